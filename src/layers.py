"""Which layers of a classifier can be explained, and which of them is best: by tests, not by their names."""

import math

import torch
from torch import Tensor, nn

from . import layout
from .checks import check_images
from .classifier import Classifier
from .holes import GROW, grown
from .inference import evaluating, infer, pixels
from .masking import hottest
from .masks import Masks
from .saliency import heatmaps

SMALLEST = 4  # positions along each side of a map that can single out a spot
TRIES = 3  # layers of one shape that are tested
LOOKED_AT = 64  # images


def suggest_layers(model: nn.Module, images: Tensor) -> list[tuple[str, tuple[int, int]]]:
    """Return layers that can be explained, with the size (h, w) of their maps: one of each size, the best first.

    Those count whose map has at least 4x4 positions and follows the image (see `layout`), and on whose output the
    logits depend. Of those of one size, late ones are preferred, of these such as end in a ReLU, since XGradCAM divides
    by the sums of channels, and then the outermost: a block rather than a part of one. Best is the layer whose masks
    hit what the model leans on: see `worth`.

    Args:
        model: a classifier of yours, or a `Classifier`.
        images: (N, 3, H, W) uint8, such as the training images, of which some are looked at.

    Raises:
        TypeError, ValueError: the model or the images are not of that kind.
    """
    check_images(images)
    if not isinstance(model, Classifier):
        model = Classifier(model, None)
    device = next((weight.device for weight in model.model.parameters()), images.device)
    inputs = layout.probe(tuple(images.shape[2:]), device).requires_grad_()
    layers = {name: part for name, part in model.model.named_modules() if name and not isinstance(part, nn.Identity)}
    best: dict[tuple[int, int], tuple[tuple, str, layout.Reading]] = {}
    with evaluating(model), torch.enable_grad():
        try:
            outputs, logits = layout.outputs_of(model, layers, inputs)
        except Exception as error:  # a model can fail in any way
            raise ValueError(f"the forward pass on images {tuple(inputs.shape)}: {type(error).__name__}: {error}"
                             ) from error
        gradients = dict.fromkeys(outputs)
        if logits.requires_grad and outputs:
            gradients = dict(zip(outputs, torch.autograd.grad(logits.amax(1).sum(), list(outputs.values()),
                                                              retain_graph=True, allow_unused=True), strict=True))
        shapes: dict[tuple[int, ...], list[str]] = {}
        for name, output in outputs.items():
            gradient = gradients[name]
            if gradient is not None and gradient[:, max(layout.PREFIXES) if gradient.dim() == 3 else 0:].any():
                shape = tuple(output.shape)
                shapes[shape] = [*shapes.pop(shape, []), name]  # late ones come last
        early = list(outputs)[:len(outputs) // 2]
        for names in shapes.values():
            late = sorted(names[len(names) // 2:][::-1], key=lambda name: (bool((outputs[name] < 0).any()),
                                                                          name.count(".")))
            for name in late[:TRIES]:
                found = layout.reading_of(outputs[name], inputs)
                if found is None or not (maps := found[1](outputs[name]))[:, :, [0, -1]].any(2).any():
                    continue  # no map of the image, or one whose border is always zero: padding
                size = tuple(maps.shape[2:])
                rank = (bool((maps < 0).any()), name in early, name.count("."))
                if min(size) >= SMALLEST and maps.shape[1] != logits.shape[1] and rank <= best.get(size, (rank,))[0]:
                    best[size] = (rank, name, found[1])
                break
    some = images[::max(1, len(images) // LOOKED_AT)].to(device)
    worths = {size: worth(model, some, name, read) for size, (_, name, read) in best.items()}
    return [(best[size][1], size) for size in sorted(best, key=lambda size: (-worths[size], math.prod(size)))]


def worth(model: Classifier, images: Tensor, layer: str, read: layout.Reading, k: float = 2.0) -> float:
    """How many predictions change when what a layer's maps show as hottest is hidden, for each share of pixels hidden.

    Masks that hit what a model leans on cost it more than as large masks elsewhere. They are grown and filled smoothly,
    so that neither a rest of it nor the hole speaks. images: (N, 3, H, W) uint8 on the model's device.
    """
    heat, guesses = heatmaps(model, pixels(images), model.model.get_submodule(layer), read)
    masks = grown(Masks.of(hottest(heat, k)), GROW)
    changed = infer(model, images, masks, fill="smooth").argmax(1) != guesses
    return changed.double().mean().item() / max(masks.share(), 0.01)  # of a few pixels, one image would decide
