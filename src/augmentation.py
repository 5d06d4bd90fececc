"""The training view of images: a random crop, resized; or a turn and a shift; perhaps mirrored."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .seeding import generator

ATTEMPTS = 10  # to find a crop that fits; torchvision's


@dataclass(frozen=True)
class Augmentation:
    """What may happen to an image: as torchvision's RandomResizedCrop, or RandomAffine, with flips.

    `draw` decides for a whole epoch, and calling it does so to a batch, on its device. Both are pure: what becomes of
    image i depends on (seed, epoch, i) alone.
    """

    side: int | None = 224  # pixels, of the square that the model sees; None: no crop, a turn and a shift
    scale: tuple[float, float] = (0.7, 1.0)  # share of the area that the crop covers
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop
    flip: float = 0.5  # probability of a horizontal flip
    degrees: float = 0.0  # without a crop: the angle about the middle is drawn from ± degrees
    shift: float = 0.0  # and a shift from ± shift pixels on both axes, then rounded

    def __post_init__(self) -> None:
        if self.side is not None and (self.degrees or self.shift):
            raise ValueError(f"Augmentation: expected a crop, or side=None for degrees and shift, got {self}")

    def draw(self, n: int, height: int, width: int, seed: int, epoch: int) -> Tensor:
        """Return what happens to each of n images of height x width pixels in an epoch: (n, 6) float64, on the CPU.

        The columns: left, top, width and height of the view, whole pixels; the angle in radians, clockwise; 1 where the
        image is flipped, else 0. Row i is the same whatever n is. A crop is the first of ten attempts that fits into
        the image, else the largest central one of an allowed ratio.
        """
        # in float64, so that another exp, of another machine or of the last few rows, does not round to other pixels
        columns = 4 if self.side is None else 2 * ATTEMPTS + 6  # three to spare: so the rows of results/ were drawn
        draw = generator(seed, "augmentation", epoch)
        uniform = torch.rand(n, columns, generator=draw, device="cpu", dtype=torch.float64)
        image = torch.tensor([width, height], dtype=torch.float64)
        if self.side is None:
            angle = _between(uniform[:, :1], -math.radians(self.degrees), math.radians(self.degrees)).float()
            corner = -_between(uniform[:, 1:3], -self.shift, self.shift).round()
            return torch.cat([corner, image.expand(n, 2), angle, uniform[:, 3:] < self.flip], 1)
        area, aspect, place, flip, _ = uniform.split((ATTEMPTS, ATTEMPTS, 2, 1, 3), dim=1)
        area = height * width * _between(area, *self.scale)
        aspect = _between(aspect, *map(math.log, self.ratio)).exp()
        sizes = torch.stack([(area * aspect).sqrt().round(), (area / aspect).sqrt().round()], 2)  # (n, attempts, 2)
        fits = ((sizes >= 1) & (sizes <= image)).all(2)
        found = fits.any(1, keepdim=True)
        first = fits.int().argmax(1)  # of several maxima it is the first
        central = image.new_tensor([min(width, max(1, round(height * self.ratio[1]))),
                                    min(height, max(1, round(width / self.ratio[0])))])
        size = torch.where(found, sizes[torch.arange(n), first], central)
        corner = torch.where(found, place * (image - size + 1), (image - size) / 2).floor()
        return torch.cat([corner, size, torch.zeros(n, 1), flip < self.flip], 1)

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Return the images as drawn: (B, 3, H, W) float in [0, 1] -> (B, 3, side, side), or of the same size.

        drawn: (B, 6), the rows of `draw` for these images, on their device; ValueError: it is not. A crop is resized
        bilinearly between its own pixels, without antialiasing, which changes nothing where it is enlarged. A turn
        moves pixels without interpolation; those from outside are black.
        """
        if drawn.shape != (len(images), 6):
            raise ValueError(f"expected drawn to be {(len(images), 6)}, a row of draw() for each image, got "
                             f"{tuple(drawn.shape)}")
        height, width = images.shape[2:]
        left, top, across, down, angle, flipped = drawn[:, :, None, None].double().unbind(1)  # (B, 1, 1) each
        columns, rows = (torch.arange(self.side or size, device=drawn.device, dtype=torch.float64) + 0.5
                         for size in (width, height))
        x = left + columns * across / len(columns) - 0.5  # (B, 1, side): where the view looks, in pixels
        y = top + rows[:, None] * down / len(rows) - 0.5  # (B, side, 1)
        if self.side is None:
            x, y = x - (width - 1) / 2, y - (height - 1) / 2
            x, y = angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x  # (B, H, W)
            x, y = (x + (width - 1) / 2).round(), (y + (height - 1) / 2).round()
            x = torch.where(flipped > 0, width - 1 - x, x)
        else:
            x, y = x.clamp(left, left + across - 1), y.clamp(top, top + down - 1)
            x = torch.where(flipped > 0, x.flip(2), x)
        grid = torch.stack(torch.broadcast_tensors((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), 3)
        mode, padding = ("nearest", "zeros") if self.side is None else ("bilinear", "border")
        views = F.grid_sample(images, grid.to(images.dtype), mode, padding, align_corners=False).clamp_(max=1)
        if images.is_contiguous(memory_format=torch.channels_last):
            views = views.contiguous(memory_format=torch.channels_last)
        return views


def _between(uniform: Tensor, low: float, high: float) -> Tensor:
    return low + uniform * (high - low)
