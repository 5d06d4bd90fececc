"""Make a set in Waterbirds' layout from cut-outs and scenes of your own: `python -m src.datasets.compose OUT ...`.

    python -m src.datasets.compose data/waterbirds_rebuilt --objects CUB/images --masks CUB/segmentations \\
        --scenes forest=places/forest sea=places/sea --classes classes.csv

Each object is cut out by its mask and set on a scene. In the training split, the scene goes with the label in most
images, in the others in half of them (as Sagawa et al. 2020 made Waterbirds from CUB and Places). The columns of
`classes.csv` are folder, label (0 or 1) and split (train, val or test). Scenes of the splits are disjoint.
"""

import argparse
import math
import re
from itertools import pairwise
from pathlib import Path

import pandas
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from ..seeding import generator
from .decode import View, fit
from .images import files_below
from .photographs import BITS, SPLITS, WRITTEN, Waterbirds, read_table, read_values

SHARES = {"train": 0.6, "val": 0.7, "test": 1.0}  # of the scenes: up to where each split has them
COLUMNS = ["img_id", "img_filename", "y", "split", "place", "place_filename", "image", "mask"]
SCALE = (0.55, 0.85)  # the object's longer side as a share of the frame's


def plan(objects: Path, masks: Path, scenes: dict[str, Path], classes: Path, correlation: float, seed: int
         ) -> pandas.DataFrame:
    """Decide what is set on what, with no image opened: Waterbirds' metadata, and the files `image` and `mask`.

    Raises:
        FileNotFoundError, ValueError: something is missing; the list of classes or the correlation is not valid.
    """
    if len(scenes) != 2 or not 0.5 <= correlation <= 1:
        raise ValueError(f"expected two kinds of scenes and correlation in [0.5, 1], got {scenes} and {correlation}")
    table = read_table(classes, ("folder", "label", "split"))
    rows = zip(table["folder"], read_values(table, "label", BITS, classes),
               read_values(table, "split", WRITTEN, classes), strict=True)
    found = [(f"{folder}/{image.stem}", image, *rest) for folder, *rest in rows for image in _images(objects / folder)]
    if len({name for name, *_ in found}) < len(found):
        raise ValueError(f"expected one image of each name in {objects}, got several")
    supplies = {(place, split): part for place, folder in enumerate(scenes.values())
                for split, part in _scenes(folder, seed).items()}
    draw, rows = generator(seed, "compose"), []
    for name, image, label, split in sorted(found):
        mask = masks / f"{name}.png"
        if not mask.is_file():
            raise FileNotFoundError(f"{mask} is missing, the mask of {image}")
        usual = torch.rand((), generator=draw).item() < (correlation if split == "train" else 0.5)
        place = label if usual else 1 - label
        if not supplies[place, split]:
            raise ValueError(f"expected more scenes in {list(scenes.values())[place]}, got too few for {split}")
        scene = supplies[place, split].pop(0)
        rows.append((len(rows), f"{name}.jpg", label, SPLITS.index(split), place, scene, image, mask))
    return pandas.DataFrame(rows, columns=COLUMNS, dtype=object)


def _images(folder: Path) -> list[Path]:
    if found := [path for path in files_below(folder) if path.suffix.lower() in IMG_EXTENSIONS]:
        return found
    raise FileNotFoundError(f"expected image files in {folder}, got none")


def _scenes(folder: Path, seed: int) -> dict[str, list[Path]]:
    """The scenes of one kind for each split, in random order, none in two of them."""
    paths = _images(folder)
    order = torch.randperm(len(paths), generator=generator(seed, "compose scenes", folder.name)).tolist()
    ends = [0, *(math.ceil(share * len(paths) - 0.5) for share in SHARES.values())]
    return {split: [paths[i] for i in order[slice(*part)]] for split, part in zip(SPLITS, pairwise(ends), strict=True)}


def picture(one: pandas.Series, side: int, seed: int) -> tuple[Image.Image, Image.Image]:
    """The object of a row on its scene, side x side pixels in RGB, and the pixels of the object, 1 bit."""
    cut, shape = (Image.open(path).convert(mode) for path, mode in ((one.image, "RGB"), (one.mask, "L")))
    shape = shape.point(lambda value: 255 * (value > 127))
    if cut.size != shape.size or not shape.getbbox():
        raise ValueError(f"expected {one.mask} to mark some pixels of {one.image}, which is {cut.size}, got "
                         f"{shape.size if cut.size != shape.size else 'none'}")
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
    """Write all images, their masks, and last the metadata; FileExistsError if the folder holds anything before."""
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"expected {out} to be free or empty; what is there is left as it is, remove it first")
    for one in tqdm(plans.itertuples(), total=len(plans), unit="image", desc="compose"):
        files = out / one.img_filename, (out / "masks" / one.img_filename).with_suffix(".png")
        for made, file in zip(picture(one, side, seed), files, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            made.save(file, quality=95)  # of JPEG
    plans[COLUMNS[:-2]].to_csv(out / "metadata.csv", index=False, lineterminator="\n", errors="surrogateescape")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--objects", type=Path, required=True, help="images, in a folder for each kind of object")
    parser.add_argument("--masks", type=Path, required=True, help="FOLDER/NAME.png for each image, white = object")
    parser.add_argument("--scenes", nargs=2, required=True, metavar="NAME=DIR", help="of label 0, then of label 1")
    parser.add_argument("--classes", type=Path, required=True, help="CSV: folder, label, split")
    parser.add_argument("--correlation", type=float, default=0.95, help="of label and scene in the training split")
    parser.add_argument("--side", type=int, default=160, help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if not all(re.fullmatch("[^=]+=.+", scene) for scene in given.scenes):
        parser.error(f"expected --scenes NAME=DIR NAME=DIR, got {' '.join(given.scenes)}")
    scenes = {name: Path(folder) for name, folder in (scene.split("=", 1) for scene in given.scenes)}
    try:
        compose(given.out, plan(given.objects, given.masks, scenes, given.classes, given.correlation, given.seed),
                given.side, given.seed)
    except (OSError, SyntaxError, ValueError) as error:
        parser.error(str(error))
    for split in SPLITS:
        counts = Waterbirds(given.out, split, published=False).counts()
        print(f"{split}: {counts}, of label 0 on {' and '.join(map(ascii, scenes))}, then of label 1")


if __name__ == "__main__":
    main()
