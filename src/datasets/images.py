"""Your own images, decoded once into memory: from folders, or from any torch data set."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import center_crop, pil_to_tensor, to_pil_image
from torchvision.transforms.functional import resize as scale
from tqdm import tqdm


@dataclass(frozen=True)
class Images:
    """A data set in memory: images (N, 3, side, side) uint8, labels (N,) int64, and groups (N,) int64 where known."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    groups: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


def load_folder(root: Path | str, side: int, classes: Sequence[str] | None = None) -> Images:
    """Load `root/class/*.jpg` (or png, ...): the shorter side scaled to `side` pixels, the middle cut out.

    Args:
        classes: those that must be there, such as `train.classes` for a test set, so that labels mean the same.

    Raises:
        FileNotFoundError: there are no class folders with images.
        ValueError: the classes are others, or a file is no readable image; it is named.
    """
    folder = ImageFolder(root)
    if classes is not None and list(classes) != folder.classes:
        raise ValueError(f"{root} has the classes {', '.join(folder.classes)}; {', '.join(classes)} are wanted")
    images = load_files([Path(path) for path, _ in folder.samples], side)
    return Images(images, torch.tensor(folder.targets), tuple(folder.classes))


def save_folder(root: Path | str, images: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    """Write images (N, 3, H, W) uint8 with labels (N,) int64 as `root/class/00000.png`, one folder a class."""
    for name in classes:
        (Path(root) / name).mkdir(parents=True, exist_ok=True)
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        to_pil_image(image).save(Path(root) / classes[label] / f"{i:05d}.png")


def load_files(paths: Sequence[Path], side: int, resize: int | None = None) -> Tensor:
    """Decode image files: (N, 3, side, side) uint8. ValueError names a file that is no readable image."""
    images = torch.empty(len(paths), 3, side, side, dtype=torch.uint8)
    for i, path in enumerate(tqdm(paths, desc="decode", leave=False, position=0)):
        try:
            with Image.open(path) as image:
                images[i] = fit(image, side, resize)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} is not a readable image ({error}); replace or remove it") from error
    return images


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
            images.append(fit(image, side))
            rest.append([int(number) for number in numbers])
        except (TypeError, ValueError) as error:
            raise type(error)(f"item {i} of the data set: {error}") from error
    if not images or {len(numbers) for numbers in rest} - {1, 2} or len({len(numbers) for numbers in rest}) != 1:
        raise ValueError("the data set must have items, all of them (image, label) or all (image, label, group)")
    labels, *groups = torch.tensor(rest).T
    names = tuple(classes or map(str, range(int(labels.max()) + 1)))
    return Images(torch.stack(images), labels, names, groups[0] if groups else None)


def fit(image: Image.Image | Tensor, side: int, resize: int | None = None) -> Tensor:
    """Scale the shorter side to `resize` pixels, `side` if not given, and cut out the middle: (3, side, side) uint8.

    Grey and CMYK become RGB.
    """
    if isinstance(image, Tensor):
        if image.dim() != 3 or image.shape[0] not in (1, 3):
            raise ValueError(f"an image is {tuple(image.shape)}; (3, H, W) is wanted")
        if image.is_floating_point():
            if not (image.min() >= 0 and image.max() <= 1):
                raise ValueError("an image leaves [0, 1]; leave normalisation to the model")
            image = (image * 255).round().to(torch.uint8)
        if image.dtype != torch.uint8:
            raise TypeError(f"an image is {image.dtype}; torch.uint8, or floats in [0, 1], are wanted")
        image = image.expand(3, -1, -1)
    elif isinstance(image, Image.Image):
        image = pil_to_tensor(image.convert("RGB"))
    else:
        raise TypeError(f"an image is a {type(image).__name__}; a PIL image or a tensor (3, H, W) is wanted")
    return center_crop(scale(image, resize or side, antialias=True), [side, side])
