"""Benchmarks of photographs with a label and a spurious attribute: known before any image is opened."""

import csv
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from .decode import View, cached, decode
from .images import Images, class_files

SPLITS = ("train", "val", "test")


class Grouped:
    """Files with labels, spurious attributes and groups; `load` decodes them.

    Attributes, all of length N:
        paths: the image files.  labels: (N,) int64.  attributes: (N,) int64.
        groups: (N,) int64 = number of attributes * label + attribute, named by `group_names`.
    """

    def __init__(self, paths: list[Path], labels: list[int], attributes: list[int], classes: tuple[str, ...],
                 attribute_names: tuple[str, ...]) -> None:
        self.paths, self.classes = paths, classes
        self.labels, self.attributes = torch.tensor(labels), torch.tensor(attributes)
        self.groups = len(attribute_names) * self.labels + self.attributes
        self.group_names = tuple(f"{label}, {attribute}" for label in classes for attribute in attribute_names)

    def __len__(self) -> int:
        return len(self.paths)

    def counts(self) -> list[int]:
        """How many images each group has."""
        return self.groups.bincount(minlength=len(self.group_names)).tolist()

    def load(self, view: View, file: Path | str) -> Images:
        """All images as seen by a view, decoded once into `file`, from which they are memory-mapped: see `cached`."""
        return Images(cached(self.paths, view, Path(file)), self.labels, self.classes, self.groups)

    def _check_counts(self, published: tuple[tuple[int, ...], ...]) -> None:
        if tuple(self.counts()) not in published:
            warnings.warn(f"{type(self).__name__}: the groups ({'; '.join(self.group_names)}) have {self.counts()} "
                          f"images; published: {' or '.join(map(str, map(list, published)))}. Results will not "
                          "compare", stacklevel=3)

    def _check_files(self, source: str) -> None:
        missing = [path for path in self.paths if not path.exists()]
        if missing:
            raise FileNotFoundError(f"{type(self).__name__}: {len(missing):,} of {len(self):,} images are missing, "
                                    f"such as {missing[0]}; {source}")


class Waterbirds(Grouped):
    """Waterbirds on land and water (Sagawa et al. 2020): CUB birds cut out and set on backgrounds from Places.

    Input: RGB photographs of several sizes. Labels: landbird, waterbird. Attribute: land or water behind it, which goes
    with the label in 95 % of the training images. 11,788 images, 11,621 with the MaskTune authors' corrected metadata.
    For research only: CUB-200-2011 and Places forbid other use.

    Args:
        root: the folder `waterbird_complete95_forest2water2`, with `metadata.csv` and 200 class folders.
        split: "train", "val" or "test".
        metadata: another file than `root/metadata.csv`, such as the corrected one.
        published: whether the groups should have the sizes that are published; otherwise it is a set of one's own, in
            the same layout.

    Raises:
        FileNotFoundError: the metadata, or images that it names, are missing.
        ValueError: an unknown split, or a column is missing or holds what it should not.
    """

    SOURCE = "from nlp.stanford.edu/data/dro/waterbird_complete95_forest2water2.tar.gz, about 0.5 GB"
    PUBLISHED: ClassVar = {"train": ((3498, 184, 56, 1057), (3550, 187, 52, 961)),
                           "val": ((467, 466, 133, 133), (470, 472, 122, 124)),
                           "test": ((2255, 2255, 642, 642), (2255, 2264, 581, 583))}  # original, corrected

    def __init__(self, root: Path | str, split: str = "train", metadata: Path | str | None = None,
                 published: bool = True) -> None:
        root = Path(root)
        columns = ("img_filename", "y", "split", "place")
        file = Path(metadata or root / "metadata.csv")
        source = self.SOURCE if published else "made by `python -m src.datasets.compose`, say"
        chosen = _of_split(csv_rows(file, columns, source), "split", split, file)
        super().__init__([root / row["img_filename"].replace("\\", "/") for row in chosen],
                         [_bit(row, "y") for row in chosen], [_bit(row, "place") for row in chosen],
                         ("landbird", "waterbird"), ("land", "water"))
        if published:
            self._check_counts(self.PUBLISHED[split])
        self._check_files(source)
        self.root = root

    def objects(self, view: View) -> Tensor:
        """The birds' pixels as seen by a view, (N, height, width) bool: of a set that `compose` made, which keeps them.

        Raises:
            ValueError: `masks/FOLDER/NAME.png` is missing or unreadable for one of the images.
        """
        files = (self.root / "masks" / path.relative_to(self.root).with_suffix(".png") for path in self.paths)
        return torch.stack([decode(file, view)[0] > 127 for file in files])


class CelebA(Grouped):
    """CelebA (Liu et al. 2015): is the hair blond? Attribute: male, which goes with not blond.

    Input: RGB faces, 178x218. Labels: not blond, blond. 202,599 images, 162,770 to train. Non-commercial research only.

    Args:
        root: the folder with `img_align_celeba/` and either `list_attr_celeba.txt` and `list_eval_partition.txt` (the
            official folder) or the same two as `.csv` (Kaggle's `jessicali9530/celeba-dataset`).
        split: "train", "val" or "test".

    Raises:
        FileNotFoundError: the lists, or images that they name, are missing.
        ValueError: an unknown split, or the lists do not fit each other.
    """

    SOURCE = "from mmlab.ie.cuhk.edu.hk/projects/CelebA.html, or Kaggle's jessicali9530/celeba-dataset, about 1.4 GB"
    PUBLISHED: ClassVar = {"train": ((71_629, 66_874, 22_880, 1_387),), "val": ((8_535, 8_276, 2_874, 182),),
                           "test": ((9_767, 7_535, 2_480, 180),)}

    def __init__(self, root: Path | str, split: str = "train") -> None:
        root = Path(root)
        read = csv_rows if (root / "list_attr_celeba.csv").exists() else _columns
        ending = "csv" if read is csv_rows else "txt"
        file = root / f"list_eval_partition.{ending}"
        ours = {row["image_id"] for row in _of_split(read(file, ("image_id", "partition"), self.SOURCE), "partition",
                                                     split, file)}
        attributes = read(root / f"list_attr_celeba.{ending}", ("image_id", "Blond_Hair", "Male"), self.SOURCE)
        chosen = [row for row in attributes if row["image_id"] in ours]
        folder = root / "img_align_celeba"
        if (folder / "img_align_celeba").is_dir():  # as Kaggle's archive unpacks
            folder /= "img_align_celeba"
        super().__init__([folder / row["image_id"] for row in chosen],
                         [_bit(row, "Blond_Hair", "-1") for row in chosen],
                         [_bit(row, "Male", "-1") for row in chosen], ("not blond", "blond"), ("female", "male"))
        self._check_counts(self.PUBLISHED[split])
        self._check_files(self.SOURCE)


class ImageNet9(Grouped):
    """ImageNet-9 and the test sets of the Background Challenge (Xiao et al. 2021): nine super-classes.

    Input: RGB photographs. Labels: the nine folders, in their order. There is no attribute; the group is the class.
    Images are ImageNet's, and so are the terms: non-commercial research and education.

    Args:
        root: the folder with `in9l/` (training) or with the variants of `bg_challenge/`.
        variant: "train" or "val" of `in9l`, or a test set: see `VARIANTS`.

    Raises:
        FileNotFoundError: the folder is missing or has no images.
        ValueError: an unknown variant, or not the nine classes.
    """

    SOURCE = ("in9l.tar.gz (training) and backgrounds_challenge_data.tar.gz (tests) are linked from "
              "github.com/MadryLab/backgrounds_challenge")
    VARIANTS = ("original", "mixed_same", "mixed_rand", "mixed_next", "only_fg", "no_fg", "only_bg_b", "only_bg_t")
    PARTS = ("train", "val", *VARIANTS)

    def __init__(self, root: Path | str, variant: str = "train") -> None:
        if variant not in self.PARTS:
            raise ValueError(f"expected variant to be one of {self.PARTS}, got {variant!r}")
        test = variant in self.VARIANTS
        folder = Path(root) / ("bg_challenge" if test else "in9l") / variant / ("val" if test else "")
        if not folder.is_dir():
            raise FileNotFoundError(f"ImageNet9: {folder} is missing; {self.SOURCE}")
        paths, labels, classes = class_files(folder)
        train = Path(root) / "in9l" / "train"
        if test and train.is_dir() and (expected := class_files(train)[2]) != classes:
            raise ValueError(f"expected {folder} to have the classes of {train}, {', '.join(expected)}, got "
                             f"{', '.join(classes)}")
        if len(classes) != 9:
            raise ValueError(f"expected {folder} to have the 9 classes of ImageNet-9, got {len(classes)}: "
                             f"{', '.join(classes)}")
        super().__init__(paths, labels, [0] * len(paths), tuple(name.split("_", 1)[-1] for name in classes),
                         ("any background",))
        if test and len(self) != 4_050:
            warnings.warn(f"ImageNet9: {folder} has {len(self):,} images; published: 4,050. Results will not compare",
                          stacklevel=2)


def _of_split(rows: Iterator[dict[str, str]], column: str, split: str, file: Path) -> list[dict[str, str]]:
    """The rows of a split, which is written as a number from 0 on, or as a word.

    Raises:
        ValueError: an unknown split, a row with another value, or no row of this split.
    """
    if split not in SPLITS:
        raise ValueError(f"expected split to be one of {SPLITS}, got {split!r}")
    values = {**{text: name for i, name in enumerate(SPLITS) for text in (str(i), f"{i}.0", name)},
              "training": "train", "valid": "val", "validation": "val", "testing": "test"}
    found: dict[str, list[dict[str, str]]] = {name: [] for name in SPLITS}
    for row in rows:
        value = row[column].lower()
        if value not in values:
            raise ValueError(f"{row['line']}: expected {column} to be 0, 1, 2 or one of {SPLITS}, got {row[column]!r}")
        found[values[value]].append(row)
    if not found[split]:
        raise ValueError(f"expected rows of the split {split} in {file}, got "
                         + ", ".join(f"{len(those):,} of {name}" for name, those in found.items()))
    return found[split]


def csv_rows(path: Path, columns: tuple[str, ...], source: str) -> Iterator[dict[str, str]]:
    """The rows of a CSV file that must have these columns; blank ones are passed over. "line" says where each is."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; {source}")
    with path.open(newline="", encoding="utf-8-sig") as file:  # with a byte order mark, as Excel writes, or without
        reader = csv.DictReader(file, skipinitialspace=True)
        names = [name.strip() for name in reader.fieldnames or ()]
        if missing := [column for column in columns if column not in names]:
            raise ValueError(f"expected {path} to have the columns {', '.join(missing)}, got {', '.join(names)}")
        reader.fieldnames = names
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if not any(value and value.strip() for value in row.values() if isinstance(value, str)):
                continue
            if None in row or None in row.values():
                raise ValueError(f"{where}: expected {len(names)} values, got "
                                 f"{len(names) + len(row.get(None, ())) - list(row.values()).count(None)}")
            yield {name: value.strip() for name, value in row.items()} | {"line": where}


def _columns(path: Path, columns: tuple[str, ...], source: str) -> Iterator[dict[str, str]]:
    """The rows of one of CelebA's lists: blanks between values; a count, and names, in the first lines or none."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; {source}")
    lines = [(number, line.split()) for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), 1)
             if line.strip()]
    names = columns
    if lines and len(lines[0][1]) == 1 and lines[0][1][0].isdigit():
        lines = lines[1:]
    if lines and set(columns[1:]) <= set(lines[0][1]):  # the names of the attributes, with or without the image's
        names, lines = ("image_id", *(name for name in lines[0][1] if name != "image_id")), lines[1:]
    for number, values in lines:
        if len(values) != len(names) or set(columns) - set(names):
            raise ValueError(f"{path}, line {number}: expected a line with {', '.join(columns)}, got "
                             f"{' '.join(values)[:60]!r}")
        yield dict(zip(names, values, strict=True)) | {"line": f"{path}, line {number}"}


def _bit(row: dict[str, str], column: str, zero: str = "0") -> int:
    value = row[column].removesuffix(".0")
    if value not in (zero, "1"):
        raise ValueError(f"{row['line']}: expected {column} to be {zero} or 1, got {row[column]!r}")
    return int(value == "1")
