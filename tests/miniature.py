"""The benchmarks' exact layouts, small, with a planted shortcut in the background."""

import csv
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from src.seeding import generator

SHAPES = ("cross", "disc")  # the two classes
GROUNDS = ((60, 110, 60), (60, 90, 160))  # land and water
COUNTS = {"train": (190, 10, 10, 190), "val": (20, 20, 20, 20), "test": (60, 60, 60, 60)}  # of the groups; 95 %


def scene(label: int, ground: int, draw: torch.Generator, size: tuple[int, int]) -> Image.Image:
    """A shape of random size, place and colour, which is the label, on noise around one colour, the shortcut."""
    noise = torch.randint(-40, 41, (size[1] // 4, size[0] // 4, 3), generator=draw) + torch.tensor(GROUNDS[ground])
    image = Image.fromarray(noise.to(torch.uint8).numpy()).resize(size, Image.Resampling.BILINEAR)
    side, pen = min(size), ImageDraw.Draw(image)
    r = int(torch.randint(side // 6, side // 4, (1,), generator=draw))
    x, y = (int(torch.randint(r + 1, side - r - 12, (1,), generator=draw)) for _ in range(2))
    colour = tuple(torch.randint(60, 140, (3,), generator=draw).tolist())  # so the ground is told more easily
    if SHAPES[label] == "disc":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    else:
        pen.line((x - r, y - r, x + r, y + r), fill=colour, width=side // 10)
        pen.line((x - r, y + r, x + r, y - r), fill=colour, width=side // 10)
    return image


def scenes(counts: dict[str, tuple[int, ...]], size: tuple[int, int]) -> Iterator[tuple[str, int, int, Image.Image]]:
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


def wrong(squares) -> torch.Tensor:
    """Which of the training images of a `SpuriousSquare` contradict what the square says: (N,) bool."""
    return squares.squares == (squares.labels == 1)
