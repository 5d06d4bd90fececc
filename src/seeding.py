"""Where every random choice of the project comes from."""

import hashlib
import operator
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a CPU generator that is a pure function of the seed and the purpose.

    `generator(0, "order", 7)` is the same stream on every machine and at every moment of a run, so an interrupted run
    needs no saved generator state, and drawing for one purpose never shifts another.
    """
    digest = hashlib.sha256(repr((operator.index(seed), *purpose)).encode()).digest()  # NumPy's 0 is Python's 0
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def epoch_order(n: int, seed: int, epoch: int, order: int = 0) -> torch.Tensor:
    """Return the order in which an epoch visits n samples: (n,) int64, a permutation.

    `order` numbers alternatives for the same seed and epoch.
    """
    return torch.randperm(n, generator=generator(seed, "order", epoch, *([order] if order else [])), device="cpu")


@contextmanager
def seeded(seed: int, *purpose: str | int) -> Iterator[None]:
    """Inside the block, what draws without a generator depends on the arguments alone; afterwards all is as it was.

    That is dropout and augmentations that are not ours: the global generators of torch, on the CPU and on the GPU in
    use, of NumPy and of Python.
    """
    start = generator(seed, *purpose).initial_seed()
    python, legacy = random.getstate(), numpy.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(start)
        random.seed(start)
        numpy.random.seed(start % 2 ** 32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(legacy)  # noqa: NPY002
