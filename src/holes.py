"""What a hole gives away, and how not to (ours): a hole in one class only is as good a cue as the shortcut it hides.

Class information leaks through the shape and place of masks (Rong et al. 2022), and missing pixels are a cue of their
own (Jain et al. 2022). So masks may be grown, that no rest of what they cover stays visible; each image may hide, too,
what was hidden in an image of another class, a decoy; and hidden pixels may show what is around them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_number
from .masks import Masks
from .seeding import generator

FILLS = ("black", "smooth")  # what hidden pixels show: nothing (paper), or a smooth continuation of what is around them
GROW, WIDEST = 0.036, 0.25  # of the shorter side: a pixel of MNIST's 28, as in the study; the most that is allowed


def check_grow(grow: float) -> None:
    """How far masks are widened is a share of the shorter side, at most a quarter."""
    check_number("grow", grow, 0 <= grow <= WIDEST, f"a share of the side, in [0, {WIDEST}]")


def grown(masks: Masks, grow: float) -> Masks:
    """Masks widened on all sides by a share of the shorter side, in whole pixels: by 1 of 28 pixels for 1/28."""
    check_grow(grow)
    reach = round(grow * min(masks.shape[1:]))
    if reach == 0:
        return masks
    wide = Masks(masks.shape, device=masks.bits.device)
    for chunk in masks.chunks():
        wide[chunk] = F.max_pool2d(masks[chunk].to(torch.float32), 2 * reach + 1, stride=1, padding=reach) > 0
    return wide


def check_decoys(labels: Tensor) -> None:
    """Decoys are of another class: ValueError if there is but one."""
    if len(labels.unique()) < 2:
        raise ValueError("expected images of at least two classes for decoys, which are of another class, got one")


def with_decoys(masks: Masks, labels: Tensor, seed: int, epoch: int) -> Masks:
    """Masks (N, H, W) that hide, beside an image's own pixels, those hidden in one image of another class.

    That class is drawn uniformly among the others that occur in labels (N,) int64, and the image within it: a pure
    function of the arguments.
    """
    classes, own, counts = labels.cpu().unique(return_inverse=True, return_counts=True)
    draw = generator(seed, "decoys", epoch)
    other = (own + torch.randint(1, len(classes), own.shape, generator=draw)) % len(classes)
    within = (torch.rand(len(own), generator=draw, dtype=torch.float64) * counts[other]).long()
    partners = own.argsort(stable=True)[counts.cumsum(0)[other] - counts[other] + within]
    return Masks(masks.shape, masks.bits | masks.bits[partners.to(masks.bits.device)], masks.bits.device)


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
