"""Several processes at one training, as `torchrun` starts them: who does what, and what they share.

A global batch is dealt out, one slice to each process; BatchNorm, the loss and the gradient see the whole of it. So the
number of processes changes nothing but the rounding. Without torchrun, everything here does nothing.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel


def start() -> None:
    """Join the processes that torchrun started, each on a GPU of its own where there are GPUs; none: do nothing."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def stop() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if dist.is_initialized() else 0


def leads() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def bars() -> bool:
    """Whether this process shows progress bars: not beside others, nor where tqdm's own variable forbids it."""
    return leads() and not os.environ.get("TQDM_DISABLE")


def wait() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()


def total(local: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if world() > 1:
        dist.all_reduce(local)
    return local


def mine(items: Sequence) -> Sequence:
    """What this process does of a list of items, or of the indices in a batch."""
    return items[rank()::world()]


def deal(batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, float]]:
    """This process's indices of each batch, and the factor that makes DDP's mean over processes the batch's mean."""
    for batch in batches:
        dealt = mine(batch)
        yield dealt, len(dealt) * world() / len(batch)


def gathered(parts: dict[int, Tensor]) -> list[Tensor]:
    """The parts of all processes, in the order of their numbers."""
    if world() == 1:
        return list(parts.values())
    everyones: list[dict[int, Tensor]] = [{}] * world()
    dist.all_gather_object(everyones, {number: part.cpu() for number, part in parts.items()})
    merged = {number: part for theirs in everyones for number, part in theirs.items()}
    return [merged[number] for number in sorted(merged)]


@contextmanager
def joined(model: nn.Module) -> Iterator[nn.Module]:
    """The model for training on slices of a batch: gradients are averaged (DDP), BatchNorm sees all slices.

    The model is left as it was; with one process it is yielded as it is.
    """
    if world() == 1:
        yield model
        return
    norms = [(parent, name, norm) for parent in model.modules() for name, norm in parent.named_children()
             if isinstance(norm, _BatchNorm)]
    for parent, name, norm in norms:
        if next(model.parameters()).is_cuda:  # torch's own is for GPUs only; it shares weights and statistics with norm
            setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(norm))
        else:
            norm.forward = partial(_batch_norm, norm)  # shadows the method until it is deleted
    try:
        yield DistributedDataParallel(model, broadcast_buffers=False)  # equal buffers need no broadcast
    finally:
        for parent, name, norm in norms:
            setattr(parent, name, norm)
            vars(norm).pop("forward", None)


def _batch_norm(norm: _BatchNorm, inputs: Tensor) -> Tensor:
    """BatchNorm over the slices of all processes, on a CPU."""
    if not norm.training:
        return type(norm).forward(norm, inputs)
    given, inputs = inputs.dtype, inputs.to(norm.weight.dtype)  # statistics in fp32, under autocast too
    dims = [0, *range(2, inputs.dim())]
    shape = (1, -1, *[1] * (inputs.dim() - 2))
    count = inputs.new_full((1,), inputs.numel() / inputs.shape[1])
    sums = all_reduce(torch.cat([inputs.sum(dims), count]))
    n = sums[-1].detach()
    mean = sums[:-1] / n
    centred = inputs - mean.view(shape)
    variance = all_reduce(centred.square().sum(dims)) / n
    with torch.no_grad():
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * n / (n - 1), norm.momentum)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return (centred * scale.view(shape) + norm.bias.view(shape)).to(given)
