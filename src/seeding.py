"""Where every random choice of the project comes from."""

import hashlib
import operator

import torch


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a CPU generator that is a pure function of the seed and the purpose.

    `generator(0, "order", 7)` is the same stream on every machine and at every moment of a run, so an interrupted run
    needs no saved generator state, and drawing for one purpose never shifts another.

    Raises:
        TypeError: the seed is not a whole number.
    """
    digest = hashlib.sha256(repr((operator.index(seed), *purpose)).encode()).digest()  # NumPy's 0 is Python's 0
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def epoch_order(n: int, seed: int, epoch: int, order: int = 0) -> torch.Tensor:
    """Return the order in which an epoch visits n samples: (n,) int64, a permutation.

    `order` numbers alternatives for the same seed and epoch, so that what one order did can be told from what the
    epoch does.
    """
    return torch.randperm(n, generator=generator(seed, "order", epoch, *([order] if order else [])))
