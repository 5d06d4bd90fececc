"""CIFAR-10, its JPEG copy and SVHN, in their exact formats at a miniature size."""

import hashlib
import pickle
import shutil
import socket
import urllib.request
from http.client import IncompleteRead
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, SVHN

from src.datasets import DataUnavailable, missing, small
from src.datasets.decode import View
from src.datasets.small import small_pictures
from src.datasets.spurious import CONNECT_TIMEOUT_S
from tests.miniature import expected

VIEW = View(32, 32)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    socket.setdefaulttimeout(None)


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Five batches of four images and a test batch of six; pixels (26, 3, 32, 32) and labels (26,) of all."""
    folder, draw = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir()
    pixels, labels = draw.integers(0, 256, (26, 3, 32, 32), dtype=np.uint8), draw.integers(0, 10, 26)

    def write(name: str, content: dict) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(name: str, start: int, end: int) -> list[str]:
        return write(name, {"data": pixels[start:end].reshape(-1, 3072), "labels": labels[start:end].tolist()})

    monkeypatch.setattr(CIFAR10, "train_list", [batch(f"data_batch_{i + 1}", 4 * i, 4 * i + 4) for i in range(5)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch", 20, 26)])
    name, md5 = write("batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return tmp_path, torch.from_numpy(pixels), torch.from_numpy(labels)


@pytest.fixture
def svhn(tmp_path, monkeypatch):
    """Twenty images to train and five to test; {part: (pixels (N, 3, 32, 32), labels (N,), of which 10 means 0)}."""
    (tmp_path / "svhn").mkdir()
    draw, parts, table = np.random.default_rng(0), {}, {}
    for part, n in (("train", 20), ("test", 5)):
        pixels, labels = draw.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8), 1 + np.arange(n) % 10
        file = tmp_path / "svhn" / f"{part}_32x32.mat"
        scipy.io.savemat(file, {"X": pixels.transpose(2, 3, 1, 0), "y": labels[:, None].astype(np.uint8)})
        parts[part] = torch.from_numpy(pixels), torch.from_numpy(labels)
        table[part] = [f"http://localhost/{file.name}", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", table)
    return tmp_path, parts


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_cifar10(cifar10, split):
    root, pixels, labels = cifar10
    data = small_pictures("CIFAR10", split, VIEW, root)
    chosen = list(range(20, 26)) if split == "test" else expected(20, split)
    assert len(data) == {"train": 16, "val": 4, "test": 6}[split]
    assert torch.equal(data.images, pixels[chosen])
    assert torch.equal(data.labels, labels[chosen])
    assert (data.images.dtype, data.labels.dtype) == (torch.uint8, torch.int64)
    assert data.classes == tuple(f"class {i}" for i in range(10))
    assert small_pictures("CIFAR10", split, View(16, 16), root).images.shape == (len(data), 3, 16, 16)
    assert torch.equal(small_pictures("CIFAR10", split, VIEW, root).images, data.images)
    assert missing("CIFAR10", root) is None


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_svhn(svhn, split):
    root, parts = svhn
    pixels, labels = parts["test" if split == "test" else "train"]
    data = small_pictures("SVHN", split, VIEW, root)
    chosen = list(range(5)) if split == "test" else expected(20, split)
    assert torch.equal(data.images, pixels[chosen])
    assert torch.equal(data.labels, labels[chosen] % 10)
    assert data.labels.dtype == torch.int64
    assert data.classes == tuple("0123456789")
    assert missing("SVHN", root) is None


@pytest.mark.parametrize("damage", ["missing", "half"])
@pytest.mark.parametrize(("dataset", "file"), [
    ("CIFAR10", "cifar-10-batches-py/data_batch_3"), ("CIFAR10", "cifar-10-batches-py/batches.meta"),
    ("SVHN", "svhn/train_32x32.mat")])
def test_damaged_without_a_network(cifar10, svhn, dataset, file, damage):
    root = cifar10[0]
    if damage == "half":
        (root / file).write_bytes((root / file).read_bytes()[:99])
    else:
        (root / file).unlink()
    folder = (root / file).parent
    with pytest.raises(DataUnavailable, match=rf"{dataset} is not whole in {folder}: .*; run with a network, .*there$"):
        small_pictures(dataset, "train", VIEW, root)
    assert socket.getdefaulttimeout() is None
    assert missing(dataset, root).startswith(f"{dataset} is not whole in {folder}: Dataset")
    if dataset == "SVHN":
        assert len(small_pictures(dataset, "test", VIEW, root)) == 5  # its file is whole


def test_download(svhn, monkeypatch):
    root, _ = svhn
    server, timeouts = root / "server", []
    shutil.move(root / "svhn", server)

    def fetch(_, folder, name, __):
        timeouts.append(socket.getdefaulttimeout())
        folder.mkdir(exist_ok=True)
        shutil.copy(server / name, folder / name)

    monkeypatch.setattr("torchvision.datasets.svhn.download_url", fetch)
    assert "train_32x32.mat" in missing("SVHN", root)
    assert not (root / "svhn").exists()
    assert len(small_pictures("SVHN", "train", VIEW, root)) == 16
    assert "run with a network" in missing("SVHN", root)  # the test set
    assert len(small_pictures("SVHN", "test", VIEW, root)) == 5
    assert missing("SVHN", root) is None
    assert timeouts == [CONNECT_TIMEOUT_S] * 2

    def cut(*_):
        raise IncompleteRead(b"")

    monkeypatch.setattr("torchvision.datasets.svhn.download_url", cut)
    with pytest.raises(DataUnavailable, match="IncompleteRead"):
        small_pictures("SVHN", "test", VIEW, root)


def test_the_jpeg_copy(tmp_path, monkeypatch):
    for part, n in (("train", 10), ("test", 2)):
        for label, name in enumerate(("airplane", "cat")):
            (tmp_path / "cifar10_jpeg" / part / name).mkdir(parents=True)
            for i in range(n):
                value = 10 * i + 100 * label + 5 * (part == "test")
                Image.new("RGB", (32, 32), (value,) * 3).save(tmp_path / "cifar10_jpeg" / part / name / f"{i:04d}.jpg")
    values = [10 * i + 100 * label for label in range(2) for i in range(10)]
    for split in ("train", "val"):
        data = small_pictures("CIFAR-10, JPEG copy", split, VIEW, tmp_path)
        assert data.images[:, 0, 0, 0].tolist() == [values[i] for i in expected(20, split)]
        assert data.labels.tolist() == [i // 10 for i in expected(20, split)]
    data = small_pictures("CIFAR-10, JPEG copy", "test", VIEW, tmp_path)
    assert data.images[:, 0, 0, 0].tolist() == [5, 15, 105, 115]
    assert data.classes == ("airplane", "cat")
    assert {"cifar10-jpeg-train", "cifar10-jpeg-test"} <= {path.name for path in (tmp_path / "cache").iterdir()}
    assert "59,976 of 60,000 images are missing; put train/ and" in missing("CIFAR-10, JPEG copy", tmp_path)
    monkeypatch.setitem(small.PUBLISHED, "CIFAR-10, JPEG copy", 24)
    assert missing("CIFAR-10, JPEG copy", tmp_path) is None


@pytest.mark.parametrize(("dataset", "error", "match"), [
    ("CIFAR10", DataUnavailable, r"/cifar-10-batches-py: <urlopen error no network here>; .*cifar-10-python.tar.gz"),
    ("SVHN", DataUnavailable, r"/svhn: <urlopen error no network here>; .*test_32x32.mat .* from ufldl.stanford.edu"),
    ("CatsVsDogs", FileNotFoundError, r"/cats_vs_dogs: .*; .*Kaggle's dogs-vs-cats.*Microsoft's kagglecatsanddogs"),
    ("CIFAR-10, JPEG copy", FileNotFoundError, r"/cifar10_jpeg: its t.* missing; .*github.com/YoongiKim/CIFAR-10-im")])
def test_nothing_there(dataset, error, match, tmp_path):
    source = missing(dataset, tmp_path)
    assert source.endswith(small.SOURCES[dataset])
    assert not list(tmp_path.iterdir())
    for split in small.SPLITS:
        with pytest.raises(error, match=match):
            small_pictures(dataset, split, VIEW, tmp_path)


def test_unknown_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"expected split to be one of \('train', 'val', 'test'\), got 'dev'"):
        small_pictures("CIFAR10", "dev", VIEW, tmp_path)
    with pytest.raises(ValueError, match=r"expected dataset to be one of \('CIFAR10', 'SVHN', .*, got 'CIFAR100'"):
        small_pictures("CIFAR100", "test", VIEW, tmp_path)
