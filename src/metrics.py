"""What is measured: pure functions of tensors."""

import math
from dataclasses import dataclass
from statistics import fmean, stdev

from torch import Tensor


@dataclass(frozen=True)
class Score:
    """Accuracies in [0, 1]: over all samples, of each group that occurs, of the worst of these, and of each class."""

    average: float
    groups: dict[int, float]
    classes: dict[int, float]

    @property
    def worst(self) -> float:
        return min(self.groups.values())


def score(predictions: Tensor, labels: Tensor, groups: Tensor) -> Score:
    """Score predictions, all (N,) int64. Groups without a sample are left out, not counted as 0."""
    correct = (predictions == labels).double()
    by_group, by_class = ({int(part): correct[parts == part].mean().item() for part in parts.unique()}
                          for parts in (groups, labels))
    return Score(correct.mean().item(), by_group, by_class)


def adjusted_average(accuracies: dict[int, float], train_groups: Tensor) -> float:
    """The average accuracy of the field: that of each group, weighted by its share in training (Sagawa et al. 2020)."""
    shares = train_groups.bincount().double() / len(train_groups)
    return sum(accuracies[group] * share for group, share in enumerate(shares.tolist()) if share > 0)


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (ddof 1) over n seeds; prints as percent."""

    mean: float
    std: float
    n: int

    def __format__(self, spec: str) -> str:
        spec = spec or ".1f"
        return f"{100 * self.mean:{spec}}" + (f" ± {100 * self.std:{spec}}" if self.n > 1 else "")

    def __str__(self) -> str:
        return format(self)


def summarize(values: list[float]) -> Summary:
    """Summarize one number per seed; with one seed the standard deviation is NaN."""
    return Summary(fmean(values), stdev(values) if len(values) > 1 else math.nan, len(values))


def spread(by_seed: list[list[float]]) -> tuple[float, float]:
    """Two standard deviations of values that vary with the seed and, for each seed, with the order of one epoch.

    The first is that of the seeds' means (ddof 1; NaN with one seed), the second the root mean square of each seed's
    own (ddof 1; 0 with one order).
    """
    means = [fmean(values) for values in by_seed]
    within = [stdev(values) ** 2 for values in by_seed if len(values) > 1]
    return stdev(means) if len(means) > 1 else math.nan, math.sqrt(fmean(within)) if within else 0.0
