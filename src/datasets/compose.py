"""Make a set in Waterbirds' layout from cut-outs and scenes of your own: `python -m src.datasets.compose OUT ...`.

    python -m src.datasets.compose data/waterbirds_rebuilt --objects CUB/images --masks CUB/segmentations \\
        --scenes places/forest places/sea --classes classes.csv

Each object is cut out by its mask and set on a scene. In the training split, the scene goes with the label in most
images, in the others in half of them (as Sagawa et al. 2020 made Waterbirds from CUB and Places). The columns of
`classes.csv` are folder, label (0 or 1) and split (train, val or test). Scenes of the splits are disjoint.
"""

import argparse
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pandas
import torch
from PIL import Image
from tqdm import tqdm

from ..seeding import generator
from .decode import View, fit
from .images import image_files
from .photographs import BITS, SPLITS, read_table, read_values

SHARES = {"train": 0.6, "val": 0.7, "test": 1.0}  # of the scenes: up to where each split has them
COLUMNS = ["img_id", "img_filename", "y", "split", "place", "place_filename", "image", "mask"]
SCALE = (0.55, 0.85)  # the object's longer side as a share of the frame's


def plan(objects: Path, masks: Path, scenes: Sequence[Path], classes: Path, correlation: float, seed: int
         ) -> pandas.DataFrame:
    """Decide what is set on what, with no image opened: Waterbirds' metadata, and the files `image` and `mask`."""
    table = read_table(classes, ("folder", "label", "split"))
    kinds = zip(table["folder"], read_values(table, "label", BITS, classes),
                read_values(table, "split", {split: split for split in SPLITS}, classes), strict=True)
    found = [(f"{folder}/{image.stem}", image, *rest)
             for folder, *rest in kinds for image in image_files(objects / folder)]
    supplies = {(place, split): part for place, folder in enumerate(scenes)
                for split, part in _scenes(folder, seed).items()}
    draw, rows = generator(seed, "compose"), []
    for name, image, label, split in sorted(found):
        usual = torch.rand((), generator=draw).item() < (correlation if split == "train" else 0.5)
        place = label if usual else 1 - label
        if not supplies[place, split]:
            raise ValueError(f"expected more scenes in {scenes[place]}, got too few for {split}")
        scene = supplies[place, split].pop(0)
        rows.append((len(rows), f"{name}.jpg", label, SPLITS.index(split), place, scene, image, masks / f"{name}.png"))
    return pandas.DataFrame(rows, columns=COLUMNS, dtype=object)


def _scenes(folder: Path, seed: int) -> dict[str, list[Path]]:
    """The scenes of one kind for each split, in random order, none in two of them."""
    paths = image_files(folder)
    order = torch.randperm(len(paths), generator=generator(seed, "compose scenes", folder.name)).tolist()
    ends = [0, *(math.ceil(share * len(paths) - 0.5) for share in SHARES.values())]
    return {split: [paths[i] for i in order[slice(*part)]] for split, part in zip(SPLITS, pairwise(ends), strict=True)}


def picture(one: pandas.Series, side: int, seed: int) -> tuple[Image.Image, Image.Image]:
    """The object of a row on its scene, side x side pixels in RGB, and the pixels of the object, 1 bit."""
    cut, shape = (Image.open(path).convert(mode) for path, mode in ((one.image, "RGB"), (one.mask, "L")))
    shape = shape.point(lambda value: 255 * (value > 127))
    if cut.size != shape.size or not shape.getbbox():
        raise ValueError(f"expected {one.mask} to mark some pixels of {one.image}, and to be of its size")
    cut, shape = (image.crop(shape.getbbox()) for image in (cut, shape))
    name = one.img_filename.removesuffix(".jpg")
    share, across, down = torch.rand(3, generator=generator(seed, "compose", name)).tolist()
    scale = side * (SCALE[0] + share * (SCALE[1] - SCALE[0])) / max(cut.size)
    size = tuple(max(1, round(length * scale)) for length in cut.size)
    corner = round(across * (side - size[0])), round(down * (side - size[1]))
    with Image.open(one.place_filename) as scene:
        canvas = Image.fromarray(fit(scene, View(side, side)).permute(1, 2, 0).numpy())
    outline = Image.new("L", canvas.size)
    outline.paste(shape.resize(size, Image.Resampling.BILINEAR), corner)
    canvas.paste(cut.resize(size, Image.Resampling.BICUBIC), corner, shape.resize(size, Image.Resampling.BILINEAR))
    return canvas, outline.point(lambda value: 255 * (value > 127)).convert("1", dither=Image.Dither.NONE)


def compose(out: Path, plans: pandas.DataFrame, side: int, seed: int) -> None:
    """Write all images, their masks, and last the metadata into a new folder."""
    out.mkdir(parents=True)
    for one in tqdm(plans.itertuples(), total=len(plans), unit="image", desc="compose"):
        files = out / one.img_filename, (out / "masks" / one.img_filename).with_suffix(".png")
        for made, file in zip(picture(one, side, seed), files, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            made.save(file, quality=95)  # of JPEG
    plans[COLUMNS[:-2]].to_csv(out / "metadata.csv", index=False, lineterminator="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name in ("--objects", "--masks", "--classes"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--scenes", type=Path, nargs=2, required=True, help="of label 0, then of label 1")
    parser.add_argument("--correlation", type=float, default=0.95, help="of label and scene in the training split")
    parser.add_argument("--side", type=int, default=160, help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    plans = plan(given.objects, given.masks, given.scenes, given.classes, given.correlation, given.seed)
    compose(given.out, plans, given.side, given.seed)
    print(plans.groupby(["split", "y", "place"]).size().to_string())


if __name__ == "__main__":
    main()
