"""Masks of a whole data set, kept as bits."""

import math

import torch
from torch import Tensor

CHUNK = 2 ** 22  # pixels unpacked at a time


class Masks:
    """Which pixels are hidden in each of N images, one bit a pixel: an eighth of what torch.bool takes.

    `masks[index]`, with an index or slice over the N images, is a (B, H, W) bool tensor, True = hidden.
    """

    dtype = torch.bool

    def __init__(self, shape: tuple[int, int, int], bits: Tensor | None = None, device: torch.device | str = "cpu"
                 ) -> None:
        """Hide nothing, or what `bits` (N, ceil(H W / 8)) uint8 say. shape: (N, H, W)."""
        n, height, width = self.shape = tuple(shape)
        expected = (n, math.ceil(height * width / 8))
        self.bits = torch.zeros(expected, dtype=torch.uint8, device=device) if bits is None else bits.to(device)
        if self.bits.dtype != torch.uint8 or tuple(self.bits.shape) != expected:
            raise ValueError(f"expected bits torch.uint8 {expected} for masks of {self.shape}, got {self.bits.dtype} "
                             f"{tuple(self.bits.shape)}")
        self._several = max(1, CHUNK // max(1, height * width))
        self._powers = (2 ** torch.arange(8, device=device)).to(torch.uint8)

    @classmethod
    def of(cls, masks: Tensor) -> "Masks":
        """Pack a tensor (N, H, W) bool."""
        packed = cls(tuple(masks.shape), device=masks.device)
        packed[:] = masks
        return packed

    def to(self, device: torch.device | str) -> "Masks":
        """The same masks on a device."""
        return Masks(self.shape, self.bits, device)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        flat = (self.bits[index, :, None] & self._powers).ne(0).flatten(1)
        return flat[:, :self.shape[1] * self.shape[2]].unflatten(1, self.shape[1:])

    def __setitem__(self, index: Tensor | slice, masks: Tensor) -> None:
        flat = masks.flatten(1)
        flat = torch.nn.functional.pad(flat, (0, 8 * self.bits.shape[1] - flat.shape[1]))
        self.bits[index] = (flat.unflatten(1, (-1, 8)) * self._powers).sum(2, dtype=torch.uint8)

    def chunks(self) -> list[slice]:
        """Slices that cover all masks, each small enough to unpack."""
        return [slice(start, start + self._several) for start in range(0, len(self), self._several)]

    def mean(self, chosen: Tensor) -> Tensor:
        """How often each pixel is hidden in the images chosen, (N,) bool: (H, W) in [0, 1]."""
        indices = torch.nonzero(chosen).flatten().split(self._several)
        return sum(self[index].sum(0) for index in indices) / chosen.sum()

    def share(self) -> float:
        """The share of pixels that are hidden, in [0, 1]."""
        return sum(self[chunk].sum().item() for chunk in self.chunks()) / math.prod(self.shape)

    def untouched(self) -> float:
        """The share of images in which nothing is hidden, in [0, 1]."""
        return (self.bits == 0).all(1).double().mean().item()
