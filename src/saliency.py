"""XGradCAM (Fu et al. 2020): where a classifier looks. It leaves the model exactly as it was."""

import math
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_images, check_labels, check_pixels
from .classifier import Classifier
from .inference import evaluating, pixels

DISTORTION = math.log(1.5)  # of a map's proportion, by convolutions without padding
SMALLEST = 4  # positions along each side of a map that can single out a spot
CONVOLUTIONAL = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.modules.pooling._MaxPoolNd,
                 nn.modules.pooling._AvgPoolNd, nn.GroupNorm)  # always (B, K, h, w)
ADVICE = ("name a convolutional block of this model, see suggest_layers, or pass reshape_transform=, which makes such "
          "maps of the output")


def xgradcam(model: nn.Module, images: Tensor, layer: nn.Module | None = None, classes: Tensor | None = None) -> Tensor:
    """Return the XGradCAM heat map of each image.

    The weight of channel k is sum(g_k * a_k) / (sum(a_k) + 1e-7) over its positions, where a is the layer's output and
    g the gradient of the class's logit; the map is relu(sum_k w_k a_k), scaled to [0, 1], resized to the image
    (bilinear) and scaled again. Equal to the grad-cam library's within 1e-5.

    Args:
        images: (B, 3, H, W) float in [0, 1], on the model's device.
        layer: the module whose output is explained; the model's own `saliency_layer` if not given. It gives maps
            (B, K, h, w), or what `map_transform` makes such maps of.
        classes: (B,) int64, the logit explained for each image; the predicted class if not given, as in the official
            code (the paper's formula has the label).

    Returns:
        (B, H, W) float in [0, 1]; all zero where nothing speaks for the class.

    Raises:
        TypeError, ValueError: the images, the layer or the classes are not of that kind.
    """
    check_pixels(images)
    layer = getattr(model, "saliency_layer", None) if layer is None else layer
    if layer is None:
        raise ValueError(f"{type(model).__name__} names no saliency_layer; pass layer=, such as its last convolution")
    if classes is not None:
        with evaluating(model), torch.no_grad():
            check_labels(classes, images, model(images[:1]).shape[1])
    return heatmaps(model, images, layer, classes)


def heatmaps(model: nn.Module, images: Tensor, layer: nn.Module, classes: Tensor | None = None) -> Tensor:
    """`xgradcam` behind its door: the arguments are right, but for a layer whose output is no map."""
    return unit_range(resized(unit_range(coarse_maps(model, images, layer, classes)), *images.shape[2:]))


def coarse_maps(model: nn.Module, images: Tensor, layer: nn.Module, classes: Tensor | None = None) -> Tensor:
    """The maps as the layer gives them: (B, h, w) >= 0."""
    kept = {}

    def keep(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor | None:
        if isinstance(output, Tensor):
            kept["activation"] = output.detach().requires_grad_()  # cut here: autograd stops at the layer
            return kept["activation"].clone()  # the next layer may work in place
        return None

    handle = layer.register_forward_hook(keep)
    try:
        with evaluating(model), torch.enable_grad():
            logits = model(images)
            if "activation" not in kept:
                raise ValueError(f"expected a (B, K, h, w) output of the layer {type(layer).__name__}, which "
                                 f"{type(getattr(model, 'model', model)).__name__} did not give; {ADVICE}")
            maps_of = map_transform(model, layer, kept["activation"], images)
            classes = logits.argmax(1) if classes is None else classes
            score = logits.gather(1, classes[:, None]).sum()
            gradient = None
            if score.requires_grad:
                gradient, = torch.autograd.grad(score, kept["activation"], allow_unused=True)
            if gradient is None:
                raise ValueError(f"expected a gradient from the logits back to the layer {type(layer).__name__}, got "
                                 "none: it runs under torch.no_grad, or what comes after it does, or the logits do "
                                 "not depend on it; name a layer outside of that")
    finally:
        handle.remove()
    activation, gradient = maps_of(kept["activation"].detach()), maps_of(gradient)
    if activation.dtype in (torch.float16, torch.bfloat16):
        activation, gradient = activation.float(), gradient.float()
    weight = (gradient * activation).sum((2, 3)) / (activation.sum((2, 3)) + 1e-7)
    return torch.einsum("bk,bkhw->bhw", weight, activation).relu().float()


def map_transform(model: nn.Module, layer: nn.Module, output: Tensor, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what makes maps (B, K, h, w) of a layer's output.

    That is the model's own `reshape_transform` if it has one; nothing where the output is laid out so, by the kind of
    the layer or because its last two sides are in proportion to those of the images; the known transforms of
    torchvision's and timm's ViT and Swin. Everything else is refused, since a wrong guess gives maps of no meaning.

    Raises:
        ValueError: the output is no map, or cannot be told to be one.
    """
    name, shape, given = type(layer).__name__, tuple(output.shape), getattr(model, "reshape_transform", None)
    if given is not None:
        made = given(output.detach())
        if not isinstance(made, Tensor) or made.dim() != 4 or len(made) != len(images):
            raise ValueError(f"expected reshape_transform to make (B, K, h, w) of the output {shape} of {name}, got "
                             f"{tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__}")
        return given
    inner = getattr(model, "model", model)  # of a `Classifier`
    family = type(inner)
    known = family.__module__.split(".")[0] in ("torchvision", "timm")
    if len(shape) == 3 and known and family.__name__ == "VisionTransformer":
        return lambda tokens: _grid(tokens, getattr(inner, "num_prefix_tokens", 1), images)
    if len(shape) == 4 and len(output) == len(images):
        first, last = (_distortion(sides, images) for sides in (shape[1:3], shape[2:4]))
        if isinstance(layer, CONVOLUTIONAL) or last < min(first, DISTORTION) or (
                last == first and not any(isinstance(part, nn.LayerNorm) for part in model.modules())):
            return lambda maps: maps  # K = h = w can be read in two ways where there is a LayerNorm, as in Swin
        if first <= min(last, DISTORTION) and known and "Swin" in family.__name__:
            return lambda maps: maps.permute(0, 3, 1, 2)
        if first < last:
            raise ValueError(f"expected a (B, K, h, w) output of the layer {name}, got {shape}, which looks like "
                             "(B, h, w, K); pass reshape_transform=lambda maps: maps.permute(0, 3, 1, 2) if it is")
    raise ValueError(f"expected a (B, K, h, w) output of the layer {name}, got {shape} for images "
                     f"{tuple(images.shape)}; {ADVICE}")


def _distortion(sides: tuple[int, int], images: Tensor) -> float:
    """How far a map's sides are from the proportion of the images; infinite where they are larger than those."""
    height, width = images.shape[2:]
    if sides[0] > height + 4 or sides[1] > width + 4 or min(sides) == 0:  # a padded convolution may add a few
        return math.inf
    return abs(math.log(sides[0] / sides[1] * width / height))


def _grid(tokens: Tensor, prefix: int, images: Tensor) -> Tensor:
    """(B, prefix + h w, K) -> (B, K, h, w), h and w in proportion to the images."""
    patches = tokens[:, prefix:]
    height, width = images.shape[2:]
    rows = round(math.sqrt(patches.shape[1] * height / width))
    if rows == 0 or patches.shape[1] % rows:
        raise ValueError(f"expected tokens of a grid in proportion to images of {height} x {width} pixels, got "
                         f"{patches.shape[1]}; pass reshape_transform=")
    return patches.transpose(1, 2).unflatten(2, (rows, -1))


def suggest_layers(model: nn.Module, images: Tensor) -> list[tuple[str, tuple[int, int]]]:
    """Return layers that can be explained, with the size (h, w) of their maps: one of each size, the coarsest first.
    The first is a good choice.

    Those count whose map has at least 4x4 positions, whose output the logits depend on, and which are called once. Of
    the later half of those of one size, the last of the outermost modules is named: a block rather than a part of one.

    Args:
        model: a classifier of yours, or a `Classifier`.
        images: (N, 3, H, W) uint8; two of them are looked at.

    Raises:
        TypeError, ValueError: the model or the images are not of that kind.
    """
    check_images(images)
    if not isinstance(model, Classifier):
        model = Classifier(model, None)
    device = next((weight.device for weight in model.model.parameters()), images.device)
    seen, calls = {}, Counter()

    def note(name: str, output: object) -> None:
        calls[name] += 1
        if isinstance(output, Tensor) and output.dim() in (3, 4) and output.requires_grad:
            seen.pop(name, None)
            seen[name] = output

    handles = [part.register_forward_hook(lambda _part, _inputs, output, name=name: note(name, output))
               for name, part in model.model.named_modules() if name]
    inputs = pixels(images[:2].to(device)).requires_grad_()
    try:
        with evaluating(model), torch.enable_grad():
            logits = model(inputs)
            gradients = [None] * len(seen)
            if logits.requires_grad and seen:
                gradients = torch.autograd.grad(logits.amax(1).sum(), list(seen.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[tuple[int, int], list[str]] = {}
    for (name, output), gradient in zip(seen.items(), gradients, strict=True):
        if calls[name] > 1 or gradient is None:
            continue
        try:
            maps = map_transform(model, model.model.get_submodule(name), output, inputs)(gradient)
        except ValueError:
            continue
        size = tuple(maps.shape[2:])
        if min(size) >= SMALLEST and maps.shape[1] != logits.shape[1] and maps.any():
            found.setdefault(size, []).append(name)
    late = {size: names[len(names) // 2:][::-1] for size, names in found.items()}
    return [(min(late[size], key=lambda name: name.count(".")), size) for size in sorted(late, key=math.prod)]


def resized(maps: Tensor, height: int, width: int) -> Tensor:
    """Resize maps (B, h, w) to (B, height, width), bilinear, by two products: as F.interpolate within 1e-6, and faster.

    On CUDA it also stays one formula where torch must be deterministic, which F.interpolate does not.
    """
    eyes = (torch.eye(size, dtype=maps.dtype, device=maps.device)[None] for size in maps.shape[1:])
    rows, columns = (F.interpolate(eye, size, mode="linear")[0]  # (old, new)
                     for eye, size in zip(eyes, (height, width), strict=True))
    return rows.T @ maps @ columns


def unit_range(maps: Tensor) -> Tensor:
    """Scale each map (B, H, W) to [0, 1] by its own minimum and maximum; a constant map becomes zero."""
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (maps.amax((1, 2), keepdim=True) + 1e-7)
