"""What the method accepts: each check names what was expected and what came. Public doors check; the core does not."""

import math

import torch
from torch import Tensor

from .masks import Masks

PRECISIONS = ("fp32", "bf16")


def check_images(images: Tensor) -> None:
    """Stored images are (N, 3, H, W) uint8, at least one."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise TypeError(f"expected images as a torch.uint8 tensor (N, 3, H, W), got {_kind(images)}")
    if images.dim() != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"expected images (N, 3, H, W) with N >= 1, got {tuple(images.shape)}")


def check_pixels(images: Tensor) -> None:
    """What a model sees is (B, 3, H, W), float in [0, 1]: models normalise by themselves."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(f"expected images as floats in [0, 1], got {_kind(images)}; pixels() makes them from uint8")
    if images.dim() != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"expected images (B, 3, H, W) with B >= 1, got {tuple(images.shape)}")
    low, high = torch.stack((images.detach().amin(), images.detach().amax())).tolist()  # aminmax would copy them
    if not (low >= 0 and high <= 1):  # so worded, NaN fails too
        raise ValueError(f"expected images in [0, 1], before any normalisation, got [{low:g}, {high:g}]")


def check_masks(masks: Masks | Tensor | None, images: Tensor) -> None:
    """Masks are (N, H, W) bool, one for each image, True = hidden; None is no masks."""
    expected = f"torch.bool {(len(images), *images.shape[2:])}"
    if masks is not None and _kind(masks) != expected:
        raise ValueError(f"expected masks {expected}, one for each image, True = hidden, got {_kind(masks)}")


def check_labels(labels: Tensor, images: Tensor, classes: int, whose: str = "the model has") -> None:
    """Labels are (N,) int64, one for each image, in 0..classes - 1."""
    expected = f"torch.int64 {(len(images),)}"
    if _kind(labels) != expected:
        raise ValueError(f"expected labels {expected}, one for each image, got {_kind(labels)}")
    low, high = torch.stack(labels.aminmax()).tolist()  # the host waits once
    if low < 0 or high >= classes:
        raise ValueError(f"expected labels in 0..{classes - 1}, since {whose} {classes} classes, got {low}..{high}")


def check_number(name: str, value: float, good: bool, valid: str) -> None:
    """A setting is a finite number, and good."""
    if not (good and math.isfinite(value)):
        raise ValueError(f"expected {name} to be {valid}, got {value!r}")


def check_count(name: str, value: float) -> None:
    """A setting is a whole number of at least 1."""
    check_number(name, value, value >= 1 and value % 1 == 0, "a whole number of at least 1")


def _kind(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, (Tensor, Masks)) else type(value).__name__
