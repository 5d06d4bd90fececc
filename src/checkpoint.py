"""Run a stage once: load it if it is finished, continue it if it was interrupted, start it if it is missing."""

import hashlib
import io
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from . import parallel
from .device import device_name
from .files import locked, write_whole
from .masks import Masks
from .state import State, digest

SEAL = b"\nmasktune checkpoint 3, sha256 "  # ends a file, before the sha256 of all that stands before it
ADVICE = "move it away to run this stage anew"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message names the file, what is wrong and what to do."""


def load_or_run(path: Path, config: dict, epochs: int, fresh: Callable[[], State],
                advance: Callable[[State], dict[str, float]]) -> State:
    """Bring a stage to its last epoch and return it, loaded where it is finished; say where it starts or continues.

    It is saved after every epoch, so an interrupt or a kill loses the epoch under way and nothing else. Of two
    processes at one stage, the second waits; those of torchrun work at it together, and the first of them writes.

    Args:
        config: everything that the result depends on, as plain numbers and strings.
        epochs: of the finished state, those that it started from included.
        fresh: builds the state from which the stage starts. A file with other parents is stale: run again.
        advance: trains one epoch, a pure function of the state; returns what the history shall hold, as numbers.

    Raises:
        ValueError, pickle.PickleError: a file cannot give back the configuration or the model; nothing is trained.
        CheckpointError, OSError: the file is of something else, damaged, or cannot be written; it is left as it is.
        FloatingPointError: the loss or the weights are no longer finite; the file on disk is from before.
    """
    name, leads = f"{path.parent.name}/{path.stem}", parallel.rank() == 0
    state = fresh()
    _resume(state, path, config, epochs)  # without the lock: what is finished is loaded from a read-only folder, too
    if parallel.total(torch.tensor(int(state.epoch == epochs))) == parallel.world():  # all saw it finished
        return state
    with locked(path, name) if leads else nullcontext():
        parallel.wait()  # for the one with the lock
        state = fresh()
        first, begins = state.epoch, not state.parents
        found = _resume(state, path, config, epochs)  # anew: another process may have gone on until now
        if leads and found:
            print(f"{name}: {found}", flush=True)
            if _content(_pack(state, config, whole=True))["config"] != config:  # fails now, not when it is to be loaded
                raise ValueError(f"expected a configuration that is equal to its copy, got {config}")
        parallel.wait()  # until all have read the file, before it is written
        start = time.monotonic()
        with tqdm(desc=name, initial=state.epoch - first, total=epochs - first, unit="epoch",
                  disable=not (found and parallel.bars())) as progress:
            while state.epoch < epochs:
                state.finish_epoch(**{key: float(value) for key, value in advance(state).items()})
                if leads:
                    write_whole(path, _pack(state, config, whole=begins or state.epoch < epochs))
                progress.update()
                done = state.epoch - first
                if leads and not parallel.bars() and done % max(1, (epochs - first) // 10) == 0:
                    print(f"{name}: {done} of {epochs - first} epochs, {time.monotonic() - start:.0f} s", flush=True)
    return state


def finished(path: Path, epochs: int) -> bool:
    """Whether a file holds a stage at its last epoch; of what it holds else, nothing is checked."""
    return path.exists() and _unpack(path)["epoch"] == epochs


def _resume(state: State, path: Path, config: dict, epochs: int) -> str | None:
    """Bring a fresh state to where the file stands, if there is one to go on from; say what was found, None: all."""
    if not path.exists():
        return "starts"
    saved, first = _unpack(path), state.epoch
    if differences := "; ".join(_differences(saved["config"], config)):
        raise CheckpointError(f"{path} belongs to another experiment ({differences}); use another folder "
                              f"for checkpoints, or {ADVICE}")
    if any(saved["parents"].get(parent) != theirs for parent, theirs in state.parents.items()):
        return "stale, since the weights that it started from have changed; starts anew"
    try:
        if not first <= saved["epoch"] <= epochs:
            raise ValueError(f"epoch {saved['epoch']} is outside the stage")
        state.model.load_state_dict(saved["model"])
        if saved["optimizer"] is not None or saved["epoch"] < epochs:
            state.optimizer.load_state_dict(saved["optimizer"])
            if any(value.dim() and value.shape != parameter.shape for parameter, values in state.optimizer.state.items()
                   for value in values.values()):  # Adam counts its steps in a scalar
                raise ValueError("the optimizer's state belongs to another model")
        if saved["masks"] is not None:
            state.masks = Masks(**saved["masks"], device=next(state.model.parameters()).device)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit its own configuration ({error!r}); {ADVICE}") from error
    state.epoch, state.parents, state.history, state.best = (
        saved[key] for key in ("epoch", "parents", "history", "best"))
    if state.epoch == epochs:
        return None
    there, here = saved["made_with"], _made_with(state)
    other = "" if there == here else f"; it was begun with {there}, here is {here}: not bit for bit what either gives"
    return f"continues after {state.epoch - first} epochs{other}"


def _pack(state: State, config: dict, whole: bool) -> bytes:
    """The file of a state; `whole`: with optimizer and masks, which a finished stage with parents leaves out."""
    masks = {"shape": state.masks.shape, "bits": state.masks.bits} if whole and state.masks is not None else None
    buffer = io.BytesIO()
    torch.save({
        "config": config, "parents": state.parents | ({"masks": digest(state.masks)} if state.masks else {}),
        "epoch": state.epoch, "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict() if whole else None, "masks": masks, "best": state.best,
        "history": state.history, "made_with": _made_with(state)}, buffer)
    body = buffer.getvalue()
    return body + SEAL + hashlib.sha256(body).hexdigest().encode()


def _made_with(state: State) -> dict[str, str]:
    return {"python": platform.python_version(), "torch": str(torch.__version__),
            "device": device_name(next(state.model.parameters()).device)}


def _unpack(path: Path) -> dict:
    """Load a file on the CPU, its seal checked, which vouches for the rest."""
    try:
        return _content(path.read_bytes())
    except Exception as error:  # a forged file can fail in any way while it is unpacked
        raise CheckpointError(f"{path} is damaged, or no checkpoint of this version ({error!r}); {ADVICE}") from error


def _content(content: bytes) -> dict:
    body, _, sha = content.rpartition(SEAL)
    if sha != hashlib.sha256(body).hexdigest().encode():
        raise ValueError(f"the seal of this version does not match these {len(content):,} bytes")
    return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)  # executes no code


def _differences(found: dict, expected: dict, prefix: str = "") -> Iterator[str]:
    """Name the fields in which two configurations differ, nested ones by dotted names."""
    for key in sorted(found.keys() | expected.keys(), key=str):
        there, here = found.get(key), expected.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            yield from _differences(there, here, f"{prefix}{key}.")
        elif there != here:
            yield f"{prefix}{key}: expected {here!r}, got {there!r}"
