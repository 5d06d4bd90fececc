"""Train from a terminal, on one device or several: `python -m src.train waterbirds`, or under `torchrun`.

    torchrun --standalone --nproc-per-node 8 -m src.train waterbirds --seeds 0 1 2

The stages are those of the notebook, and so are the checkpoints: run it, and the notebook loads them.
"""

import argparse

from src import experiments, parallel
from src.recipes import DIGITS, MNIST, PHOTOGRAPHS, SELECTIVE
from src.training import prepare

SETTINGS = {setting.name: setting for setting in (*MNIST, *DIGITS, *PHOTOGRAPHS, *SELECTIVE)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those of the setting")
    arguments = parser.parse_args()
    setting = SETTINGS[arguments.setting]
    prepare()
    parallel.start()
    try:
        for seed in arguments.seeds or setting.seeds:
            experiments.run(setting, seed)
    finally:
        parallel.stop()


if __name__ == "__main__":
    main()
