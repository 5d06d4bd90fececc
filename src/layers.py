"""Which layers of a classifier can be explained, and which of them is best: by tests, not by their names."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import layout
from .checks import check_images
from .classifier import Classifier, copied
from .holes import COVERED, Shown, pixels
from .inference import evaluating, infer
from .masking import hottest
from .saliency import heat_of

SMALLEST = 4  # positions along each side of a map that can single out a spot
TESTED, TRIED = 3, 12  # layers with outputs alike; and those whose masks are applied, shared among the sizes of maps
LOOKED_AT, AT_ONCE = 64, 8  # images


@torch.inference_mode(False)
def suggest_layers(model: nn.Module, images: Tensor, mean: Sequence[float] | None = None,
                   std: Sequence[float] | None = None) -> list[tuple[str, tuple[int, int]]]:
    """Return layers that can be explained, with the size (h, w) of their maps: one of each size, the best first.

    Those count whose map has at least 4x4 positions and follows the image (see `layout`), and on whose output the
    logits depend. Best is the layer whose masks hit what the model leans on: see `worth`. Among those of one size that
    are about as good, late ones are preferred, of these such as end in a ReLU, since XGradCAM divides by the sums of
    channels, and then the outermost: a block rather than a part of one.

    Args:
        model: a classifier of yours, or a `Classifier`.
        images: (N, 3, H, W) uint8, such as the training images, of which some are looked at.
        mean, std: of the normalisation that the model expects, as of `masktune`.

    Raises:
        TypeError, ValueError: the model or the images are not of that kind, or there is no such layer.
    """
    check_images(images)
    ready = isinstance(model, Classifier) and mean is std is None
    model = copied(model if ready else Classifier(model, None, mean, std))
    device = next((weight.device for weight in model.model.parameters()), images.device)
    layers = {name: part for name, part in model.model.named_modules() if name and not isinstance(part, nn.Identity)}
    with evaluating(model), torch.enable_grad():
        inputs = layout.probe(tuple(images.shape[2:]), device).requires_grad_()
        try:
            model(inputs.detach())  # it finds out how many channels the model takes, before calls are counted
            outputs, logits = layout.outputs_of(model, layers, inputs)
        except Exception as error:  # a model can fail in any way
            raise ValueError(f"the forward pass on images {tuple(inputs.shape)}: {type(error).__name__}: {error}"
                             ) from error

        def map_of(name: str) -> tuple[tuple[int, int], layout.Reading] | None:
            """The size of a layer's map, and how to read it; None: it is none, too coarse, or has a border of zeros."""
            if (found := layout.reading_of(outputs[name], inputs)) is None:
                return None
            maps = found[1](outputs[name])
            good = maps.shape[1] != logits.shape[1] and not layout.framing(outputs[name], maps, inputs)  # of pixels
            return (tuple(maps.shape[2:]), found[1]) if good and min(maps.shape[2:]) >= SMALLEST else None

        ranks = _ranks(outputs, logits)
        tested: dict[torch.Size, list] = {}  # of outputs alike, until one is a map: a test takes eight gradients
        sizes: dict[tuple[int, int], dict[str, layout.Reading]] = {}
        for name in sorted(ranks, key=ranks.get):
            shape = outputs[name].shape
            alike = tested.setdefault(shape, [])
            if len(alike) < TESTED and not any(alike) and len(sizes.get(tuple(shape[2:]), ())) < TRIED:
                alike.append(map_of(name))
            if found := next(filter(None, alike), None):
                sizes.setdefault(found[0], {})[name] = found[1]
        each, some = max(1, TRIED // max(1, len(sizes))), images[::max(1, len(images) // LOOKED_AT)].to(device)
        chosen = {size: names[:each // 2] + names[each // 2::math.ceil(2 * len(names) / each)]
                  for size, names in ((size, list(found)) for size, found in sizes.items())}
        wanted = {name: sizes[size][name] for size, names in chosen.items() for name in names}
        worths = worth(model, some, wanted) if wanted else {}
        best = {}
        for size, names in chosen.items():
            names = [name for name in names if name in worths]
            least = 2 / 3 * max(map(worths.get, names), default=0)  # what lies above is no difference: preferred goes
            if name := next(filter(map_of, sorted(names, key=lambda name: worths[name] < least)), None):
                best[name] = size
    if not best:
        why = ("none has a map of 4x4 positions or more that lies over the image" if ranks else "no gradient reaches "
               "one: it runs under torch.no_grad, is exported, or checkpoints activations with use_reentrant=True")
        raise ValueError(f"expected a layer that can be explained, got {type(model.model).__name__}, of which {why}; "
                         "larger images have larger maps; see reshape_transform=")
    return sorted(best.items(), key=lambda found: (-worths[found[0]], math.prod(found[1])))


def _ranks(outputs: dict[str, Tensor], logits: Tensor) -> dict[str, tuple]:
    """Of the layers on whose output the logits depend: which is preferred, least first, where all else is equal."""
    if not (logits.requires_grad and outputs):
        return {}
    gradients = torch.autograd.grad(logits.amax(1).sum(), list(outputs.values()), retain_graph=True, allow_unused=True)
    used = [name for name, gradient in zip(outputs, gradients, strict=True) if gradient is not None
            and (gradient[:, max(layout.PREFIXES):] if gradient.dim() == 3 else gradient).any()]
    shapes: dict[torch.Size, list[str]] = {}
    for name in used:
        shapes.setdefault(outputs[name].shape, []).append(name)
    return {name: (i < len(used) // 2, shapes[outputs[name].shape].index(name) < len(shapes[outputs[name].shape]) // 2,
                   bool((outputs[name] < 0).any()), name.count("."), -i) for i, name in enumerate(used)}


def worth(model: Classifier, images: Tensor, layers: dict[str, layout.Reading], k: float = 2.0) -> dict[str, float]:
    """How many predictions change when what a layer's maps show as hottest is hidden, for each share of pixels hidden.

    Masks that hit what a model leans on cost it more than as large masks elsewhere. They are grown and filled smoothly,
    so that neither a rest of it nor the hole speaks. images: (N, 3, H, W) uint8 on the model's device; layers: how to
    read the output of each.
    """
    hidden: dict[str, list[Tensor]] = {name: [] for name in layers}
    guesses, parts = [], {name: model.model.get_submodule(name) for name in layers}
    for few in images.split(AT_ONCE):
        outputs, logits = layout.outputs_of(model, parts, pixels(few).requires_grad_())
        guesses.append(logits.argmax(1))
        parts = {name: parts[name] for name in outputs}  # without those that a model calls for some images alone
        gradients = outputs and torch.autograd.grad(logits.amax(1).sum(), [*outputs.values()], materialize_grads=True)
        for (name, output), gradient in zip(outputs.items(), gradients, strict=True):
            heat = heat_of(layers[name](output.detach()), layers[name](gradient), images.shape[2:])
            hidden[name].append(hottest(heat, k))
    found = {}
    for name in parts:
        shown = Shown(images, torch.cat(hidden[name]), COVERED)
        changed = infer(model, shown).argmax(1) != torch.cat(guesses)
        # of masks of a few pixels, one prediction would decide
        found[name] = changed.double().mean().item() / max(shown.masks.share(), 0.01)
    return found
