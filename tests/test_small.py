"""CIFAR-10 and its JPEG copy, in their exact formats at a miniature size."""

import hashlib
import pickle
import shutil
import urllib.request
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from src.datasets import DataUnavailable, View, load
from tests.miniature import expected

SPLITS = ("train", "val", "test")
pytestmark = pytest.mark.filterwarnings("ignore:.*Results will not compare")


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """CIFAR-10 under a root, without a network; pixels (N, 3, 32, 32) and labels (N,) of {part: ...}."""
    def refuse(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    draw, parts = np.random.default_rng(0), {}

    def write(name: str, content: dict) -> list[str]:
        file = tmp_path / "cifar-10-batches-py" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(pickle.dumps(content))
        return [name, hashlib.md5(file.read_bytes()).hexdigest()]

    for part, batches in (("train", [f"data_batch_{i + 1}" for i in range(5)]), ("test", ["test_batch"])):
        pixels, labels = draw.integers(0, 256, (20, 3, 32, 32), dtype=np.uint8), draw.integers(0, 10, 20)
        data, targets = (np.split(one.reshape(20, -1), len(batches)) for one in (pixels, labels))
        monkeypatch.setattr(CIFAR10, f"{part}_list", [
            write(name, {"data": some, "labels": theirs.flatten().tolist()})
            for name, some, theirs in zip(batches, data, targets, strict=True)])
        parts[part] = torch.from_numpy(pixels), torch.from_numpy(labels)
    name, md5 = write("batches.meta", {"label_names": list("0123456789")})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return tmp_path, parts


@pytest.mark.parametrize("split", SPLITS)
def test_fetched(split, fetched):
    root, parts = fetched
    pixels, labels = parts["test" if split == "test" else "train"]
    data = load("CIFAR10", split, root=root, view=View(32, 32))
    chosen = list(range(20)) if split == "test" else expected(20, split)
    assert torch.equal(data.images, pixels[chosen])
    assert torch.equal(data.labels, labels[chosen])
    assert (data.images.dtype, data.labels.dtype, data.classes) == (torch.uint8, torch.int64, tuple("0123456789"))
    assert load("CIFAR10", split, root=root, view=View(16, 16)).images.shape == (len(chosen), 3, 16, 16)


@pytest.mark.parametrize("damage", ["missing", "half"])
@pytest.mark.parametrize("file", ["data_batch_3", "batches.meta"])
def test_damaged_without_a_network(fetched, file, damage):
    path = fetched[0] / "cifar-10-batches-py" / file
    content = path.read_bytes()
    path.unlink()
    if damage == "half":
        path.write_bytes(content[:-9])
    with pytest.raises(DataUnavailable, match=r"CIFAR10 is not whole in .*(no network|metadata).*; run with .*there$"):
        load("CIFAR10", root=fetched[0], view=View(32, 32))


def test_jpegs(tmp_path):
    """Twenty plain pictures of two classes, each of its own grey, ten a class."""
    for i in range(20):
        path = tmp_path / "cifar10_jpeg" / "train" / ("cat", "dog")[i // 10] / f"{i % 10:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 40), (10 * i + 20,) * 3).save(path)
    shutil.copytree(tmp_path / "cifar10_jpeg" / "train", tmp_path / "cifar10_jpeg" / "test")
    for split in SPLITS:
        chosen = list(range(20)) if split == "test" else expected(20, split)
        with pytest.warns(UserWarning, match="Results will not compare"):
            data = load("CIFAR-10, JPEG copy", split, root=tmp_path, view=View(16, 16))
        assert data.images.flatten(1).float().std(1).max() == 0
        assert ((data.images[:, 0, 0, 0].long() - 20) // 10).tolist() == chosen
        assert data.labels.tolist() == [i // 10 for i in chosen]
        assert (data.classes, data.labels.dtype, data.groups) == (("cat", "dog"), torch.int64, None)
