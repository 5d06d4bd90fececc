"""How a picture becomes stored pixels."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

LONGEST = 100  # times the shorter side


@dataclass(frozen=True)
class View:
    """The shorter side scaled to `resize` pixels (what just fills the frame, if not given), then the middle cut out."""

    height: int
    width: int
    resize: int | None = None


def fit(image: Image.Image | Tensor, view: View) -> Tensor:
    """Return a picture as seen by a view: (3, height, width) uint8. Grey, CMYK and palettes become RGB.

    image: a PIL image, or (1 or 3, H, W) uint8 or float in [0, 1]. One that `resize` leaves too small for the frame is
    padded with black.
    """
    if isinstance(image, Tensor):
        if image.dim() != 3 or image.shape[0] not in (1, 3):
            raise ValueError(f"an image is {tuple(image.shape)}; (3, H, W) is wanted")
        if image.is_floating_point():
            if not (image.min() >= 0 and image.max() <= 1):
                raise ValueError("an image leaves [0, 1]; leave normalisation to the model")
            image = (image * 255).round().to(torch.uint8)
        if image.dtype != torch.uint8:
            raise TypeError(f"an image is {image.dtype}; torch.uint8, or floats in [0, 1], are wanted")
        image = image.expand(3, -1, -1)
    elif isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):  # Pillow would clip instead of scaling
            raise ValueError(f"its pixels are of mode {image.mode}; 8 bits a channel are wanted")
        image.info.pop("transparency", None)  # of a palette; Pillow would warn that it is dropped
        image = pil_to_tensor(image.convert("RGB"))
    else:
        raise TypeError(f"an image is a {type(image).__name__}; a PIL image or a tensor (3, H, W) is wanted")
    height, width = image.shape[1:]
    if max(height, width) > LONGEST * min(height, width):  # scaled, it could fill the memory
        raise ValueError(f"it is {height} x {width} pixels; no side may be over {LONGEST} times the other")
    shorter = view.resize or math.ceil(min(height, width) * max(view.height / height, view.width / width))
    return center_crop(resize(image, shorter, antialias=True), [view.height, view.width])


def decode(path: Path, view: View) -> Tensor:
    """Read a file as seen by a view; ValueError names one that is no readable image, or too large for one."""
    try:
        with Image.open(path) as image:
            return fit(image, view)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path} is not a readable image ({error}); replace or remove it") from error
