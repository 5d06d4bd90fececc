"""Small pictures for selective classification: CIFAR-10, SVHN, Cats vs Dogs; a fifth of the training set kept aside."""

from pathlib import Path

import torch
import torchvision
from torch import Tensor

from src.datasets.images import Images, load_folder
from src.datasets.view import View

SPLIT_SEED = 50  # paper
VALIDATION = 0.2  # of the training images; paper


def small_pictures(dataset: str, split: str, view: View, root: Path) -> Images:
    if dataset == "CIFAR-10, JPEG copy":
        part = "test" if split == "test" else "train"
        data = load_folder(root / "cifar10_jpeg" / part, view.height, cache=root / "cache" / f"cifar10-jpeg-{part}")
    return data if split == "test" else _part(data, split)


def _part(data: Images, split: str) -> Images:
    """The training or the validation part of a training set: 80 or 20 %, drawn with a seed that is always the same."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out = round(VALIDATION * len(data))
    chosen = (order[:held_out] if split == "val" else order[held_out:]).sort().values
    return Images(data.images[chosen], data.labels[chosen], data.classes)
