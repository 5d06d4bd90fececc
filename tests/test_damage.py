"""Checkpoint files that are damaged, foreign or hostile: each is refused by one kind of error, and left as it is."""

import hashlib
import io
import pickle
import random
import zipfile
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


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def bomb() -> bytes:
    """An archive whose one part unpacks to 100 MB of zeros."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10 ** 8))
    return packed.getvalue()


class Hostile:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def broken(content: bytes) -> Iterator[tuple[str, bytes]]:
    """What disks and downloads do to a file."""
    draw = random.Random(0)
    size, body = len(content), content[:content.rindex(SEAL)]
    for cut in [0, 1, 2, 100, size - 1, size - 64, size - 65, len(body), *(draw.randrange(size) for _ in range(52))]:
        yield f"cut after {cut} bytes", content[:cut]
    for place in [0, 3, size - 1, size - 70, len(body) - 1, *(draw.randrange(size) for _ in range(95))]:
        yield f"bit flipped at {place}", (content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)])
                                          + content[place + 1:])
    for place in (draw.randrange(size - 4096) for _ in range(15)):
        yield f"block lost at {place}", content[:place] + bytes(4096) + content[place + 4096:]
    for extra in (b"\0", b"\n", b"more", content):
        yield f"{len(extra)} bytes too many", content + extra
    yield "a file of the first format", body
    yield "a file of the second format", content.replace(b"checkpoint 3,", b"checkpoint 2,")
    yield "a picture", b"\x89PNG\r\n\x1a\n" + bytes(1000)
    yield "a web page", b"<!DOCTYPE html><title>404 Not Found</title>"
    yield "a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def forged(body: bytes, trap) -> Iterator[tuple[str, bytes]]:
    """What a seal can be put on by whoever wants to."""
    def load() -> dict:
        return torch.load(io.BytesIO(body), weights_only=True)

    for key in load():
        yield f"no {key}", saved({name: value for name, value in load().items() if name != key})
    for key, values in {
            "epoch": [-1, 10 ** 9, "3", None, 2.5], "best": [3, "x"], "model": [{}, None, [1], {"a": torch.zeros(3)}],
            "optimizer": ["x", {}, {"state": {}, "param_groups": []}], "config": [{}, None, "erm", [("lr", 1)]],
            "masks": [{}, {"shape": [9], "bits": 3}, {"shape": [10 ** 6] * 3, "bits": torch.zeros(1).byte()}],
            "parents": [None], "history": [7]}.items():
        for value in values:
            yield f"{key} is {str(value)[:20]}", saved({**load(), key: value})
    for name, shape in (("linear.3.bias", (3,)), ("backbone.0.weight", (16, 1, 3, 3)), ("backbone.1.weight", ())):
        changed = load()
        changed["model"][name] = torch.zeros(shape)
        yield f"{name} is {shape}", saved(changed)
    changed, other = load(), load()
    changed["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(5)
    other["config"]["seed"] = 7
    array = io.BytesIO()
    np.savez(array, weight=np.zeros(3))
    for name, inside in (("momentum of another shape", saved(changed)), ("another seed", saved(other)),
                        ("nothing", b""), ("a text", b"not a checkpoint"), ("a NumPy archive", array.getvalue()),
                        ("zip bomb", bomb())):
        yield name, inside
    for value in ([], 3, "text", torch.zeros(3), {}):
        yield f"{value} alone", saved(value)
    for hostile in (pickle.dumps(Hostile(trap)), saved(Hostile(trap)), saved({**load(), "history": Hostile(trap)})):
        yield "hostile", hostile


def test_every_damaged_file_is_refused_and_left_alone(tmp_path):
    path, trap, trained = tmp_path / "stage" / "erm-seed0.pt", tmp_path / "trap", []

    def fresh() -> State:
        model = SmallCNN()
        return State(model, sgd(model, 0.9, 1e-4))

    def advance(state: State) -> dict[str, float]:
        trained.append(state.epoch)
        return {"loss": masktune_epoch(state, IMAGES, torch.arange(8) % 2, lr=0.01, batch_size=4, seed=0)[0]}

    load_or_run(path, {"stage": "erm", "seed": 0}, 2, fresh, advance)
    load_or_run(path, {"stage": "erm", "seed": 0}, 2, fresh, advance)  # whole, it is taken
    content = path.read_bytes()
    body = content[:content.rindex(SEAL)]
    files = [*broken(content), *forged(body, trap)]
    files += [(f"{name}, sealed", inside + SEAL + hashlib.sha256(inside).hexdigest().encode())
              for name, inside in forged(body, trap)]
    for name, damaged in files:
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"erm-seed0\.pt.* move it away"):
            load_or_run(path, {"stage": "erm", "seed": 0}, 2, fresh, advance)
        assert path.read_bytes() == damaged, name
        assert not trap.exists(), name
    assert trained == [0, 1]  # nothing was trained over a file
    assert len(files) >= 200
    print(f"{len(files)} files refused")
