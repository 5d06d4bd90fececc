"""Your own images, decoded once: from folders, or from any torch data set."""

import hashlib
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from ..masks import Masks
from .decode import CHUNK, cached, decode, mapped
from .items import Key, frame, map_style, own_classes, reader

PARTS_OF_A_DATA_SET = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}
NOT_OURS = ("__MACOSX", "@eaDir", "__pycache__")  # folders that systems leave behind, besides hidden ones


@dataclass(eq=False)
class Images:
    """A data set: images (N, 3, height, width) uint8, labels (N,) int64, and what else is known of it."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    groups: Tensor | None = None  # (N,) int64
    group_names: tuple[str, ...] = ()
    known: Masks | None = None  # (N, height, width): the pixels that are known, a square or a bird

    def __len__(self) -> int:
        return len(self.labels)

    def with_classes(self, classes: Sequence[str]) -> "Images":
        """The same images, labelled as in another list of classes, of which some may not occur here.

        Raises:
            ValueError: a class that occurs here is not in the list.
        """
        if unknown := [name for name in self.classes if name not in classes]:
            raise ValueError(f"expected classes among {', '.join(classes)}, got {', '.join(unknown)}; name them alike, "
                             "with classes= or in the folders")
        place = torch.tensor([list(classes).index(name) for name in self.classes])
        return replace(self, labels=place[self.labels.cpu()].to(self.labels.device), classes=tuple(classes))


def load_folder(root: Path | str, side: int | tuple[int, int], classes: Sequence[str] | None = None,
                cache: Path | str | None = None) -> Images:
    """Load `root/class/*.jpg` (or png, ...) and folders within: scaled to fill the frame, the middle cut out.

    Hidden files and folders are passed over; files of other endings, too, with a warning that counts them. Classes are
    in the order of their names as strings, as torchvision's `ImageFolder` has them.

    Args:
        side: pixels of a square frame, or (height, width).
        classes: of the training set, such as `train.classes` for a test set, so that labels mean the same. Some may
            be missing in the folder.
        cache: a file to decode into, once and in parallel, and to map the images from; see `cached`. Another file in
            its place is refused, and left as it is.

    Raises:
        FileNotFoundError: there are no class folders with images.
        FileExistsError: `cache` names a file of another kind.
        ValueError: a class is not among `classes`, or a file is no readable image; it is named.
    """
    paths, labels, found = class_files(root, classes)
    view = frame(side)
    if cache:
        images = cached(paths, view, Path(cache).expanduser())
    else:
        images = torch.empty(len(paths), 3, view.height, view.width, dtype=torch.uint8)
        for i, path in enumerate(tqdm(paths, desc="decode", leave=False, position=0)):
            images[i] = decode(path, view)
    return Images(images, torch.tensor(labels), found)


def class_files(root: Path | str, classes: Sequence[str] | None = None
                ) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """The image files in the class folders of `root`, their labels, and the classes; see `load_folder`."""
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"expected a folder with one folder for each class, got {root}, which is "
                                f"{'a file' if root.exists() else 'missing'}")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and _counts(entry.name))
    if not names:
        raise FileNotFoundError(f"expected one folder for each class in {root}, got none")
    if len(parts := [name for name in names if name.lower() in PARTS_OF_A_DATA_SET]) > 1 or parts == names:
        raise ValueError(f"expected one folder for each class in {root}, got {', '.join(parts)}, which look like "
                         f"the parts of a data set; name one of them, such as {root / parts[0]}")
    if classes is None and all(name.isdecimal() for name in names) and names != sorted(names, key=int):
        warnings.warn(f"the class folders of {root} are numbers, in the order of strings: {', '.join(names[:4])}, ...; "
                      f"so the label of {names[2]} is 2, as with torchvision. Pass classes= for another order",
                      stacklevel=3)
    known = tuple(names if classes is None else classes)
    if len(set(known)) < len(known) or not set(names) <= set(known):
        raise ValueError(f"expected {root} to have the classes {', '.join(known)}, got {', '.join(names)}"
                         + ("" if len(set(known)) == len(known) else "; each may be there but once"))
    paths, labels, skipped = [], [], Counter()
    for name in names:
        files = files_below(root / name)
        images = [path for path in files if path.suffix.lower() in IMG_EXTENSIONS]
        skipped.update(path.suffix.lower() or "no ending" for path in set(files).difference(images))
        if not images and classes is None:
            raise FileNotFoundError(f"expected images in {root / name}, got none of {', '.join(IMG_EXTENSIONS)}"
                                    + _counted(skipped))
        paths += images
        labels += [known.index(name)] * len(images)
    if not paths:
        raise FileNotFoundError(f"expected images in {root}, got none of {', '.join(IMG_EXTENSIONS)}"
                                + _counted(skipped))
    if skipped:
        warnings.warn(f"{root}: {len(paths):,} images{_counted(skipped)}, passed over", stacklevel=3)
    return paths, labels, known


def _counts(name: str) -> bool:
    return not name.startswith(".") and name not in NOT_OURS


def files_below(folder: Path) -> list[Path]:
    """All files below a folder that are not hidden, in torchvision's order."""
    found = []
    for here, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if _counts(name)]
        found.append((here, sorted(name for name in names if _counts(name))))
    return [Path(here, name) for here, names in sorted(found) for name in names]


def _counted(endings: Counter) -> str:
    if not endings:
        return ""
    return f"; {endings.total():,} other files ({', '.join(f'{n:,} {ending}' for ending, n in endings.most_common(5))})"


def save_folder(root: Path | str, images: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    """Write images (N, 3, H, W) uint8 with labels (N,) int64 as `root/class/00000.png`, one folder a class.

    The folder appears once all of it is written.

    Raises:
        FileExistsError: there is something at `root`; it is left as it is.
        ValueError: a label has no class, or a class has no name for a folder; nothing is written.
    """
    root = Path(root).expanduser()
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise FileExistsError(f"expected {root} to be free or empty, got something in its place, which is left as it is"
                              "; remove it or use another name")
    for name in classes:
        if not name or name != Path(name).name or "\\" in name or "\0" in name or not _counts(name):
            raise ValueError(f"expected class names that can be folders, and are not hidden ones, got {name!r}")
    if len({name.casefold() for name in classes}) < len(classes):
        raise ValueError(f"expected class names that differ, not in case alone, got {', '.join(classes)}")
    if len(images) != len(labels) or not len(labels) or labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"expected a label in 0..{len(classes) - 1} for each image, got {len(labels)} labels"
                         + (f" in {labels.min()}..{labels.max()}" if len(labels) else "")
                         + f" for {len(images)} images")
    partial = root.with_name(f".{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a call that was killed
    for name in classes:
        (partial / name).mkdir(parents=True)
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        to_pil_image(image).save(partial / classes[label] / f"{i:05d}.png")
    os.replace(partial, root)


def load_dataset(data: Dataset | DataLoader | Sequence, side: int | tuple[int, int] | None = None,
                 classes: Sequence[str] | None = None, *, image: Key | None = None, label: Key | None = None,
                 group: Key | None = None, mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
                 cache: Path | str | None = None) -> Images:
    """Load a data set of (image, label) or (image, label, group), or of dicts with an image and a label.

    An image is a PIL image, a tensor (3, H, W) or an array (H, W, 3), of uint8 or of floats in [0, 1]. It is fitted as
    in `load_folder`. Each item is read once: a data set that augments at random should be handed over without.

    Args:
        data: anything with a length and items by number. Of a DataLoader, its data set is used.
        side: as of `load_folder`; if not given, all images must have one size.
        classes: names; those that the data set gives itself, or "0", "1", ..., if not given.
        image, label, group: where these are in an item, a key, a position or a function of the item; by default
            "image" and "label" of a dict, else the first, the second and, if there are three, the third entry. WILDS'
            (x, y, metadata) needs one such as group=lambda item: item[2][0].
        mean, std: of the normalisation that the floats went through, which is undone.
        cache: a file to keep the images in, and to map them from; built anew if the number of items, or the first, the
            middle or the last one, has changed. What else changes is not noticed.

    Raises:
        TypeError, ValueError: an item is not of that kind; it is named by its index.
        FileExistsError: `cache` names a file of another kind.
    """
    data = map_style(data)
    read = reader(data, side, classes, image, label, group, mean, std)
    first, again = read(0), read(0)
    if not torch.equal(first[0], again[0]):
        warnings.warn("item 0 of the data set is another image when it is read again: it augments at random, and each "
                      "image is kept as it was read first; hand over a data set without augmentation", stacklevel=2)
    shape = (len(data), *first[0].shape)
    rest: list[tuple[int, ...]] = []

    def chunk(start: int) -> Tensor:
        items = [read(i) for i in range(start, min(start + CHUNK, len(data)))]
        rest.extend(numbers for _, *numbers in items)
        return torch.stack([picture for picture, *_ in items])

    if cache:
        probes = [read(i) for i in (0, len(data) // 2, len(data) - 1)]
        probe = hashlib.sha256(b"".join(picture.numpy().tobytes() + repr(numbers).encode()
                                        for picture, *numbers in probes)).hexdigest()
        images, rest = mapped(Path(cache).expanduser(), shape, {"items": len(data), "probe": probe}, chunk,
                              lambda: rest)
    else:
        images = torch.empty(shape, dtype=torch.uint8)
        for start in tqdm(range(0, len(data), CHUNK), desc="decode", leave=False, position=0):
            images[start:start + CHUNK] = chunk(start)
    if len({len(numbers) for numbers in rest}) != 1:
        raise ValueError("expected items with a group in all of them or in none, got both")
    labels, *groups = torch.tensor(rest).T
    names = tuple(classes or own_classes(data, label) or map(str, range(int(labels.max()) + 1)))
    if labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(f"expected labels in 0..{len(names) - 1}, since there are {len(names)} classes "
                         f"({', '.join(names[:5])}), got {labels.min()}..{labels.max()}")
    return Images(images, labels, names, groups[0] if groups else None)
