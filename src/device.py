"""What computes, with how many threads, and how to name it."""

import ctypes
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]


def best_device() -> torch.device:
    """CUDA when present, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def room_for(images: Tensor, device: torch.device | None = None) -> torch.device:
    """Where images are kept: on the GPU if they take less than half of what is free there, else where they are."""
    device = device or best_device()
    if device.type == "cuda":  # what torch's allocator has cached is free, too
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if images.nbytes > (torch.cuda.mem_get_info(device)[0] + cached) / 2:
            return images.device
    return device


def prepare() -> None:
    """Set up a process of our own, before its first CUDA operation: the same bits at every run, freed memory kept."""
    be_deterministic()
    keep_freed_memory(True)


def be_deterministic() -> None:
    """The same bits at every run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)  # an operation without such an algorithm says so
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    torch.backends.cudnn.benchmark = False


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Compute on a device, the same bits each time, with gradients, whatever the caller has set; that is put back."""
    memory, cudnn = torch.utils.deterministic, torch.backends.cudnn
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
              memory.fill_uninitialized_memory, cudnn.benchmark)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"expected device to be there, got {device}, and PyTorch sees no CUDA; leave device= out")
    with (torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False),
          torch.cuda.device(device if device.type == "cuda" else -1)):
        try:
            be_deterministic()
            yield
        finally:
            if workspace is None:
                os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            memory.fill_uninitialized_memory, cudnn.benchmark = before[2:]


def keep_freed_memory(keep: bool) -> None:
    """Let glibc keep what is freed, or give it back to the system, its default; other C libraries do as they do.

    Given back, the activations of every step are faulted in again in the next: half the time of an evaluation.
    """
    with suppress(AttributeError, OSError):
        for option, kept, usual in ((-4, 0, 65_536), (-1, 2 ** 30, 2 ** 17)):  # M_MMAP_MAX, M_TRIM_THRESHOLD: malloc.h
            ctypes.CDLL(None).mallopt(option, kept if keep else usual)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute with this many CPU threads inside the block. One thread gives the same bits on any number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def processor() -> str:
    """The processor's name, with family and model where Linux tells them: they decide how sums are rounded."""
    with suppress(OSError, KeyError):
        facts = dict(re.findall(r"(\S.*?)\s*: (.*)", Path("/proc/cpuinfo").read_text().split("\n\n")[0]))
        return f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"
    return platform.processor() or platform.machine() or "unknown processor"


def device_name(device: torch.device) -> str:
    """Name a device as a reader would: the GPU's own name, or the processor and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' if threads > 1 else ''}"


def made_with() -> str:
    """Name what produces the numbers: Python, torch, device, and the commit with a mark where files differ from it.

    Files under results/ and checkpoints/ do not count: what writes this line writes there.
    """
    commit, git = "unknown", partial(subprocess.check_output, cwd=ROOT, text=True, stderr=subprocess.DEVNULL)
    with suppress(OSError, subprocess.CalledProcessError):  # no git here
        if (ROOT / ".git").exists():  # not a repository that happens to lie around an archive
            changed = git(["git", "status", "--porcelain", "--untracked-files=no", "--", ":(exclude)results",
                           ":(exclude)checkpoints"])
            commit = git(["git", "describe", "--always"]).strip() + ("-dirty" if changed else "")
    return (f"Python {platform.python_version()}, torch {torch.__version__}, {device_name(best_device())}, "
            f"commit {commit}")
