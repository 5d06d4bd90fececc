"""What is asked of a setting: a question is a list of changes to the base condition; each condition is one row.

A condition may change the data (`ratio`, `DATA`), ERM (`erm_epochs`), the masks (`method`, `k`, `cam`, `layer`), what
holes show (`fill`, `grow`, `decoys`), and the epoch (`lr`, `order`, `iteration`, `accumulate`, `batchnorm`).
"""

from itertools import product

from ..datasets import DIGIT_SETS
from ..datasets.spurious import BACKGROUNDS
from ..holes import GROW
from .recipes import MARKS, MNIST, Setting
from .rows import Row

ORACLES = ("known hidden", "rest hidden")  # perfect masks: the square or the bird is hidden, or all but it
BASE: Row = {  # MaskTune as the paper has it; LR, layer, ERM's epochs and the ratio are those of the setting
    "method": "masktune",  # or "erm"; "plain", the epoch without masks; "randmask"; "shuffled", MaskTune's masks, each
    # for another image; the oracles; "dfr": the last layer fitted anew with the groups equally large (Kirichenko et al.
    # 2023), on the validation images if there are any, else on the training images
    "order": 0,  # in which the epoch visits the images
    "lr": 0.01,
    "k": 2.0,
    "cam": "XGradCAM",  # of the predicted class; "label": of the label (paper's formula); others are the grad-cam
    # library's; "random": uniform noise of the saliency layer's size, resized and cut off as every other map
    "layer": "own",  # to be explained; "own": the one that the model names
    "fill": "black",  # what hidden pixels show: see `holes`; "other": those pixels of another training image
    "grow": 0.0,  # by what share of the side masks are widened
    "decoys": False,  # whether what was hidden in an image of another class is hidden, too
    "batchnorm": "moving",  # its statistics, as in train mode; or "frozen" at ERM's
    "iteration": 1,  # the last of so many iterations
    "accumulate": False,  # whether hidden pixels stay hidden in the next iteration
    "erm_epochs": 100,  # after which masks and fine-tune start
}
DATA = ("background", "place", "side", "opacity", "marks")  # options of data sets that a condition may change
SEEDS = (0, 1, 2)  # of every question but those of `ALL_SEEDS`, which take all
ALL_SEEDS = ("results", "benchmark", "holes", "large", "price")
REMEDIES: list[Row] = [{"decoys": True}, {"grow": GROW}, {"fill": "smooth"}, {"grow": GROW, "decoys": True},
                       {"grow": GROW, "decoys": True, "fill": "smooth"}]
REPAIRS: list[Row] = [{"method": "masktune", **remedy} for remedy in ({}, *REMEDIES)]
PERFECT: list[Row] = [{"method": "known hidden", **remedy} for remedy in ({}, *REMEDIES)]
_FEW = [{"method": "erm"}, REPAIRS[0], REPAIRS[-2], REPAIRS[-1], PERFECT[0], PERFECT[-2]]
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
    "holes": [{**remedy, "order": order} for remedy in REMEDIES for order in range(5)],
}
ON_BACKGROUNDS: dict[str, list[Row]] = {
    "holes": [{**data, **change, "order": order}
              for data in ({"background": background, "ratio": ratio} for background, ratio in product(
                  BACKGROUNDS, (0.0, 0.01)))
              for change in [{"method": "erm"}, {"method": "plain"}, {"method": "randmask"}, *REPAIRS, *PERFECT]
              for order in ((0,) if change == {"method": "erm"} else (0, 1, 2))],
    "large": [{"background": background, "ratio": 0.0, "size": 60_000, "erm_epochs": 10, **change}
              for background in ("black", "white") for change in _FEW],
}
BIRD_LRS = (0.001, 0.003, 0.01)
LAYERS = ("features", "features.14.conv.0", "features.7.conv.0", "features.13")  # the last block, its map 5x5; then two
# that end in a ReLU, of 10x10 and 20x20; and one that does not, of 10x10
ON_PHOTOGRAPHS: dict[str, list[Row]] = {
    "benchmark": [{"method": "erm"}, {"method": "masktune"}],
    "results": [{"method": method} for method in ("erm", "plain", "randmask", "masktune", *ORACLES[::-1], "dfr")],
    "lr": [{"method": method, "lr": lr} for method in ("plain", "masktune", "rest hidden") for lr in BIRD_LRS],
    "layer": [{"layer": layer} for layer in LAYERS],
    "k": [{"k": k} for k in (0.0, 1.0, 2.0)],
    "fill": [{"method": method, "fill": fill} for method in ("masktune", "rest hidden") for fill in ("black", "other")],
    "iterations": [{}, *({"iteration": i, "accumulate": True} for i in (2, 3))],
    "lateness": [{"method": method, "erm_epochs": epochs} for method in ("erm", "masktune") for epochs in (1, 2, 5)],
    "ours": [{"fill": "other", **change} for change in (
        {"k": 1.0}, {"layer": LAYERS[1], "k": 0.0}, {"method": "shuffled", "k": 1.0})],  # more is hidden, none in black
    "holes": [{"layer": layer, **remedy} for layer in LAYERS[:2]
              for remedy in ({}, {"decoys": True}, {"fill": "smooth"}, REMEDIES[-2])],
}
ON_MARKS: dict[str, list[Row]] = {
    "results": [{"method": "erm"}, {"method": "plain"}, {"method": "randmask"}, *REPAIRS, *PERFECT],
    "published": [{"layer": LAYERS[0], **remedy} for remedy in ({}, *REMEDIES[-2:])],
    "layer": [{"layer": layer, "k": k, **remedy} for layer in LAYERS[:3] for k in (1.0, 2.0)
              for remedy in ({}, *REMEDIES[-2:])],
    "lr": [{"lr": lr, **remedy} for lr in BIRD_LRS for remedy in ({}, REMEDIES[-2])],
    **{name: [{name: value, **change} for value in values for change in _FEW] for name, values in (
        ("place", ("corner", "random")), ("side", (0.08, 0.12, 0.2)), ("opacity", (0.3, 0.6, 1.0)),
        ("ratio", (0.0, 0.01, 0.05)))},
    "price": [{"marks": marks, **change} for marks in ("none", "both") for change in (_FEW[0], *REPAIRS)],
}


def of(setting: Setting) -> dict[str, list[Row]]:
    """The questions that can be asked of a setting, by name."""
    if setting.erm.dataset == "SpuriousImagenette":
        asked = ON_MARKS if setting == MARKS[0] else ("results", "lr") if setting == MARKS[2] else ("results",)
        return {question: ON_MARKS[question] for question in asked}  # of SqueezeNet, which LR suits it
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
