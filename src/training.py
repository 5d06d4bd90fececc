"""Train for an epoch, and infer: the same code on CUDA and on a CPU."""

import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.seeding import epoch_order


def best_device() -> torch.device:
    """CUDA when present, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def environment() -> str:
    """Name what produces the numbers: Python, torch, device, and the commit with a mark where files differ from it."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return (f"Python {platform.python_version()}, torch {torch.__version__}, {device_name(best_device())}, "
            f"commit {git.stdout.strip() or 'unknown'}")


def device_name(device: torch.device) -> str:
    """Name a device as a reader would: the GPU's own name, or the CPU threads in use."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def pixels(images: Tensor, masks: Tensor | None = None) -> Tensor:
    """Turn stored images into what a model sees: (B, 3, H, W) uint8 -> float32 in [0, 1], hidden pixels black.

    masks: (B, H, W) bool, True = hidden.
    """
    images = images.to(torch.float32, memory_format=torch.channels_last) / 255
    return images if masks is None else images.masked_fill(masks[:, None], 0)


def sgd(model: nn.Module, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD whose LR is written by `train_epoch` before each epoch; 0 until then, so that none is applied by accident."""
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=True)


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, *, lr: float,
                batch_size: int, seed: int, epoch: int, masks: Tensor | None = None) -> tuple[float, float]:
    """Train for one epoch in train mode; return the mean loss and the accuracy of its batches, as they were met.

    images: (N, 3, H, W) uint8, labels: (N,) int64, masks: (N, H, W) bool with True = hidden, on the model's device.
    The order of the samples depends on (seed, epoch) alone.
    """
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss_sum = torch.zeros((), device=images.device)
    correct = torch.zeros((), device=images.device)
    order = epoch_order(len(labels), seed, epoch).to(images.device)
    for index in order.split(batch_size):
        inputs = pixels(images[index], None if masks is None else masks[index])
        logits = model(inputs)
        loss = F.cross_entropy(logits, labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.detach() * len(index)
        correct += (logits.detach().argmax(1) == labels[index]).sum()
    return loss_sum.item() / len(labels), correct.item() / len(labels)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and each of its parts back into its own mode afterwards, come what may."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def infer(model: nn.Module, images: Tensor, masks: Tensor | None = None, batch_size: int = 250) -> Tensor:
    """Return the logits of all images, in eval mode: (N, 3, H, W) uint8 -> (N, classes) float32.

    masks: (N, H, W) bool, True = hidden. The model is left as it was.
    """
    device = next(model.parameters()).device
    logits = []
    with evaluating(model):
        for start in range(0, len(images), batch_size):
            batch = slice(start, start + batch_size)
            hidden = None if masks is None else masks[batch].to(device)
            logits.append(model(pixels(images[batch].to(device), hidden)))
    return torch.cat(logits)
