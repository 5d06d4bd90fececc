"""A real training on the digits in a process of its own, to be killed, and faults to plant in it."""

import os
import signal
import sys
import threading
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import sklearn.datasets  # noqa: F401  imported once for all processes
import torch
from tqdm import tqdm

from src import checkpoint, experiments
from src.datasets import SpuriousDigits
from src.experiments import load_data
from src.recipes import DIGITS, Erm, FineTune
from src.state import digest
from src.training import prepare

SETTING = replace(DIGITS[0], erm=replace(DIGITS[0].erm, epochs=2, lr_halved_every=1), save_steps=3,
                  finetune=FineTune(iterations=2, accumulate=True))
IMAGES = 320  # of the 1,347, to be quick: ten steps an epoch
FAULTS = ("before the file", "half written", "before fsync", "before replace", "after replace")

context = get_context("forkserver")  # torch is imported once, and each process is forked from a clean one
context.set_forkserver_preload(["tests.harness"])


def train(folder: Path, ready: Connection, fault: str | None = None, write: int = 0) -> None:
    """ERM, RandMask and MaskTune with two iterations, saved at every 3rd step; killed at a write's fault, if named."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
    prepare()
    torch.set_num_threads(1)
    sys.stdout = (folder / "log").open("a", buffering=1)
    sys.stderr = (folder / "errors").open("a", buffering=1)
    tqdm.set_lock(threading.RLock())  # its own would be a semaphore that a killed process leaves behind
    experiments.CHECKPOINTS = folder
    experiments.load_data = first_images
    pack = checkpoint._pack
    checkpoint._pack = lambda state, config, whole: pack(state, config, whole=True)  # to compare optimizers, too
    if fault is not None:
        plant(fault, write)
    ready.send("ready")
    experiments.run(SETTING, seed=0)


def first_images(erm: Erm, seed: int, test_set: str | None = None, count: int = IMAGES) -> SpuriousDigits:
    data = load_data(erm, seed, test_set)
    for name in ("images", "labels", "squares"):
        setattr(data, name, getattr(data, name)[:count])
    return data


def plant(fault: str, write: int) -> None:
    """Kill this process at one moment of its write number `write`, counted from 0."""
    writes = -1
    real = {name: getattr(os, name) for name in ("fdopen", "fsync", "replace")}

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    class Half:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, content):
            self.file.write(content[:len(content) // 2])
            self.file.flush()
            die()

    def fdopen(*arguments):
        nonlocal writes
        writes += 1
        if writes == write and fault == "before the file":
            die()
        file = real["fdopen"](*arguments)
        return Half(file) if writes == write and fault == "half written" else file

    def fsync(handle):
        if writes == write and fault == "before fsync":
            die()
        real["fsync"](handle)

    def swap(*arguments):
        if writes == write and fault == "before replace":
            die()
        real["replace"](*arguments)
        if writes == write and fault == "after replace":
            die()

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
