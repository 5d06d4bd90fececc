"""Where a training stands, and the name of a content."""

import copy
import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from src.interrupts import uninterrupted
from src.masks import Masks


@dataclass(eq=False)  # two states are compared by their digests
class State:
    """Where a training stands: everything that its next step depends on, and what was seen on the way."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    epoch: int = 0  # epochs done, a fine-tune's on top of ERM's
    step: int = 0  # steps done of the epoch under way
    losses: Tensor | None = None  # (steps of an epoch,) float32, of the epoch under way
    correct: Tensor | None = None  # () int64, images classified correctly in the epoch under way
    masks: Masks | None = None  # (N, H, W): what a fine-tune trains on
    masked_epoch: int | None = None  # the epoch for which `masks` were made
    best: dict | None = None  # "epoch", "accuracy", "model", "optimizer" of the best epoch so far, if one is selected
    parents: dict[str, str] = field(default_factory=dict)  # digests of what the stage came from
    history: dict[str, list[float]] = field(default_factory=dict)  # per name, one number for each epoch

    def mask(self, masks: Masks) -> None:
        """Take these masks for the epoch under way."""
        with uninterrupted():
            self.masks, self.masked_epoch = masks, self.epoch

    def keep_if_best(self, accuracy: float) -> None:
        """Keep a copy of weights and momentum if no earlier epoch did as well on the validation set."""
        if self.best is None or accuracy > self.best["accuracy"]:
            self.best = copy.deepcopy({"epoch": self.epoch + 1, "accuracy": accuracy, "model": self.model.state_dict(),
                                       "optimizer": self.optimizer.state_dict()})

    def take_best(self) -> None:
        """Go back to the weights and the momentum of the best epoch; what follows counts on from the last."""
        self.model.load_state_dict(self.best["model"])
        self.optimizer.load_state_dict(copy.deepcopy(self.best["optimizer"]))  # PyTorch would share its tensors

    def finish_epoch(self, **seen: float) -> None:
        """Count the epoch under way as done, with what was seen in it."""
        for name, value in seen.items():
            self.history.setdefault(name, []).append(value)
        self.epoch, self.step, self.losses, self.correct = self.epoch + 1, 0, None, None

    def check_finite(self) -> None:
        """Raise FloatingPointError, naming epoch, step and LR, if the epoch under way met a loss that is no number."""
        bad = [] if self.losses is None else torch.nonzero(~self.losses[:self.step].isfinite()).flatten().tolist()
        lr = self.optimizer.param_groups[0]["lr"]
        if bad:
            raise FloatingPointError(f"the loss is {self.losses[bad[0]].item()} in epoch {self.epoch + 1}, step "
                                     f"{bad[0] + 1} of {len(self.losses)}, LR {lr:g}; lower the LR, or look for broken "
                                     "images. Nothing was saved since")
        if not all(value.isfinite().all() for value in self.model.state_dict().values()):
            raise FloatingPointError(f"weights are not finite in epoch {self.epoch + 1}, after step {self.step}, LR "
                                     f"{lr:g}; lower the LR, or look for broken images. Nothing was saved since")

    def digest(self) -> str:
        """Name the weights and the momentum by their content: all that a stage which starts from here takes over."""
        return digest({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()["state"]})


def digest(content: object) -> str:
    """Name nested dicts, lists, tensors, numbers and strings by their content: sha256, the same on every machine."""
    sha = hashlib.sha256()

    def feed(item: object) -> None:
        if isinstance(item, Tensor):
            sha.update(f"{item.dtype}{tuple(item.shape)}".encode())
            sha.update(item.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(item, Masks):
            sha.update(f"{item.dtype}{item.shape}".encode())  # as the unpacked tensor
            for chunk in item.chunks():
                sha.update(item[chunk].cpu().numpy().tobytes())
        elif isinstance(item, dict):
            sha.update(b"{")
            for key, value in item.items():
                sha.update(repr(key).encode())
                feed(value)
            sha.update(b"}")
        elif isinstance(item, (list, tuple)):
            sha.update(b"[")
            for value in item:
                feed(value)
            sha.update(b"]")
        else:
            sha.update(repr(item).encode() + b",")

    feed(content)
    return sha.hexdigest()
