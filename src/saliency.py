"""XGradCAM (Fu et al. 2020): where a classifier looks. It leaves the model exactly as it was."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_labels, check_pixels
from .inference import evaluating


def xgradcam(model: nn.Module, images: Tensor, layer: nn.Module | None = None, classes: Tensor | None = None) -> Tensor:
    """Return the XGradCAM heat map of each image.

    The weight of channel k is sum(g_k * a_k) / (sum(a_k) + 1e-7) over its positions, where a is the layer's output and
    g the gradient of the class's logit; the map is relu(sum_k w_k a_k), scaled to [0, 1], resized to the image
    (bilinear) and scaled again. Equal to the grad-cam library's within 1e-5.

    Args:
        images: (B, 3, H, W) float in [0, 1], on the model's device.
        layer: the module whose output (B, K, h, w) is explained; the model's own `saliency_layer` if not given.
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
    kept = {}

    def keep(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        kept["activation"] = output.detach().requires_grad_()  # cut here: autograd stops at the layer
        return kept["activation"].clone()  # the next layer may work in place

    handle = layer.register_forward_hook(keep)
    try:
        with evaluating(model), torch.enable_grad():
            logits = model(images)
            if getattr(kept.get("activation"), "ndim", 0) != 4:
                raise ValueError(f"expected a (B, K, h, w) output of the layer {type(layer).__name__}, which "
                                 f"{type(model).__name__} did not give; pass a convolutional layer of this model")
            classes = logits.argmax(1) if classes is None else classes
            score = logits.gather(1, classes[:, None]).sum()
            gradient, = torch.autograd.grad(score, kept["activation"])
    finally:
        handle.remove()
    activation = kept["activation"].detach()
    weight = (gradient * activation).sum((2, 3)) / (activation.sum((2, 3)) + 1e-7)
    coarse = torch.einsum("bk,bkhw->bhw", weight, activation).relu()
    return unit_range(resized(unit_range(coarse), *images.shape[2:]))


def resized(maps: Tensor, height: int, width: int) -> Tensor:
    """Resize maps (B, h, w) to (B, height, width), bilinear, by two products: as F.interpolate within 1e-6, and faster.

    On CUDA it also stays one formula where torch must be deterministic, which F.interpolate does not.
    """
    rows, columns = (F.interpolate(torch.eye(old, device=maps.device)[None], new, mode="linear")[0]  # (old, new)
                     for old, new in zip(maps.shape[1:], (height, width), strict=True))
    return rows.T @ maps @ columns


def unit_range(maps: Tensor) -> Tensor:
    """Scale each map (B, H, W) to [0, 1] by its own minimum and maximum; a constant map becomes zero."""
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (maps.amax((1, 2), keepdim=True) + 1e-7)
