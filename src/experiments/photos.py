"""The paper's benchmarks of photographs: what is missing, and what is measured."""

import json

from .. import datasets
from ..metrics import adjusted_average, score
from . import stages
from .recipes import Setting
from .studies import RESULTS

PUBLISHED_SPEED = 2790  # images/s: ResNet-50 at 224 in training on one H100, as published; not measured here
TRAINING_IMAGES = {"waterbirds": 4_795, "celeba": 162_770}  # published; of ImageNet-9, no count is known here


def to_fetch(settings: list[Setting]) -> list[dict]:
    """What to fetch for benchmarks, where to put it, and how long a seed takes: measured, and at a published speed."""
    rows = []
    for setting in settings:
        images = TRAINING_IMAGES.get(setting.name)
        minutes = images and images * (setting.erm.epochs + setting.finetune.iterations) / PUBLISHED_SPEED / 60
        rows.append({"benchmark": setting.title, "missing": missing_files(setting), "epochs": setting.erm.epochs,
                     "hours on two cores, fp32 / bf16": hours(setting, images) if images else "?",
                     "a seed on one H100, at least": f"{minutes:.0f} min" if minutes else "?",
                     "to expect": setting.expect})
    return rows


def hours(setting: Setting, images: int) -> str:
    """How long a seed takes at the costs in results/photographs.json, with fp32 and with bf16."""
    costs = json.loads((RESULTS / "photographs.json").read_text())["rows"]
    found = []
    for precision in ("fp32", "bf16"):
        cost, = (row for row in costs if (row["model"], row["side"], row["precision"]) == (
            setting.erm.model, setting.erm.test_view.height, precision))
        finetune = setting.finetune.iterations
        seconds = images * (cost["train_ms"] * (setting.erm.epochs + finetune) + cost["masks_ms"] * finetune) / 1000
        found.append(f"{seconds / 3600:.0f}")
    return " / ".join(found)


def missing_files(setting: Setting) -> str | None:
    """What is not there of a benchmark's files, and where to get it; None if all of it is there."""
    return datasets.missing(setting.erm.dataset, stages.DATA, ("train", "val", *setting.test_sets))


def measures(runs: list[stages.Run]) -> list[dict]:
    """One row for each method, seed and measure, its `value` in [0, 1], of runs of one setting.

    Waterbirds and CelebA: the accuracy of each group, of the worst, the plain average (the paper's), and the average
    with the groups weighted as in training (the field's "adjusted average"). Background Challenge: the accuracy on each
    variant, and BG-gap = mixed_same - mixed_rand (Xiao et al. 2021).
    """
    setting = runs[0].setting
    tests = stages.load_tests(setting)
    train = datasets.open_files(setting.erm.dataset, "train", stages.DATA)
    rows = []
    for method, states in (("ERM", [run.erm for run in runs]), ("MaskTune", [run.finetuned for run in runs])):
        guesses = stages.predict(states, tests)
        for i, run in enumerate(runs):
            scored = {name: score(guesses[name][i], test.labels, test.groups) for name, test in tests.items()}
            if setting.erm.dataset == "ImageNet9":
                values = {name: one.average for name, one in scored.items()}
                values["BG-gap"] = values["mixed_same"] - values["mixed_rand"]
            else:
                one = scored["test"]
                values = {"average": one.average, "adjusted average": adjusted_average(one.groups, train.groups),
                          "worst group": one.worst}
                values |= {train.group_names[group]: accuracy for group, accuracy in one.groups.items()}
            rows += [{"benchmark": setting.title, "method": method, "seed": run.seed, "measure": name, "value": value}
                     for name, value in values.items()]
    return rows
