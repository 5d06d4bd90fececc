"""A 4x4 blue square that goes with the label: the shortcut of the paper's MNIST experiment (section 4.1)."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from src.seeding import generator

SQUARE = 4  # pixels a side, in the top-left corner (paper)
CLASSES = ("digits 0-4", "digits 5-9")
GROUPS = ("0-4, no square", "0-4, square", "5-9, no square", "5-9, square")
TEST_SETS = ("raw", "malicious")
MIX_ORDERS = ("random", "digit")


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
        raise ValueError(f"test_set={test_set!r} goes with train=False; with train=True leave it at None")
    if not train and test_set not in TEST_SETS:
        raise ValueError(f"test_set={test_set!r} is unknown; with train=False it is one of {TEST_SETS}")
    if mix_order not in MIX_ORDERS:
        raise ValueError(f"mix_order={mix_order!r} is unknown; it is one of {MIX_ORDERS}")
    if not 0 <= class_mix_ratio <= 1:
        raise ValueError(f"class_mix_ratio={class_mix_ratio!r} is outside [0, 1]")
