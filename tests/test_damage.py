"""Checkpoint files that are damaged, foreign or hostile: each is refused by one kind of error, and left as it is."""

import hashlib
import io
import pickle
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from src.checkpoint import SEAL, CheckpointError, load_or_run
from src.masking import masktune_epoch
from src.models import SmallCNN
from src.seeding import generator
from src.state import State
from src.training import sgd

IMAGES = torch.randint(256, (8, 3, 28, 28), dtype=torch.uint8, generator=generator(0, "damage"))


class Hostile:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def broken(content: bytes) -> Iterator[bytes]:
    """What disks, downloads and earlier versions make of a file."""
    draw, size, body = random.Random(0), len(content), content[:content.rindex(SEAL)]
    for cut in [0, 1, 2, 100, size - 1, size - 64, size - 65, len(body), *(draw.randrange(size) for _ in range(52))]:
        yield content[:cut]
    for place in [0, 3, size - 1, size - 70, len(body) - 1, *(draw.randrange(size) for _ in range(95))]:
        yield content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1:]
    for place in (draw.randrange(size - 4096) for _ in range(15)):
        yield content[:place] + bytes(4096) + content[place + 4096:]
    yield from (content + b"\0", content + b"more", content + content, content[10:])
    yield from (body, content.replace(b"checkpoint 3,", b"checkpoint 2,"))
    yield from (b"\x89PNG\r\n\x1a\n" + bytes(1000), b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\n")


def forged(body: bytes, trap) -> Iterator[bytes]:
    """What can be sealed anew by whoever wants to: code, no checkpoint at all, or one of something else."""
    def load(**changes: object) -> dict:
        return torch.load(io.BytesIO(body), weights_only=True) | changes

    whole, momentum = load(), load()
    momentum["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(5)
    contents = [Hostile(trap), load(history=Hostile(trap)), momentum, load(config=whole["config"] | {"seed": 7})]
    contents += [load(epoch=-1), load(epoch=10 ** 9), load(model={}), load(optimizer=None, epoch=1)]
    contents += [load(model=whole["model"] | {name: torch.zeros(shape)}) for name, shape in (
        ("linear.3.bias", (3,)), ("backbone.0.weight", (16, 1, 3, 3)), ("backbone.1.weight", ()))]
    for content in contents:
        torch.save(content, file := io.BytesIO())
        yield file.getvalue()
    np.savez(array := io.BytesIO(), weight=np.zeros(3))
    yield from (b"", b"not a checkpoint", array.getvalue(), pickle.dumps(Hostile(trap)))


def test_every_damaged_file_is_refused_and_left_alone(tmp_path):
    path, trap, trained = tmp_path / "stage" / "erm-seed0.pt", tmp_path / "trap", []

    def fresh() -> State:
        model = SmallCNN()
        return State(model, sgd(model.parameters(), 0.9, 1e-4))

    def advance(state: State) -> dict[str, float]:
        trained.append(state.epoch)
        return {"loss": masktune_epoch(state, IMAGES, torch.arange(8) % 2, lr=0.01, batch_size=4, seed=0)[0]}

    for _ in range(2):  # whole, it is taken
        load_or_run(path, {"stage": "erm", "seed": 0}, 2, fresh, advance)
    content = path.read_bytes()
    files, inside = [*broken(content)], [*forged(content[:content.rindex(SEAL)], trap)]
    files += inside + [one + SEAL + hashlib.sha256(one).hexdigest().encode() for one in inside]
    assert len(files) >= 200
    for number, damaged in enumerate(files):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"erm-seed0\.pt.* move it away"):
            load_or_run(path, {"stage": "erm", "seed": 0}, 2, fresh, advance)
        assert path.read_bytes() == damaged, number
        assert not trap.exists(), number
    assert trained == [0, 1]  # nothing was trained over a file
