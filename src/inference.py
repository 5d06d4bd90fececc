"""Infer without a trace, the same code on CUDA and on a CPU; and score what comes of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import parallel
from .checks import check_images, check_masks
from .holes import smooth
from .masks import Masks


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


def inference_batch(images: Tensor) -> int:
    """How many images are inferred at once: 500, and fewer of large ones, whose activations would fill the memory."""
    return max(32, min(500, 2 ** 22 // (images.shape[2] * images.shape[3])))


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
def infer(model: nn.Module, images: Tensor, masks: Masks | Tensor | None = None, batch_size: int | None = None,
          fill: str = "black") -> Tensor:
    """Return the logits of all images, in eval mode: (N, 3, H, W) uint8 -> (N, classes) float32.

    masks: (N, H, W) bool, True = hidden, and filled as of `pixels`. The model is left as it was.
    """
    check_images(images)
    check_masks(masks, images)
    batch_size = batch_size or inference_batch(images)
    device = next(model.parameters()).device
    logits = {}
    with evaluating(model):
        for start in parallel.mine(range(0, len(images), batch_size)):
            batch = slice(start, start + batch_size)
            hidden = None if masks is None else masks[batch].to(device)
            logits[start] = model(pixels(uploaded(images, batch, device), hidden, fill))
    return torch.cat(parallel.gathered(logits)).to(device)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, masks: Masks | Tensor | None = None,
             fill: str = "black") -> float:
    """The share of images, in [0, 1], that a model classifies as labelled (N,) int64; the rest as of `infer`."""
    guesses = infer(model, images, masks, fill=fill).argmax(1)
    return (guesses == labels.to(guesses.device)).double().mean().item()


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
