"""Where a training stands after a whole number of epochs, and the name of a content."""

import copy
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType

import torch
from torch import Tensor, nn

from .masks import Masks

INSTALLED = tuple(sysconfig.get_paths()[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib"))


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


def contents(value: object, seen: tuple[int, ...] = ()) -> object:
    """What a function or an object does, for `digest`: code and all that it uses, not names, which may mean another.

    Objects are what pickle would make of them; TypeError: it cannot, as of an open file. What is installed, and what a
    function names from other modules, goes by its name; so does what it names and pickle cannot take.
    """
    if isinstance(value, Tensor | str | bytes | int | float | complex | None):
        return value
    if id(value) in seen:
        return "again"

    def inner(*parts: object) -> list:
        return [contents(part, (*seen, id(value))) for part in parts]

    if isinstance(value, dict):
        return inner(*value.items())
    if isinstance(value, list | tuple):
        return inner(*value)
    if isinstance(value, set | frozenset):
        return inner(*sorted(value, key=repr))  # their own order differs from process to process
    if isinstance(value, CodeType):
        return inner(value.co_code, value.co_names, value.co_varnames, value.co_consts)
    if isinstance(value, ModuleType | BuiltinFunctionType):
        return value.__name__
    if isinstance(value, type | FunctionType):
        file = getattr(sys.modules.get(value.__module__), "__file__", None) or ""
        made = [f"{value.__module__}.{value.__qualname__}"]
        if value.__module__ == "builtins" or file.startswith(INSTALLED):
            return made
        if isinstance(value, type):
            parts = {name: getattr(part, "__func__", getattr(part, "fget", part)) for name, part in vars(value).items()}
            parts = {name: part for name, part in parts.items() if isinstance(part, FunctionType | str | int | float)}
            parts |= {base.__qualname__: base for base in value.__bases__}
        else:
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            made = inner(value.__code__, value.__defaults__, value.__kwdefaults__, cells)
            parts = {name: value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__}
        for name, part in parts.items():
            if not isinstance(part, type | FunctionType) or part.__module__ == value.__module__:
                with suppress(TypeError):
                    made += [name, *inner(part)]
        return made
    made = value.__reduce_ex__(4)
    return made if isinstance(made, str) else inner(*made[:3])


def _names(code: CodeType) -> list[str]:
    """What code names, and what is written within it, such as a comprehension."""
    return [*code.co_names, *(name for part in code.co_consts if isinstance(part, CodeType) for name in _names(part))]
