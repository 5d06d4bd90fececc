"""CIFAR-10, its JPEG copy, SVHN and Cats vs Dogs, in their exact formats at a miniature size."""

import hashlib
import pickle
import re
import shutil
import urllib.request
from http.client import IncompleteRead
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, SVHN

from src.datasets import DataUnavailable, View, load, missing
from tests.miniature import expected, held_out

SPLITS = ("train", "val", "test")
pytestmark = pytest.mark.filterwarnings("ignore:.*Results will not compare")


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """Both data sets under a root, without a network; pixels (N, 3, 32, 32) and labels (N,) of {part: ...}."""
    def refuse(request, **_):
        raise URLError("no network") if "toronto" in request.full_url else IncompleteRead(b"")  # which is no OSError

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    draw, parts, svhn = np.random.default_rng(0), {}, {}

    def write(path: str, content: dict) -> list[str]:
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        if file.suffix == ".mat":
            scipy.io.savemat(file, content)
        else:
            file.write_bytes(pickle.dumps(content))
        return [file.name, hashlib.md5(file.read_bytes()).hexdigest()]

    for part, batches in (("train", [f"data_batch_{i + 1}" for i in range(5)]), ("test", ["test_batch"])):
        pixels, labels = draw.integers(0, 256, (20, 3, 32, 32), dtype=np.uint8), draw.integers(0, 10, 20)
        data, targets = (np.split(one.reshape(20, -1), len(batches)) for one in (pixels, labels))
        monkeypatch.setattr(CIFAR10, f"{part}_list", [
            write(f"cifar-10-batches-py/{name}", {"data": some, "labels": theirs.flatten().tolist()})
            for name, some, theirs in zip(batches, data, targets, strict=True)])
        content = {"X": pixels.transpose(2, 3, 1, 0), "y": np.where(labels, labels, 10)[:, None]}
        svhn[part] = ["http://localhost/", *write(f"svhn/{part}_32x32.mat", content)]
        parts[part] = torch.from_numpy(pixels), torch.from_numpy(labels)
    name, md5 = write("cifar-10-batches-py/batches.meta", {"label_names": list("0123456789")})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    monkeypatch.setattr(SVHN, "split_list", svhn)
    return tmp_path, parts


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ["CIFAR10", "SVHN"])
def test_fetched(name, split, fetched):
    root, parts = fetched
    pixels, labels = parts["test" if split == "test" else "train"]
    data = load(name, split, root=root, view=View(32, 32))
    chosen = list(range(20)) if split == "test" else expected(20, split)
    assert torch.equal(data.images, pixels[chosen])
    assert torch.equal(data.labels, labels[chosen])
    assert (data.images.dtype, data.labels.dtype, data.classes) == (torch.uint8, torch.int64, tuple("0123456789"))
    assert load(name, split, root=root, view=View(16, 16)).images.shape == (len(chosen), 3, 16, 16)
    assert missing(name, root) is None


@pytest.mark.parametrize("damage", ["missing", "half"])
@pytest.mark.parametrize(("name", "file"), [
    ("CIFAR10", "cifar-10-batches-py/data_batch_3"), ("CIFAR10", "cifar-10-batches-py/batches.meta"),
    ("SVHN", "svhn/train_32x32.mat")])
def test_damaged_without_a_network(fetched, name, file, damage):
    path = fetched[0] / file
    content = path.read_bytes()
    path.unlink()
    if damage == "half":
        path.write_bytes(content[:-9])
    said = missing(name, fetched[0])
    assert said.startswith(f"{name} is not whole in {path.parent} (RuntimeError")  # of a download, nothing
    with pytest.raises(DataUnavailable, match=r"(no network|IncompleteRead|metadata).*; run with a network, .*there$"):
        load(name, root=fetched[0], view=View(32, 32))


@pytest.mark.parametrize(("name", "layout"), [
    ("CatsVsDogs", "cats_vs_dogs/train/{0}.{1}.jpg"), ("CatsVsDogs", "cats_vs_dogs/PetImages/{2}/{1}.jpg"),
    ("CIFAR-10, JPEG copy", "cifar10_jpeg/train/{0}/{1:02d}.jpg")])
def test_sets_of_files(name, layout, tmp_path):
    """Twenty plain pictures of two classes, each of its own grey, ten a class."""
    for i in range(20):
        animal = ("cat", "dog")[i // 10]
        path = tmp_path / layout.format(animal, i % 10 + 5, animal.title())  # 10 comes after 9
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 40), (10 * i + 20,) * 3).save(path)
    if name != "CatsVsDogs":
        shutil.copytree(tmp_path / "cifar10_jpeg" / "train", tmp_path / "cifar10_jpeg" / "test")
    test = held_out(20) if name == "CatsVsDogs" else list(range(20))
    train = [i for i in range(20) if i not in test] if name == "CatsVsDogs" else test
    chosen = {"test": test} | {split: [train[i] for i in expected(len(train), split)] for split in ("train", "val")}
    for split in SPLITS:
        with pytest.warns(UserWarning, match="Results will not compare"):
            data = load(name, split, root=tmp_path, view=View(16, 16))
        assert data.images.flatten(1).float().std(1).max() == 0
        assert ((data.images[:, 0, 0, 0].long() - 20) // 10).tolist() == chosen[split]
        assert data.labels.tolist() == [i // 10 for i in chosen[split]]
        assert (data.classes, data.labels.dtype, data.groups) == (("cat", "dog"), torch.int64, None)
    assert missing(name, tmp_path) is None
    shutil.rmtree(tmp_path / layout.split("{")[0])
    assert re.search("(cats_vs_dogs; it comes from train/|cifar10_jpeg/train is missing)", missing(name, tmp_path))
