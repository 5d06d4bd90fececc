"""Where a training stands after a whole number of epochs, and the name of a content."""

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .masks import Masks


@dataclass(eq=False)  # two states are compared by their digests
class State:
    """Everything that the next epoch depends on, and what was seen on the way."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    epoch: int = 0  # epochs done, a fine-tune's on top of ERM's
    masks: Masks | None = None  # (N, H, W): what the last epoch of a fine-tune trained on
    best: dict | None = None  # "epoch", "accuracy", "model", "optimizer" of the best epoch so far, if one is selected
    parents: dict[str, str] = field(default_factory=dict)  # digests of what the stage came from
    history: dict[str, list[float]] = field(default_factory=dict)  # per name, one number for each epoch

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
        """Count an epoch as done, with what was seen in it."""
        for name, value in seen.items():
            self.history.setdefault(name, []).append(value)
        self.epoch += 1

    def digest(self) -> str:
        """Name the weights and the momentum by their content: all that a stage which starts from here takes over."""
        return digest({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()["state"]})


def digest(content: object) -> str:
    """Name nested dicts, lists, tensors, numbers and strings by their content: sha256, the same on every machine."""
    sha = hashlib.sha256()
    for part in _parts(content):
        sha.update(part)
    return sha.hexdigest()


def _parts(item: object) -> Iterator[bytes]:
    if isinstance(item, Tensor | Masks):
        yield f"{item.dtype}{tuple(item.shape)}".encode()
        chunks = item.split(1024) if isinstance(item, Tensor) and item.dim() else [item]  # of memory-mapped images
        for chunk in (item[part] for part in item.chunks()) if isinstance(item, Masks) else chunks:  # unpacked masks
            yield chunk.detach().cpu().contiguous().numpy().tobytes()
    elif isinstance(item, dict):
        yield b"{"
        for key, value in item.items():
            yield repr(key).encode()
            yield from _parts(value)
        yield b"}"
    elif isinstance(item, list | tuple):
        yield b"["
        for value in item:
            yield from _parts(value)
        yield b"]"
    else:
        yield repr(item).encode() + b","
