"""The one type of data set, and your own images, decoded once: from folders, or from any torch data set."""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unicodedata import normalize

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from ..checks import check_labels
from ..masks import Masks
from .decode import View, cached, decoded, fit

PARTS_OF_A_DATA_SET = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}
NOT_OURS = {  # folders that systems and file servers make, in small letters
    "__macosx", "@eadir", "__pycache__", "lost+found", "#recycle", "$recycle.bin", "system volume information",
    "@recycle", "@recently-snapshot", "#snapshot", "network trash folder", "temporary items"}
Key = str | int | Callable[[object], object] | None  # where something is in an item of a data set
Floats = Sequence[float] | None  # one of each channel
FEW_GROUPS = 8  # so many may be in a third entry, however few images there are


@dataclass(eq=False)
class Images:
    """A data set: images (N, 3, height, width) uint8, labels (N,) int64, and what else is known of it."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    groups: Tensor | None = None  # (N,) int64
    group_names: tuple[str, ...] = ()
    known: Masks | None = None  # (N, height, width): the pixels that are known, a square or a bird
    numbered: bool = False  # the classes are called "0", "1", ... for want of names

    def __len__(self) -> int:
        return len(self.labels)

    def with_classes(self, classes: Sequence[str]) -> "Images":
        """The same images, labelled as in another list of classes: matched by name, those that have none by number.
        ValueError: a class that occurs here is not in the list.
        """
        if self.numbered and len(self.classes) <= len(classes):
            return replace(self, classes=tuple(classes), numbered=False)
        if unknown := [name for i, name in enumerate(self.classes) if classes.count(name) != 1 and i in self.labels]:
            raise ValueError(f"expected {', '.join(unknown)} once among the classes {', '.join(classes)}; see classes=")
        place = torch.tensor([list(classes).index(name) if name in classes else -1 for name in self.classes])
        labels = place[self.labels.cpu()].to(self.labels.device)
        return Images(self.images, labels, tuple(classes), self.groups, self.group_names, self.known)


def load_folder(root: Path | str, side: int | tuple[int, int], classes: Sequence[str] | None = None,
                cache: Path | str | None = None) -> Images:
    """Load `root/class/*.jpg` (or png, ...) and folders within: scaled to fill the frame, the middle cut out.

    Hidden files and folders are passed over, and other classes within one; files of other endings, with a warning.
    Classes are in the order of their names as strings, as torchvision's `ImageFolder` has them.

    Args:
        side: pixels of a square frame, or (height, width).
        classes: of the training set, such as `train.classes` for a test set, so that labels mean the same.
        cache: a file to decode into, once and in parallel, and to map the images from; see `cached`.

    Raises:
        FileNotFoundError, ValueError: no class folders with images, one not among `classes`, no readable image.
        FileExistsError: `cache` names a file of another kind, which is left as it is.
    """
    paths, labels, found = class_files(root, classes)
    view = View.of(side)
    if cache:
        images = cached(paths, view, Path(cache).expanduser())
    else:
        kind = numpy.dtype((numpy.uint8, (3, view.height, view.width)))
        images = torch.from_numpy(numpy.fromiter(decoded(paths, view), kind, len(paths)))
    return Images(images, torch.tensor(labels), found)


def class_files(root: Path | str, classes: Sequence[str] | None = None) -> tuple[Sequence[Path], Sequence[int], tuple]:
    """The image files in the class folders of `root`, their labels, and the classes; see `load_folder`."""
    root = Path(root).expanduser()
    names = sorted(entry.name for entry in root.glob("*") if entry.is_dir() and _counts(entry.name))
    if len(parts := [name for name in names if name.lower() in PARTS_OF_A_DATA_SET]) > 1 or parts == names != []:
        raise ValueError(f"expected {root} to have a folder for each class, got parts of a set: {', '.join(parts)}")
    if classes is None and all(name.isdecimal() for name in names) and names != sorted(names, key=int):
        warnings.warn(f"{root}: classes in the order of strings: {', '.join(names[:4])}; see classes=", stacklevel=3)
    known = tuple(names) if classes is None else in_order(classes)
    places = {normalize("NFC", name): i for i, name in enumerate(known)}  # a name may be written in two ways
    if len(places) < len(known) or not {normalize("NFC", name) for name in names} <= set(places):
        raise ValueError(f"expected {root} to have the classes {', '.join(known)}, each once, got {', '.join(names)}")
    tops = {os.path.realpath(folder) for folder in (root, *(root / name for name in names))}  # not to be linked to
    found, images = [], []
    for name in names:
        own = files_below(root / name, tops - {os.path.realpath(root / name)})
        pictures = [path for path in own if path.suffix.lower() in IMG_EXTENSIONS]
        if not pictures:
            endings = ", ".join(sorted({path.suffix or "none" for path in own})) or "no files"
            raise FileNotFoundError(f"{root / name}: expected images of class {name} ({', '.join(IMG_EXTENSIONS)}), "
                                    f"got {endings}; convert them, or remove the folder")
        found += own
        images += [(path, places[normalize("NFC", name)]) for path in pictures]
    if not images:
        raise FileNotFoundError(f"{root} is missing, or has no folders of images, one for each class")
    if odd := [path for path, _ in images if not path.is_file()]:
        raise FileNotFoundError(f"{odd[0]} is no file: a link to nothing, a pipe or the like; remove it")
    if others := [path.name for path in found if path.suffix.lower() not in IMG_EXTENSIONS]:
        warnings.warn(f"{root}: {len(images):,} images; {len(others):,} other files, of which one is {others[0]}, are "
                      "passed over", stacklevel=3)
    return *zip(*images, strict=True), known


def files_below(folder: Path, seen: set[str]) -> list[Path]:
    """All files below a folder that are not hidden, in torchvision's order; none twice, or in a folder seen already."""
    found = []

    def unreadable(error: OSError) -> None:  # os.walk would pass it over, with all its images
        raise error

    for here, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = sorted(name for name in folders if _counts(name) and real not in seen)
        found += [(here, name) for name in names if _counts(name) and real not in seen]
        seen.add(real)
    return [Path(here, name) for here, name in sorted(found)]


def _counts(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in NOT_OURS


def load_dataset(data: Dataset | Sequence, side: int | tuple[int, int] | None = None,
                 classes: Sequence[str] | None = None, *, image: Key = None, label: Key = None, group: Key = None,
                 mean: Floats = None, std: Floats = None) -> Images:
    """Load a data set of (image, label) or (image, label, group), or of dicts with an image and a label.

    An image is a PIL image, a tensor (3, H, W) or an array (H, W, 3), of uint8 or of floats in [0, 1].

    Args:
        data: anything with a length and items by number, without augmentation.
        side: as of `load_folder`; if not given, all images must have one size.
        classes: names; those that the data set gives itself, or "0", "1", ..., if not given.
        image, label, group: where these are in an item, a key, a position or a function of the item; by default
            "image" and "label" of a dict, else the first, the second and, if there are three, the third entry. WILDS'
            (x, y, metadata) needs one such as group=lambda item: item[2][0].
        mean, std: of the normalisation that the floats went through, which is undone.

    Raises:
        TypeError, ValueError: it is no such data set, or an item is not of that kind; it is named by its index.
    """
    has_items = {"__len__", "__getitem__"} <= set(dir(type(data)))  # an object may only pass on what its type lacks
    if not has_items or isinstance(data, (str, Mapping, IterableDataset)) or hasattr(data, "train_ds"):
        raise TypeError("expected a data set with a length and items by number (of a DataLoader its .dataset, of "
                        "fastai dls.train_ds, of a dict one of its values, or list(...) of one without), got "
                        f"a {type(data).__name__} {str(data)[:60]!r}; load_folder reads folders of images")
    names = own_classes(data, label) if classes is None else in_order(classes)
    view = None if side is None else View.of(side)

    def read(i: int) -> tuple[Tensor, list[int]]:
        try:
            picture, *numbers = _parts(data[i], image, label, group)
            return fit(_picture(picture, mean, std), view), [_whole(number, names or ()) for number in numbers]
        except Exception as error:  # a data set can fail in any way
            raise ValueError(f"item {i} of the data set: {error}") from error

    first, numbers = read(0)
    if not torch.equal(first, read(0)[0]):
        warnings.warn("item 0 is another image when it is read again: hand over a data set without augmentation, or "
                      "each image stays as it was read first", stacklevel=2)
    images, rest = torch.empty(len(data), *first.shape, dtype=torch.uint8), []
    for i in tqdm(range(len(data)), desc="decode", leave=False, position=0):
        picture, found = read(i)
        if (picture.shape, len(found)) != (first.shape, len(numbers)):
            raise ValueError(f"item {i} of the data set: expected an image {tuple(first.shape)}, and a group in all of "
                             f"them or in none, got {tuple(picture.shape)}; side= brings all to one size")
        images[i] = picture
        rest.append(found)
    labels, *groups = torch.tensor(rest).T
    known = names or tuple(map(str, range(int(labels.max()) + 1)))
    check_labels(labels, images, len(known), "there are")
    if groups and group is None and (many := len(groups[0].unique())) > max(FEW_GROUPS, len(data) / 10):
        raise ValueError(f"expected a group as third entry of the items, got {many} different ones in {len(data)} "
                         "items, like an index; pass image=0 and label=1 to leave it out, or group=2 to keep it")
    return Images(images, labels, known, groups[0] if groups else None, numbered=not names)


def _parts(item: object, image: Key, label: Key, group: Key) -> Sequence:
    """Image, label and, if there is one, group of an item."""
    named = isinstance(item, Mapping)
    if not named and image is label is group is None:
        if isinstance(item, (tuple, list)) and len(item) in (2, 3):
            return item
        raise ValueError(f"expected (image, label), (image, label, group) or a dict, got a {type(item).__name__}; say "
                         "where they are with image=, label= and group=")
    defaults = ("image", "label", None) if named else (0, 1, None)
    keys = [default if key is None else key for key, default in zip((image, label, group), defaults, strict=True)]
    if absent := [key for key in keys if isinstance(key, str) and key not in item]:
        raise ValueError(f"expected {' and '.join(absent)} among {', '.join(map(str, item))}; see image= and label=")
    return [key(item) if callable(key) else item[key] for key in keys if key is not None]


def _picture(given: object, mean: Floats, std: Floats) -> Image.Image | Tensor:
    """A PIL image, or a tensor (3, H, W) with floats as they were before a normalisation."""
    if not isinstance(given, (Tensor, Image.Image, numpy.ndarray)) or (mean is None) != (std is None):
        raise TypeError("expected a PIL image, a tensor (3, H, W) or an array (H, W, 3), and mean and std together, "
                        f"got a {type(given).__name__}, mean {mean} and std {std}")
    if isinstance(given, numpy.ndarray):
        given = torch.from_numpy(numpy.ascontiguousarray(given if given.ndim == 3 else given[..., None]))
        given = given.permute(2, 0, 1) if given.shape[-1] in (1, 3) else given
    return given if mean is None else given * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)


def _whole(value: object, classes: tuple[str, ...]) -> int:
    """A label or group as a whole number; a class by its name, if it has one."""
    if isinstance(value, str) and value in classes:
        return classes.index(value)
    number = numpy.asarray(value)  # as MedMNIST's array([1]), too
    if number.size == 1 and number.dtype.kind in "biuf" and number.item() % 1 == 0:
        return int(number.item())
    raise ValueError(f"expected a whole number as label or group, got {type(value).__name__} {repr(value)[:60]}; pass "
                     "classes=, the names, or label= and group=: the argmax of one-hot labels, one of multi-hot ones")


def own_classes(data: object, label: Key = None) -> tuple[str, ...] | None:
    """The class names that a data set of torchvision, fastai or Hugging Face, or a part or sum of them, has itself."""
    if isinstance(data, Subset):
        return own_classes(data.dataset, label)
    if isinstance(data, ConcatDataset):
        found = {own_classes(part, label) for part in data.datasets}
        if len(found) > 1:
            raise ValueError(f"expected the same classes in all parts of a ConcatDataset, got {sorted(found, key=str)}")
        return found.pop()
    names, features = getattr(data, "classes", getattr(data, "vocab", None)), getattr(data, "features", None)
    if names is None and isinstance(features, Mapping):
        names = getattr(features.get(label or "label"), "names", None)
    return in_order(names) if isinstance(names, Iterable) and not isinstance(names, str) else None


def in_order(classes: Iterable[str] | Mapping) -> tuple[str, ...]:
    """The names of classes by number: of a list, or a dict of numbers by name, or of names by number (0, 1, ...)."""
    if isinstance(classes, Mapping):
        pairs = [(int(name), number) if isinstance(number, str) else (number, name) for name, number in classes.items()]
        if [number for number, _ in sorted(pairs)] != list(range(len(pairs))):
            raise ValueError(f"expected classes numbered 0, 1, ..., got {dict(classes)}")
        classes = [name for _, name in sorted(pairs)]
    if isinstance(classes, set | frozenset):
        raise ValueError(f"expected the names of classes in order, got a set, {classes}")
    return tuple(map(str, classes))
