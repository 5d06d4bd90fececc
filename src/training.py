"""Train for an epoch, and infer: the same code on CUDA and on a CPU."""

import copy
import ctypes
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from src import parallel
from src.augmentation import Augmentation
from src.capture import Captured
from src.checks import check_images, check_labels, check_masks
from src.interrupts import uninterrupted
from src.masks import Masks
from src.seeding import epoch_order
from src.state import State

PRECISIONS = ("fp32", "bf16")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def best_device() -> torch.device:
    """CUDA when present, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def room_for(images: Tensor) -> torch.device:
    """Where images are kept: on the GPU if they take less than half of what is free there, else where they are."""
    device = best_device()
    if device.type == "cuda" and images.nbytes > torch.cuda.mem_get_info()[0] / 2:
        return images.device
    return device


def prepare() -> None:
    """Set up this process: the same bits at every run and full fp32 on CUDA, freed memory kept on a CPU.

    To be called before the first CUDA operation: cuBLAS reads its setting once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)  # an operation without such an algorithm says so
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    keep_freed_memory(True)


def keep_freed_memory(keep: bool) -> None:
    """Let glibc keep what is freed, or give it back to the system, its default.

    By default the activations of every step are given back, and faulted in again, page by page, in the next: on two
    cores this took half the time of an evaluation. Other C libraries are left as they are.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0 if keep else 65_536)
        mallopt(M_TRIM_THRESHOLD, 2 ** 30 if keep else 2 ** 17)


def environment() -> str:
    """Name what produces the numbers: Python, torch, device, and the commit with a mark where files differ from it.

    Those under results/ do not count, since the studies that write this line there change them row by row.
    """
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()

    commit = git("describe", "--always") or "unknown"
    mark = "-dirty" if git("status", "--porcelain", "--untracked-files=no", "--", ":(exclude)results") else ""
    return (f"Python {platform.python_version()}, torch {torch.__version__}, {device_name(best_device())}, "
            f"commit {commit}{mark}")


def device_name(device: torch.device) -> str:
    """Name a device as a reader would: the GPU's own name, or the CPU threads in use."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def pixels(images: Tensor, masks: Tensor | None = None) -> Tensor:
    """Turn stored images into what a model sees: (B, 3, H, W) uint8 -> float32 in [0, 1], hidden pixels black.

    masks: (B, H, W) bool, True = hidden.
    """
    floats = images.to(torch.float32, memory_format=torch.channels_last, copy=True).div_(255)
    return floats if masks is None else floats.masked_fill_(masks[:, None], 0)


def sgd(model: nn.Module, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD whose LR is written by `train_epoch` before each epoch; 0 until then, so that none is applied by accident."""
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=True)


def inference_batch(images: Tensor) -> int:
    """How many images are inferred at once: 500, and fewer of large ones, whose activations would fill the memory."""
    return max(32, min(500, 2 ** 22 // (images.shape[2] * images.shape[3])))


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """Return the indices of each batch of an epoch, on the device; a pure function of its arguments.

    A last batch of one image joins the one before it: BatchNorm cannot normalise a single sample. So does one with less
    than an image for each process.
    """
    batches = list(epoch_order(n, seed, epoch).to(device).split(batch_size))  # one upload, not one a step
    if len(batches) > 1 and batch_size > 1 and len(batches[-1]) < max(2, parallel.world()):
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def train_epoch(state: State, images: Tensor, labels: Tensor, *, lr: float, batch_size: int, seed: int,
                masks: Masks | Tensor | None = None, augmentation: Augmentation | None = None, precision: str = "fp32",
                capture: bool = False, after_step: Callable[[], None] | None = None) -> tuple[float, float]:
    """Train what is left of the state's epoch, in train mode; return its mean loss and its accuracy, as they were met.

    `state.finish_epoch` then counts it as done. The order of the samples, and what the augmentation does to each,
    depend on (seed, state.epoch) alone, so an epoch that was cut off between two steps goes on as if it had not been.

    Args:
        images: (N, 3, H, W) uint8, with labels (N,) int64 and masks (N, H, W) bool, True = hidden; on the model's
            device where they fit, else in host memory or a memory map.
        batch_size: images of one update, over all processes.
        augmentation: comes after the masks, so that each hides the pixels that it was computed on.
        precision: "fp32", or "bf16": forward and loss under autocast, weights and optimizer in fp32.
        capture: replay the step as a CUDA graph; with images on the GPU, SGD and one process.
        after_step: called between two steps.

    Raises:
        TypeError, ValueError: the input is not of that kind; nothing has been trained.
        FloatingPointError: the loss or the weights are no longer finite.
        KeyboardInterrupt: between two steps, never inside one.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown; it is one of {PRECISIONS}")
    if capture and not (images.device.type != "cpu" and parallel.world() == 1
                        and isinstance(state.optimizer, torch.optim.SGD)):
        raise ValueError("capture (MASKTUNE_CAPTURE=1) wants the images on a GPU, SGD and one process; here are images "
                         f"on {images.device}, {type(state.optimizer).__name__} and {parallel.world()} processes")
    check_images(images)
    check_masks(masks, images)
    check_labels(labels, images, classes=infer(state.model, images[:1]).shape[1])
    batches = epoch_batches(len(labels), batch_size, seed, state.epoch, images.device)
    if min(map(len, batches)) == 1 and any(isinstance(part, nn.BatchNorm1d) for part in state.model.modules()):
        raise ValueError(f"{len(labels)} images in batches of {batch_size}: BatchNorm cannot train on a batch of one "
                         "image; it takes at least two")
    if min(map(len, batches)) < parallel.world():
        raise ValueError(f"{len(labels)} images in batches of {batch_size} for {parallel.world()} processes; each "
                         "takes at least one image of every batch")
    device = next(state.model.parameters()).device
    if augmentation:
        drawn = augmentation.draw(len(images), *images.shape[2:], seed=seed, epoch=state.epoch).to(images.device)
    state.model.train()
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    if state.step == 0:
        state.losses = torch.zeros(len(batches), device=device)
        state.correct = torch.zeros((), dtype=torch.int64, device=device)
    with parallel.shared(state.model) as model:

        def step(batch: Tensor) -> tuple[Tensor, Tensor]:
            """Update the weights by a batch, shared with other processes; its mean loss, and how many were right."""
            index = parallel.share(batch)
            inputs = pixels(images[index].to(device), None if masks is None else masks[index].to(device))
            targets = labels[index].to(device)
            if augmentation:
                inputs = augmentation(inputs, drawn[index].to(device))
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = model(inputs)
                loss = F.cross_entropy(logits, targets)
            state.optimizer.zero_grad()
            (loss * (len(index) * parallel.world() / len(batch))).backward()  # DDP averages over the processes
            state.optimizer.step()
            return (parallel.total(loss.detach() * (len(index) / len(batch))),
                    parallel.total((logits.detach().argmax(1) == targets).sum()))

        run = Captured(step) if capture else step
        for batch in batches[state.step:]:
            with uninterrupted():
                state.losses[state.step], right = run(batch)
                state.correct += right
                state.step += 1
            if after_step is not None:
                after_step()
    state.check_finite()
    sizes = torch.tensor([len(batch) for batch in batches], device=device)
    return (state.losses * sizes).sum().item() / len(labels), state.correct.item() / len(labels)


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
        for module, mode in modes:
            module.training = mode
        for weight in learning:
            weight.requires_grad = True


def folded(model: nn.Module) -> nn.Module:
    """A copy for inference in eval mode, with each BatchNorm folded into the layer before it.

    Only of a model that says by `runs_in_sequence` that its nn.Sequentials are run from first to last: the order of
    layers is known then. Any other is returned as it is. The saliency layer is never touched, so that heat maps are
    those of the model.
    """
    if not getattr(model, "runs_in_sequence", False):
        return model
    kinds = ((nn.Conv2d, nn.BatchNorm2d, fuse_conv_bn_eval), (nn.Linear, nn.BatchNorm1d, fuse_linear_bn_eval))

    def foldable(model: nn.Module) -> Iterator[tuple[nn.Sequential, int, Callable]]:
        kept = getattr(model, "saliency_layer", None)
        for part in [part for part in model.modules() if isinstance(part, nn.Sequential)]:
            for i, (first, second) in enumerate(pairwise(part)):
                for layer, norm, fuse in kinds:
                    if type(first) is layer and type(second) is norm and kept not in (first, second):
                        yield part, i, fuse

    model = copy.deepcopy(model).eval()
    for part, i, fuse in list(foldable(model)):
        part[i], part[i + 1] = fuse(part[i], part[i + 1]), nn.Identity()
    return model


@torch.no_grad()
def infer(model: nn.Module, images: Tensor, masks: Masks | Tensor | None = None,
          batch_size: int | None = None) -> Tensor:
    """Return the logits of all images, in eval mode: (N, 3, H, W) uint8 -> (N, classes) float32.

    masks: (N, H, W) bool, True = hidden. The model is left as it was.
    """
    check_images(images)
    check_masks(masks, images)
    batch_size = batch_size or inference_batch(images)
    device = next(model.parameters()).device
    logits = {}
    with evaluating(model):
        fast = folded(model)
        for start in parallel.share(range(0, len(images), batch_size)):
            batch = slice(start, start + batch_size)
            hidden = None if masks is None else masks[batch].to(device)
            logits[start] = fast(pixels(images[batch].to(device), hidden))
    return torch.cat(parallel.gathered(logits)).to(device)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, masks: Masks | Tensor | None = None) -> float:
    """The share of images, in [0, 1], that a model classifies as labelled (N,) int64; the rest as of `infer`."""
    guesses = infer(model, images, masks).argmax(1)
    return (guesses == labels.to(guesses.device)).double().mean().item()
