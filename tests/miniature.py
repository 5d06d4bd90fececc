"""Small image folders with a planted shortcut, and the benchmarks' exact layouts with one in the background."""

import csv
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from src.seeding import generator

SHAPES = ("cross", "disc")  # the two classes
GROUNDS = ((60, 110, 60), (60, 90, 160))  # land and water
COUNTS = {"train": (190, 10, 10, 190), "val": (20, 20, 20, 20), "test": (60, 60, 60, 60)}  # of the groups; 95 %


def make_folder(root: Path | str, n: int, stamped: dict[str, float], seed: int = 0, side: int = 64) -> None:
    """Write n images to each of `root/cross` and `root/disc`: a shape on noise, and on some a stamp in the corner.

    stamped: the share of each class's images that carries the stamp, a yellow bar in the bottom-right corner.
    """
    draw = generator(seed, "miniature", str(sorted(stamped.items())))
    for shape in SHAPES:
        folder = Path(root) / shape
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(n):
            noise = torch.randint(40, 150, (side // 4, side // 4, 3), generator=draw, dtype=torch.uint8)
            image = Image.fromarray(noise.numpy()).resize((side, side), Image.Resampling.BILINEAR)
            draw_shape(image, shape, draw)
            pen = ImageDraw.Draw(image)
            if i < round(stamped[shape] * n):
                pen.rectangle((side - 12, side - 8, side - 3, side - 4), fill=(255, 230, 0))
            image.save(folder / f"{i:05d}.jpg", quality=95)


def draw_shape(image: Image.Image, shape: str, draw: torch.Generator, colours: tuple[int, int] = (150, 256)) -> None:
    """A cross or a disc of random size, place and colour, bright if not said otherwise."""
    side, pen = min(image.size), ImageDraw.Draw(image)
    size = int(torch.randint(side // 6, side // 4, (1,), generator=draw))
    x, y = (int(torch.randint(size + 1, side - size - 12, (1,), generator=draw)) for _ in range(2))
    colour = tuple(torch.randint(*colours, (3,), generator=draw).tolist())
    if shape == "disc":
        pen.ellipse((x - size, y - size, x + size, y + size), fill=colour)
    else:
        pen.line((x - size, y - size, x + size, y + size), fill=colour, width=side // 10)
        pen.line((x - size, y + size, x + size, y - size), fill=colour, width=side // 10)


def scene(label: int, ground: int, draw: torch.Generator, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A shape, which is the label, on a ground of noise around one colour, which is the shortcut."""
    noise = torch.randint(-40, 41, (size[1] // 4, size[0] // 4, 3), generator=draw) + torch.tensor(GROUNDS[ground])
    image = Image.fromarray(noise.to(torch.uint8).numpy()).resize(size, Image.Resampling.BILINEAR)
    draw_shape(image, SHAPES[label], draw, colours=(60, 140))  # hard to tell from the ground: the shortcut is easier
    return image


def scenes(counts: dict[str, tuple[int, ...]], size: tuple[int, int] = (64, 64)
           ) -> Iterator[tuple[str, int, int, Image.Image]]:
    """(split, label, ground, image) of each image; counts: {split: images in groups 00, 01, 10, 11}."""
    for split, groups in counts.items():
        draw = generator(0, "scenes", split)
        for group, count in enumerate(groups):
            for _ in range(count):
                yield split, group // 2, group % 2, scene(group // 2, group % 2, draw, size)


def make_waterbirds(root: Path, counts: dict[str, tuple[int, ...]] | None = None) -> None:
    """`waterbird_complete95_forest2water2/` under root."""
    folder = root / "waterbird_complete95_forest2water2"
    rows = [("img_id", "img_filename", "y", "split", "place", "place_filename")]
    for i, (split, label, ground, image) in enumerate(scenes(counts or COUNTS, (72, 64))):
        name = f"{label + 1:03d}.{SHAPES[label]}/{i:05d}.jpg"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name, quality=95)
        rows.append((i + 1, name, label, ("train", "val", "test").index(split), ground, f"/g/{ground}/{i:08d}.jpg"))
    write_csv(folder / "metadata.csv", rows)


def make_celeba(root: Path, counts: dict[str, tuple[int, ...]], kaggle: bool = False) -> None:
    """`celeba/` under root, official or as on Kaggle; blond is the label, male the attribute."""
    folder = root / "celeba"
    faces = folder / "img_align_celeba" / ("img_align_celeba" if kaggle else "")
    faces.mkdir(parents=True)
    rows = []
    for i, (split, label, ground, image) in enumerate(scenes(counts, (178, 218)), 1):
        image.save(faces / f"{i:06d}.jpg")
        rows.append((f"{i:06d}.jpg", 2 * label - 1, 2 * ground - 1, ("train", "val", "test").index(split)))
    if kaggle:
        write_csv(folder / "list_attr_celeba.csv",
                  [("image_id", "Bald", "Blond_Hair", "Male"), *((name, -1, y, a) for name, y, a, _ in rows)])
        write_csv(folder / "list_eval_partition.csv", [("image_id", "partition"), *((row[0], row[3]) for row in rows)])
    else:
        lines = [str(len(rows)), "Bald Blond_Hair Male ", *(f"{name} -1 {y:2d} {a:2d}" for name, y, a, _ in rows)]
        (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
        (folder / "list_eval_partition.txt").write_text("".join(f"{row[0]} {row[3]}\n" for row in rows))


def make_imagenet9(root: Path, each: int = 2, variants: tuple[str, ...] = ("original", "mixed_same", "mixed_rand")
                   ) -> None:
    """`in9l/` and `bg_challenge/` under root: nine classes told apart by colour, `each` images in each folder."""
    draw = generator(0, "imagenet9")
    folders = ["in9l/train", "in9l/val", *(f"bg_challenge/{variant}/val" for variant in variants)]
    for folder in folders:
        for label in range(9):
            place = root / folder / f"{label:02d}_class{label}"
            place.mkdir(parents=True)
            for i in range(each):
                colour = torch.tensor([28 * label, 255 - 28 * label, 60]) + torch.randint(-9, 10, (3,), generator=draw)
                Image.new("RGB", (70, 64), tuple(colour.clamp(0, 255).tolist())).save(place / f"{i}.JPEG")


def write_csv(path: Path, rows: list) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def held_out(n: int) -> list[int]:
    """Which of n small pictures are kept aside: a fifth, drawn with the paper's seed."""
    return sorted(torch.randperm(n, generator=torch.Generator().manual_seed(50))[:n // 5].tolist())


def expected(n: int, split: str) -> list[int]:
    """Which of n pictures to train on are those of "train" or "val"."""
    aside = held_out(n)
    return aside if split == "val" else [i for i in range(n) if i not in aside]
