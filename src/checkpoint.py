"""Run a stage once: load it if it is finished, continue it if it was interrupted, start it if it is missing."""

import hashlib
import io
import pickle
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
    """A checkpoint cannot be read or written; the message names the file, what is wrong and what to do."""


def load_or_run(path: Path, config: dict, epochs: int, fresh: Callable[[], State],
                advance: Callable[[State], dict[str, float]]) -> State:
    """Bring a stage to its last epoch and return it, loaded where it is finished; say where it starts or continues.

    It is saved after every epoch, so an interrupt or a kill loses the epoch under way and nothing else. What only a
    stage with parents needs to continue (optimizer, masks) is left out of its finished file. Of two processes at one
    stage, the second waits; those that torchrun started together work at it together, and the first of them writes.
    Where progress bars are off (`parallel.bars`), a line is printed after every tenth of the epochs.

    Args:
        config: everything that the result depends on, as plain numbers and strings.
        epochs: of the finished state, those that it started from included.
        fresh: builds the state from which the stage starts. A file with other parents is stale: run again.
        advance: trains one epoch, a pure function of the state; returns what the history shall hold, as numbers.

    Raises:
        TypeError, ValueError: the configuration or the model is not what a file can give back; nothing is trained.
        CheckpointError: the file belongs to another configuration, is damaged, or cannot be written. What is on disk
            is left as it is.
        FloatingPointError: the loss or the weights are no longer finite; the file on disk is from before.
    """
    name = f"{path.parent.name}/{path.stem}"
    leads = parallel.leads()
    state = fresh()
    _resume(state, path, config, epochs)
    if parallel.total(torch.tensor(state.epoch == epochs, dtype=torch.int)) == parallel.world():  # all saw it finished
        return state
    with ExitStack() as stack:
        if leads:
            with _writable(path):
                stack.enter_context(locked(path, name))
        parallel.wait()  # for the one with the lock
        state = fresh()
        first, begins = state.epoch, not state.parents
        found = _resume(state, path, config, epochs)  # anew: another process may have gone on until now
        if leads and found:
            print(f"{name}: {found}", flush=True)
        if state.epoch < epochs:
            _check_that_it_can_be_read_back(state, config)
        parallel.wait()  # until all have read the file, before it is written
        start, done = time.monotonic(), state.epoch
        with tqdm(desc=name, initial=done - first, total=epochs - first, unit="epoch",
                  disable=done == epochs or not parallel.bars()) as progress:
            while state.epoch < epochs:
                try:
                    state.finish_epoch(**{name: float(value) for name, value in advance(state).items()})
                    if leads:
                        content = _pack(state, config, whole=begins or state.epoch < epochs)
                        with _writable(path):
                            write_whole(path, content)
                except KeyboardInterrupt:  # held back while the file is written
                    print(f"{name}: interrupted; the {state.epoch - first} epochs done are saved, run again to go on")
                    raise
                progress.update()
                if leads and not parallel.bars() and (state.epoch - first) % max(1, (epochs - first) // 10) == 0:
                    print(f"{name}: {state.epoch - first} of {epochs - first} epochs, "
                          f"{(time.monotonic() - start) / (state.epoch - done):.1f} s each", flush=True)
    return state


def finished(path: Path, epochs: int) -> bool:
    """Whether a file holds a stage at its last epoch; of what it holds else, nothing is checked."""
    try:
        return _unpack(path)["epoch"] == epochs
    except FileNotFoundError:
        return False


def _resume(state: State, path: Path, config: dict, epochs: int) -> str | None:
    """Bring a fresh state to where the file stands, if there is one to go on from; say what was found, None: all."""
    try:
        saved = _unpack(path)
    except FileNotFoundError:
        return "starts"
    if differences := _differences(saved["config"], config):
        raise CheckpointError(f"{path} belongs to another experiment ({'; '.join(differences)}); use another folder "
                              f"for checkpoints, or {ADVICE}")
    first = state.epoch
    try:
        if any(saved["parents"][parent] != theirs for parent, theirs in state.parents.items()):
            return "stale, since the weights that it started from have changed; starts anew"
        _restore(state, saved, epochs)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit its own configuration ({_first_line(error)}); {ADVICE}") from error
    if state.epoch == epochs:
        return None
    there, here = (", ".join(f"{name} {value}" for name, value in one.items())
                   for one in (saved["made_with"], _made_with(state)))
    other = "" if there == here else f"; it was begun with {there}, here is {here}: not bit for bit what either gives"
    return f"continues after {state.epoch - first} epochs{other}"


def _restore(state: State, saved: dict, epochs: int) -> None:
    if not state.epoch <= saved["epoch"] <= epochs:
        raise ValueError(f"epoch {saved['epoch']} is outside the stage")
    state.model.load_state_dict(saved["model"])
    if saved["optimizer"] is not None:
        state.optimizer.load_state_dict(saved["optimizer"])
        if any(value.dim() and value.shape != parameter.shape for parameter, values in state.optimizer.state.items()
               for value in values.values()):  # Adam counts its steps in a scalar
            raise ValueError("the optimizer's state belongs to another model")
    elif saved["epoch"] < epochs:
        raise ValueError("the optimizer's state is missing")
    if saved["masks"] is not None:
        device = next(state.model.parameters()).device
        state.masks = Masks(saved["masks"]["shape"], saved["masks"]["bits"], device)
    state.epoch, state.parents, state.history, state.best = (
        saved[key] for key in ("epoch", "parents", "history", "best"))


def _pack(state: State, config: dict, whole: bool) -> bytes:
    """The file of a state; `whole` keeps what only a stage that goes on needs."""
    masks = {"shape": state.masks.shape, "bits": state.masks.bits} if whole and state.masks is not None else None
    buffer = io.BytesIO()
    torch.save({
        "config": config, "parents": state.parents | ({"masks": digest(state.masks)} if state.masks else {}),
        "epoch": state.epoch, "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict() if whole else None, "masks": masks, "best": state.best,
        "history": state.history, "made_with": _made_with(state)}, buffer)
    body = buffer.getvalue()
    return body + SEAL + hashlib.sha256(body).hexdigest().encode()


def _check_that_it_can_be_read_back(state: State, config: dict) -> None:
    """Raise ValueError, before anything is trained, if a file of this state could not be read, or not as it was."""
    try:
        saved = _content(_pack(state, config, whole=True), "a trial file")
    except (CheckpointError, TypeError, AttributeError, RuntimeError, pickle.PicklingError) as error:
        raise ValueError("expected configuration and model of plain numbers, strings and tensors, which a checkpoint "
                         f"can give back, got something else: {_first_line(error.__cause__ or error)}") from error
    if differences := _differences(saved["config"], config):
        raise ValueError(f"expected a configuration that is equal to its copy, got {'; '.join(differences)}")


def _unpack(path: Path) -> dict:
    """Load a file on the CPU, its seal and its fields checked; FileNotFoundError if there is none."""
    try:
        return _content(path.read_bytes(), path)
    except FileNotFoundError:
        raise
    except OSError as error:  # a folder, for one
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); make it readable, or {ADVICE}") from error


def _content(content: bytes, path: Path | str) -> dict:
    """What a file holds; `path` names it in errors."""
    body, seal, sha = content.rpartition(SEAL)
    if not seal:
        raise CheckpointError(f"{path} ({len(content):,} bytes) is cut short, or no checkpoint of this version of the "
                              f"project; {ADVICE}")
    if sha != hashlib.sha256(body).hexdigest().encode():
        raise CheckpointError(f"{path} is damaged: its content does not match its sha256; {ADVICE}")
    try:
        return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)  # executes no code
    except Exception as error:  # a forged file can fail in any way while it is unpacked
        raise CheckpointError(f"{path} is no checkpoint of this project ({_first_line(error)}); {ADVICE}") from error


def _differences(found: dict, expected: dict, prefix: str = "") -> list[str]:
    """Name the fields in which two configurations differ, nested ones by dotted names."""
    lines = []
    for key in sorted(found.keys() | expected.keys()):
        there, here = found.get(key), expected.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            lines += _differences(there, here, f"{prefix}{key}.")
        elif there != here:
            lines.append(f"{prefix}{key}: expected {here!r}, got {there!r}")
    return lines


def _made_with(state: State) -> dict[str, str]:
    return {"python": platform.python_version(), "torch": str(torch.__version__),
            "device": device_name(next(state.model.parameters()).device)}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Turn the errors of a disk into a CheckpointError that says what to do."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error.strerror or error}); what was there is untouched: "
                              "free some space or use another folder, and run again") from error
