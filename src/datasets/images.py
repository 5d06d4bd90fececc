"""Your own images, decoded once into memory: from folders, or from any torch data set."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from .decode import View, cached, decode, fit


@dataclass(frozen=True)
class Images:
    """A data set in memory: images (N, 3, side, side) uint8, labels (N,) int64, and groups (N,) int64 where known."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    groups: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


def load_folder(root: Path | str, side: int, classes: Sequence[str] | None = None, cache: Path | str | None = None
                ) -> Images:
    """Load `root/class/*.jpg` (or png, ...): the shorter side scaled to `side` pixels, the middle cut out.

    Args:
        classes: those that must be there, such as `train.classes` for a test set, so that labels mean the same.
        cache: a file to decode into, once and in parallel, and to map the images from; see `cached`. Another file in
            its place is refused, and left as it is.

    Raises:
        FileNotFoundError: there are no class folders with images.
        FileExistsError: `cache` names a file of another kind.
        ValueError: the classes are others, or a file is no readable image; it is named.
    """
    folder = ImageFolder(root)
    if classes is not None and list(classes) != folder.classes:
        raise ValueError(f"expected {root} to have the classes {', '.join(classes)}, got {', '.join(folder.classes)}")
    paths, view = [Path(path) for path, _ in folder.samples], View(side, side)
    images = cached(paths, view, Path(cache)) if cache else torch.stack(
        [decode(path, view) for path in tqdm(paths, desc="decode", leave=False, position=0)])
    return Images(images, torch.tensor(folder.targets), tuple(folder.classes))


def save_folder(root: Path | str, images: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    """Write images (N, 3, H, W) uint8 with labels (N,) int64 as `root/class/00000.png`, one folder a class."""
    for name in classes:
        (Path(root) / name).mkdir(parents=True, exist_ok=True)
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        to_pil_image(image).save(Path(root) / classes[label] / f"{i:05d}.png")


def load_dataset(data: Dataset | Iterable, side: int, classes: Sequence[str] | None = None) -> Images:
    """Load a torch data set of (image, label) or (image, label, group).

    An image is a PIL image, or a tensor (3, H, W) of uint8 or of floats in [0, 1]; it is fitted as in `load_folder`.

    Args:
        classes: names; "0", "1", ... if not given.

    Raises:
        TypeError, ValueError: an item is not of that kind; it is named by its index.
    """
    images, rest = [], []
    for i in tqdm(range(len(data)), desc="decode", leave=False, position=0):
        image, *numbers = data[i]
        try:
            images.append(fit(image, View(side, side)))
            rest.append([int(number) for number in numbers])
        except (TypeError, ValueError) as error:
            raise type(error)(f"item {i} of the data set: {error}") from error
    if not images or {len(numbers) for numbers in rest} - {1, 2} or len({len(numbers) for numbers in rest}) != 1:
        raise ValueError("expected a data set with items, all of them (image, label) or all (image, label, group)")
    labels, *groups = torch.tensor(rest).T
    names = tuple(classes or map(str, range(int(labels.max()) + 1)))
    return Images(torch.stack(images), labels, names, groups[0] if groups else None)
