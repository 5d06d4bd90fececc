"""The training view of photographs: a random crop, resized, perhaps mirrored, in slightly other colours."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_fields
from .seeding import generator

ATTEMPTS = 10  # to find a crop that fits; torchvision's
GREY = (0.2989, 0.587, 0.114)  # weights of R, G, B; torchvision's


@dataclass(frozen=True)
class Augmentation:
    """What may happen to an image: as torchvision's RandomResizedCrop, RandomHorizontalFlip and ColorJitter do it.

    `draw` decides for a whole epoch, and calling it does so to a batch, on its device. Both are pure: what becomes of
    image i depends on (seed, epoch, i) alone, so an interrupted epoch goes on as if it had not been.

    Raises:
        ValueError: a field is not valid.
    """

    side: int = 224  # pixels, of the square that the model sees
    scale: tuple[float, float] = (0.7, 1.0)  # share of the area that the crop covers
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop
    flip: float = 0.5  # probability of a horizontal flip
    jitter: float = 0.0  # brightness, contrast and saturation change, each by a factor in 1 ± jitter

    def __post_init__(self) -> None:
        check_fields(
            self, ("side", self.side >= 1 and self.side % 1 == 0, "a whole number of pixels, at least 1"),
            ("scale", 0 < self.scale[0] <= self.scale[1] <= 1, "(smallest, largest) share of the area, in (0, 1]"),
            ("ratio", 0 < self.ratio[0] <= self.ratio[1] < math.inf, "(smallest, largest), positive and finite"),
            ("flip", 0 <= self.flip <= 1, "a probability, in [0, 1]"),
            ("jitter", 0 <= self.jitter < 1, "in [0, 1)"))

    def draw(self, n: int, height: int, width: int, seed: int, epoch: int) -> Tensor:
        """Return what happens to each of n images of height x width pixels in an epoch: (n, 8) float32, on the CPU.

        The columns: the crop's left, top, width and height, whole pixels; 1 where the image is flipped, else 0; the
        factors of brightness, contrast and saturation. Row i is the same whatever n is. A crop is the first of ten
        attempts that fits into the image, else the largest central one of a ratio that is allowed.
        """
        # in float64, so that another exp, of another machine or of the last few rows, does not round to other pixels
        uniform = torch.rand(n, 2 * ATTEMPTS + 6, generator=generator(seed, "augmentation", epoch), dtype=torch.float64)
        area, aspect, corner, flip, colour = uniform.split((ATTEMPTS, ATTEMPTS, 2, 1, 3), dim=1)
        area = height * width * _between(area, *self.scale)
        aspect = _between(aspect, *map(math.log, self.ratio)).exp()
        sizes = torch.stack([(area * aspect).sqrt().round(), (area / aspect).sqrt().round()], 2)  # (n, attempts, 2)
        image = sizes.new_tensor([width, height])
        fallback = sizes.new_tensor([min(width, max(1, round(height * self.ratio[1]))),
                                     min(height, max(1, round(width / self.ratio[0])))])
        fits = ((sizes >= 1) & (sizes <= image)).all(2)
        first = fits.int().argmax(1)  # of several maxima it is the first
        found = fits.any(1, keepdim=True)
        size = torch.where(found, sizes[torch.arange(n), first], fallback)
        corner = torch.where(found, corner * (image - size + 1), (image - size) / 2).floor()
        factors = _between(colour, 1 - self.jitter, 1 + self.jitter)
        return torch.cat([corner, size, flip < self.flip, factors], 1).float()

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Return the images as drawn: (B, 3, H, W) float in [0, 1] -> (B, 3, side, side), likewise.

        drawn: (B, 8), the rows of `draw` for these images, on their device. channels_last stays channels_last. The
        resizing is bilinear between the crop's own pixels, without antialiasing: that changes nothing where the crop is
        enlarged, and crops are hardly ever larger than `side` here. The colours change in a fixed order, brightness,
        contrast, saturation; torchvision's ColorJitter shuffles it.

        Raises:
            ValueError: `drawn` is not one row for each image.
        """
        if drawn.shape != (len(images), 8):
            raise ValueError(f"expected drawn to be {(len(images), 8)}, a row of draw() for each image, got "
                             f"{tuple(drawn.shape)}")
        left, top, width, height, flipped = drawn[:, :5, None].double().unbind(1)
        x = self._line(left, width, images.shape[3])
        y = self._line(top, height, images.shape[2])
        x = torch.where(flipped > 0, x.flip(1), x)
        grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), 3).to(images.dtype)
        views = F.grid_sample(images, grid, padding_mode="border", align_corners=False).clamp_(max=1)  # 1 + rounding
        if images.is_contiguous(memory_format=torch.channels_last):
            views = views.contiguous(memory_format=torch.channels_last)
        return _recolour_(views, *drawn[:, 5:, None, None, None].unbind(1)) if self.jitter else views

    def _line(self, first: Tensor, length: Tensor, size: int) -> Tensor:
        """Where along an axis of `size` pixels the view looks, in grid_sample's units: (B, 1), (B, 1) -> (B, side)."""
        centres = torch.arange(self.side, device=first.device, dtype=first.dtype) + 0.5
        pixel = (first + centres * length / self.side - 0.5).clamp(first, first + length - 1)
        return (2 * pixel + 1) / size - 1  # -1 and 1 are the image's edges, not the centres of its outer pixels


@dataclass(frozen=True)
class Affine:
    """A flip, a turn and a shift of small images: torchvision's RandomHorizontalFlip and RandomAffine.

    As there, pixels are moved without interpolation, and those from outside are black. `draw` and the call are pure, as
    those of `Augmentation`.

    Raises:
        ValueError: a field is not valid.
    """

    degrees: float = 0.0  # the angle is drawn from ± degrees
    shift: float = 0.0  # pixels; drawn from ± shift on both axes, then rounded. 4.5: RandomCrop(padding=4)
    flip: float = 0.0  # probability of a horizontal flip

    def __post_init__(self) -> None:
        check_fields(self, ("degrees", 0 <= self.degrees <= 180, "in [0, 180]"),
                     ("shift", 0 <= self.shift < math.inf, "a number of pixels, not negative"),
                     ("flip", 0 <= self.flip <= 1, "a probability, in [0, 1]"))

    def draw(self, n: int, height: int, width: int, seed: int, epoch: int) -> Tensor:
        """Return what happens to each of n images in an epoch: (n, 4) float32, on the CPU.

        The columns: the angle in radians, clockwise; the shift to the right and downwards, whole pixels; 1 where the
        image is flipped, else 0. Row i is the same whatever n is, and of whatever size images are.
        """
        uniform = torch.rand(n, 4, generator=generator(seed, "augmentation", epoch), dtype=torch.float64)
        angle = _between(uniform[:, :1], -math.radians(self.degrees), math.radians(self.degrees))
        shift = _between(uniform[:, 1:3], -self.shift, self.shift).round()
        return torch.cat([angle, shift, uniform[:, 3:] < self.flip], 1).float()

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Return the images as drawn, flipped, then turned about the middle, then shifted: (B, 3, H, W), likewise.

        drawn: (B, 4), the rows of `draw` for these images, on their device. The result is channels_last.

        Raises:
            ValueError: `drawn` is not one row for each image.
        """
        if drawn.shape != (len(images), 4):
            raise ValueError(f"expected drawn to be {(len(images), 4)}, a row of draw() for each image, got "
                             f"{tuple(drawn.shape)}")
        height, width = images.shape[2:]
        angle, right, down, flipped = drawn.double()[:, :, None, None].unbind(1)
        middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
        x = torch.arange(width, device=images.device) - middle_x - right  # (B, 1, W)
        y = torch.arange(height, device=images.device)[:, None] - middle_y - down  # (B, H, 1)
        column = (angle.cos() * x + angle.sin() * y + middle_x).round()  # where each pixel comes from: (B, H, W)
        row = (angle.cos() * y - angle.sin() * x + middle_y).round()
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        column = torch.where(flipped > 0, width - 1 - column, column)
        source = torch.where(inside, row * width + column, 0).long().flatten(1)[:, :, None].expand(-1, -1, 3)
        found = images.permute(0, 2, 3, 1).flatten(1, 2).gather(1, source).view(len(images), height, width, 3)
        return found.masked_fill_(~inside[..., None], 0).permute(0, 3, 1, 2)


def _between(uniform: Tensor, low: float, high: float) -> Tensor:
    return low + uniform * (high - low)


def _grey(images: Tensor) -> Tensor:
    return sum(weight * channel for weight, channel in zip(GREY, images.split(1, dim=1), strict=True))


def _recolour_(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Change the colours in place, image by image: factors (B, 1, 1, 1), of which 1 changes nothing."""
    images.mul_(brightness).clamp_(0, 1)
    mean = _grey(images).mean((1, 2, 3), keepdim=True, dtype=torch.float64)  # the same bits in any order of the sum
    images.mul_(contrast).add_((1 - contrast) * mean.to(images.dtype)).clamp_(0, 1)
    grey = _grey(images)
    return images.mul_(saturation).add_((1 - saturation) * grey).clamp_(0, 1)
