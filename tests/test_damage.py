"""Checkpoint files that are damaged, foreign or hostile: each is refused by one kind of error, and left as it is."""

import hashlib
import io
import pickle
import random
import time
import zipfile
from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
import torch

from src.checkpoint import SEAL, CheckpointError
from src.experiments import stages
from src.experiments.stages import run_erm


def sealed(body: bytes) -> bytes:
    return body + SEAL + hashlib.sha256(body).hexdigest().encode()


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def deflated(body: bytes, bomb: bool) -> bytes:
    """The same archive compressed; with `bomb`, one part of it holds 100 MB of zeros."""
    source, packed = zipfile.ZipFile(io.BytesIO(body)), io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for i, name in enumerate(source.namelist()):
            target.writestr(name, bytes(10 ** 8) if bomb and i == 2 else source.read(name))
    return packed.getvalue()


class Hostile:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def mutations(content: bytes, trap) -> Iterator[tuple[str, bytes]]:
    draw = random.Random(0)
    size, body = len(content), content[:content.rindex(SEAL)]
    for cut in [0, 1, 2, 100, size - 1, size - 64, size - 65, len(body), *(draw.randrange(size) for _ in range(52))]:
        yield f"cut after {cut} bytes", content[:cut]
    for place in [0, 3, size - 1, size - 70, len(body) - 1, *(draw.randrange(size) for _ in range(95))]:
        flipped = bytes([content[place] ^ 1 << draw.randrange(8)])
        yield f"bit flipped at {place}", content[:place] + flipped + content[place + 1:]
    for _ in range(15):
        place = draw.randrange(size - 4096)
        yield f"block lost at {place}", content[:place] + bytes(4096) + content[place + 4096:]
    for extra in (b"\0", b"\n", b"more", content):
        yield f"{len(extra)} bytes too many", content + extra
    yield "head lost", content[10:]

    def load() -> dict:
        return torch.load(io.BytesIO(body), weights_only=True)

    names = [name for name, value in load()["model"].items() if value.dim() == 1 and len(value) in (16, 32)]
    for one, two in list(combinations(names, 2))[:15]:
        changed = load()
        changed["model"][one], changed["model"][two] = changed["model"][two], changed["model"][one]
        yield f"{one} and {two} exchanged, saved by torch.save", saved(changed)
    for key in load():
        changed = load()
        del changed[key]
        yield f"no {key}, sealed", sealed(saved(changed))
    forged = {
        "epoch": [-1, 10 ** 9, "3", None, 2.5], "best": [3, "x"], "model": [{}, None, [1], {"a": torch.zeros(3)}],
        "optimizer": ["x", {}, {"state": {}, "param_groups": []}], "config": [{}, None, "erm", [("lr", 1)]],
        "masks": [{}, {"shape": [9], "bits": 3}, {"shape": [10 ** 6] * 3, "bits": torch.zeros(1).byte()}],
        "parents": [None], "history": [7],
    }
    for key, values in forged.items():
        for value in values:
            yield f"{key} is {str(value)[:20]}, sealed", sealed(saved({**load(), key: value}))
    for name, shape in (("linear.3.bias", (3,)), ("backbone.0.weight", (16, 1, 3, 3)), ("backbone.1.weight", ())):
        changed = load()
        changed["model"][name] = torch.zeros(shape)
        yield f"{name} is {shape}, sealed", sealed(saved(changed))
    changed, other = load(), load()
    changed["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(5)
    other["config"]["seed"] = 7
    for name, inside in (("momentum of another shape", saved(changed)), ("another seed", saved(other)),
                        ("nothing", b""), ("a text", b"not a checkpoint")):
        yield f"{name}, sealed", sealed(inside)
    for value in ([], 3, "text", torch.zeros(3), {}):
        yield f"sealed: {value}", sealed(saved(value))
    for hostile in (pickle.dumps(Hostile(trap)), saved(Hostile(trap)), saved({**load(), "history": Hostile(trap)})):
        yield "hostile", hostile
        yield "hostile, sealed", sealed(hostile)
    yield "compressed, sealed", sealed(deflated(body, bomb=False))
    yield "zip bomb, sealed", sealed(deflated(body, bomb=True))
    array = io.BytesIO()
    np.savez(array, weight=np.zeros(3))
    yield "a NumPy archive, sealed", sealed(array.getvalue())
    yield "a file of the first format", body
    yield "a file of the second format", content.replace(b"checkpoint 3,", b"checkpoint 2,")
    yield "a picture", b"\x89PNG\r\n\x1a\n" + bytes(1000)
    yield "a web page", b"<!DOCTYPE html><title>404 Not Found</title>"
    yield "a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def test_every_damaged_file_is_refused_and_left_alone(setting, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(stages, "train_epoch", None)  # nothing may be trained over it
    content = (trained[1] / setting.name / "erm-seed0.pt").read_bytes()
    path, trap = tmp_path / setting.name / "erm-seed0.pt", tmp_path / "trap"
    path.parent.mkdir()
    path.write_bytes(content)
    run_erm(setting, 0)  # whole, it is taken
    names, longest = [], (0.0, "")
    for name, damaged in mutations(content, trap):
        path.write_bytes(damaged)
        begun = time.perf_counter()
        with pytest.raises(CheckpointError, match=r"erm-seed0\.pt") as refusal:
            run_erm(setting, 0)
        longest = max(longest, (time.perf_counter() - begun, name))
        assert "move it away" in str(refusal.value), name
        assert path.read_bytes() == damaged, name
        assert not trap.exists(), name
        names.append(name)
    assert len(names) >= 200
    print(f"{len(names)} files refused of {len(names)} tried, the slowest in {longest[0]:.3f} s ({longest[1]})")
