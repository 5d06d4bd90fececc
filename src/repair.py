"""What a repair did to a classifier, in numbers: the report of `masktune`."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .datasets.images import Images
from .device import best_device, device_name
from .inference import infer
from .masks import Masks
from .metrics import Score, score


@dataclass(frozen=True)
class Report:
    """What one repair did. Accuracies are in [0, 1]; a score's groups are those given, else the classes."""

    hidden: float  # share of the pixels hidden, in [0, 1]
    before: dict[str, Score]  # by data set
    after: dict[str, Score]
    before_on_masked: Score  # the old model on the masked training images: how much leaned on what was hidden
    masks: Masks  # of the training images
    computed_by: str  # the GPU, or the processor and the threads
    mean_masks: Tensor  # (classes, H, W): how often each pixel is hidden; a shortcut that sits in one place shows

    @classmethod
    def of(cls, old: nn.Module, new: nn.Module, masks: Masks, train: Images, tests: dict[str, Images]) -> "Report":
        """Score both models on the training images and on every test set."""
        sets = {"train": train, **tests}
        before, after = ({name: _score(model, data) for name, data in sets.items()} for model in (old, new))
        labels = train.labels.to(masks.bits.device)
        mean_masks = torch.stack([masks.mean(labels == label) for label in range(len(train.classes))]).cpu()
        return cls(masks.share(), before, after, _score(old, train, masks), masks, device_name(best_device()),
                   mean_masks)

    def __str__(self) -> str:
        lines = [f"{self.hidden:.1%} of the pixels hidden; on what was left, the old model is right on "
                 f"{self.before_on_masked.average:.1%}"]
        lines += [f"{name}: {old.average:.1%} -> {self.after[name].average:.1%}, worst group {old.worst:.1%} -> "
                  f"{self.after[name].worst:.1%}" for name, old in self.before.items()]
        lines.append(f"computed by {self.computed_by}")
        return "\n".join(lines)


def _score(model: nn.Module, data: Images, masks: Masks | None = None) -> Score:
    guesses = infer(model, data.images, masks).argmax(1).cpu()
    return score(guesses, data.labels, data.labels if data.groups is None else data.groups)
