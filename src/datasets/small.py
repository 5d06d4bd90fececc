"""Small pictures for selective classification: CIFAR-10, and a copy of it in JPEG.

"train" and "val" are 80 and 20 % of the training set, always the same; "test" is the published test set.
"""

from http.client import HTTPException
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from .decode import View, fit
from .images import Images, class_files
from .photographs import Files
from .spurious import DataUnavailable

SPLIT_SEED = 50  # paper
VALIDATION = 0.2  # of the training images; paper


def cifar10(split: str, view: View, root: Path) -> Images:
    """A split of CIFAR-10 (Krizhevsky 2009): ten classes, 50,000 + 10,000 images of 32x32, checked by torchvision.

    DataUnavailable: it is not there, whole, and cannot be downloaded.
    """
    try:
        data = torchvision.datasets.CIFAR10(root, split != "test", download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        raise DataUnavailable(f"CIFAR10 is not whole in {root / 'cifar-10-batches-py'} ({error!r}); run with a "
                              "network, which fetches it, or unpack cifar-10-python.tar.gz (170 MB) from "
                              "www.cs.toronto.edu/~kriz there") from error
    chosen = drawn(len(data), split)
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2)[chosen]
    if view != View(*images.shape[2:]):  # one of their own size shows the images as they are
        images = torch.stack([fit(image, view) for image in images])
    return Images(images.contiguous(), torch.tensor(data.targets)[chosen], tuple(data.classes))


def drawn(n: int, split: str) -> Tensor:
    """Which of n images are in the 80 % ("train"), the 20 % ("val") or all ("test"): int64 in ascending order."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(SPLIT_SEED), device="cpu")
    held_out = round(VALIDATION * n)
    return {"train": order[held_out:], "val": order[:held_out], "test": order}[split].sort().values


class Jpegs(Files):
    """CIFAR-10 as class folders of JPEG files, `train/` and `test/`."""

    def __init__(self, root: Path, split: str) -> None:
        paths, labels, classes = class_files(root / ("test" if split == "test" else "train"))
        paths, labels = zip(*((paths[i], labels[i]) for i in drawn(len(paths), split).tolist()), strict=True)
        super().__init__(paths, labels, classes, ((40_000 if split == "train" else 10_000,),))
