"""What is asked of a setting: a question is a list of changes to the base condition; each condition is one row.

A condition may change the data (`ratio`, `DATA`), ERM (`erm_epochs`), the masks (`method`, `k`, `cam`, `layer`), what
is shown there (`holes`), and the epoch (`lr`, `order`, `iteration`, `accumulate`, `batchnorm`, `weighted`).
"""

from dataclasses import replace
from itertools import product

from ..datasets import DIGIT_SETS
from ..datasets.spurious import BACKGROUNDS
from ..holes import HOLES
from .recipes import MARKS, MNIST, Setting
from .rows import Row

ORACLES = ("known hidden", "rest hidden")  # perfect masks: the square or the bird is hidden, or all but it
BASE: Row = {  # MaskTune as the paper has it; LR, layer, ERM's epochs and the ratio are those of the setting
    "method": "masktune",  # or "erm"; "plain", the epoch without masks; "randmask"; the oracles; "dfr": the last layer
    # fitted anew with the groups equally large (Kirichenko et al. 2023), on the validation images if there are any,
    # else on the training images
    "order": 0,  # in which the epoch visits the images
    "lr": 0.01,
    "k": 2.0,
    "cam": "XGradCAM",  # of the predicted class; "label": of the label (paper's formula); others are the grad-cam
    # library's; "random": uniform noise of the saliency layer's size, resized and cut off as every other map
    "layer": "own",  # to be explained; "own": the one that the model names
    "holes": "black",  # what is shown there: a name in `KINDS`
    "weighted": False,  # whether the loss weights classes inversely to their size
    "batchnorm": "moving",  # its statistics, as in train mode; or "frozen" at ERM's
    "iteration": 1,  # the last of so many iterations; 0: until nothing new is found, as `masktune(iterations=None)`
    "accumulate": False,  # whether hidden pixels stay hidden in the next iteration
    "erm_epochs": 100,  # after which masks and fine-tune start
}
DATA = ("background", "place", "side", "opacity", "marks")  # options of data sets that a condition may change
SEEDS = (0, 1, 2)  # of every question but those of `ALL_SEEDS`, which take all
ALL_SEEDS = ("results", "benchmark", "holes", "large", "price", "lr of holes", "each")
_TRANSPLANTS = HOLES["transplants"]
KINDS = {  # what is shown in holes; all but the first three are parts of transplants, for two classes
    **HOLES, "transplants, black": replace(_TRANSPLANTS, fill="black"),
    "transplants, not grown": replace(_TRANSPLANTS, grow=0.0),
    "transplants, q = 1/2": replace(_TRANSPLANTS, own=0.5),  # of ten classes it would be 1/18
    **{f"transplants, q = {q}, r = {r}": replace(_TRANSPLANTS, own=q, theirs=r)
       for q, r in product((0.0, 0.5, 1.0), repeat=2) if (q, r) != (0.5, 0.5)}}
REPAIRS: list[Row] = [{"method": "masktune", "holes": kind} for kind in HOLES]
PERFECT: list[Row] = [{"method": "known hidden", "holes": kind} for kind in HOLES]
_FEW = [{"method": "erm"}, *REPAIRS, *PERFECT]
_CONTROLS: list[Row] = [{"method": "plain"}, {"method": "randmask", "holes": "transplants"}]
ABLATION = [{"holes": kind} for kind in KINDS if kind not in ("black", "transplants, q = 1/2")]
THRESHOLDS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)  # k in m + k s
CAMS = ("XGradCAM", "label", "GradCAM", "GradCAMPlusPlus", "LayerCAM", "EigenCAM", "random")
FINETUNE_LRS = (0.01, 0.005, 0.0025, 0.00125)  # the four of ERM's schedule: official code's first to paper's last
ON_SQUARES: dict[str, list[Row]] = {
    "results": [{"method": "erm"}] + [{"method": method, "order": order} for method in ("randmask", "masktune")
                                      for order in range(5)],
    "lr": [{"lr": lr} for lr in FINETUNE_LRS],
    "reference": [{"method": "plain"}, {"method": "dfr"}],
    "threshold": [{"k": k} for k in THRESHOLDS],
    "cam": [{"cam": cam} for cam in CAMS],
    "batchnorm": [{"batchnorm": kind} for kind in ("moving", "frozen")],
    "iterations": [{}] + [{"iteration": i, "accumulate": accumulate} for accumulate in (False, True) for i in (2, 3)],
    "ratio": [{"method": method, "ratio": ratio, "erm_epochs": 10}
              for ratio in (0.0, 0.001, 0.01, 0.05, 0.2) for method in ("erm", "masktune")],
    "holes": [*({"holes": kind, "order": order} for kind in HOLES for order in range(5)), *PERFECT],
}
ON_BACKGROUNDS: dict[str, list[Row]] = {
    "holes": [{"background": background, "ratio": ratio, **change, **({} if change["method"] == "erm" else {"lr": lr})}
              for background, (ratio, lr), change in product(
                  BACKGROUNDS, ((0.0, 0.01), (0.0, 0.003), (0.01, 0.01)), [*_FEW, *_CONTROLS])],
    "large": [{"background": background, "ratio": 0.0, "size": 60_000, "erm_epochs": 10, **change}
              for background in ("black", "white") for change in _FEW],
    "ablation": [{"background": background, **change} for background in ("white", "grey") for change in ABLATION],
}
ON_TWO_SQUARES: dict[str, list[Row]] = {"results": [
    {"background": background, **change} for background in ("white", "black") for change in (
        {"method": "erm"}, *({"holes": kind, "iteration": i, "accumulate": True}
                             for kind, i in product(HOLES, (1, 2, 3, 0))))]}
BIRD_LRS = (0.001, 0.003, 0.01)
LAYERS = ("features", "features.14.conv.0", "features.7.conv.0", "features.13")  # the last block, its map 5x5; then two
# that end in a ReLU, of 10x10 and 20x20; and one that does not, of 10x10
ON_PHOTOGRAPHS: dict[str, list[Row]] = {
    "benchmark": [{"method": "erm"}, {"method": "masktune"}],
    "results": [{"method": method} for method in ("erm", "plain", "randmask", "masktune", *ORACLES[::-1], "dfr")],
    "lr": [{"method": method, "lr": lr} for method in ("plain", "masktune", "rest hidden") for lr in BIRD_LRS],
    "layer": [{"layer": layer} for layer in LAYERS],
    "k": [{"k": k} for k in (0.0, 1.0, 2.0)],
    "iterations": [{}, *({"iteration": i, "accumulate": True} for i in (2, 3))],
    "lateness": [{"method": method, "erm_epochs": epochs} for method in ("erm", "masktune") for epochs in (1, 2, 5)],
    "holes": [*({"layer": layer, "k": k, "holes": kind}
                for layer, k, kind in product(LAYERS[:2], (0.0, 1.0, 2.0), ("black", "transplants"))),
              *({"method": "rest hidden", "holes": "transplants", "weighted": weighted} for weighted in (False, True))],
}
ON_MARKS: dict[str, list[Row]] = {
    "results": [{"method": "erm"}, {"method": "randmask"}, *({"lr": lr, **change} for lr, change in product(
        BIRD_LRS, [*_CONTROLS[:1], *REPAIRS, *PERFECT]))],
    "layer": [{"layer": layer, "k": k, "holes": kind}
              for layer, k, kind in product(LAYERS[:3], (1.0, 2.0), HOLES)],
    **{name: [{name: value, "holes": kind} for value, kind in product(values, HOLES)] for name, values in (
        ("place", ("corner", "random")), ("side", (0.08, 0.12, 0.2)), ("opacity", (0.3, 0.6, 1.0)),
        ("ratio", (0.0, 0.01, 0.05)))},
    "each": [{"marks": "each", **change} for change in _FEW],
    "price": [{"marks": marks, **change} for marks in ("none", "both")
              for change in (_FEW[0], *_CONTROLS[:1], *REPAIRS)],
    "ablation": ABLATION,
}
ON_OTHER_MARKS: dict[str, list[Row]] = {"results": [*_FEW, {"holes": "transplants, q = 1/2"}]}


def of(setting: Setting) -> dict[str, list[Row]]:
    """The questions that can be asked of a setting, by name."""
    if setting.erm.dataset == "SpuriousImagenette":
        return ON_MARKS if setting == MARKS[0] else ON_OTHER_MARKS
    if "squares" in setting.erm.options:
        return ON_TWO_SQUARES
    if "background" in setting.erm.options:
        return ON_BACKGROUNDS
    return ON_SQUARES if setting.erm.dataset in DIGIT_SETS else ON_PHOTOGRAPHS


def base(setting: Setting) -> Row:
    """The condition from which all others of a setting differ."""
    options = {"ratio" if name == "class_mix_ratio" else name: value for name, value in setting.erm.options.items()
               if name in (*DATA, "class_mix_ratio")}
    return {**BASE, "lr": setting.finetune.lr, "layer": setting.erm.layer or "own", "erm_epochs": setting.erm.epochs,
            **options}


def conditions(setting: Setting, *questions: str) -> list[Row]:
    """What some questions ask of a setting, each condition once."""
    found = {}
    for question in questions:
        seeds = [seed for seed in setting.seeds if question in ALL_SEEDS or seed in SEEDS]
        if question == "ratio" and setting in MNIST[1:]:
            continue  # other ratios are drawn at random: one setting answers for all
        for seed, change in product(seeds, of(setting)[question]):
            condition = {"setting": setting.name, "seed": seed, **base(setting), **change}
            if _is_asked(setting, condition):
                found[tuple(condition.values())] = condition
    return list(found.values())


def _is_asked(setting: Setting, condition: Row) -> bool:
    empty = condition["method"] == "dfr" and condition.get("ratio") == 0  # two of the groups
    unknown = condition["method"] in ORACLES and setting.erm.dataset not in (  # the pixels
        *DIGIT_SETS, "Waterbirds, rebuilt", "SpuriousImagenette")
    return condition["order"] in setting.orders and not empty and not unknown
