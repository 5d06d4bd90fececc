"""Real trainings on the digits in processes of their own: to be killed, with planted faults, or under torchrun."""

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import sklearn.datasets  # noqa: F401  imported once for all processes
import torch
from torch import nn
from tqdm import tqdm

from src import checkpoint, masktune, parallel
from src.augmentation import Augmentation
from src.datasets import Images
from src.device import prepare
from src.experiments import stages, study
from src.experiments.recipes import DIGITS, FineTune, Places
from src.inference import infer
from src.masking import find_masks
from src.masks import Masks
from src.state import digest

SETTING = replace(DIGITS[0], erm=replace(DIGITS[0].erm, epochs=3, lr_halved_every=1),
                  finetune=FineTune(iterations=2, accumulate=True))
FAULTS = {"write_bytes": Path, "fsync": os, "replace": os}
load_data = stages.load_data

context = get_context("forkserver")  # torch is imported once, and each process is forked from a clean one
context.set_forkserver_preload(["tests.harness"])


def first_images(*arguments: object, n: int = 320) -> Images:
    """What `load_data` gives, cut short, to be quick: ten steps an epoch instead of 43."""
    data = load_data(*arguments)
    return Images(data.images[:n], data.labels[:n], data.classes, data.groups[:n], data.group_names,
                  Masks.of(data.known[:n]))


def train(folder: Path, ready: Connection, fault: str | None = None, write: int = 0) -> None:
    """ERM and MaskTune with two iterations, saved after each epoch; killed at a write's fault, if named."""
    prepare()
    sys.stdout = (folder / "log").open("a", buffering=1)
    sys.stderr = (folder / "errors").open("a", buffering=1)
    tqdm.set_lock(threading.RLock())  # its own would be a semaphore that a killed process leaves behind
    stages.load_data = first_images
    pack = checkpoint._pack
    checkpoint._pack = lambda state, config, whole: pack(state, config, whole=True)  # to compare optimizers, too
    if fault:
        plant(fault, write)
    ready.send("ready")
    stages.run(Places(folder), SETTING, seed=0)


def plant(fault: str, write: int) -> None:
    """Kill this process inside its write number `write`, counted from 0: as a function begins, or half of the file."""
    real, calls = getattr(FAULTS[fault], fault), count()

    def killed(*arguments):
        if next(calls) == write:
            if fault == "write_bytes":
                real(arguments[0], arguments[1][:len(arguments[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    setattr(FAULTS[fault], fault, killed)


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


def double(number: int) -> tuple[int, int, int]:
    """Twice a number, with the process and its threads; an error if it is negative, or this process torchrun's."""
    if number < 0 or "WORLD_SIZE" in os.environ:
        time.sleep(0.5)  # the others are done by then
        raise ValueError(f"{number} is negative")
    return 2 * number, os.getpid(), torch.get_num_threads()


def main(folder: Path, killed: str = "") -> None:
    """What torchrun's processes do, ERM and MaskTune, but no study; and what they do to the bits of one process.

    Those are masks and logits, and a repair of a network without BatchNorm, in double precision. Then, where another
    folder is given, all over again for that; but process 1 kills itself in the second iteration, whose masks depend on
    BatchNorm's statistics.
    """
    prepare()
    torch.set_num_threads(1)
    parallel.start()
    stages.load_data = partial(first_images, n=549)  # two batches of masks, 18 of training, the last of 5
    if parallel.world() > 1:
        stages.run_all((SETTING,), seeds=(0,), places=Places(folder))
        try:
            study.ask([SETTING], "results", places=Places(folder, results=folder))
        except RuntimeError as refused:
            print(refused)
    data, model = stages.load_data(Places(), SETTING.erm), stages.new_model(0)
    seen = find_masks(model, data.images, batch_size=100).bits, infer(model, data.images, batch_size=100)
    torch.manual_seed(0)
    own = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).double()
    own, report = masktune(own, replace(data, groups=None), layer="1", lr=0.1, batch_size=32, iterations=2,
                           loss=nn.CrossEntropyLoss(torch.tensor([1.0, 9.0])), holes="transplants",
                           augment=Augmentation(side=28), tests={"again": data})
    if parallel.rank() == 0:
        repaired = own.state_dict(), report.hidden, report.after["again"].average
        torch.save((seen, repaired), folder.with_suffix(".found"))
    if killed:
        joined, calls = parallel.joined, count()
        if parallel.rank() == 1:
            parallel.joined = lambda model: joined(model) if next(calls) < 4 else os.kill(os.getpid(), signal.SIGKILL)
        stages.run_all((SETTING,), seeds=(0,), places=Places(Path(killed)))
    parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
