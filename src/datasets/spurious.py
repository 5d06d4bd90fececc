"""Digits with a 4x4 blue square that goes with the label: the shortcut of the paper's experiment (section 4.1)."""

import gzip
import hashlib
import tempfile
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from ..files import write_whole
from ..masks import Masks
from ..seeding import generator
from .images import Images

SQUARE = 4  # pixels a side, in the top-left corner (paper)
BLUE, RED = (0, 0, 255), (255, 0, 0)
CLASSES = ("digits 0-4", "digits 5-9")
GROUPS = ("0-4, no square", "0-4, square", "5-9, no square", "5-9, square")
TEST_SETS = ("raw", "malicious")
ALONE = ("blue", "red")  # test sets beside these where there are two squares: with one of them
MIX_ORDERS = ("random", "digit")
BACKGROUNDS = ("black", "white", "grey", "colours")
BRIGHTEST = 200  # of 255, in a field of colours, so that a white digit stands out from it
MD5 = {  # of MNIST's files, unpacked: the same, however they are gzipped
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
DIGITS_TRAIN = 1347  # of scikit-learn's 1,797; the other 450 are the test set
DIGIT, FRAME = 20, 28  # pixels a side; MNIST's own proportions, so that the corner with the square is empty


class SpuriousSquare(Images):
    """Grey digits in two classes, some with a blue square in the top-left corner.

    Training: class 0 carries the square, class 1 does not, except for a share `class_mix_ratio` of each class
    ("conflicting"), where it is the other way round. Test sets: `raw` has no squares (the paper's "original"),
    `malicious` has them on class 1 only (the paper's "biased").

    With squares=2 a red one, bottom right, goes with the blue one everywhere (two shortcuts at once, as in Whac-A-Mole,
    Li et al. 2023); then there are test sets `blue` and `red`, too, malicious with one of the two alone.

    Beside what `Images` have, in the order of the source: digits: (N,) int64 in 0..9.  squares: (N,) bool. Groups are
    2 * label + square, `known` the pixels of squares. `data[i]` is (image, label, group), a float32 image in [0, 1].
    background: see `on_background`. size: only so many training images, the first.
    """

    def __init__(self, grey: Tensor, digits: Tensor, train: bool, test_set: str | None, class_mix_ratio: float,
                 mix_order: str, seed: int, background: str = "black", size: int | None = None, squares: int = 1
                 ) -> None:
        valid = (None,) if train else TEST_SETS + ALONE if squares == 2 else TEST_SETS
        if test_set not in valid or mix_order not in MIX_ORDERS or not 0 <= class_mix_ratio <= 1:
            raise ValueError(f"expected, with {train=}, test_set of {valid}, mix_order of {MIX_ORDERS} and ratio in "
                             f"[0, 1], got {test_set!r}, {mix_order!r} and {class_mix_ratio}")
        if squares not in (1, 2):
            raise ValueError(f"expected squares to be 1 or 2, got {squares!r}")
        chosen = first(size if train else None, len(grey))
        grey, self.digits = grey[chosen], digits[chosen].long()
        labels = (self.digits >= 5).long()
        if train:
            self.squares = (labels == 0) ^ conflicting(labels, self.digits, class_mix_ratio, mix_order, seed)
        else:
            self.squares = (labels == 1) & (test_set != "raw")
        known = torch.zeros(grey.shape, dtype=torch.bool)
        images = on_background(grey, background, generator(seed, "background", "train" if train else "test"))
        for name, colour, side in (("blue", BLUE, slice(SQUARE)), ("red", RED, slice(-SQUARE, None)))[:squares]:
            if test_set not in ALONE or test_set == name:
                images[self.squares, :, side, side] = torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1)
                known[self.squares, side, side] = True
        super().__init__(images, labels, CLASSES, 2 * labels + self.squares, GROUPS, Masks.of(known))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.images[index] / 255, self.labels[index], self.groups[index]


def conflicting(labels: Tensor, digits: Tensor, class_mix_ratio: float, mix_order: str, seed: int) -> Tensor:
    """Choose the training images whose square is on the wrong side: (N,) bool, round(ratio * n) of each class.

    `random` draws them uniformly within each class. `digit` does what the official code does: the square goes to the
    first 99 % of class 0 and the first 1 % of class 1, digit by digit, so only 4s lack it and only 5s carry it.
    """
    chosen = torch.zeros(len(digits), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = torch.nonzero(labels == label).flatten()
        count = round(class_mix_ratio * len(members))
        if mix_order == "random":
            members = members[torch.randperm(len(members), generator=generator(seed, "squares", label), device="cpu")]
        else:
            by_digit = members[torch.argsort(digits[members], stable=True)]
            members = by_digit.flip(0) if label == 0 else by_digit  # class 0 is short of squares at its end
        chosen[members[:count]] = True
    return chosen


def first(size: int | None, n: int) -> slice:
    """The slice of the first `size` of n images, None: of all; ValueError: there are not so many."""
    if size is None or (isinstance(size, int) and 1 <= size <= n):
        return slice(size)
    raise ValueError(f"expected a size of None or a whole number in 1..{n}, got {size!r}")


def on_background(grey: Tensor, background: str, colours: torch.Generator) -> Tensor:
    """Set grey digits (N, H, W) uint8, 0 = paper, on a background: (N, 3, H, W) uint8.

    "black": as they are. "white": inverted. "grey": white on 128. "colours": white on a field of its own for each
    image, bilinear between four random colours in the corners.
    """
    if background not in BACKGROUNDS:
        raise ValueError(f"expected a background of {BACKGROUNDS}, got {background!r}")
    images = (255 - grey if background == "white" else grey)[:, None].repeat(1, 3, 1, 1)
    if background in ("grey", "colours"):
        corners = BRIGHTEST * torch.rand(len(grey), 3, 2, 2, generator=colours, device="cpu")
        corners = corners if background == "colours" else torch.full_like(corners, 128)
        for some, corner in zip(images.split(1024), corners.split(1024), strict=True):  # at a time, for the memory
            field = F.interpolate(corner.double(), size=grey.shape[1:], mode="bilinear", align_corners=True)
            some.copy_((field + (255 - field) * (some / 255.0)).round())
    return images


class DataUnavailable(RuntimeError):
    """A data set is neither on disk, whole and undamaged, nor can it be downloaded; the message says what to do."""


class SpuriousMNIST(SpuriousSquare):
    """MNIST in two classes, 0-4 and 5-9, with a 4x4 blue square that goes with the class (MaskTune, section 4.1).

    60,000 images (3, 28, 28) to train, 10,000 to test. Digits: LeCun, Cortes, Burges (CC BY-SA 3.0).

    Args:
        root: the folder that holds, or will hold, `MNIST/raw/`; `download`: fetch what is missing there.
        train, test_set: the training set, or with train=False a test set, such as "raw" or "malicious".
        class_mix_ratio: share of the training images of each class whose square is on the wrong side, in [0, 1].
        mix_order, seed: which images those are: see `conflicting`. The same arguments give the same tensors, always.
        background, size, squares: one of `BACKGROUNDS`, how many training images, 1 or 2: see `SpuriousSquare`.

    Raises:
        ValueError, DataUnavailable: an argument is not valid; MNIST is missing or damaged and cannot be downloaded.
    """

    def __init__(self, root: str | Path, train: bool, test_set: str | None = None, class_mix_ratio: float = 0.01,
                 mix_order: str = "random", seed: int = 0, download: bool = True, background: str = "black",
                 size: int | None = None, squares: int = 1) -> None:
        files, part = ensure_mnist(Path(root), download), "train" if train else "t10k"
        grey = torch.frombuffer(files[f"{part}-images-idx3-ubyte"], dtype=torch.uint8, offset=16)  # behind four sizes
        digits = torch.frombuffer(files[f"{part}-labels-idx1-ubyte"], dtype=torch.uint8, offset=8)
        super().__init__(grey.view(-1, FRAME, FRAME), digits, train, test_set, class_mix_ratio, mix_order, seed,
                         background, size, squares)


class SpuriousDigits(SpuriousSquare):
    """scikit-learn's 1,797 handwritten digits (UCI Optical Recognition, 8x8) in the frame of `SpuriousMNIST`.

    The digits are scaled to 20x20. 1,347 images to train, 450 to test, split once for every seed.
    """

    def __init__(self, train: bool, test_set: str | None = None, class_mix_ratio: float = 0.01,
                 mix_order: str = "random", seed: int = 0, background: str = "black", size: int | None = None,
                 squares: int = 1) -> None:
        from sklearn.datasets import load_digits  # here, so that training on MNIST needs no scikit-learn

        source = load_digits()
        eight = torch.from_numpy(source.images).float() / 16  # the source counts 0..16
        twenty = F.interpolate(eight[:, None], size=(DIGIT, DIGIT), mode="bilinear", align_corners=False)[:, 0]
        grey = F.pad((twenty * 255).round().to(torch.uint8), [(FRAME - DIGIT) // 2] * 4)
        order = torch.randperm(len(grey), generator=generator(0, "digits split"), device="cpu")
        chosen = order[:DIGITS_TRAIN] if train else order[DIGITS_TRAIN:]
        super().__init__(grey[chosen], torch.from_numpy(source.target)[chosen], train, test_set, class_mix_ratio,
                         mix_order, seed, background, size, squares)


def ensure_mnist(root: Path, download: bool = True) -> dict[str, bytearray]:
    """MNIST's four files, unpacked, from the `.gz` in `root/MNIST/raw/`; those that are missing are fetched."""
    raw, files = root / "MNIST" / "raw", {}
    for name, md5 in MD5.items():
        file = raw / f"{name}.gz"
        try:
            if download and not file.exists():
                with tempfile.TemporaryDirectory() as folder:
                    torchvision.datasets.MNIST(folder, download=True)
                    for path in Path(folder).rglob("*.gz"):
                        if not (raw / path.name).exists():
                            write_whole(raw / path.name, path.read_bytes())
            files[name] = bytearray(gzip.decompress(file.read_bytes()))
            if hashlib.md5(files[name]).hexdigest() != md5:
                raise OSError(f"its content's md5 is not {md5}")
        except (OSError, EOFError, RuntimeError, zlib.error) as error:
            reason = str(error).split("\n")[0].rstrip(":")  # of torchvision's, each mirror has a line
            raise DataUnavailable(f"{file} is missing or damaged ({reason}); put MNIST's four files into {raw}, or "
                                  "delete what is damaged and run again with a network") from error
    return files
