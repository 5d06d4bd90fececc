"""Classification with a reject option: answer where the score is high enough, and count the errors among the answers.

The paper's score multiplies what ERM and MaskTune say: where they disagree, the shortcut may have spoken.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from itertools import product

import pandas
import torch
from torch import Tensor

from ..device import cores
from ..inference import infer
from ..state import State, digest
from . import stages
from .recipes import Places, Setting
from .rows import Row, measured

LRS = (0.01, 0.001, 0.0001)  # of the fine-tune: from MNIST's down towards ERM's last, 0.1 / 2 ** 11
COVERAGES = (0.8, 0.85, 0.9, 0.95, 1.0)  # paper
VOICES = ("ERM", "MaskTune alone", "ERM × MaskTune", "two ERM seeds")


def answer(*probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Return the prediction and the score of one model or of several together: (N,) int64 and (N,) float64.

    probabilities: (N, classes) each. Of one, the score is its softmax response, max p. Of several, it is
    max softmax(p1 * p2), as in the paper, whose softmax is taken of the product; the prediction is its argmax.
    """
    product = torch.stack([p.double() for p in probabilities]).prod(0)
    score, prediction = (product if len(probabilities) == 1 else product.softmax(1)).max(1)
    return prediction, score


def threshold(scores: Tensor, coverage: float) -> float:
    """The score from which on to answer, so that on these validation scores (N,) a share `coverage` is answered.

    It is the score at rank round(coverage * N), counted from 1 and from the highest; -inf for a coverage of 1, so that
    no other image is refused either; inf where the rank is 0.
    """
    rank = round(coverage * len(scores))
    return -math.inf if coverage == 1 else scores.sort(descending=True).values[rank - 1].item() if rank else math.inf


def error_and_coverage(scores: Tensor, wrong: Tensor, threshold: float) -> tuple[float, float]:
    """The share of errors among the answers, NaN without answers, and the share that is answered: score >= threshold.

    scores: (N,), wrong: (N,) bool.
    """
    answered = scores >= threshold
    return wrong[answered].double().mean().item(), answered.double().mean().item()


def risk_coverage(scores: Tensor, wrong: Tensor) -> Tensor:
    """The risk-coverage curve: entry k - 1 is the error among the k images of the highest scores; (N,) float64.

    Of images that tie, the errors are spread evenly, as over all their orders. Its mean is the AURC (Geifman 2019).
    """
    scores, order = scores.sort(descending=True)
    _, tie, size = scores.unique_consecutive(return_inverse=True, return_counts=True)
    errors = torch.zeros(len(size), dtype=torch.float64, device=scores.device).index_add(0, tie, wrong[order].double())
    return (errors / size)[tie].cumsum(0) / torch.arange(1, len(scores) + 1, device=scores.device)


def selective_study(setting: Setting, places: Places = Places()) -> pandas.DataFrame:
    """Error, real coverage and AURC of each of `VOICES`, seed by seed, on the test set; measured once, then loaded.

    The thresholds are those of the validation set. A row's `error_0.8` and `coverage_0.8` and so on are at each of
    `COVERAGES`, its `risk_1` to `risk_100` the curve at every hundredth of the coverage, its `hidden` the share of
    training pixels that MaskTune hid. "two ERM seeds" are the row's and the next.
    """
    def measure(condition: Row) -> Row:
        seed, lr = condition["seed"], setting.finetune.lr
        other = setting.seeds[(setting.seeds.index(seed) + 1) % len(setting.seeds)]
        voices = {"ERM": [(seed, None)], "MaskTune alone": [(seed, lr)], "ERM × MaskTune": [(seed, None), (seed, lr)],
                  "two ERM seeds": [(seed, None), (other, None)]}[condition["method"]]
        validation, _ = _heard(places, setting, voices, "val")
        scores, wrong = _heard(places, setting, voices, "test")
        risks = risk_coverage(scores, wrong)
        row: Row = {"aurc": risks.mean().item()}
        for coverage in COVERAGES:
            row[f"error_{coverage}"], row[f"coverage_{coverage}"] = error_and_coverage(
                scores, wrong, threshold(validation, coverage))
        if (seed, lr) in voices:
            row["hidden"] = _state(places, setting, seed, lr).history["hidden"][0]
        for i in range(1, 101):
            row[f"risk_{i}"] = round(risks[max(1, round(i * len(risks) / 100)) - 1].item(), 5)
        return row

    return _measured("selective", setting, places, [{"method": method} for method in VOICES], measure)


def selective_lrs(setting: Setting, places: Places = Places()) -> pandas.DataFrame:
    """MaskTune with the fine-tune at each of `LRS`, from the same ERM weights; measured once, then loaded.

    A row has, on the validation set ("val"), by which an LR is chosen, and on the test set, the error of MaskTune alone
    and the AURC of its product with ERM.
    """
    def measure(condition: Row) -> Row:
        erm, tuned = (condition["seed"], None), (condition["seed"], condition["lr"])
        row: Row = {}
        for part in ("val", "test"):
            row[f"error_{part}"] = _heard(places, setting, [tuned], part)[1].double().mean().item()
            row[f"aurc_{part}"] = risk_coverage(*_heard(places, setting, [erm, tuned], part)).mean().item()
        return row

    return _measured("finetune-lr", setting, places, [{"lr": lr} for lr in LRS], measure)


@cache
def _state(places: Places, setting: Setting, seed: int, lr: float | None) -> State:
    """ERM of a seed, or what its fine-tune at an LR makes of it."""
    erm = stages.run_erm(places, setting, seed)
    return erm if lr is None else stages.run_finetune(places, setting, seed, erm, replace(setting.finetune, lr=lr))


@cache
def _said(places: Places, setting: Setting, seed: int, lr: float | None, part: str) -> tuple[Tensor, Tensor]:
    """The probabilities (N, classes) that a model gives for a part, "val" or "test", and the labels."""
    data = stages.load_data(places, setting.erm, 0, part)
    return infer(_state(places, setting, seed, lr).model, data.images).softmax(1).cpu(), data.labels


def _heard(places: Places, setting: Setting, voices: list[tuple[int, float | None]], part: str
           ) -> tuple[Tensor, Tensor]:
    """The scores that models give together, and which of their predictions are wrong: (N,) float64 and (N,) bool."""
    said = [_said(places, setting, *voice, part) for voice in voices]
    predictions, scores = answer(*(probabilities for probabilities, _ in said))
    return scores, predictions != said[0][1]


def _measured(file: str, setting: Setting, places: Places, changes: list[Row], measure: Callable[[Row], Row]
              ) -> pandas.DataFrame:
    """A row for each seed and change; `erm` names what is trained by its content: another recipe is measured anew."""
    conditions = []
    for seed, change in product(setting.seeds, changes):
        recipe = {"erm": asdict(setting.erm), **setting.finetune.named(), "lr": change.get("lr", setting.finetune.lr)}
        conditions.append({"setting": setting.name, "seed": seed, **change, "erm": digest(recipe)[:16]})
    return measured(places.results / f"{file}-{setting.name}.csv", conditions, measure, processes=1, threads=cores())
