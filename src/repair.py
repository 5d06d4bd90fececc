"""MaskTune for a classifier of your own: `repaired, report = masktune(model, data, layer=..., lr=...)`."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from src.datasets.images import Images
from src.masks import Masks
from src.masktune import masktune_epoch
from src.metrics import Score, score
from src.models import Classifier
from src.state import State
from src.training import best_device, infer, sgd


@dataclass(frozen=True)
class Report:
    """What one repair did. Accuracies are in [0, 1]; a score's groups are those given, else the classes."""

    hidden: float  # share of the pixels hidden, in [0, 1]
    before: dict[str, Score]  # by data set
    after: dict[str, Score]
    before_on_masked: Score  # the old model on the masked training images: how much leaned on what was hidden
    masks: Masks  # of the training images
    mean_masks: Tensor  # (classes, H, W): how often each pixel is hidden; a shortcut that sits in one place shows

    def __str__(self) -> str:
        lines = [f"{self.hidden:.1%} of the pixels hidden; on what was left, the old model is right on "
                 f"{self.before_on_masked.average:.1%}"]
        lines += [f"{name}: {old.average:.1%} -> {self.after[name].average:.1%}, worst group {old.worst:.1%} -> "
                  f"{self.after[name].worst:.1%}" for name, old in self.before.items()]
        return "\n".join(lines)


def masktune(model: nn.Module, data: Images, *, layer: str, lr: float, batch_size: int = 128, k: float = 2.0,
             iterations: int = 1, accumulate: bool = False, momentum: float = 0.9, weight_decay: float = 1e-4,
             mean: tuple[float, float, float] = (0, 0, 0), std: tuple[float, float, float] = (1, 1, 1), seed: int = 0,
             tests: dict[str, Images] | None = None) -> tuple[nn.Module, Report]:
    """Repair a trained classifier: masks by its own heat maps, then one epoch on what is left (MaskTune, section 3).

    Args:
        model: any classifier (B, 3, H, W) -> (B, classes); it is left as it was.
        data: the images that it was trained on.
        layer: the name of the module to be explained, usually the last convolutional block; see `Classifier`.
        lr: of the one epoch, with SGD; the LR with which the training of the model began is a good first try.
        k: what is hotter than m + k s is hidden.
        iterations: of masks and an epoch; with `accumulate`, hidden pixels stay hidden.
        mean, std: with which the model wants its images normalised.
        tests: more data sets to be scored before and after, by name.

    Returns:
        A repaired copy of the model, in eval mode, and a report.

    Raises:
        ValueError: the layer does not exist or gives no maps, or the data do not fit the model.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations}; at least 1 is wanted")
    device = best_device()
    old = Classifier(copy.deepcopy(model), layer, mean, std).to(device)
    new = copy.deepcopy(old)
    images, labels = data.images.to(device), data.labels.to(device)
    state = State(new, sgd(new, momentum, weight_decay))
    for _ in range(iterations):
        state.finish_epoch(loss=masktune_epoch(state, images, labels, lr=lr, batch_size=batch_size, seed=seed, k=k,
                                               accumulate=accumulate)[0])
    sets = {"train": data, **(tests or {})}
    per_class = torch.stack([state.masks.mean(labels == label) for label in range(len(data.classes))]).cpu()
    return new.model.eval(), Report(state.masks.share(), _scores(old, sets), _scores(new, sets),
                                    _score(old, data, state.masks), state.masks, per_class)


def _scores(model: nn.Module, sets: dict[str, Images]) -> dict[str, Score]:
    return {name: _score(model, data) for name, data in sets.items()}


def _score(model: nn.Module, data: Images, masks: Masks | None = None) -> Score:
    guesses = infer(model, data.images, masks).argmax(1).cpu()
    return score(guesses, data.labels, data.labels if data.groups is None else data.groups)
