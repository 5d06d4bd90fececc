"""What the method accepts: each check names what was wrong and what would be right."""

import torch
from torch import Tensor

from src.masks import Masks


def check_images(images: Tensor) -> None:
    """Stored images are (N, 3, H, W) uint8, at least one."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise TypeError(f"images are {_kind(images)}; a torch.uint8 tensor (N, 3, H, W) is wanted; multiply floats in "
                        "[0, 1] by 255, round, and convert")
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images are {tuple(images.shape)}; (N, 3, H, W) is wanted"
                         + ("; repeat grey images to three channels" if 1 in images.shape[1:2] else ""))
    if len(images) == 0:
        raise ValueError("the data set is empty; at least one image is wanted")


def check_pixels(images: Tensor) -> None:
    """What a model sees is (B, 3, H, W), float in [0, 1]: models normalise by themselves."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(f"images are {_kind(images)}; floats in [0, 1] are wanted (pixels() makes them from uint8)")
    if images.dim() != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"images are {tuple(images.shape)}; (B, 3, H, W) with B >= 1 is wanted")
    low, high = torch.stack((images.detach().amin(), images.detach().amax())).tolist()  # aminmax would copy them
    if not (low >= 0 and high <= 1):  # so worded, NaN fails too
        raise ValueError(f"images lie in [{low:g}, {high:g}]; [0, 1] is wanted, before any normalisation")


def check_masks(masks: Masks | Tensor | None, images: Tensor) -> None:
    """Masks are (N, H, W) bool, one for each image, True = hidden; None is no masks."""
    wanted = f"torch.bool {(len(images), *images.shape[2:])}"
    if masks is not None and _kind(masks) != wanted:
        raise ValueError(f"masks are {_kind(masks)}; {wanted} is wanted, one for each image, True = hidden")


def check_labels(labels: Tensor, images: Tensor, classes: int) -> None:
    """Labels are (N,) int64, one for each image, in 0..classes - 1."""
    wanted = f"torch.int64 {(len(images),)}"
    if _kind(labels) != wanted:
        raise ValueError(f"labels are {_kind(labels)}; {wanted} is wanted, one for each image")
    low, high = torch.stack(labels.aminmax()).tolist()  # the host waits once
    if low < 0 or high >= classes:
        raise ValueError(f"labels lie in {low}..{high}; the model has {classes} classes, so 0..{classes - 1} is wanted")


def _kind(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, (Tensor, Masks)) else type(value).__name__


def check_fields(config: object, *rules: tuple[str, bool, str]) -> None:
    """Raise ValueError for the first field that is not valid, naming it and what would be: (field, good, what is)."""
    for name, good, valid in rules:
        if not good:
            raise ValueError(f"{type(config).__name__}: {name}={getattr(config, name)!r}; it is {valid}")
