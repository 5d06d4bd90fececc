"""Train from a terminal, on one device or several: `python -m src.experiments waterbirds`, or under `torchrun`.

    torchrun --standalone --nproc-per-node 8 -m src.experiments waterbirds --seeds 0 1 2

The stages are those of the notebook, and so are the checkpoints: run it, and the notebook loads them. `studies` trains
what is missing of the MNIST experiment and measures every row of results/ on it; `demonstration` measures those of
`masktune()` on a network of one's own; `holes` those of digits on other backgrounds; `marks` of photographs with a
mark, and `birds` of those in data/waterbirds_rebuilt. Seeds are best trained side by side, one on each GPU; torchrun is
for one large training.
"""

import argparse

from .. import parallel
from ..device import prepare
from . import demonstration, questions, stages, study
from .recipes import ALL, BIRDS, HOLES, MARKS, MNIST


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=[*ALL, "studies", "demonstration", "holes", "marks", "birds"])
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those of the setting")
    parser.add_argument("--processes", type=int,
                        help="large trainings at once, one on each GPU if not given; of the SmallCNN, one on each core")
    arguments = parser.parse_args()
    prepare()
    parallel.start()
    try:
        if arguments.setting in ALL:
            stages.run_all((ALL[arguments.setting],), arguments.seeds, arguments.processes)
        elif arguments.setting == "studies":
            stages.run_all(MNIST)
            study.ask(MNIST, *questions.ON_SQUARES)
        elif arguments.setting == "demonstration":
            demonstration.demonstrate()
        elif arguments.setting == "holes":
            study.ask([HOLES], *questions.ON_BACKGROUNDS)
        elif arguments.setting == "marks":
            for setting in MARKS:
                study.ask([setting], *questions.of(setting))
        else:
            study.choose()
            study.ask(BIRDS[1:], *questions.ON_PHOTOGRAPHS)
    finally:
        parallel.stop()


if __name__ == "__main__":
    main()
