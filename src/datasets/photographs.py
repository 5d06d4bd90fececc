"""Benchmarks of photographs with a label and a spurious attribute: known before any image is opened."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pandas
import torch

from ..masks import Masks
from .decode import View, cached, decode
from .images import Images

SPLITS = ("train", "val", "test")
WRITTEN = {text: name for i, name in enumerate(SPLITS) for text in (str(i), name)}  # of splits, in tables
BITS = {"0": 0, "1": 1}


class Files:
    """Image files `paths` with labels (N,) int64; `load` decodes them.

    groups: (N,) int64 = number of attributes * label + attribute, named by `group_names`; None without an attribute.
    masks: the files of the pixels that are known in each image, white on black, or None.
    published: the counts of groups, or the number of images, as published; others are warned of.
    FileNotFoundError, ValueError: images or tables of them are missing; a table holds what it should not.
    """

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], classes: tuple[str, ...], published: tuple = (),
                 attributes: Sequence[int] | None = None, attribute_names: tuple[str, ...] = ()) -> None:
        self.paths, self.classes, self.labels, self.masks = paths, classes, torch.tensor(labels), None
        self.groups = None if attributes is None else len(attribute_names) * self.labels + torch.tensor(attributes)
        self.group_names = tuple(f"{label}, {attribute}" for label in classes for attribute in attribute_names)
        if published and tuple(self.counts()) not in published:
            warnings.warn(f"{type(self).__name__}: {self.counts()} images ({'; '.join(self.group_names)}); published: "
                          f"{' or '.join(map(str, map(list, published)))}. Results will not compare", stacklevel=3)
        if missing := [path for path in paths if not path.is_file()]:
            raise FileNotFoundError(f"{len(missing):,} of {len(self):,} images are missing, such as {missing[0]}")

    def __len__(self) -> int:
        return len(self.paths)

    def counts(self) -> list[int]:
        """How many images each group has; without groups, how many there are."""
        return [len(self)] if self.groups is None else self.groups.bincount(minlength=len(self.group_names)).tolist()

    def load(self, view: View, file: Path) -> Images:
        """All images as seen by a view, decoded once into `file`, from which they are memory-mapped: see `cached`."""
        known = self.masks and Masks.of(torch.stack([decode(path, view)[0] > 127 for path in self.masks]))
        return Images(cached(self.paths, view, file), self.labels, self.classes, self.groups, self.group_names, known)


class Waterbirds(Files):
    """Waterbirds on land and water (Sagawa et al. 2020): CUB birds cut out and set on backgrounds from Places.

    Attribute: land or water behind it, which goes with the label in 95 % of the training images. 11,788 images, 11,621
    with the MaskTune authors' corrected metadata. For research only: CUB-200-2011 and Places forbid other use.

    published: whether it should be this very set; otherwise it is one of one's own, in the same layout. If that has
    `masks/FOLDER/NAME.png`, white on black, those are the known pixels of the training images.
    """

    PUBLISHED: ClassVar = {"train": ((3498, 184, 56, 1057), (3550, 187, 52, 961)),
                           "val": ((467, 466, 133, 133), (470, 472, 122, 124)),
                           "test": ((2255, 2255, 642, 642), (2255, 2264, 581, 583))}  # original, corrected

    def __init__(self, root: Path | str, split: str = "train", metadata: str = "metadata.csv", published: bool = True
                 ) -> None:
        root, file = Path(root), Path(root) / metadata
        chosen = of_split(read_table(file, ("img_filename", "y", "split", "place")), "split", split, file)
        names = [name.replace("\\", "/") for name in chosen["img_filename"]]
        super().__init__([root / name for name in names], read_values(chosen, "y", BITS, file),
                         ("landbird", "waterbird"), self.PUBLISHED.get(split) if published else (),
                         read_values(chosen, "place", BITS, file), ("land", "water"))
        if not published and split == "train" and (root / "masks").is_dir():
            self.masks = [(root / "masks" / name).with_suffix(".png") for name in names]


class CelebA(Files):
    """CelebA (Liu et al. 2015): is the hair blond? Attribute: male, which goes with not blond.

    202,599 faces, 178x218, 162,770 of them to train. Non-commercial research only.
    root: the folder with `img_align_celeba/` and either `list_attr_celeba.txt` and `list_eval_partition.txt` (the
    official folder) or the same two as `.csv` (Kaggle's `jessicali9530/celeba-dataset`).
    """

    PUBLISHED: ClassVar = {"train": (71_629, 66_874, 22_880, 1_387), "val": (8_535, 8_276, 2_874, 182),
                           "test": (9_767, 7_535, 2_480, 180)}

    def __init__(self, root: Path | str, split: str = "train") -> None:
        root, columns, ending, more = Path(root), ("image_id", "partition"), ".csv", ({}, {})
        if not (root / "list_attr_celeba.csv").exists():  # official: one list has no header, one a count before it
            ending, more = ".txt", ({"sep": r"\s+", "names": columns}, {"sep": r"\s+", "skiprows": 1})
        file = root / f"list_attr_celeba{ending}"
        partition = read_table(root / f"list_eval_partition{ending}", columns, **more[0])
        attributes = read_table(file, ("image_id", "Blond_Hair", "Male"), **more[1])
        chosen = of_split(attributes.merge(partition, on="image_id"), "partition", split, file)
        folder = root / "img_align_celeba"
        if (folder / "img_align_celeba").is_dir():  # as Kaggle's archive unpacks
            folder /= "img_align_celeba"
        blond, male = (read_values(chosen, column, {"-1": 0, "1": 1}, file) for column in ("Blond_Hair", "Male"))
        super().__init__([folder / name for name in chosen["image_id"]], blond, ("not blond", "blond"),
                         (self.PUBLISHED[split],), male, ("female", "male"))


def read_table(path: Path, columns: tuple[str, ...], **options: object) -> pandas.DataFrame:
    """Columns of a CSV file as text, blank rows left out; options: as of `pandas.read_csv`."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    with path.open("rb") as file:
        coding = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"  # as spreadsheets export it
    try:
        table = pandas.read_csv(path, dtype=object, keep_default_na=False, encoding=coding,
                                encoding_errors="surrogateescape", skipinitialspace=True, **options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(table.index, pandas.RangeIndex):  # what precedes the columns that have names
        table = table.reset_index(names=columns[0])
    table.columns = table.columns.str.strip()
    if missing := [column for column in columns if column not in table]:
        raise ValueError(f"expected {path} to have the columns {', '.join(missing)}, got {', '.join(table.columns)}")
    table = table[list(columns)].apply(lambda column: column.str.strip())
    table = table[(table != "").any(axis=1)]
    if (twice := table[columns[0]].duplicated()).any():
        raise ValueError(f"expected {path} to have each {columns[0]} once, got {table[twice].iloc[0, 0]!r} twice")
    return table


def read_values(table: pandas.DataFrame, column: str, values: dict[str, object], file: Path) -> list:
    """A column's values by what they are written as, such as {"0": 0, "1": 1}; ValueError names the first other one."""
    found = table[column].str.lower().str.removesuffix(".0").map(values)
    if found.isna().any():
        row = table[found.isna()].iloc[0]
        raise ValueError(f"{file}: expected {column} of {', '.join(values)}, got {row[column]!r} for {row.iloc[0]}")
    return found.tolist()


def of_split(table: pandas.DataFrame, column: str, split: str, file: Path) -> pandas.DataFrame:
    """The rows of a split, which is written as a number from 0 on, or as a word; ValueError: there are none."""
    found = pandas.Series(read_values(table, column, WRITTEN, file), table.index)
    if not (found == split).any():
        raise ValueError(f"expected rows of the split {split!r} in {file}, got those of {', '.join(found.unique())}")
    return table[found == split]
