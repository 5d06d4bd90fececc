"""Train for one epoch: the same code on CUDA and on a CPU, in one process or several."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from . import parallel
from .augmentation import Augmentation
from .checks import PRECISIONS, check_count, check_images, check_labels, check_masks, check_number
from .holes import Holes, Shown, holes_of, partners
from .inference import infer
from .masks import Masks
from .seeding import epoch_order, seeded
from .state import State


def sgd(weights: Iterable[nn.Parameter], momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD whose LR is written by `train_epoch`; 0 until then, so that none is applied by accident."""
    return torch.optim.SGD(weights, lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=True)


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int, order: int = 0,
                  device: torch.device | str = "cpu") -> list[Tensor]:
    """Return the indices of each batch of an epoch, on the device; a pure function of its arguments.

    A last batch of less than two images for each process joins the one before it: BatchNorm cannot normalise one.
    """
    batches = list(epoch_order(n, seed, epoch, order).to(device).split(batch_size))  # one upload, not one a step
    if len(batches) > 1 and batch_size > 1 and len(batches[-1]) < 2 * parallel.world():
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def check_epoch(state: State, images: Tensor, labels: Tensor, *, lr: float, batch_size: int, precision: str = "fp32",
                masks: Masks | Tensor | None = None, holes: str | Holes = "black", **_others) -> None:
    """Raise TypeError or ValueError, naming what was expected and what came, before anything is trained."""
    check_number("lr", lr, lr >= 0, "a finite number, not negative")
    check_count("batch_size", batch_size)
    if precision not in PRECISIONS:
        raise ValueError(f"expected precision to be one of {PRECISIONS}, got {precision!r}")
    check_images(images)
    check_masks(masks, images)
    check_labels(labels, images, classes=infer(state.model, images[:1]).shape[1])
    if holes_of(holes).partners:
        partners(labels, 0, 0)
    smallest = min(map(len, epoch_batches(len(labels), batch_size, 0, 0)))
    if smallest == 1 and any(isinstance(part, nn.BatchNorm1d) for part in state.model.modules()):
        raise ValueError(f"expected batches of at least two images, which BatchNorm needs, got {len(labels)} images in "
                         f"batches of {batch_size}")
    if smallest < parallel.world():
        raise ValueError(f"expected an image of every batch for each of {parallel.world()} processes, got "
                         f"{len(labels)} images in batches of {batch_size}")


def train_epoch(state: State, images: Tensor, labels: Tensor, *, lr: float, batch_size: int, seed: int, order: int = 0,
                masks: Masks | Tensor | None = None, augmentation: Augmentation | Callable | None = None,
                precision: str = "fp32", loss: Callable = F.cross_entropy, holes: str | Holes = "black",
                title: str | None = None) -> tuple[float, float]:
    """Train for one epoch, in train mode; return its mean loss and its accuracy, measured before each update.

    `state.finish_epoch` then counts it as done. The epoch is a pure function of the state, the data and the arguments:
    run again from the same state, it gives the same bits, dropout included. A model that is in train mode already is
    left as it is: what of it was put in eval mode, such as a frozen BatchNorm, stays so.

    Args:
        images: (N, 3, H, W) uint8, with labels (N,) int64 and masks (N, H, W) bool, True = hidden; on the model's
            device where they fit, else in host memory or a memory map.
        batch_size: images of one update, over all processes.
        seed, order: draw, with the state's epoch, the order of the images and what the augmentation does to each.
        augmentation: comes after the masks, so that each hides the pixels that it was computed on; ours, or any
            function of a batch (B, 3, H, W) float in [0, 1] on the device.
        precision: "fp32", or "bf16": forward and loss under autocast, weights and optimizer in fp32.
        loss: a function of logits (B, classes) and labels (B,) that gives their mean.
        holes: what is shown where the masks are: "black" (paper), "decoys" or "transplants" (ours), or `Holes`.

    Raises:
        TypeError, ValueError: the input is not of that kind; nothing has been trained.
        FloatingPointError: the loss or the weights are no longer finite.
    """
    check_epoch(state, images, labels, lr=lr, batch_size=batch_size, precision=precision, masks=masks,
                holes=holes)
    if not state.model.training:
        state.model.train()
    device = next(state.model.parameters()).device
    shown = Shown(images, masks if masks is None else masks.to(device), holes, labels, seed, state.epoch)
    batches = epoch_batches(len(labels), batch_size, seed, state.epoch, order, images.device)
    losses = torch.zeros(len(batches), dtype=torch.float32, device=device)  # each a sum over the batch
    correct = torch.zeros((), dtype=torch.int64, device=device)
    drawn = None
    if hasattr(augmentation, "draw"):
        drawn = augmentation.draw(len(images), *images.shape[2:], seed=seed, epoch=state.epoch).to(images.device)
    with (parallel.joined(state.model) as model, seeded(seed, "epoch", state.epoch, order, parallel.rank()),
          tqdm(desc=title, total=len(labels), unit="image", disable=not (title and parallel.bars())) as bar):
        for step, batch in enumerate(map(parallel.mine, batches)):
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            inputs = shown(batch, device)
            targets = labels[batch].to(device)
            if augmentation:
                inputs = augmentation(inputs) if drawn is None else augmentation(inputs, drawn[batch].to(device))
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = model(inputs)
                n = len(batches[step])
                lost = loss(parallel.whole(logits, n), parallel.whole(targets, n))
            if lost.dim():
                raise ValueError(f"expected loss to give one number, the mean of the batch, got {tuple(lost.shape)}; "
                                 "see reduction='mean'")
            state.optimizer.zero_grad()
            (lost * parallel.world()).backward()  # DDP's mean over processes makes this the batch's gradient
            state.optimizer.step()
            losses[step] = lost.detach() * len(batch)
            correct += (logits.detach().argmax(1) == targets).sum()
            bar.update(len(batches[step]))
    losses, correct = parallel.total(losses), parallel.total(correct)
    _check_finite(state, losses, lr)
    return losses.sum().item() / len(labels), correct.item() / len(labels)


def _check_finite(state: State, losses: Tensor, lr: float) -> None:
    """Raise FloatingPointError, naming epoch, step and LR, if a loss or a weight is not finite."""
    bad = torch.nonzero(~losses.isfinite()).flatten().tolist()
    where = f"epoch {state.epoch + 1}" + (f", step {bad[0] + 1} of {len(losses)}" if bad else "") + f", LR {lr:g}"
    weights = [*state.model.parameters(), *(buffer for name, buffer in state.model.named_buffers()
                                            if "running_" in name)]  # others may hold -inf, as masks of attention do
    if bad or not all(weight.isfinite().all() for weight in weights):
        raise FloatingPointError(f"{'the loss is' if bad else 'weights are'} not finite in {where}; lower the LR, or "
                                 "look for broken images. Nothing was saved since the epoch before")
