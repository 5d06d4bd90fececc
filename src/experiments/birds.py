"""What MaskTune does on photographs: each condition is one row, measured once into `results/<setting>.json`."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from ..inference import infer
from ..metrics import Score, score
from ..rows import Row, measured, row
from ..state import State
from . import stages
from .recipes import Setting
from .studies import RESULTS
from .workers import side_by_side

CHOOSING_SEEDS, CHOOSING_EPOCHS = (10, 11), 5  # of ERM's candidates, which see the validation set alone
CANDIDATES = ({"lr": 0.001, "batch_size": 32}, {"lr": 0.003, "batch_size": 32}, {"lr": 0.01, "batch_size": 32},
              {"lr": 0.01, "batch_size": 128})


def choose(setting: Setting) -> list[Row]:
    """ERM's candidates on the validation set: `average`, `worst` and `train`, the accuracies after each epoch."""
    return measured(RESULTS / f"{setting.name}-erm.json", (
        {"setting": setting.name, "seed": seed, **candidate} for seed in CHOOSING_SEEDS for candidate in CANDIDATES),
        lambda missing: side_by_side(partial(_choose, setting, stages.DATA), missing, f"{setting.name}: candidates"))


def _choose(setting: Setting, data: Path, condition: Row) -> Row:
    seed = condition["seed"]
    erm = replace(setting.erm, epochs=CHOOSING_EPOCHS, lr=condition["lr"], batch_size=condition["batch_size"])
    train, validation = (stages.load_data(erm, seed, part, data) for part in ("train", "val"))
    model = stages.new_model(seed, erm.model, erm.classes, erm.weights, erm.layer)
    state, scores = State(model, stages.new_optimizer(model, erm)), []
    for _ in range(erm.epochs):
        _, met = stages.train_epoch(state, train.images, train.labels, lr=erm.lr, **stages.epoch_options(erm, seed))
        state.finish_epoch(train=met)
        scores.append(_scored(state.model, validation))
    return row(condition, {"average": [one.average for one in scores], "worst": [one.worst for one in scores],
                           "train": state.history["train"]})


def _scored(model, data) -> Score:
    return score(infer(model, data.images).argmax(1).cpu(), data.labels, data.groups)
