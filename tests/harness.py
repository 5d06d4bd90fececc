"""A real training on the digits in a process of its own, to be killed, and faults to plant in it."""

import io
import os
import signal
import sys
import threading
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import sklearn.datasets  # noqa: F401  imported once for all processes
import torch
from tqdm import tqdm

from src import checkpoint
from src.device import prepare
from src.experiments import stages
from src.experiments.recipes import DIGITS, FineTune
from src.state import digest

SETTING = replace(DIGITS[0], erm=replace(DIGITS[0].erm, epochs=3, lr_halved_every=1),
                  finetune=FineTune(iterations=2, accumulate=True))
IMAGES = 320  # of the 1,347, to be quick: ten steps an epoch
FAULTS = ("before the file", "half written", "before fsync", "before replace", "after replace")
load_data = stages.load_data

context = get_context("forkserver")  # torch is imported once, and each process is forked from a clean one
context.set_forkserver_preload(["tests.harness"])


def train(folder: Path, ready: Connection, fault: str | None = None, write: int = 0) -> None:
    """ERM and MaskTune with two iterations, saved after each epoch; killed at a write's fault, if named."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
    prepare()
    sys.stdout = (folder / "log").open("a", buffering=1)
    sys.stderr = (folder / "errors").open("a", buffering=1)
    tqdm.set_lock(threading.RLock())  # its own would be a semaphore that a killed process leaves behind
    stages.CHECKPOINTS = folder
    stages.load_data = first_images
    pack = checkpoint._pack
    checkpoint._pack = lambda state, config, whole: pack(state, config, whole=True)  # to compare optimizers, too
    if fault is not None:
        plant(fault, write)
    ready.send("ready")
    stages.run(SETTING, seed=0)


def first_images(*arguments: object, count: int = IMAGES) -> SimpleNamespace:
    """What `load_data` gives, cut short."""
    data = load_data(*arguments)
    return SimpleNamespace(**{name: getattr(data, name)[:count] for name in ("images", "labels", "squares")})


def plant(fault: str, write: int) -> None:
    """Kill this process at one moment of its write number `write`, counted from 0."""
    writes = -1
    real = {name: getattr(os, name) for name in ("fdopen", "fsync", "replace")}

    def reach(moment: str) -> None:
        if writes == write and fault == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    class Half(io.FileIO):
        def write(self, content: bytes) -> None:
            super().write(content[:len(content) // 2])
            reach("half written")

    def fdopen(handle: int, mode: str) -> io.IOBase:
        nonlocal writes
        writes += 1
        reach("before the file")
        return Half(handle, mode) if writes == write and fault == "half written" else real["fdopen"](handle, mode)

    def fsync(handle: int) -> None:
        reach("before fsync")
        real["fsync"](handle)

    def swap(*paths: Path | str) -> None:
        reach("before replace")
        real["replace"](*paths)
        reach("after replace")

    os.fdopen, os.fsync, os.replace = fdopen, fsync, swap


def start(folder: Path, fault: str | None = None, write: int = 0) -> BaseProcess:
    """Start such a process and wait until its training begins."""
    ours, theirs = context.Pipe()
    process = context.Process(target=train, args=(folder, theirs, fault, write))
    process.start()
    theirs.close()
    ours.recv()
    return process


def results(folder: Path) -> dict[str, str]:
    """The content of each checkpoint by name: weights, optimizer, masks, history. Nothing else may be left there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in ("", ".lock"))
    return {path.name: digest(torch.load(path, weights_only=True)) for path in files}
