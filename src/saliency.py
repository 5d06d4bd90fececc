"""XGradCAM (Fu et al. 2020): where a classifier looks. It leaves the model exactly as it was."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import layout
from .checks import check_labels, check_pixels
from .classifier import Classifier
from .inference import evaluating

ADVICE = ("name a convolutional block of this model, see suggest_layers, or pass reshape_transform=, which makes such "
          "maps of the output")


def xgradcam(model: nn.Module, images: Tensor, layer: nn.Module | None = None, classes: Tensor | None = None) -> Tensor:
    """Return the XGradCAM heat map of each image.

    The weight of channel k is sum(g_k * a_k) / (sum(a_k) + 1e-7) over its positions, where a is the layer's output and
    g the gradient of the class's logit; the map is relu(sum_k w_k a_k), scaled to [0, 1], resized to the image
    (bilinear) and scaled again. Equal to the grad-cam library's within 1e-5.

    Args:
        images: (B, 3, H, W) float in [0, 1], on the model's device.
        layer: the module whose output is explained; the model's own `saliency_layer` if not given. Of one that is
            named here, it is tested how its output is laid out over the image: see `reader`.
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
    return heatmaps(model, images, layer, reader(model, layer, tuple(images.shape[2:])), classes)[0]


def heatmaps(model: nn.Module, images: Tensor, layer: nn.Module, read: layout.Reading, classes: Tensor | None = None
             ) -> tuple[Tensor, Tensor]:
    """`xgradcam` behind its door, where it is known how to read the layer's output; and the classes predicted (B,)."""
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
            if len(kept.get("activation", ())) != len(images):  # not called, or for some of the images alone
                raise ValueError(f"expected a (B, K, h, w) output of the layer {type(layer).__name__}, which "
                                 f"{type(getattr(model, 'model', model)).__name__} did not give; {ADVICE}")
            guesses = logits.argmax(1)
            score = logits.gather(1, (guesses if classes is None else classes)[:, None]).sum()
            gradient = None
            if score.requires_grad:
                gradient, = torch.autograd.grad(score, kept["activation"], allow_unused=True)
            if gradient is None:
                raise ValueError(f"expected a gradient from the logits back to the layer {type(layer).__name__}, got "
                                 "none: it runs under torch.no_grad, or what comes after it does, or the logits do "
                                 "not depend on it; name a layer outside of that")
    finally:
        handle.remove()
    return heat_of(read(kept["activation"].detach()), read(gradient), tuple(images.shape[2:])), guesses


def heat_of(activation: Tensor, gradient: Tensor, size: tuple[int, int]) -> Tensor:
    """The formula of `xgradcam`: (B, height, width) of a layer's maps and their gradients, both (B, K, h, w)."""
    if activation.dtype in (torch.float16, torch.bfloat16):
        activation, gradient = activation.float(), gradient.float()
    weight = (gradient * activation).sum((2, 3)) / (activation.sum((2, 3)) + 1e-7)
    maps = torch.einsum("bk,bkhw->bhw", weight, activation).relu().float()  # (B, h, w) as the layer gives them
    return unit_range(resized(unit_range(maps), *size))


def reader(model: nn.Module, layer: nn.Module, size: tuple[int, int]) -> layout.Reading:
    """Return what makes maps (B, K, h, w) of a layer's output, for images of (height, width) pixels.

    That is the model's own `reshape_transform` if it has one, of which a warning tells if its maps do not follow the
    image, and nothing for the layer that one of our models names itself; for other layers it is tested: see `layout`.

    ValueError: the output is no map of the image, or cannot be told to be one, or not of the whole image.
    """
    own = layer is getattr(model, "saliency_layer", None)
    if own and getattr(model, "reading", None):
        return model.reading
    given = getattr(model, "reshape_transform", None) if own else None
    if own and not isinstance(model, Classifier):
        return given or (lambda maps: maps)
    images = layout.probe(size, next(model.parameters()).device).requires_grad_()
    with evaluating(model), torch.enable_grad():
        made, _ = layout.outputs_of(model, {"": layer}, images)
        found = layout.reading_of(made[""], images) if made and not given else None
        read = given or (found and found[1])
        if not made or not read:
            raise ValueError(f"expected a layer that the model calls once, whose output is a map of the image, got one "
                             f"of {type(layer).__name__}, which {'does not follow it' if made else 'it does not'}; "
                             f"{ADVICE}")
        maps = read(made[""])
        if given and maps.dim() == 4 and layout.follows_quarters(maps, images)[0] <= 0.5:
            warnings.warn(f"reshape_transform: the maps that it makes of {type(layer).__name__} do not follow the "
                          f"image: are height and width, {tuple(maps.shape[2:])}, in their places?", stacklevel=2)
        if framed := layout.framing(made[""], maps, images):
            raise ValueError(f"expected a layer whose map lies over the whole image, got one of "
                             f"{type(layer).__name__}: {framed}; crop or pad the images, not within the model")
    return read


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
