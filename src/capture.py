"""A training step as a CUDA graph: recorded once, then replayed by a single launch instead of some hundred."""

from collections.abc import Callable

import torch
from torch import Tensor

EAGER_STEPS = 3  # before the recording: by then momentum, cuBLAS and cuDNN have what they make at their first use


class Captured:
    """A training step that runs as it is three times, is recorded, and replayed from then on.

    A replay launches the same kernels on the same memory. So the step must do the same to whatever batch it is given,
    and must neither wait for the device nor upload to it; weights, momentum, images, labels and masks must stay where
    they are. An LR that changes takes a new recording. A batch of another size than the recorded one is not replayed.
    """

    def __init__(self, step: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        """step: takes the indices of a batch, (B,) int64 on the device; returns tensors on the device."""
        self.step, self.calls, self.batch = step, 0, None
        self.stream = torch.cuda.Stream()  # one for all: cuBLAS and autograd keep things for each stream

    def __call__(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Run the step; what it returns holds until the next call."""
        self.calls += 1
        if self.calls > EAGER_STEPS and self.batch is None:
            self._record(batch)
        if self.batch is None or len(batch) != len(self.batch):
            return self._run(batch)
        self.batch.copy_(batch)
        self.graph.replay()
        return self.results

    def _run(self, batch: Tensor) -> tuple[Tensor, ...]:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            results = self.step(batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        return results

    def _record(self, batch: Tensor) -> None:
        """Note the step's kernels; none of them is run yet."""
        self.batch, self.graph = batch.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.results = self.step(self.batch)
