"""Small image folders with a planted shortcut."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw

from src.seeding import generator

SHAPES = ("cross", "disc")  # the two classes


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
            pen = ImageDraw.Draw(image)
            size = int(torch.randint(side // 6, side // 4, (1,), generator=draw))
            x, y = (int(torch.randint(size + 1, side - size - 12, (1,), generator=draw)) for _ in range(2))
            colour = tuple(torch.randint(150, 256, (3,), generator=draw).tolist())
            if shape == "disc":
                pen.ellipse((x - size, y - size, x + size, y + size), fill=colour)
            else:
                pen.line((x - size, y - size, x + size, y + size), fill=colour, width=side // 10)
                pen.line((x - size, y + size, x + size, y - size), fill=colour, width=side // 10)
            if i < round(stamped[shape] * n):
                pen.rectangle((side - 12, side - 8, side - 3, side - 4), fill=(255, 230, 0))
            image.save(folder / f"{i:05d}.jpg", quality=95)
