"""Train from a terminal, on one device or several: `python -m src.experiments waterbirds`, or under `torchrun`.

    torchrun --standalone --nproc-per-node 8 -m src.experiments waterbirds --seeds 0 1 2

The stages are those of the notebook, and so are the checkpoints: run it, and the notebook loads them. `studies` trains
what is missing of the MNIST experiment and measures every row of results/ on it; `demonstration` measures those of
`masktune()` on a network of one's own; `birds` trains and measures the study on photographs, whose files are in
data/waterbirds_rebuilt.
"""

import argparse

from .. import parallel
from ..device import prepare
from . import birds, demonstration, stages, studies
from .recipes import BIRDS, DIGITS, MNIST, PHOTOS, SELECTIVE

SETTINGS = {setting.name: setting for setting in (*MNIST, *DIGITS, *PHOTOS, *BIRDS, *SELECTIVE)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=[*SETTINGS, "studies", "demonstration", "birds"])
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those of the setting")
    parser.add_argument("--processes", type=int, default=1,
                        help="large trainings at once, which share the CPU's cores; of the SmallCNN, one on each core")
    arguments = parser.parse_args()
    prepare()
    parallel.start()
    try:
        if arguments.setting == "studies":
            stages.run_all(MNIST)
            studies.ask(MNIST, *studies.QUESTIONS)
            studies.ratio_study(MNIST[0])
        elif arguments.setting == "demonstration":
            demonstration.demonstrate()
        elif arguments.setting == "birds":
            birds.choose(BIRDS[1])
            for question in birds.QUESTIONS:
                birds.ask(BIRDS[1], question)
        else:
            stages.run_all((SETTINGS[arguments.setting],), arguments.seeds, arguments.processes)
    finally:
        parallel.stop()


if __name__ == "__main__":
    main()
