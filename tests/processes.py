"""Work for other processes: `python -m tests.processes FOLDER` is one training, alone or in those of torchrun."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from src import parallel
from src.augmentation import Augmentation
from src.device import prepare
from src.experiments import stages
from src.experiments.recipes import DIGITS, FineTune
from tests.harness import first_images

ERM = replace(DIGITS[0].erm, epochs=2, lr_halved_every=1, augmentation=Augmentation(side=28))
SETTING = replace(DIGITS[0], erm=ERM, finetune=FineTune(iterations=2, accumulate=True))


def main(folder: Path, dies: str = "") -> None:
    """ERM and MaskTune on 309 images in batches of 32, the last of 21; process 1 kills itself if told so."""
    prepare()
    parallel.start()
    stages.CHECKPOINTS = folder
    stages.load_data = lambda *arguments: first_images(*arguments, count=309)
    if dies and parallel.rank() == 1:
        mine, calls = parallel.mine, iter(range(10 ** 6))

        def die_later(items):
            if next(calls) == 15:  # in the second epoch of ERM: each takes one call before its ten batches
                os.kill(os.getpid(), signal.SIGKILL)
            return mine(items)

        parallel.mine = die_later
    stages.run_all((SETTING,), seeds=(0,))
    parallel.stop()


def double(number: int) -> tuple[int, int, int]:
    """Twice a number, with the process and its threads; an error if the number is negative."""
    if number < 0:
        raise ValueError(f"{number} is negative")
    return 2 * number, os.getpid(), torch.get_num_threads()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
