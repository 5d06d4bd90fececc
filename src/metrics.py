"""What is measured: pure functions of tensors."""

from dataclasses import dataclass

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
