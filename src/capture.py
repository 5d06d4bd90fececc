"""A training step as a CUDA graph: recorded once, then replayed by a single launch instead of some hundred."""

from collections.abc import Callable

import torch
from torch import Tensor

EAGER_STEPS = 3  # before the recording: by then momentum, cuBLAS and cuDNN have what they make at their first use


class Captured:
    """A training step that runs as it is three times, is recorded, and replayed from then on.

    A replay launches the same kernels on the same memory. So the step must do the same to whatever indices it is given,
    and must neither wait for the device nor upload to it; weights, momentum, images, labels and masks must stay where
    they are. An LR that changes takes a new recording. Another number of indices than the recorded one is not replayed.
    """

    def __init__(self, step: Callable[[Tensor, int], tuple[Tensor, ...]]) -> None:
        """step: takes the indices of its images on the device, (B,) int64, and B; returns tensors on the device."""
        self.step, self.calls, self.index = step, 0, None
        self.stream = torch.cuda.Stream()  # one for all: cuBLAS and autograd keep things for each stream

    def __call__(self, index: Tensor, n: int) -> tuple[Tensor, ...]:
        """Run the step; what it returns holds until the next call."""
        self.calls += 1
        if self.calls > EAGER_STEPS and self.index is None:
            self._record(index, n)
        if self.index is None or len(index) != len(self.index):
            return self._run(index, n)
        self.index.copy_(index)
        self.graph.replay()
        return self.results

    def _run(self, index: Tensor, n: int) -> tuple[Tensor, ...]:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            results = self.step(index, n)
        torch.cuda.current_stream().wait_stream(self.stream)
        return results

    def _record(self, index: Tensor, n: int) -> None:
        """Note the step's kernels; none of them is run yet."""
        self.index, self.graph = index.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.results = self.step(self.index, n)
