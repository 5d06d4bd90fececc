"""Train from a terminal, on one device or several: `python -m src.experiments waterbirds`, or under `torchrun`.

    torchrun --standalone --nproc-per-node 8 -m src.experiments waterbirds --seeds 0 1 2

The checkpoints are those of the notebook. `studies`, `holes`, `marks` and `birds` train what is missing and measure
every row of results/ on MNIST, on digits on other backgrounds, on photographs with a mark and in
data/waterbirds_rebuilt. Seeds are best trained side by side, one on each GPU; torchrun is for one large training.
"""

import argparse

from .. import parallel
from ..device import prepare
from . import questions, selective, stages, study
from .recipes import ALL, BIRDS, HOLES, MARKS, MNIST, SELECTIVE, TWO

STUDIES = {"studies": MNIST, "holes": (HOLES, TWO), "marks": MARKS, "birds": BIRDS[1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=[*ALL, *STUDIES])
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those of the setting")
    parser.add_argument("--processes", type=int, help="large trainings at once, if not one on each GPU")
    arguments = parser.parse_args()
    if arguments.setting in STUDIES and (arguments.seeds or arguments.processes):
        parser.error("a study has seeds and processes of its own")
    prepare()
    parallel.start()
    try:
        if arguments.setting in ALL:
            stages.run_all((ALL[arguments.setting],), arguments.seeds, arguments.processes)
            if ALL[arguments.setting] in SELECTIVE and not arguments.seeds:
                selective.selective_study(ALL[arguments.setting])
        else:
            if arguments.setting == "studies":
                stages.run_all(MNIST)
            for setting in STUDIES[arguments.setting]:
                study.ask([setting], *questions.of(setting))
    finally:
        parallel.stop()


if __name__ == "__main__":
    main()
