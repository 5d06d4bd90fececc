"""Digits with a square, and every data set by its name."""

import gzip
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision

from src.datasets import SQUARE, DataUnavailable, SpuriousDigits, SpuriousMNIST, View, load, open_files
from src.datasets.spurious import MD5
from tests.conftest import REPOSITORY
from tests.miniature import wrong


def test_mnist_counts_by_digit_and_at_random(mnist_root):
    by_digit = SpuriousMNIST(mnist_root, train=True, mix_order="digit", download=False)
    assert by_digit.digits[wrong(by_digit)].bincount(minlength=10).tolist() == [0, 0, 0, 0, 306, 294, 0, 0, 0, 0]
    for digit, chosen in ((4, slice(-306, None)), (5, slice(294))):  # the last of class 0, the first of class 1
        assert wrong(by_digit)[by_digit.digits == digit][chosen].all()
    random = SpuriousMNIST(mnist_root, train=True, download=False)
    assert random.groups.bincount().tolist() == by_digit.groups.bincount().tolist() == [306, 30290, 29110, 294]
    assert (random.digits[wrong(random)].bincount(minlength=10) > 0).all()


def test_same_arguments_same_tensors_and_other_seed_other_squares():
    first, again, other = (SpuriousDigits(train=True, seed=seed) for seed in (3, 3, 4))
    torch.rand(5)  # the global generator has no say
    for name in ("images", "labels", "digits", "squares", "groups"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert torch.equal(first.digits, other.digits)
    assert not torch.equal(first.squares, other.squares)
    image, label, group = first[5]
    assert torch.equal(image, first.images[5].float() / 255)
    assert (label, group) == (first.labels[5], first.groups[5])
    for one in (first, SpuriousDigits(train=False, test_set="raw"), SpuriousDigits(train=False, test_set="malicious")):
        known = torch.zeros(1347 if one is first else 450, 28, 28, dtype=torch.bool)
        known[one.squares, :SQUARE, :SQUARE] = True
        assert torch.equal(one.known[:], known)


def test_two_squares_go_together_but_in_the_test_sets_of_one_alone():
    make = partial(SpuriousDigits, background="grey")
    one, two = (make(train=True, squares=squares) for squares in (1, 2))
    assert torch.equal(one.squares, two.squares)
    corners = {"blue": (slice(SQUARE), (0, 0, 255)), "red": (slice(-SQUARE, None), (255, 0, 0))}
    for name, seen in {None: corners, "malicious": corners, "blue": ["blue"], "red": ["red"], "raw": []}.items():
        data = make(train=name is None, test_set=name, squares=2)
        plain = make(train=name is None, test_set=name and "raw") if name else one
        left = data.images.clone()
        for corner, (side, colour) in corners.items():
            there = (data.images[:, :, side, side] == torch.tensor(colour).view(3, 1, 1)).flatten(1).all(1)
            assert torch.equal(there, data.squares & (corner in seen))
            assert torch.equal(data.known[:][:, side, side].all((1, 2)), there)
            left[:, :, side, side] = plain.images[:, :, side, side]
        assert name is None or torch.equal(left, plain.images)  # nothing else is changed
    for bad in ({"test_set": "blue"}, {"test_set": "raw", "squares": 3}):
        with pytest.raises(ValueError, match="expected"):
            make(train=False, **bad)


@pytest.fixture
def gzipped(tmp_path):
    """The folder of MNIST as it is shipped."""
    return Path(shutil.copytree(REPOSITORY / "data" / "MNIST" / "raw", tmp_path / "MNIST" / "raw",
                                ignore=lambda _, names: {name for name in names if not name.endswith(".gz")}))


def test_shipped_mnist_is_read_without_a_network_and_not_unpacked(gzipped, tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "MNIST", None)
    assert len(SpuriousMNIST(tmp_path, train=False, test_set="raw")) == 10_000
    assert {path.name for path in gzipped.iterdir()} == {f"{name}.gz" for name in MD5}


def test_a_download_gives_what_is_missing_and_nothing_half(gzipped, tmp_path, monkeypatch):
    lost = gzipped / "t10k-labels-idx1-ubyte.gz"
    content, kept = lost.read_bytes(), {path: path.stat().st_mtime_ns for path in gzipped.iterdir() if path != lost}
    lost.unlink()

    def interrupted(folder, download):
        (Path(folder) / "half.gz").write_bytes(b"half")
        raise RuntimeError("no network:\ntried one mirror\ntried another")

    monkeypatch.setattr(torchvision.datasets, "MNIST", interrupted)
    with pytest.raises(DataUnavailable, match=r"t10k-labels.* \(no network\); put MNIST's four files into"):
        SpuriousMNIST(tmp_path, train=True)
    assert set(gzipped.iterdir()) == set(kept)
    monkeypatch.setattr(torchvision.datasets, "MNIST", lambda folder, download: [
        (Path(folder) / f"{name}.gz").write_bytes(content) for name in MD5])
    assert len(SpuriousMNIST(tmp_path, train=False, test_set="raw")) == 10_000
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


DAMAGED = gzip.compress(b"others", mtime=0)


@pytest.mark.parametrize("content", [None, b"no gzip", DAMAGED, DAMAGED[:-9],
                                     gzip.compress(b"", mtime=0)[:10] + b"\xff" * 30])
def test_damaged_mnist_is_named_and_never_used(content, gzipped, tmp_path):
    damaged = gzipped / "t10k-images-idx3-ubyte.gz"
    damaged.unlink()
    if content is not None:
        damaged.write_bytes(content)
    with pytest.raises(DataUnavailable, match=r"t10k-images-idx3-ubyte\.gz is missing or damaged"):
        SpuriousMNIST(tmp_path, train=True, download=False)
    assert content is None or damaged.read_bytes() == content  # it is the user's


def test_data_sets_by_name(tmp_path):
    data = load("SpuriousDigits", "raw", seed=3, mix_order="digit")
    assert torch.equal(data.images, SpuriousDigits(train=False, test_set="raw").images)
    drawn = load("SpuriousDigits", seed=3, class_mix_ratio=0.2, mix_order="digit")
    assert torch.equal(drawn.groups, SpuriousDigits(True, None, 0.2, "digit", 3).groups)
    for name, said in (("Waterbirds, corrected", "nlp.stanford.edu"), ("Waterbirds, rebuilt", "data/README"),
                       ("CelebA", "mmlab"), ("CIFAR-10, JPEG copy", "Yoongi")):
        with pytest.raises(FileNotFoundError, match=said):
            load(name, root=tmp_path, view=View(8, 8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("call", "error", "named"), [
    *((lambda of=of: of("MNIST"), ValueError, "'SpuriousMNIST': .*got 'MNIST'") for of in (load, open_files)),
    (lambda: open_files("CIFAR10"), KeyError, "CIFAR10"),
    (lambda: load("SpuriousDigits", "test"), ValueError, "malicious"),
    (lambda: load("SpuriousDigits", ratio=0.5), TypeError, "'ratio'"),
    (lambda: load("CelebA", view=View(8, 8), mix_order="digit"), ValueError, "mix_order"),
    (lambda: load("CIFAR10"), ValueError, "expected a view for CIFAR10"),
    (lambda: SpuriousDigits(train=True, test_set="raw"), ValueError, "test_set of .None"),
    (lambda: SpuriousDigits(train=False), ValueError, "malicious"),
    (lambda: SpuriousDigits(train=True, mix_order="alphabetical"), ValueError, "digit"),
    *((lambda ratio=ratio: SpuriousDigits(train=True, class_mix_ratio=ratio), ValueError, r"\[0, 1\]")
      for ratio in (1.1, -0.1, float("nan")))])
def test_unknown_names_parts_and_options(call, error, named):
    with pytest.raises(error, match=named):
        call()
