"""Infer without a trace, the same code on CUDA and on a CPU; and score what comes of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import parallel
from .holes import SWAP, Shown
from .masks import Masks

NO_EPOCH = -1  # of the swap test: its partners are drawn apart from those of any epoch


def inference_batch(images: Tensor) -> int:
    """How many images are inferred at once: 500, and fewer of large ones, whose activations would fill the memory."""
    return max(1, min(500, 2 ** 22 // (images.shape[2] * images.shape[3])))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, its weights fixed, and each of its parts back as it was afterwards, come what may.

    Autograd keeps no activation for weights that ask for no gradient: of a ResNet50, that is most of the memory.
    """
    modes = [(module, module.training) for module in model.modules()]
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    model.eval()
    try:
        for weight in learning:
            weight.requires_grad = False
        yield
    finally:
        for module, mode in modes:  # a block before its parts, which mostly puts them back, too
            if module.training != mode:
                module.train(mode)  # it may do more than note its mode, as LoRA does, or nothing at all
            module.training = mode
        for weight in learning:
            weight.requires_grad = True


@torch.no_grad()
def infer(model: nn.Module, images: Tensor | Shown, batch_size: int | None = None) -> Tensor:
    """Return the logits of all images, in eval mode: (N, 3, H, W) uint8, or as `Shown` -> (N, classes) float32.

    The model is left as it was.
    """
    shown = images if isinstance(images, Shown) else Shown(images)
    batch_size = batch_size or inference_batch(shown.images)
    device = next(model.parameters()).device
    logits = {}
    with evaluating(model):
        for start in parallel.mine(range(0, len(shown), batch_size)):
            logits[start] = model(shown(slice(start, start + batch_size), device))
    return torch.cat(parallel.gathered(logits)).to(device)


def accuracy(model: nn.Module, images: Tensor | Shown, labels: Tensor) -> float:
    """The share of images, in [0, 1], that a model classifies as labelled (N,) int64; the rest as in `infer`."""
    guesses = infer(model, images).argmax(1)
    return (guesses == labels.to(guesses.device)).double().mean().item()


def swapped(model: nn.Module, images: Tensor, labels: Tensor, masks: Masks | Tensor, seed: int = 0) -> float:
    """The swap test (ours): accuracy where what was hot is exchanged for what was hot in an image of another class.

    images: (N, 3, H, W) uint8; masks: (N, H, W), those of the *old* model, so that models are compared on the same
    images. A model that leans on what was hot answers the class of the partner. The lower of this and the accuracy on
    the images as they are ranks repairs, where all images carry the shortcut. It is a ranking, no estimate, and cannot
    know whether what is hot is a shortcut or the subject.
    ValueError: as in `Shown`, such as for images of one class alone.
    """
    return accuracy(model, Shown(images, masks, SWAP, labels, seed, NO_EPOCH), labels)


@dataclass(frozen=True)
class Score:
    """Accuracies in [0, 1]: over all samples, of each group that occurs, of the worst of these, and of each class."""

    average: float
    groups: dict[int, float]
    classes: dict[int, float]

    @property
    def worst(self) -> float:
        return min(self.groups.values())


def score(predictions: Tensor, labels: Tensor, groups: Tensor) -> Score:
    """Score predictions, all (N,) int64. Groups without a sample are left out, not counted as 0."""
    correct = (predictions == labels).double()
    by_group, by_class = ({int(part): correct[parts == part].mean().item() for part in parts.unique()}
                          for parts in (groups, labels))
    return Score(correct.mean().item(), by_group, by_class)


def adjusted_average(accuracies: dict[int, float], train_groups: Tensor) -> float:
    """The average accuracy of the field: that of each group, weighted by its share in training (Sagawa et al. 2020)."""
    shares = train_groups.bincount().double() / len(train_groups)
    return sum(accuracies[group] * share for group, share in enumerate(shares.tolist()) if share > 0)
