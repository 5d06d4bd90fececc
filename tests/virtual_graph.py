"""CUDA graphs of the virtual device: what is recorded is not computed, a replay computes it on the same memory.

    with gpu() as device, virtual_graphs(device) as graphs:
        ...  # torch.cuda.graph, CUDAGraph and streams are the virtual device's
    graphs  # all that were made; each counts its replays
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.virtual_device import VirtualDevice


class VirtualGraph:
    """The operations recorded on the virtual device, with the very tensors that they took and gave."""

    def __init__(self) -> None:
        self.operations, self.before, self.made, self.replays = [], {}, {}, 0

    def record(self, func, args: tuple, kwargs: dict) -> object:
        """Compute an operation, so that the next one has shapes to go by; `end` takes it back."""
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self.before | self.made:
                self.before[storage._cdata] = storage, storage.clone()
        result = func(*args, **kwargs)
        self.made |= {storage._cdata: storage for storage in _storages(result) if storage._cdata not in self.before}
        self.operations.append((func, args, kwargs, result))
        return result

    def end(self) -> None:
        """Bring all memory back to where it was; what was made in between holds nothing yet: NaN, or -1."""
        for storage, content in self.before.values():
            storage.copy_(content)
        for storage in self.made.values():
            storage.fill_(255)

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, result in self.operations:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                    old.copy_(new)


def _storages(item: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(item) if isinstance(leaf, Tensor)]


@contextmanager
def virtual_graphs(device: VirtualDevice) -> Iterator[list[VirtualGraph]]:
    """Put the virtual device's graphs in the place of CUDA's; all its streams are one."""
    graphs = []

    def new() -> VirtualGraph:
        graphs.append(VirtualGraph())
        return graphs[-1]

    @contextmanager
    def recording(graph: VirtualGraph, stream: object) -> Iterator[None]:
        device.recording = graph
        try:
            yield
        finally:
            device.recording = None
            graph.end()

    stream = SimpleNamespace(wait_stream=lambda other: None)
    with pytest.MonkeyPatch.context() as patch:
        for name, ours in {"CUDAGraph": new, "graph": recording, "Stream": lambda: stream,
                           "current_stream": lambda: stream, "stream": lambda _: nullcontext()}.items():
            patch.setattr(torch.cuda, name, ours)
        yield graphs
