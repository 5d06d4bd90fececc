"""Small pictures for selective classification: CIFAR-10, SVHN, Cats vs Dogs; a fifth of the training set kept aside.

"train" and "val" are 80 and 20 % of the training set, always the same; "test" is the published test set.
"""

import re
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
FETCHED = {  # by torchvision, where they are missing: folder below root, and how to do without a network
    "CIFAR10": ("cifar-10-batches-py", "unpack cifar-10-python.tar.gz (170 MB) from www.cs.toronto.edu/~kriz there"),
    "SVHN": ("svhn", "put train_32x32.mat and test_32x32.mat (246 MB) from ufldl.stanford.edu/housenumbers there"),
}


def fetched(name: str, split: str, view: View, root: Path, download: bool = True) -> Images:
    """Load a split of "CIFAR10" (Krizhevsky 2009) or "SVHN" (Netzer et al. 2011); torchvision checks the md5.

    CIFAR10: ten classes, 32x32, 50,000 + 10,000. SVHN: house numbers, classes "0" to "9", 32x32, 73,257 + 26,032,
    without `extra`; non-commercial use only.

    Raises:
        DataUnavailable: it is not there, whole, and cannot be downloaded.
    """
    folder, how = FETCHED[name]
    try:
        if name == "SVHN":
            data = torchvision.datasets.SVHN(root / folder, "test" if split == "test" else "train", download=download)
            images, labels, classes = torch.from_numpy(data.data), torch.from_numpy(data.labels), "0123456789"
        else:
            data = torchvision.datasets.CIFAR10(root, split != "test", download=download)
            images, labels, classes = torch.from_numpy(data.data).permute(0, 3, 1, 2), data.targets, data.classes
    except (OSError, RuntimeError, HTTPException) as error:
        raise DataUnavailable(f"{name} is not whole in {root / folder} ({error!r}); run with a network, which fetches "
                              f"it, or {how}") from error
    chosen = drawn(len(images), split)
    images = images[chosen]
    if view != View(*images.shape[2:]):  # one of their own size shows the images as they are
        images = torch.stack([fit(image, view) for image in images])
    return Images(images.contiguous(), torch.as_tensor(labels)[chosen], tuple(classes))


def drawn(n: int, split: str) -> Tensor:
    """Which of n images are in the 80 % ("train"), the 20 % ("val") or all ("test"): int64 in ascending order."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out = round(VALIDATION * n)
    return {"train": order[held_out:], "val": order[:held_out], "test": order}[split].sort().values


class CatsVsDogs(Files):
    """Cats vs Dogs (Asirra; Elson et al. 2007): cat 0, dog 1, 25,000 photographs of several sizes.

    They are `train/cat.0.jpg` (Kaggle) or, if there is no `train`, `PetImages/Cat/0.jpg` (Microsoft). A fifth, drawn by
    number, is the test set, so that both layouts have the same; a fifth of the rest is "val".
    """

    def __init__(self, root: Path, split: str) -> None:
        classes, found = ("cat", "dog"), []
        for path in root.glob("train/*.jpg" if (root / "train").is_dir() else "PetImages/*/*.jpg"):
            if match := re.fullmatch(r".*/(cat|dog)[./](\d+)\.jpg", path.as_posix().lower()):
                found.append((classes.index(match[1]), int(match[2]), path))
        if {label for label, *_ in found} != {0, 1}:
            raise FileNotFoundError(f"cats, dogs or both are missing in {root}")
        test, rest = (drawn(len(found), part) for part in ("val", "train"))
        chosen = test if split == "test" else rest[drawn(len(rest), split)]
        found.sort()
        labels, _, paths = zip(*(found[i] for i in chosen.tolist()), strict=True)
        super().__init__(paths, labels, classes, (({"train": 16_000, "val": 4_000, "test": 5_000}[split],),))


class Jpegs(Files):
    """CIFAR-10 as class folders of JPEG files, `train/` and `test/`."""

    def __init__(self, root: Path, split: str) -> None:
        paths, labels, classes = class_files(root / ("test" if split == "test" else "train"))
        paths, labels = zip(*((paths[i], labels[i]) for i in drawn(len(paths), split).tolist()), strict=True)
        super().__init__(paths, labels, classes, ((40_000 if split == "train" else 10_000,),))
