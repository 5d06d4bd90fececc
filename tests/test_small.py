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

VIEW = View(32, 32)
SPLITS = ("train", "val", "test")
pytestmark = pytest.mark.filterwarnings("ignore:.*Results will not compare")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(request, **_):
        raise URLError("no network") if "toronto" in request.full_url else IncompleteRead(b"")  # which is no OSError

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """Both data sets under a root; pixels (N, 3, 32, 32) and labels (N,) of {data set: {part: ...}}."""
    draw, parts, table = np.random.default_rng(0), {"CIFAR10": {}, "SVHN": {}}, {}
    folder = tmp_path / "cifar-10-batches-py"
    for made in (folder, tmp_path / "svhn"):
        made.mkdir()

    def write(name: str, content: dict) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    for part, batches in (("train", [f"data_batch_{i + 1}" for i in range(5)]), ("test", ["test_batch"])):
        pixels, labels = draw.integers(0, 256, (20, 3, 32, 32), dtype=np.uint8), draw.integers(0, 10, 20)
        size = 20 // len(batches)
        monkeypatch.setattr(CIFAR10, f"{part}_list", [
            write(name, {"data": pixels[size * i:size * (i + 1)].reshape(-1, 3072),
                         "labels": labels[size * i:size * (i + 1)].tolist()}) for i, name in enumerate(batches)])
        parts["CIFAR10"][part] = torch.from_numpy(pixels), torch.from_numpy(labels)
        file = tmp_path / "svhn" / f"{part}_32x32.mat"
        scipy.io.savemat(file, {"X": pixels.transpose(2, 3, 1, 0), "y": np.where(labels, labels, 10)[:, None]})
        parts["SVHN"][part] = parts["CIFAR10"][part]
        table[part] = [f"http://localhost/{file.name}", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    name, md5 = write("batches.meta", {"label_names": list("0123456789")})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    monkeypatch.setattr(SVHN, "split_list", table)
    return tmp_path, parts


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ["CIFAR10", "SVHN"])
def test_fetched(name, split, fetched):
    root, parts = fetched
    pixels, labels = parts[name]["test" if split == "test" else "train"]
    data = load(name, split, root=root, view=VIEW)
    chosen = list(range(20)) if split == "test" else expected(20, split)
    assert torch.equal(data.images, pixels[chosen])
    assert torch.equal(data.labels, labels[chosen])
    assert (data.images.dtype, data.labels.dtype) == (torch.uint8, torch.int64)
    assert data.classes == tuple("0123456789")
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
        load(name, root=fetched[0], view=VIEW)


@pytest.fixture(params=["Kaggle", "Microsoft", "JPEG"])
def files(request, tmp_path):
    """Twenty plain pictures of two classes, each of its own grey, ten a class, in the layout of a set of files."""
    paths = {"Kaggle": "cats_vs_dogs/train/{0}.{1}.jpg", "Microsoft": "cats_vs_dogs/PetImages/{2}/{1}.jpg",
             "JPEG": "cifar10_jpeg/train/{0}/{1:02d}.jpg"}
    for label, animal in enumerate(("cat", "dog")):
        for i in range(10):
            path = tmp_path / paths[request.param].format(animal, i + 5, animal.title())  # 10 comes after 9
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (48, 40), (10 * i + 100 * label + 20,) * 3).save(path)
    if request.param == "JPEG":
        shutil.copytree(tmp_path / "cifar10_jpeg" / "train", tmp_path / "cifar10_jpeg" / "test")
    return ("CIFAR-10, JPEG copy" if request.param == "JPEG" else "CatsVsDogs"), tmp_path


def test_sets_of_files(files):
    name, root = files
    test = held_out(20) if name == "CatsVsDogs" else list(range(20))
    train = [i for i in range(20) if i not in test] if name == "CatsVsDogs" else test
    chosen = {"test": test} | {split: [train[i] for i in expected(len(train), split)] for split in ("train", "val")}
    for split in SPLITS:
        with pytest.warns(UserWarning, match="Results will not compare"):
            data = load(name, split, root=root, view=View(16, 16))
        assert data.images.flatten(1).float().std(1).max() == 0
        assert ((data.images[:, 0, 0, 0].long() - 20) // 10).tolist() == chosen[split]
        assert data.labels.tolist() == [i // 10 for i in chosen[split]]
        assert (data.classes, data.labels.dtype, data.groups) == (("cat", "dog"), torch.int64, None)
    assert missing(name, root) is None
    shutil.rmtree(next(root.rglob("train" if name != "CatsVsDogs" else "*s_vs_dogs")))
    assert re.search("(cats_vs_dogs; it comes from train/|cifar10_jpeg/train is missing)", missing(name, root))
