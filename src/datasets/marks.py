"""Photographs with a mark that goes with the label, drawn by us, so that its pixels, and what it covers, are known."""

import tempfile
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from ..masks import Masks
from ..seeding import generator
from .decode import View, cached
from .images import Images, class_files
from .spurious import DataUnavailable, conflicting, first

IMAGENETTE = {  # names by WordNet id
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player", "n03000684": "chain saw",
    "n03028079": "church", "n03394916": "French horn", "n03417042": "garbage truck", "n03425413": "gas pump",
    "n03445777": "golf ball", "n03888257": "parachute"}
CLASSES = {"halves": ("tench to church", "French horn to parachute"), "ten": tuple(IMAGENETTE.values())}
HORN = 5  # the label of the French horn
MAGENTA, GREEN = (255, 0, 255), (0, 255, 0)  # rare in photographs
MARKS = ("class", "each", "none", "both")


class SpuriousImagenette(Images):
    """Imagenette with a round magenta mark that goes with the label.

    Groups: 2 * label + mark; `known`: the mark's pixels. Images: Imagenette (Howard, github.com/fastai/imagenette,
    Apache 2.0), 9,469 to train and 3,925 to test, or as many of them as are there; ImageNet's, for non-commercial
    research and education.

    Parts: a fifth of the training files, always the same, is "val", marked as "train" is. The others are test sets:
    "raw" has no marks, "malicious" has them on all images but those of the label that carries them in training.

    Args:
        root: holds `imagenette2-160/`, which is fetched if it is missing, and the pixels in `cache/`.
        seed: draws what is random. The same arguments and files give the same tensors.
        classes: "halves", the first five, which carry the mark, against the last five; or "ten", and the French horn
            carries it.
        place: "corner", lower right, or "random", drawn for each image.
        side, opacity: the mark's diameter as a share of the image's shorter side; how much it covers, in (0, 1].
        class_mix_ratio: share of the "train" and "val" images of each class marked the wrong way round, in [0, 1].
        marks: of "train" and "val", on one "class", on "none" or on "both" alike, while test sets stay as they are; or
            "each" of two classes has its own, the second a green one, and "malicious" has each other's.
        size: only so many "train" images, the first in a shuffled order, among which the wrong ones are drawn.

    Raises:
        ValueError, DataUnavailable: an argument is not valid, or a picture not readable; see `imagenette`.
    """

    PARTS = ("train", "val", "raw", "malicious")

    def __init__(self, root: str | Path, part: str, view: View, seed: int = 0, classes: str = "halves",
                 place: str = "corner", side: float = 0.12, opacity: float = 0.6, class_mix_ratio: float = 0.0,
                 marks: str = "class", size: int | None = None) -> None:
        shorter = min(view.height, view.width)
        diameter, margin = round(side * shorter) if 0 < side < 1 else 0, round(shorter / 28) if place == "corner" else 0
        for name, value, valid in (("part", part, self.PARTS), ("classes", classes, tuple(CLASSES)),
                                   ("place", place, ("corner", "random")), ("marks", marks, MARKS)):
            if value not in valid:
                raise ValueError(f"expected {name} of {valid}, got {value!r}")
        if not (1 <= diameter <= shorter - margin and 0 < opacity <= 1 and 0 <= class_mix_ratio <= (marks == "class")):
            raise ValueError("expected a side of a pixel or more that fits in, an opacity in (0, 1], and a "
                             "class_mix_ratio in [0, 1], 0 unless marks='class'; got "
                             f"{side=}, {opacity=}, {class_mix_ratio=}")
        names, mark = CLASSES[classes], HORN if classes == "ten" else 0
        test = part in ("raw", "malicious")
        folder = "val" if test else "train"
        paths, labels = imagenette(root, folder)
        order = torch.randperm(len(paths), generator=generator(0, "imagenette split"), device="cpu")
        chosen = {"train": order[len(order) // 5:], "val": order[:len(order) // 5]}.get(part, order)
        chosen = chosen[first(size if part == "train" else None, len(chosen))]
        file = Path(root) / "cache" / f"imagenette-{folder}-{view.height}x{view.width}"
        images, labels = cached(paths, view, file)[chosen], labels[chosen] // (5 if classes == "halves" else 1)
        green = (labels != mark) ^ test if marks == "each" else labels < 0
        if test:
            marked = ((labels != mark) | (marks == "each")) & (part == "malicious")
        else:
            marked = (labels == mark) & (marks == "class") | (marks in ("both", "each"))
            marked = marked ^ conflicting(labels, labels, class_mix_ratio, "random", seed)
        room = torch.tensor([view.height, view.width]) - diameter - margin
        draw = generator(seed, "places", "test" if test else part)
        anywhere = torch.rand(len(labels), 2, generator=draw, device="cpu", dtype=torch.float64)
        share = anywhere if place == "random" else 1
        known = draw_marks(images, marked, (share * (room + (place == "random"))).long(), diameter, opacity, green)
        super().__init__(images, labels, names, 2 * labels + marked,
                         tuple(f"{name}, {what}" for name in names for what in ("no mark", "mark")), Masks.of(known))


def draw_marks(images: Tensor, marked: Tensor, corners: Tensor, diameter: int, opacity: float, green: Tensor
               ) -> Tensor:
    """Draw discs into those of the images (N, 3, H, W) uint8 that are marked; return their pixels, (N, H, W) bool.

    corners: (N, 2) int64 or one for all, top and left of the box around the disc; diameter: pixels; green: (N,) bool,
    which are green instead of magenta.
    """
    away = torch.arange(diameter) - (diameter - 1) / 2
    disc = torch.nonzero(away[:, None] ** 2 + away ** 2 <= (diameter / 2) ** 2)
    index = torch.nonzero(marked)  # (n, 1); rows and columns: (n, pixels of the disc)
    rows, columns = (corners.expand(len(images), 2)[marked, None] + disc).unbind(-1)
    under = images[index, :, rows, columns].double()
    colour = torch.where(green[index, None], torch.tensor(GREEN), torch.tensor(MAGENTA))
    images[index, :, rows, columns] = (under + opacity * (colour - under)).round().to(torch.uint8)
    known = torch.zeros(len(images), *images.shape[2:], dtype=torch.bool)
    known[index, rows, columns] = True
    return known


def imagenette(root: Path | str, split: str) -> tuple[Sequence[Path], Tensor]:
    """The files of Imagenette's "train" or "val" below root, and their labels, (N,) int64 in 0..9; DataUnavailable."""
    folder = Path(root) / "imagenette2-160"
    try:
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root) as whole:  # half of it would pass for a set of one's own
                torchvision.datasets.Imagenette(whole, "train", "160px", download=True)
                (Path(whole) / folder.name).rename(folder)
        paths, labels, _ = class_files(folder / split, tuple(IMAGENETTE))
        if empty := [name for i, name in enumerate(IMAGENETTE.values()) if i not in labels]:
            raise FileNotFoundError(f"no images of {', '.join(empty)} in {folder / split}")
    except (OSError, RuntimeError, HTTPException) as error:
        raise DataUnavailable(f"Imagenette is not whole in {folder} ({error}); with a network, torchvision fetches it "
                              "if there is no such folder; or unpack fast.ai's imagenette2-160.tgz there") from error
    return paths, torch.tensor(labels)
