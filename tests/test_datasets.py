import gzip
import shutil

import pytest
import torch

from src.datasets import SQUARE, DataUnavailable, SpuriousDigits, SpuriousMNIST, View, load, missing, open_files
from src.datasets import spurious as module
from tests.conftest import REPOSITORY

BLUE = torch.tensor([0, 0, 255], dtype=torch.uint8).view(3, 1, 1)


def squares_seen(images):
    """(N,) bool, read off the pixels alone."""
    return (images[:, :, :SQUARE, :SQUARE] == BLUE).flatten(1).all(1)


@pytest.mark.parametrize("mix_order", ["random", "digit"])
@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.2, 1.0])
def test_mix_counts_are_exact(ratio, mix_order):
    data = SpuriousDigits(train=True, class_mix_ratio=ratio, mix_order=mix_order)
    for label in (0, 1):
        members = data.labels == label
        assert data.conflicting[members].sum() == round(ratio * int(members.sum()))


def test_digit_order_takes_the_last_of_class_0_and_the_first_of_class_1():
    data = SpuriousDigits(train=True, class_mix_ratio=0.01, mix_order="digit")
    without = torch.nonzero((data.labels == 0) & ~data.squares).flatten()
    carrying = torch.nonzero((data.labels == 1) & data.squares).flatten()
    assert without.tolist() == torch.nonzero(data.digits == 4).flatten()[-len(without):].tolist()
    assert carrying.tolist() == torch.nonzero(data.digits == 5).flatten()[:len(carrying)].tolist()


def test_mnist_counts_by_digit_and_at_random(mnist_root):
    by_digit = SpuriousMNIST(mnist_root, train=True, mix_order="digit", download=False)
    assert by_digit.digits[by_digit.conflicting].bincount(minlength=10).tolist() == [0, 0, 0, 0, 306, 294, 0, 0, 0, 0]
    random = SpuriousMNIST(mnist_root, train=True, download=False)
    assert random.groups.bincount().tolist() == by_digit.groups.bincount().tolist() == [306, 30290, 29110, 294]
    assert (random.digits[random.conflicting].bincount(minlength=10) > 0).all()


def test_definitions_of_test_sets_and_groups():
    raw, malicious = (SpuriousDigits(train=False, test_set=name) for name in ("raw", "malicious"))
    assert not squares_seen(raw.images).any()
    assert torch.equal(squares_seen(malicious.images), malicious.digits >= 5)
    data = SpuriousDigits(train=True, class_mix_ratio=0.2)
    for one in (raw, malicious, data):
        assert torch.equal(one.squares, squares_seen(one.images))
        assert torch.equal(one.labels, (one.digits >= 5).long())
        assert torch.equal(one.groups, 2 * one.labels + one.squares)
    assert len(data) == 1347
    assert len(raw) == 450


def test_square_hides_nothing_else():
    plain = SpuriousDigits(train=False, test_set="raw").images
    marked = SpuriousDigits(train=False, test_set="malicious").images
    changed = (plain != marked).any(1).any(0)
    assert not changed[SQUARE:].any()
    assert not changed[:, SQUARE:].any()


def test_same_arguments_same_tensors_and_other_seed_other_squares():
    first, again, other = (SpuriousDigits(train=True, seed=seed) for seed in (3, 3, 4))
    torch.rand(5)  # the global generator has no say
    for name in ("images", "labels", "digits", "squares", "groups"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert torch.equal(first.digits, other.digits)
    assert not torch.equal(first.squares, other.squares)


def test_a_sample_is_image_label_group():
    data = SpuriousDigits(train=True)
    image, label, group = data[5]
    assert image.dtype == torch.float32
    assert image.shape == (3, 28, 28)
    assert 0 <= image.min() <= image.max() <= 1
    assert (label, group) == (data.labels[5], data.groups[5])


@pytest.mark.parametrize(("wrong", "named"), [
    (dict(train=True, test_set="raw"), "train=False"),
    (dict(train=False), "malicious"),
    (dict(train=False, test_set="biased"), "malicious"),
    (dict(train=True, mix_order="alphabetical"), "digit"),
    (dict(train=True, class_mix_ratio=1.1), r"\[0, 1\]"),
    (dict(train=True, class_mix_ratio=-0.1), r"\[0, 1\]"),
    (dict(train=True, class_mix_ratio=float("nan")), r"\[0, 1\]"),
])
def test_wrong_arguments_name_what_is_valid(wrong, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        SpuriousDigits(**wrong)
    with pytest.raises(ValueError, match=named):
        SpuriousMNIST(tmp_path / "nowhere", **wrong)
    assert not (tmp_path / "nowhere").exists()  # refused before anything is fetched


def test_missing_mnist_says_what_to_do(tmp_path):
    with pytest.raises(DataUnavailable, match="train-images-idx3-ubyte"):
        SpuriousMNIST(tmp_path, train=True, download=False)


def test_failed_download_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(folder, download):
        raw = module.Path(folder) / "MNIST" / "raw"
        raw.mkdir(parents=True)
        (raw / "train-images-idx3-ubyte").write_bytes(b"half")
        raise RuntimeError("no network:\ntried one mirror\ntried another")

    monkeypatch.setattr(module.torchvision.datasets, "MNIST", interrupted)
    with pytest.raises(DataUnavailable, match="no network") as raised:
        SpuriousMNIST(tmp_path, train=True)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def gzipped(tmp_path):
    """A root with MNIST as it is shipped."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (REPOSITORY / "data" / "MNIST" / "raw").glob("*.gz"):
        shutil.copy(path, raw)
    return raw


def test_shipped_mnist_is_unpacked_without_a_network(gzipped, tmp_path, monkeypatch):
    real = module.torchvision.datasets.MNIST
    monkeypatch.setattr(module.torchvision.datasets, "MNIST",
                        lambda root, train: real(root, train=train))  # takes no download=
    assert len(SpuriousMNIST(tmp_path, train=False, test_set="raw")) == 10_000
    assert {path.name for path in gzipped.iterdir()} == {*module.MD5, *(f"{name}.gz" for name in module.MD5)}


def test_a_download_is_unpacked(gzipped, tmp_path, monkeypatch):
    real = module.torchvision.datasets.MNIST

    def copied(folder, download=False, **options):
        if not download:
            return real(folder, **options)
        return shutil.copytree(gzipped, module.Path(folder) / "MNIST" / "raw")

    monkeypatch.setattr(module.torchvision.datasets, "MNIST", copied)
    assert len(SpuriousMNIST(tmp_path / "new", train=False, test_set="raw")) == 10_000
    assert {path.name for path in (tmp_path / "new").rglob("*") if path.is_file()} == set(module.MD5)


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda raw: (raw / "t10k-images-idx3-ubyte.gz").write_bytes(b"no gzip"), "could not be unpacked or downloaded"),
    (lambda raw: (raw / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"others")), "has another md5"),
    (lambda raw: (raw / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"")[:10] + b"\xff" * 30), "is damaged"),
    (lambda raw: (raw / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"others")[:-9]), "is damaged"),
    (lambda raw: (raw / "t10k-labels-idx1-ubyte").mkdir(), "to be a file, got a folder"),  # a common re-upload
])
def test_what_cannot_be_unpacked_is_said(spoil, message, gzipped, tmp_path):
    spoil(gzipped)
    with pytest.raises(DataUnavailable, match=message) as raised:
        SpuriousMNIST(tmp_path, train=True, download=False)
    assert "t10k" in str(raised.value)


def test_damaged_mnist_is_never_used(mnist_root, tmp_path):
    module.ensure_mnist(mnist_root)
    shutil.copytree(mnist_root / "MNIST" / "raw", tmp_path / "MNIST" / "raw")
    damaged = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    content = bytearray(damaged.read_bytes())
    content[5000] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(DataUnavailable, match="t10k-images-idx3-ubyte is damaged"):
        SpuriousMNIST(tmp_path, train=True, download=False)
    assert damaged.read_bytes() == content  # the user's file is left alone


def test_data_sets_by_name(tmp_path):
    data = load("SpuriousDigits", "raw", seed=3, mix_order="digit")
    assert torch.equal(data.images, SpuriousDigits(train=False, test_set="raw").images)
    drawn = load("SpuriousDigits", seed=3, class_mix_ratio=0.2, mix_order="digit")
    assert torch.equal(drawn.groups, SpuriousDigits(True, None, 0.2, "digit", 3).groups)
    assert missing("SpuriousDigits", tmp_path) is None
    for name, said in (("SpuriousMNIST", "train-images-idx3-ubyte"), ("Waterbirds, corrected", "nlp.stanford.edu"),
                       ("CelebA", "mmlab"), ("ImageNet9", "MadryLab"), ("SVHN", "ufldl"), ("CatsVsDogs", "Kaggle")):
        assert said in missing(name, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("call", "named"), [
    (lambda: load("MNIST"), "one of .*'SpuriousMNIST', .*'CelebA', .*, got 'MNIST'"),
    (lambda: missing("MNIST"), "one of .*'SpuriousMNIST'"), (lambda: open_files("MNIST"), "one of .*'SpuriousMNIST'"),
    (lambda: open_files("SVHN"), "photographs with groups, got SVHN"),
    (lambda: load("SpuriousDigits", "test"), r"one of \('train', 'raw', 'malicious'\), got 'test'"),
    (lambda: load("ImageNet9", "test", view=View(8, 8)), "'only_bg_t'.*, got 'test'"),
    (lambda: load("SpuriousDigits", ratio=0.5), r"among \['class_mix_ratio', 'mix_order'\], got \['ratio'\]"),
    (lambda: load("CelebA", view=View(8, 8), mix_order="digit"), r"among \[\], got \['mix_order'\]"),
    (lambda: load("CIFAR10"), "expected a view for CIFAR10")])
def test_unknown_names_parts_and_options(call, named):
    with pytest.raises(ValueError, match=named):
        call()
