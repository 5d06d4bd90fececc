"""Items of any data set of torch or others, read as they are meant: a picture, a label, perhaps a group."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from .decode import View, fit

Key = str | int | Callable[[object], object]  # where something is in an item


def map_style(data: object) -> Sequence:
    """The data set itself, with a length and items by number."""
    if isinstance(data, DataLoader):
        loader, data = data, data.dataset
        drawn = getattr(loader.sampler, "__len__", lambda: None)()
        if hasattr(data, "__len__") and drawn not in (None, len(data)):
            raise ValueError(f"expected a DataLoader over all of its data set, got one whose sampler draws {drawn} of "
                             f"{len(data)} items; pass a torch.utils.data.Subset")
    if isinstance(data, (str, Path)):
        raise TypeError(f"expected a data set, got the path {str(data)!r}; load_folder reads folders of images")
    if isinstance(data, Mapping):
        raise TypeError(f"expected one data set, got a {type(data).__name__} with {', '.join(map(str, data))}; pass "
                        "one of them")
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise TypeError("expected a data set with a length and items by number, got a "
                        f"{type(data).__name__}; of what can only be iterated over, pass list(...)")
    if len(data) == 0:
        raise ValueError("expected a data set with items, got an empty one")
    return data


def reader(data: Sequence, side: int | tuple[int, int] | None, classes: Sequence[str] | None, image: Key | None,
           label: Key | None, group: Key | None, mean: Sequence[float] | None, std: Sequence[float] | None
           ) -> Callable[[int], tuple]:
    """A function of an index: the fitted picture, the label, and the group if there is one."""
    view = side and frame(side)

    def read(i: int) -> tuple:
        nonlocal view
        try:
            item = data[i]
            keys = _keys(item, image, label, group)
            parts = [key(item) if callable(key) else item[key] for key in keys]
            picture = _undo(_tensor(parts[0]), mean, std)
            size = tuple(picture.shape[-2:]) if isinstance(picture, Tensor) else (picture.height, picture.width)
            view = view or View(*size)
            if side is None and size != (view.height, view.width):
                raise ValueError(f"expected an image of {view.height} x {view.width} pixels, as the first, got "
                                 f"{size[0]} x {size[1]}; pass side= to bring all to one size")
            return fit(picture, view), *(_whole(part, classes) for part in parts[1:])
        except (TypeError, ValueError, KeyError, IndexError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"item {i} of the data set: {error}") from error

    return read


def _keys(item: object, image: Key | None, label: Key | None, group: Key | None) -> list[Key]:
    if isinstance(item, Mapping):
        keys = ["image" if image is None else image, "label" if label is None else label]
        if absent := [key for key in keys if isinstance(key, str) and key not in item]:
            raise ValueError(f"expected {' and '.join(map(repr, absent))} among {', '.join(map(str, item))}; say where "
                             "they are with image= and label=")
        return keys + [group] * (group is not None)
    if not isinstance(item, (tuple, list)):
        raise TypeError(f"expected (image, label), (image, label, group) or a dict, got a {type(item).__name__}")
    if image is None and label is None and group is None and len(item) not in (2, 3):
        raise ValueError(f"expected (image, label) or (image, label, group), got {len(item)} entries; say where "
                         "they are with image=, label= and group=")
    if group is None and len(item) == 3 and image is None and label is None:
        group = 2
        if getattr(item[2], "shape", ()) not in ((), (1,)) or isinstance(item[2], (dict, list, tuple)):
            raise ValueError("expected a whole number as third entry, the group, got "
                             f"{type(item[2]).__name__} {tuple(getattr(item[2], 'shape', ()))}; pass group=, a "
                             "function of the item such as lambda item: item[2][0]")
    return [0 if image is None else image, 1 if label is None else label] + [group] * (group is not None)


def _tensor(picture: object) -> Image.Image | Tensor:
    """An array as a tensor (3, H, W); a tensor or a PIL image as it is."""
    if isinstance(picture, (Tensor, Image.Image)):
        return picture
    if not isinstance(picture, numpy.ndarray):
        raise TypeError("expected a PIL image, a tensor (3, H, W) or an array (H, W, 3), got a "
                        f"{type(picture).__name__}")
    picture = torch.from_numpy(numpy.ascontiguousarray(picture))
    if picture.dim() == 2:
        return picture[None]
    first, last = (picture.dim() == 3 and picture.shape[i] in (1, 3) for i in (0, -1))
    if first == last:
        raise ValueError(f"expected an array (H, W, 3) or (3, H, W), got {tuple(picture.shape)}")
    return picture.permute(2, 0, 1) if last else picture


def _undo(picture: Image.Image | Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
          ) -> Image.Image | Tensor:
    """Floats as they were before a normalisation."""
    if mean is None and std is None:
        return picture
    if mean is None or std is None or not isinstance(picture, Tensor) or not picture.is_floating_point():
        raise TypeError("expected mean and std together, for images as normalised floats, got "
                        f"{'one of them' if mean is None or std is None else 'pixels that are none'}")
    picture = picture * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    low, high = picture.min(), picture.max()
    if not (low >= -0.01 and high <= 1.01):
        raise ValueError(f"expected mean and std to undo the normalisation, got values in [{low:.3g}, {high:.3g}] "
                         "instead of [0, 1]")
    return picture.clamp(0, 1)


def _whole(value: object, classes: Sequence[str] | None) -> int:
    """A label or group as a whole number; a class by its name, if names are given."""
    if isinstance(value, str) and classes and value in classes:
        return list(classes).index(value)
    if getattr(value, "shape", ()) in ((), (1,)) and not isinstance(value, (str, list, tuple, dict)):
        number = float(value)
        if number == int(number):
            return int(number)
    shown = tuple(value.shape) if getattr(value, "shape", ()) not in ((), (1,)) else repr(value)[:60]
    raise ValueError(f"expected a whole number as label or group, got {type(value).__name__} {shown}; of soft or "
                     "one-hot labels take argmax, and pass classes= with labels that are names")


def own_classes(data: object, label: Key | None) -> list[str] | None:
    """The class names that a data set of torchvision or Hugging Face, or a part of one, gives itself."""
    while isinstance(data, torch.utils.data.Subset):
        data = data.dataset
    names = getattr(data, "classes", None)
    features = getattr(data, "features", None)
    if names is None and isinstance(features, Mapping):
        names = getattr(features.get(label or "label"), "names", None)
    return [str(name) for name in names] if isinstance(names, Iterable) and not isinstance(names, str) else None


def frame(side: int | tuple[int, int]) -> View:
    """The view of a square frame of `side` pixels, or of one (height, width).

    Raises:
        ValueError: it is no number of pixels.
    """
    height, width = (side, side) if isinstance(side, int) else side
    if not (height >= 1 and width >= 1 and height % 1 == width % 1 == 0):
        raise ValueError(f"expected side to be a number of pixels or (height, width), got {side!r}")
    return View(int(height), int(width))
