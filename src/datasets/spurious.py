"""Digits with a 4x4 blue square that goes with the label: the shortcut of the paper's experiment (section 4.1)."""

import gzip
import hashlib
import socket
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.utils.data import Dataset

from ..files import write_whole
from ..seeding import generator

SQUARE = 4  # pixels a side, in the top-left corner (paper)
CLASSES = ("digits 0-4", "digits 5-9")
GROUPS = ("0-4, no square", "0-4, square", "5-9, no square", "5-9, square")
TEST_SETS = ("raw", "malicious")
MIX_ORDERS = ("random", "digit")

MD5 = {  # of the four unpacked IDX files of MNIST
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
CONNECT_TIMEOUT_S = 20
DIGITS_TRAIN = 1347  # of scikit-learn's 1,797; the other 450 are the test set
DIGIT, FRAME = 20, 28  # pixels a side; MNIST's own proportions, so that the corner with the square is empty


class SpuriousSquare(Dataset):
    """Grey digits in two classes, some with a blue square in the top-left corner.

    Training: class 0 carries the square, class 1 does not, except for a share `class_mix_ratio` of each class
    ("conflicting"), where it is the other way round. Test sets: `raw` has no squares (the paper's "original"),
    `malicious` has them on class 1 only (the paper's "biased").

    Attributes, all of length N and in the order of the source:
        images: (N, 3, 28, 28) uint8.  labels: (N,) int64 in {0, 1}.  digits: (N,) int64 in 0..9.
        squares: (N,) bool.  groups: (N,) int64 = 2 * label + square, named by `GROUPS`.

    `dataset[i]` is (image, label, group), the image as float32 in [0, 1].
    """

    def __init__(self, grey: Tensor, digits: Tensor, train: bool, test_set: str | None, class_mix_ratio: float,
                 mix_order: str, seed: int) -> None:
        self.digits = digits.long()
        self.labels = (self.digits >= 5).long()
        if train:
            wrong_side = conflicting(self.digits, class_mix_ratio, mix_order, seed)
            self.squares = (self.labels == 0) ^ wrong_side
        elif test_set == "raw":
            self.squares = torch.zeros(len(digits), dtype=torch.bool)
        else:
            self.squares = self.labels == 1
        self.groups = 2 * self.labels + self.squares
        self.images = grey[:, None].repeat(1, 3, 1, 1)
        blue = torch.tensor([0, 0, 255], dtype=torch.uint8).view(3, 1, 1)
        self.images[self.squares, :, :SQUARE, :SQUARE] = blue

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.images[index] / 255, self.labels[index], self.groups[index]

    @property
    def conflicting(self) -> Tensor:
        """(N,) bool: the square contradicts what it says in training (class 0 without, class 1 with)."""
        return self.squares == (self.labels == 1)


def conflicting(digits: Tensor, class_mix_ratio: float, mix_order: str, seed: int) -> Tensor:
    """Choose the training images whose square is on the wrong side: (N,) bool, round(ratio * n) of each class.

    `random` draws them uniformly within each class. `digit` does what the official code does: it takes the images
    digit by digit and gives the square to the first 99 % of class 0 and the first 1 % of class 1, so at 1 % only 4s
    lack it and only 5s carry it.
    """
    chosen = torch.zeros(len(digits), dtype=torch.bool)
    for label in (0, 1):
        members = torch.nonzero((digits >= 5) == bool(label)).flatten()
        count = round(class_mix_ratio * len(members))
        if mix_order == "random":
            members = members[torch.randperm(len(members), generator=generator(seed, "squares", label))]
        else:
            by_digit = members[torch.argsort(digits[members], stable=True)]
            members = by_digit.flip(0) if label == 0 else by_digit  # class 0 is short of squares at its end
        chosen[members[:count]] = True
    return chosen


def check_arguments(train: bool, test_set: str | None, class_mix_ratio: float, mix_order: str) -> None:
    """Raise ValueError, naming what is valid, before anything is read or downloaded."""
    if train and test_set is not None:
        raise ValueError(f"expected test_set=None with train=True (test sets go with train=False), got {test_set!r}")
    if not train and test_set not in TEST_SETS:
        raise ValueError(f"expected test_set to be one of {TEST_SETS} with train=False, got {test_set!r}")
    if mix_order not in MIX_ORDERS:
        raise ValueError(f"expected mix_order to be one of {MIX_ORDERS}, got {mix_order!r}")
    if not 0 <= class_mix_ratio <= 1:
        raise ValueError(f"expected class_mix_ratio to be in [0, 1], got {class_mix_ratio!r}")


class DataUnavailable(RuntimeError):
    """A data set is neither on disk, whole and undamaged, nor can it be downloaded; the message says what to do."""


class SpuriousMNIST(SpuriousSquare):
    """MNIST in two classes, 0-4 and 5-9, with a 4x4 blue square that goes with the class (MaskTune, section 4.1).

    Input: (3, 28, 28) float in [0, 1]. Label: 0 for digits 0-4, 1 for 5-9. Groups: label x square (`GROUPS`).
    60,000 images to train, 10,000 to test. Digits: LeCun, Cortes, Burges, MNIST (CC BY-SA 3.0), through torchvision.

    Args:
        root: the folder that holds, or will hold, `MNIST/raw/`.
        train: the training set, or else a test set.
        test_set: with train=False, "raw" (no squares; the paper's "original") or "malicious" (squares on class 1 only;
            the paper's "biased").
        class_mix_ratio: share of the training images of each class whose square is on the wrong side, in [0, 1].
        mix_order: which images those are: "random", or "digit" as in the official code. See `conflicting`.
        seed: draws them; the same arguments give the same tensors, always.
        download: fetch MNIST where it is neither unpacked nor gzipped under the root.

    Raises:
        ValueError: an argument is outside what is valid.
        DataUnavailable: MNIST is missing and cannot be downloaded, or a file of it is damaged.
    """

    def __init__(self, root: str | Path, train: bool, test_set: str | None = None, class_mix_ratio: float = 0.01,
                 mix_order: str = "random", seed: int = 0, download: bool = True) -> None:
        check_arguments(train, test_set, class_mix_ratio, mix_order)
        ensure_mnist(Path(root), download)
        mnist = torchvision.datasets.MNIST(root, train=train)
        super().__init__(mnist.data, mnist.targets, train, test_set, class_mix_ratio, mix_order, seed)


class SpuriousDigits(SpuriousSquare):
    """scikit-learn's 1,797 handwritten digits (UCI Optical Recognition, 8x8) in the frame of `SpuriousMNIST`.

    Input: (3, 28, 28) float in [0, 1]: the digit scaled to 20x20 inside 28x28. Labels, groups, test sets and arguments
    are those of `SpuriousMNIST`, without the root. 1,347 images to train, 450 to test, split once for every seed.

    Raises:
        ValueError: an argument is outside what is valid.
    """

    def __init__(self, train: bool, test_set: str | None = None, class_mix_ratio: float = 0.01,
                 mix_order: str = "random", seed: int = 0) -> None:
        check_arguments(train, test_set, class_mix_ratio, mix_order)
        from sklearn.datasets import load_digits  # here, so that training on MNIST needs no scikit-learn

        source = load_digits()
        eight = torch.from_numpy(source.images).float() / 16  # the source counts 0..16
        twenty = F.interpolate(eight[:, None], size=(DIGIT, DIGIT), mode="bilinear", align_corners=False)[:, 0]
        grey = F.pad((twenty * 255).round().to(torch.uint8), [(FRAME - DIGIT) // 2] * 4)
        order = torch.randperm(len(grey), generator=generator(0, "digits split"))
        chosen = order[:DIGITS_TRAIN] if train else order[DIGITS_TRAIN:]
        super().__init__(grey[chosen], torch.from_numpy(source.target)[chosen], train, test_set, class_mix_ratio,
                         mix_order, seed)


def ensure_mnist(root: Path, download: bool = True) -> None:
    """See that the four files of MNIST are under root, unpacked and whole; unpack or fetch those that are missing.

    Each comes from its `.gz` beside it, as this repository ships them, else from torchvision's mirrors.
    """
    raw = root / "MNIST" / "raw"
    if missing := [name for name in MD5 if not (raw / name).is_file()]:
        how = f"put the four files ({', '.join(MD5)}), unpacked or gzipped, into {raw}, or run again with a network"
        if folders := [name for name in missing if (raw / name).is_dir()]:
            raise DataUnavailable(f"expected {raw / folders[0]} to be a file, got a folder, as some archives of MNIST "
                                  f"unpack; move it away, and {how}")
        try:
            if all((raw / f"{name}.gz").is_file() for name in missing):
                _unpack(raw, raw, missing)
            elif not download:
                raise OSError("download=False")
            else:
                root.mkdir(parents=True, exist_ok=True)
                with connect_timeout(), tempfile.TemporaryDirectory(dir=root, prefix="mnist-download-") as folder:
                    torchvision.datasets.MNIST(folder, download=True)
                    _unpack(Path(folder) / "MNIST" / "raw", raw, missing)
        except (OSError, RuntimeError) as error:
            reason = str(error).split("\n")[0].rstrip(":")
            raise DataUnavailable(f"MNIST is not in {raw} (missing: {', '.join(missing)}) and could not be unpacked or "
                                  f"downloaded ({reason}); {how}") from error
    for name in MD5:
        if hashlib.md5((raw / name).read_bytes()).hexdigest() != MD5[name]:
            raise DataUnavailable(f"{raw / name} is damaged or incomplete (its md5 is not {MD5[name]}); delete it and "
                                  "run again")


def _unpack(source: Path, raw: Path, names: list[str]) -> None:
    """Unpack files of a folder; each is whole or not there."""
    for name in names:
        try:
            content = gzip.decompress((source / f"{name}.gz").read_bytes())
        except (gzip.BadGzipFile, EOFError, zlib.error):
            content = b""
        if hashlib.md5(content).hexdigest() != MD5[name]:
            raise OSError(f"{name}.gz is damaged: its content has another md5; replace or delete it")
        write_whole(raw / name, content)


@contextmanager
def connect_timeout() -> Iterator[None]:
    """Let a download give up on a host that does not answer; urllib has no limit of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
