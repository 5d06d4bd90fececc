"""Run a stage once: load it if it is finished, continue it if it was interrupted, start it if it is missing."""

import hashlib
import io
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from src.training import device_name

FORMAT = 1
SAVE_EVERY = 5  # epochs


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message names the file, what is wrong and what to do."""


@dataclass
class State:
    """Where a training stands: everything that the next epoch depends on, and what was seen on the way."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    epoch: int = 0  # epochs done in this stage
    history: dict[str, list[float]] = field(default_factory=dict)  # per name, one number for each epoch
    masks: Tensor | None = None  # (N, H, W) bool, True = hidden: what a fine-tune last trained on

    def record(self, **values: float) -> None:
        for name, value in values.items():
            self.history.setdefault(name, []).append(value)

    def digest(self) -> str:
        """Name the weights and the momentum by their content: all that a stage which starts from here takes over."""
        return digest({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()["state"]})


def load_or_run(path: Path, config: dict, epochs: int, fresh: Callable[[], State], advance: Callable[[State], None], *,
                parent: str | None = None) -> State:
    """Bring a stage to its last epoch and return it; say in one line whether it is loaded, continued or started.

    It is saved every 5 epochs and at the end. What only a stage with a parent needs to continue (optimizer, masks) is
    left out of its finished file.

    Args:
        config: everything that the result depends on, as plain numbers and strings.
        fresh: builds the state before the first epoch.
        advance: trains one epoch, given a state whose `epoch` counts the epochs done; the counter is moved here.
        parent: digest of the state that the stage starts from. A file that started from another is stale: run again.

    Raises:
        CheckpointError: the file belongs to another configuration, or is damaged. It is left as it is.
    """
    name = f"{path.parent.name}/{path.stem}"
    saved, state = _read(path, config), fresh()
    if saved is None:
        print(f"{name}: starts")
    elif saved["parent"] != parent:
        print(f"{name}: stale, since the weights that it started from have changed; starts anew")
    else:
        _restore(state, saved)
        print(f"{name}: finished, loaded" if state.epoch == epochs else f"{name}: continues after epoch {state.epoch}")
    for _ in tqdm(range(state.epoch, epochs), desc=name, initial=state.epoch, total=epochs, unit="epoch",
                  disable=state.epoch == epochs):
        advance(state)
        state.epoch += 1
        if state.epoch % SAVE_EVERY == 0 or state.epoch == epochs:
            _write(path, _content(state, config, parent, whole=parent is None or state.epoch < epochs))
    return state


def digest(content: object) -> str:
    """Name nested dicts, lists, tensors, numbers and strings by their content: sha256, the same on every machine."""
    sha = hashlib.sha256()

    def feed(item: object) -> None:
        if isinstance(item, Tensor):
            sha.update(f"{item.dtype}{tuple(item.shape)}".encode())
            sha.update(item.detach().cpu().contiguous().numpy().tobytes())
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


def _content(state: State, config: dict, parent: str | None, whole: bool) -> dict:
    """The one dict that a file holds; `whole` keeps what only a stage that goes on needs."""
    content = {
        "format": FORMAT, "config": config, "parent": parent, "epoch": state.epoch,
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict() if whole else None,
        "masks": state.masks.cpu() if whole and state.masks is not None else None,
        "history": state.history,
        "made_with": {"python": platform.python_version(), "torch": str(torch.__version__),
                      "device": device_name(next(state.model.parameters()).device)},
    }
    return {**content, "checksum": digest(content)}


def _restore(state: State, saved: dict) -> None:
    state.model.load_state_dict(saved["model"])
    if saved["optimizer"] is not None:
        state.optimizer.load_state_dict(saved["optimizer"])
    if saved["masks"] is not None:
        state.masks = saved["masks"].to(next(state.model.parameters()).device)
    state.epoch, state.history = saved["epoch"], saved["history"]


def _read(path: Path, config: dict) -> dict | None:
    """Load a checkpoint on the CPU, checked against its checksum and the configuration; None if there is none."""
    if not path.exists():
        return None
    advice = "move it away to run this stage anew"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)  # executes no code
        checksum = saved.pop("checksum")
        sound = checksum == digest(saved) and saved["format"] == FORMAT
    except Exception as error:  # a damaged file can fail in any way while it is unpacked
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{path} is no checkpoint of this project, or damaged ({reason}); {advice}") from error
    if not sound:
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum; {advice}")
    if differences := _differences(saved["config"], config):
        raise CheckpointError(f"{path} belongs to another experiment ({'; '.join(differences)}); "
                              f"use another folder for checkpoints, or {advice}")
    return saved


def _differences(found: dict, wanted: dict, prefix: str = "") -> list[str]:
    """Name the fields in which two configurations differ, nested ones by dotted names."""
    lines = []
    for key in sorted(found.keys() | wanted.keys()):
        there, here = found.get(key), wanted.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            lines += _differences(there, here, f"{prefix}{key}.")
        elif there != here:
            lines.append(f"{prefix}{key}: {there!r} in the file, {here!r} wanted")
    return lines


def _write(path: Path, content: dict) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())


def write_whole(path: Path, content: bytes) -> None:
    """Write a whole file or none: a temporary file in the same folder, flushed to disk, then put in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's own mode would keep others from reading it
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
