"""What is shown where something was hot: nothing (the paper's), decoys, or transplants (ours).

A hole in one class only is as good a cue as the shortcut that it hides: class information leaks through the shape and
the place of masks (Rong et al. 2022), and missing pixels are a cue of their own (Jain et al. 2022). And a model that no
longer sees the shortcut is never taught that it means nothing. So transplants show it with both labels: what was hot
in an image of another class is put into this one, at the same place. Patches are exchanged elsewhere, too (CutMix, Yun
et al. 2019; DaC, Noohdani et al. 2024), but there their label comes with them: here the label stays.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_images, check_masks, check_number
from .masks import Masks
from .seeding import generator

FILLS = ("black", "smooth")  # nothing (paper), or a smooth continuation of what is around
WIDEST = 0.25  # of the shorter side: as far as masks may be grown


@dataclass(frozen=True)
class Holes:
    """What is shown where something was hot.

    With partners, each image has one of another class, drawn anew in each epoch. Where the two masks overlap, what only
    one of the two coins shows is shown; if both do, a third coin decides; if neither does, it is hidden.
    """

    grow: float = 0.0  # how far masks are widened, as a share of the shorter side: no rim of what they cover stays
    fill: str = "black"  # what hidden pixels show, one of `FILLS`
    partners: bool = False  # whether what was hot in an image of another class is replaced, too
    own: float | None = 0.0  # how often what an image's own mask covers stays; None: 1 / (2 (classes - 1))
    theirs: float = 0.0  # how often the partner's hot pixels are put into the image; else they are hidden in it

    def __post_init__(self) -> None:
        if self.fill not in FILLS:
            raise ValueError(f"expected fill to be one of {FILLS}, got {self.fill!r}")
        check_number("grow", self.grow, 0 <= self.grow <= WIDEST, f"a share of the side, in [0, {WIDEST}]")
        for name, chance in (("own", self.own or 0), ("theirs", self.theirs)):
            check_number(name, chance, 0 <= chance <= 1, "a probability")


GROW = 1 / 28  # a pixel of MNIST's
HOLES = {
    "black": Holes(),  # paper
    "decoys": Holes(GROW, partners=True),
    # with these chances each shortcut is shown equally often with every class, and so is not to be learnt from
    "transplants": Holes(GROW, "smooth", True, own=None, theirs=0.5),
}
SWAP = Holes(GROW, "smooth", True, own=0.0, theirs=1.0)  # the test: see `swapped` in `inference`
COVERED = Holes(GROW, "smooth")


def holes_of(holes: str | Holes) -> Holes:
    """The holes of a name in `HOLES`, or those given; ValueError: neither."""
    if isinstance(holes, Holes):
        return holes
    if not isinstance(holes, str) or holes not in HOLES:
        raise ValueError(f"expected holes to be one of {', '.join(map(repr, HOLES))}, or Holes(...), got {holes!r}")
    return HOLES[holes]


class Shown:
    """The images of one epoch as a model sees them, hot pixels replaced: a pure function of the arguments.

    images: (N, 3, H, W) uint8; masks: (N, H, W), True = hot, as found, None: all is shown as it is; labels: (N,) int64,
    needed for partners. `shown(chosen, device)` reads those of the chosen, and their partners, alone.
    ValueError, TypeError: they are not of that kind, or all of one class, which leaves no partners.
    """

    def __init__(self, images: Tensor, masks: Masks | Tensor | None = None, holes: str | Holes = "black",
                 labels: Tensor | None = None, seed: int = 0, epoch: int = 0) -> None:
        check_images(images)
        check_masks(masks, images)
        self.images, self.holes = images, holes_of(holes)
        self.masks = self.partners = self.coins = None
        if masks is None:
            return
        self.masks = grown(masks if isinstance(masks, Masks) else Masks.of(masks), self.holes.grow)
        if self.holes.partners:
            self.partners, classes = partners(labels, seed, epoch)
            own = 1 / (2 * (classes - 1)) if self.holes.own is None else self.holes.own
            chances = torch.tensor([own, self.holes.theirs, 0.5])
            self.coins = torch.rand(len(images), 3, generator=generator(seed, "coins", epoch), device="cpu") < chances
            self.partners, self.coins = self.partners.to(images.device), self.coins.to(images.device)

    def __len__(self) -> int:
        return len(self.images)

    def __call__(self, chosen: Tensor | slice, device: torch.device) -> Tensor:
        """(B, 3, H, W) float in [0, 1] on the device; chosen: a slice, or indices on the device of the images."""
        images = uploaded(self.images, chosen, device)
        if self.masks is None:
            return pixels(images)
        hidden, exchanged = self.replaced(chosen, device)
        if not self.holes.theirs:
            return pixels(images, hidden, self.holes.fill)
        theirs = pixels(uploaded(self.images, self.partners[chosen], device))
        # filled from the image's own surroundings before anything is put in: no colour of that runs into the holes
        return torch.where(exchanged[:, None], theirs, pixels(images, hidden | exchanged, self.holes.fill))

    def replaced(self, chosen: Tensor | slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which pixels of the chosen images are hidden, and which show the partner's, each (B, H, W) bool."""
        own = self._masks(chosen, device)
        if self.partners is None:
            return own, torch.zeros_like(own)
        theirs = self._masks(self.partners[chosen], device)
        keep, put, third = self.coins[chosen].to(device)[:, :, None, None].unbind(1)
        kept = own & keep
        exchanged = theirs & put & ~(kept & third)
        return (own | theirs) & ~kept & ~exchanged, exchanged

    def shares(self) -> tuple[float, float]:
        """The shares of all pixels that are hidden, and that are a partner's, in [0, 1]."""
        if self.masks is None:
            return 0.0, 0.0
        device, height, width = self.masks.bits.device, *self.masks.shape[1:]
        sums = [torch.stack([part.sum() for part in self.replaced(chunk, device)]) for chunk in self.masks.chunks()]
        hidden, exchanged = (torch.stack(sums).sum(0) / (len(self) * height * width)).tolist()
        return hidden, exchanged

    def _masks(self, chosen: Tensor | slice, device: torch.device) -> Tensor:
        index = chosen if isinstance(chosen, slice) else chosen.to(self.masks.bits.device)
        return self.masks[index].to(device)


def partners(labels: Tensor | None, seed: int, epoch: int) -> tuple[Tensor, int]:
    """For each image one of another class, (N,) int64, and the number of classes that occur in labels (N,) int64.

    The class is drawn uniformly among the others that occur, and the image within it: a pure function of the arguments.
    ValueError: there are no labels, or of one class alone.
    """
    classes, own, counts = (torch.zeros(0) if labels is None else labels).cpu().unique(
        return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise ValueError("expected images of at least two classes for decoys and transplants, which are of another "
                         f"class, got {len(classes)}")
    draw = generator(seed, "decoys", epoch)
    other = (own + torch.randint(1, len(classes), own.shape, generator=draw, device="cpu")) % len(classes)
    within = (torch.rand(len(own), generator=draw, device="cpu", dtype=torch.float64) * counts[other]).long()
    return own.argsort(stable=True)[counts.cumsum(0)[other] - counts[other] + within], len(classes)


def grown(masks: Masks, grow: float) -> Masks:
    """Masks widened on all sides by a share of the shorter side, in whole pixels: by 1 of 28 pixels for 1/28."""
    reach = round(grow * min(masks.shape[1:]))
    if reach == 0:
        return masks
    wide = Masks(masks.shape, device=masks.bits.device)
    for chunk in masks.chunks():
        wide[chunk] = F.max_pool2d(masks[chunk].to(torch.float32), 2 * reach + 1, stride=1, padding=reach) > 0
    return wide


def pixels(images: Tensor, masks: Tensor | None = None, fill: str = "black") -> Tensor:
    """Turn stored images into what a model sees: (B, 3, H, W) uint8 -> float32 in [0, 1], hidden pixels filled.

    masks: (B, H, W) bool, True = hidden; fill: one of `FILLS`. Smooth colours are rounded as those of stored images.
    """
    floats = images.to(torch.float32, memory_format=torch.channels_last, copy=True).div_(255)
    if masks is None:
        return floats
    floats.masked_fill_(masks[:, None], 0)
    return floats if fill == "black" else smooth(floats, (~masks[:, None]).float()).mul_(255).round_().div_(255)


def uploaded(images: Tensor, chosen: Tensor | slice, device: torch.device) -> Tensor:
    """Some of the stored images on a device; the host does not wait for a GPU to have them."""
    # index_select is several times faster than images[chosen] in host memory
    batch = images[chosen] if isinstance(chosen, slice) else images.index_select(0, chosen)
    if device.type == "cuda" and not batch.is_cuda:
        batch = batch.pin_memory()
    return batch.to(device, non_blocking=True)


def smooth(images: Tensor, visible: Tensor) -> Tensor:
    """Continue what is visible into what is not, from coarse to fine: (B, 3, H, W) float -> the same.

    visible: (B, 1, H, W), 1 or 0. What is below 0 has no influence. Each hidden pixel shows what its surroundings show
    at the finest scale, of images halved again and again, at which any of them are visible; an image of which nothing
    is visible is grey, 0.5.
    """
    height, width = images.shape[2:]
    if height == width == 1:
        return torch.where(visible > 0, images, 0.5)
    weighed = torch.cat([images * visible, visible], 1)
    halved = F.avg_pool2d(F.pad(weighed, (0, width % 2, 0, height % 2)), 2)
    known = halved[:, 3:]
    coarse = smooth(halved[:, :3] / known.clamp(min=1e-6), (known > 0).to(known.dtype))
    continued = F.interpolate(coarse, scale_factor=2, mode="bilinear")[:, :, :height, :width]
    return torch.where(visible > 0, images, continued)
