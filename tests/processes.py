"""One training on the digits, alone or in the processes that torchrun starts: `python -m tests.processes FOLDER`."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from src import experiments, parallel
from src.augmentation import Augmentation
from src.recipes import DIGITS, FineTune
from src.training import prepare
from tests.harness import first_images

ERM = replace(DIGITS[0].erm, epochs=2, lr_halved_every=1, augmentation=Augmentation(side=28))
SETTING = replace(DIGITS[0], erm=ERM, save_steps=3, finetune=FineTune(iterations=2, accumulate=True))


def main(folder: Path, dies: str = "") -> None:
    """ERM, RandMask and MaskTune on 309 images in batches of 32, the last of 21; process 1 kills itself if told so."""
    prepare()
    torch.set_num_threads(1)
    parallel.start()
    experiments.CHECKPOINTS = folder
    experiments.load_data = lambda *arguments: first_images(*arguments, count=309)
    if dies and parallel.rank() == 1:
        share, calls = parallel.share, iter(range(10 ** 6))

        def die_later(items):
            if next(calls) == 8:  # in the first epoch of ERM
                os.kill(os.getpid(), signal.SIGKILL)
            return share(items)

        parallel.share = die_later
    experiments.run(SETTING, seed=0)
    parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
