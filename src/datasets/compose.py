"""Make a set in Waterbirds' layout from cut-outs and scenes of your own: `python -m src.datasets.compose OUT ...`.

    python -m src.datasets.compose data/waterbirds_rebuilt --objects CUB/images --masks CUB/segmentations \\
        --scenes forest=places/forest sea=places/sea --classes classes.csv

Each object is cut out by its mask and set on a scene. In the training split, the scene goes with the label in most
images; in the others, in half of them (as Sagawa et al. 2020 made Waterbirds from CUB and Places). `classes.csv` has
the columns folder, label (0 or 1) and, if the split is not to be drawn, split (train, val or test). Scenes and objects
of the splits are disjoint. Every image is a function of the seed and its name, so an interrupted call goes on.
"""

import argparse
import csv
import io
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from ..files import write_whole
from ..seeding import generator
from .decode import View, fit
from .images import class_files, files_below
from .photographs import SPLITS, Waterbirds, csv_rows

SHARES = {"train": 0.6, "val": 0.1, "test": 0.3}  # of the objects of each class, where no split is given
SCALE = (0.55, 0.85)  # the object's longer side as a share of the frame's
COLUMNS = ("img_id", "img_filename", "y", "split", "place", "place_filename")  # of Waterbirds' metadata


@dataclass(frozen=True)
class Plan:
    """One image to be made: an object, its mask, the scene behind it, and where it belongs."""

    name: str  # "folder/stem", below which image and mask are kept
    image: Path
    mask: Path
    scene: Path
    label: int
    place: int
    split: str


def plan(objects: Path, masks: Path, scenes: dict[str, Path], classes: Path, correlation: float, seed: int
         ) -> list[Plan]:
    """Decide what is set on what, with no image opened.

    Raises:
        FileNotFoundError: a folder, or an image or a mask of an object, is missing.
        ValueError: the list of classes or a number is not valid, or there are too few scenes.
    """
    if len(scenes) != 2:
        raise ValueError(f"expected two kinds of scenes, the first that of label 0, got {', '.join(scenes) or 'none'}")
    if not 0.5 <= correlation <= 1:
        raise ValueError(f"expected correlation in [0.5, 1], got {correlation}")
    found = _objects(objects, masks, _labels(classes), seed)
    supplies = {(place, split): part for place, folder in enumerate(scenes.values())
                for split, part in _scenes(folder, seed).items()}
    draw, plans, needed = generator(seed, "compose"), [], Counter()
    for name, image, mask, label, split in found:
        usual = torch.rand((), generator=draw).item() < (correlation if split == "train" else 0.5)
        place = label if usual else 1 - label
        needed[place, split] += 1
        scene = supplies[place, split][needed[place, split] - 1:needed[place, split]]
        plans += [Plan(name, image, mask, scene[0], label, place, split)] if scene else []
    kinds = list(scenes)
    if lacking := [f"{count - len(supplies[key])} more {kinds[key[0]]} scenes for {key[1]}"
                   for key, count in needed.items() if count > len(supplies[key])]:
        raise ValueError(f"expected a scene for each of {len(found):,} objects, got too few: {', '.join(lacking)} are "
                         "needed")
    return plans


def _labels(classes: Path) -> dict[str, tuple[int, str | None]]:
    """The label of each folder of objects, and its split if the list has one."""
    labels = {}
    for row in csv_rows(classes, ("folder", "label"), "it names the folders of objects"):
        label, split, line = row["label"], row.get("split") or None, row.pop("line")
        if not row["folder"] or label not in ("0", "1") or split not in (None, *SPLITS):
            raise ValueError(f"{line}: expected a folder, a label 0 or 1, and a split of {SPLITS} or none, got {row}")
        labels[row["folder"]] = int(label), split
    if {label for label, _ in labels.values()} != {0, 1}:
        raise ValueError(f"expected folders of both labels in {classes}, got {len(labels)} folders")
    return labels


def _objects(objects: Path, masks: Path, labels: dict, seed: int) -> list[tuple[str, Path, Path, int, str]]:
    """Name, image, mask, label and split of every object, in the order of names."""
    paths, _, folders = class_files(objects)
    if unknown := sorted(labels.keys() - set(folders)):
        raise FileNotFoundError(f"expected the folders of the list of classes in {objects}, got none called "
                                f"{', '.join(unknown[:5])}")
    found = []
    for path in paths:
        folder = path.relative_to(objects).parts[0]
        if folder in labels:
            name = f"{folder}/{path.stem}"
            mask = masks / f"{name}.png"
            if not mask.is_file():
                raise FileNotFoundError(f"expected a mask for each object, got none for {path}: {mask} is missing")
            found.append((name, path, mask, *labels[folder]))
    images = {name for name, *_ in found}
    if len(images) < len(found):
        twice, = Counter(name for name, *_ in found).most_common(1)
        raise ValueError(f"expected one image of each name, got {twice[1]} of {twice[0]}")
    for mask in sorted(masks.glob("*/*.png")):
        if mask.parent.name in labels and f"{mask.parent.name}/{mask.stem}" not in images:
            raise FileNotFoundError(f"expected an image for each mask, got none in {objects} for {mask}")
    given = []
    for label in (0, 1):
        ours = [one for one in found if one[3] == label]
        order = torch.randperm(len(ours), generator=generator(seed, "compose split", label)).tolist()
        for rank, i in enumerate(order):
            name, image, mask, _, split = ours[i]
            given.append((name, image, mask, label, split or _split(rank, len(ours))))
    return sorted(given)


def _split(rank: int, count: int) -> str:
    """The split of one of `count` things in random order."""
    share = (rank + 0.5) / count
    return "train" if share < SHARES["train"] else "val" if share < SHARES["train"] + SHARES["val"] else "test"


def _scenes(folder: Path, seed: int) -> dict[str, list[Path]]:
    """The scenes of one kind for each split, in random order, none in two of them."""
    paths = [path for path in files_below(folder) if path.suffix.lower() in IMG_EXTENSIONS]
    if not paths:
        raise FileNotFoundError(f"expected scenes as image files in {folder}, got none")
    order = torch.randperm(len(paths), generator=generator(seed, "compose scenes", folder.name)).tolist()
    parts: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for rank, i in enumerate(order):
        parts[_split(rank, len(order))].append(paths[i])
    return parts


def picture(one: Plan, side: int, seed: int) -> tuple[Image.Image, Image.Image]:
    """The object on its scene, side x side pixels in RGB, and the pixels of the object, 1 bit."""
    cut, shape = (Image.open(path).convert(mode) for path, mode in ((one.image, "RGB"), (one.mask, "L")))
    shape = shape.point(lambda value: 255 * (value > 127))
    if cut.size != shape.size or not shape.getbbox():
        raise ValueError(f"expected {one.mask} to mark some pixels of {one.image}, which is {cut.size}, got "
                         f"{shape.size if cut.size != shape.size else 'none'}")
    cut, shape = (image.crop(shape.getbbox()) for image in (cut, shape))
    share, across, down = torch.rand(3, generator=generator(seed, "compose", one.name)).tolist()
    scale = side * (SCALE[0] + share * (SCALE[1] - SCALE[0])) / max(cut.size)
    size = tuple(max(1, round(length * scale)) for length in cut.size)
    corner = round(across * (side - size[0])), round(down * (side - size[1]))
    with Image.open(one.scene) as scene:
        canvas = Image.fromarray(fit(scene, View(side, side)).permute(1, 2, 0).numpy())
    outline = Image.new("L", canvas.size)
    outline.paste(shape.resize(size, Image.Resampling.BILINEAR), corner)
    canvas.paste(cut.resize(size, Image.Resampling.BICUBIC), corner, shape.resize(size, Image.Resampling.BILINEAR))
    return canvas, outline.point(lambda value: 255 * (value > 127)).convert("1", dither=Image.Dither.NONE)


def compose(out: Path, plans: list[Plan], side: int, seed: int) -> None:
    """Write all images, their masks and the metadata; what is there already stays.

    Raises:
        FileExistsError: the folder holds something else, or a set of other images; it is left as it is.
        ValueError: a picture is not readable, or a mask does not fit its image.
    """
    note = out / "compose.json"
    made_from = {"side": side, "seed": seed, "plans": [asdict(one) for one in plans]}
    made_from = json.loads(json.dumps(made_from, default=str))  # paths as text, as they will be read back
    if out.exists() and any(out.iterdir()):
        try:
            same = json.loads(note.read_bytes()) == made_from
        except (OSError, ValueError):
            same = False
        if not same:
            raise FileExistsError(f"expected {out} to be free, empty, or begun with these very files and numbers, got "
                                  "something else, which is left as it is")
    write_whole(note, json.dumps(made_from).encode())
    for one in tqdm(plans, unit="image", desc="compose"):
        image, mask = out / f"{one.name}.jpg", out / "masks" / f"{one.name}.png"
        if image.exists() and mask.exists():
            continue
        try:
            pictures = picture(one, side, seed)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{one.image}, {one.mask} or {one.scene} is not a readable image ({error})") from error
        for path, made, options in ((mask, pictures[1], {"format": "PNG"}),
                                    (image, pictures[0], {"format": "JPEG", "quality": 95})):
            buffer = io.BytesIO()
            made.save(buffer, **options)
            write_whole(path, buffer.getvalue())
    rows = [(i, f"{one.name}.jpg", one.label, SPLITS.index(one.split), one.place, one.scene)
            for i, one in enumerate(plans)]
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([COLUMNS, *rows])
    write_whole(out / "metadata.csv", table.getvalue().encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--objects", type=Path, required=True, help="images, in a folder for each kind of object")
    parser.add_argument("--masks", type=Path, required=True, help="FOLDER/NAME.png for each image, white = object")
    parser.add_argument("--scenes", nargs=2, required=True, metavar="NAME=DIR", help="of label 0, then of label 1")
    parser.add_argument("--classes", type=Path, required=True, help="CSV: folder, label, perhaps split")
    parser.add_argument("--correlation", type=float, default=0.95, help="of label and scene in the training split")
    parser.add_argument("--side", type=int, default=160, help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    scenes = {name: Path(folder) for name, _, folder in (scene.partition("=") for scene in given.scenes)}
    try:
        plans = plan(given.objects, given.masks, scenes, given.classes, given.correlation, given.seed)
        compose(given.out, plans, given.side, given.seed)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for split in SPLITS:
        data = Waterbirds(given.out, split, published=False)
        counts = [f"{n:,} of label {i // 2} on {list(scenes)[i % 2]}" for i, n in enumerate(data.counts())]
        print(f"{split}: {', '.join(counts)}")


if __name__ == "__main__":
    main()
