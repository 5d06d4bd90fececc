"""Several processes at one training, as `torchrun` starts them: who does what, and what they share.

A global batch is dealt out, one slice to each process; the loss and the gradient see the whole of it (DDP), and so does
BatchNorm on GPUs (SyncBatchNorm). On a CPU, its statistics are those of the first process's slices. Without torchrun,
everything here does nothing.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel


def start() -> None:
    """Join the processes that torchrun started, each on a GPU of its own where there are GPUs; none: do nothing."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        dist.init_process_group("gloo")


def stop() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; the first, 0, prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def bars() -> bool:
    """Whether this process shows progress bars: not beside others, nor where tqdm's own variable forbids it."""
    return rank() == 0 and not os.environ.get("TQDM_DISABLE")


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


def whole(local: Tensor, n: int) -> Tensor:
    """All processes' rows of a batch of n that was dealt out, of which this process's own keep their graph."""
    if world() == 1:
        return local
    local = local.float() if local.dtype in (torch.float16, torch.bfloat16) else local  # gloo knows no half precision
    padded = local.detach().new_zeros(-(-n // world()), *local.shape[1:])
    padded[:len(local)] = local.detach()
    parts = [torch.empty_like(padded) for _ in range(world())]
    dist.all_gather(parts, padded)
    parts = [part[:len(range(one, n, world()))] for one, part in enumerate(parts)]
    parts[rank()] = local
    return torch.cat(parts)


def gathered(parts: dict[int, Tensor]) -> list[Tensor]:
    """The parts of all processes, in the order of their numbers."""
    everyones: list[dict[int, Tensor]] = [parts] * world()
    if world() > 1:
        dist.all_gather_object(everyones, {number: part.cpu() for number, part in parts.items()})
    merged = {number: part for theirs in everyones for number, part in theirs.items()}
    return [merged[number] for number in sorted(merged)]


@contextmanager
def joined(model: nn.Module) -> Iterator[nn.Module]:
    """The model for training on slices of a batch; with one process it is yielded as it is. It is left as it was.

    ValueError: on GPUs, a BatchNorm that does more than torch's own, which SyncBatchNorm would leave out.
    """
    if world() == 1:
        yield model
        return
    on_gpu = next(model.parameters()).is_cuda
    norms = [(parent, name, norm) for parent in model.modules() for name, norm in parent.named_children()
             if on_gpu and isinstance(norm, _BatchNorm) and not isinstance(norm, nn.SyncBatchNorm)]
    for _, _, norm in norms:
        if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            raise ValueError(f"expected torch's own BatchNorm on several GPUs, got {type(norm).__name__}, which "
                             "SyncBatchNorm would train as a plain one; use one GPU")
    for parent, name, norm in norms:  # SyncBatchNorm shares weights and statistics with the one that it stands for
        setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(norm))
    try:
        yield DistributedDataParallel(model, static_graph=True)
        for buffer in model.buffers():  # which DDP takes from the first process before each step, not after the last
            dist.broadcast(buffer, 0)
    finally:
        for parent, name, norm in norms:
            setattr(parent, name, norm)
