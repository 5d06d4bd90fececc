"""What a report shows of a repair: the swap test, a second look with the repaired model, and pictures."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .datasets.images import Images
from .holes import SWAP, Shown, pixels
from .inference import Score, infer, score, swapped
from .masking import find_masks, spots
from .masks import Masks
from .saliency import xgradcam

SWAPPED = 2_000  # images at most, of the swap test and of the second look
EXAMPLES = 8  # images of a gallery; half as many of each other kind


@dataclass(frozen=True, eq=False)
class Again:
    """Where the repaired model looks: mean masks (classes, H, W) and the swap test with its own masks, in [0, 1].

    spots: of a class, the place (row, column) that is now hot in most of its images, and was not found before.
    """

    means: Tensor
    spots: dict[int, tuple[int, int]]
    swapped: float | None


def scored(guesses: Tensor, data: Images) -> Score:
    """The score of guesses (N,) on a data set; classes where it has no groups."""
    labels = data.labels.cpu()
    return score(guesses.cpu(), labels, labels if data.groups is None else data.groups.cpu())


def few(data: Images, most: int, masks: Masks | None = None) -> tuple[Images, Masks | None]:
    """At most so many images, spread evenly over a data set, and their masks."""
    every = slice(None, None, -(-len(data) // most))
    some = Images(data.images[every], data.labels[every], data.classes)
    return some, masks and Masks((len(some), *masks.shape[1:]), masks.bits[every], masks.bits.device)


def swap_test(model: nn.Module, data: Images, masks: Masks, seed: int) -> float | None:
    """`swapped`; None where all images are of one class, and there is nothing to exchange."""
    return None if len(data.labels.unique()) < 2 else swapped(model, data.images, data.labels, masks, seed)


def look_again(model: nn.Module, some: Images, masks: Masks, k: float, seed: int) -> Again:
    """Where the repaired model looks in some of the training images, beside the masks found before."""
    own = find_masks(model, some.images, k)
    labels = some.labels.to(own.bits.device)
    means = torch.stack([own.mean(labels == label) for label in range(len(some.classes))]).nan_to_num().cpu()
    return Again(means, spots(own, some.labels, masks), swap_test(model, some, own, seed))


def examples(old: nn.Module, new: nn.Module, data: Images, shown: Shown) -> list[Tensor]:
    """Of the first images of every class: labels, guesses before and after, images, heat, masks, what is trained on."""
    labels, each = data.labels.cpu(), max(1, EXAMPLES // len(data.classes))
    chosen = torch.cat([torch.nonzero(labels == label).flatten()[:each] for label in labels.unique()])[:EXAMPLES]
    chosen = chosen.to(data.images.device)
    images = data.images[chosen]
    guesses = [infer(model, images).argmax(1).cpu() for model in (old, new)]
    hidden = shown.masks[chosen.to(shown.masks.bits.device)].cpu()
    seen = pixels(images.to(next(old.parameters()).device))
    heat = xgradcam(old, seen).cpu()
    return [labels[chosen.cpu()], *guesses, seen.cpu(), heat, hidden, shown(chosen, torch.device("cpu"))]


def twins(old: nn.Module, new: nn.Module, data: Images, masks: Masks, seed: int) -> list[Tensor] | None:
    """Of a few images in which something is hot, if any: labels, guesses before and after on exchanged twins, both."""
    shown = Shown(data.images, masks, SWAP, data.labels, seed)
    found = torch.nonzero((masks.bits != 0).any(1)).flatten().to(data.images.device)
    if not len(found):
        return None
    chosen = found[torch.linspace(0, len(found) - 1, min(EXAMPLES // 2, len(found))).long().to(found.device)]
    exchanged = shown(chosen, next(old.parameters()).device)
    stored = (exchanged * 255).round().to(torch.uint8)
    guesses = [infer(model, stored).argmax(1).cpu() for model in (old, new)]
    return [data.labels.cpu()[chosen.cpu()], *guesses, pixels(data.images[chosen]).cpu(), exchanged.cpu()]
