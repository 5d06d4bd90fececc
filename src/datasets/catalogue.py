"""Every data set by its name: load a part of it, or say what is missing."""

from collections.abc import Sequence
from pathlib import Path

from .decode import View
from .images import Images
from .photographs import SPLITS, CelebA, Grouped, ImageNet9, Waterbirds
from .small import SOURCES, missing_pictures, small_pictures
from .spurious import TEST_SETS, DataUnavailable, SpuriousDigits, SpuriousMNIST, ensure_mnist

DIGIT_SETS = ("SpuriousMNIST", "SpuriousDigits")
PARTS = {**dict.fromkeys(DIGIT_SETS, ("train", *TEST_SETS)),
         **dict.fromkeys(("Waterbirds", "Waterbirds, corrected", "Waterbirds, rebuilt", "CelebA",
                                    *SOURCES), SPLITS),
         "ImageNet9": ImageNet9.PARTS}


def load(dataset: str, part: str = "train", *, root: Path | str = "data", seed: int = 0, view: View | None = None,
         **options: object) -> SpuriousMNIST | SpuriousDigits | Images:
    """Load a part of a data set: `images` (N, 3, H, W) uint8, `labels` (N,) int64, `groups` (N,) int64 or None.

    Args:
        dataset, part: a name in `PARTS`, and one of its parts.
        seed: draws the squares of digits; pictures are what they are.
        view: of pictures, and needed for them. Photographs are decoded at the first call and kept in `root/cache/`.
        options: of digits: `class_mix_ratio` and `mix_order`.

    Raises:
        ValueError: an unknown name, part or option, or a picture is not readable.
        FileNotFoundError, DataUnavailable: files are missing; the message says which, and where they are from.
    """
    _check(dataset, part)
    valid = {"class_mix_ratio", "mix_order"} if dataset in DIGIT_SETS else set()
    if unknown := options.keys() - valid:
        raise ValueError(f"expected options of {dataset} to be among {sorted(valid)}, got {sorted(unknown)}")
    root = Path(root)
    if dataset in DIGIT_SETS:
        arguments = dict(train=part == "train", test_set=None if part == "train" else part, seed=seed, **options)
        return SpuriousDigits(**arguments) if dataset == "SpuriousDigits" else SpuriousMNIST(root, **arguments)
    if view is None:
        raise ValueError(f"expected a view for {dataset}, such as View(224, 224), got None")
    if dataset in SOURCES:
        return small_pictures(dataset, part, view, root)
    name = f"{dataset}-{part}-{view.height}x{view.width}".lower().replace(", ", "-")
    return open_files(dataset, part, root).load(view, root / "cache" / name)


def open_files(dataset: str, part: str = "train", root: Path | str = "data") -> Grouped:
    """The files of a part of Waterbirds, CelebA or ImageNet-9, with their groups; none of them is decoded yet.

    Raises:
        ValueError: an unknown name or part.
        FileNotFoundError: files are missing; the message says which, and where they are from.
    """
    _check(dataset, part)
    root = Path(root)
    if dataset == "CelebA":
        return CelebA(root / "celeba", part)
    if dataset == "ImageNet9":
        return ImageNet9(root, part)
    if dataset in (*DIGIT_SETS, *SOURCES):
        raise ValueError(f"expected photographs with groups, got {dataset}")
    if dataset == "Waterbirds, rebuilt":
        return Waterbirds(root / "waterbirds_rebuilt", part, published=False)
    birds = root / "waterbird_complete95_forest2water2"
    return Waterbirds(birds, part, birds / "waterbirds_fixed.csv" if dataset == "Waterbirds, corrected" else None)


def missing(dataset: str, root: Path | str = "data", parts: Sequence[str] | None = None) -> str | None:
    """Say what of a data set is missing, where it goes and where it is from; None if all of it is there.

    Nothing is downloaded. parts: of photographs, those that are needed; all if not given.
    """
    for part in parts or PARTS.get(dataset, ("train",)):
        _check(dataset, part)
    if dataset in SOURCES:
        return missing_pictures(dataset, Path(root))
    try:
        if dataset == "SpuriousMNIST":
            ensure_mnist(Path(root), download=False)
        elif dataset not in DIGIT_SETS:
            for part in parts or PARTS[dataset]:
                open_files(dataset, part, root)
    except (FileNotFoundError, DataUnavailable) as error:
        return str(error)
    return None


def _check(dataset: str, part: str) -> None:
    if dataset not in PARTS:
        raise ValueError(f"expected dataset to be one of {tuple(PARTS)}, got {dataset!r}")
    if part not in PARTS[dataset]:
        raise ValueError(f"expected part of {dataset} to be one of {PARTS[dataset]}, got {part!r}")
