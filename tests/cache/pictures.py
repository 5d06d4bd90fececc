"""Small pictures, and what a finished file in the cache must look like."""

from pathlib import Path

import torch
from PIL import Image

from src.datasets.cache import cached
from src.datasets.view import View, decode

VIEW = View(12, 10, resize=14)


def picture(path: Path, seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (23, 17)) -> Path:
    path.parent.mkdir(exist_ok=True)
    noise = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).convert(mode).save(path)
    return path


def one_by_one(paths: list[Path], view: View = VIEW) -> torch.Tensor:
    return torch.stack([decode(path, view) for path in paths])


def check(paths: list[Path], file: Path, view: View = VIEW) -> None:
    """The pixels are right, and nothing is left that does not belong there."""
    assert torch.equal(cached(paths, view, file, workers=1), one_by_one(paths, view))
    assert sorted(path.name for path in file.parent.iterdir()) == [
        f".{file.name}.lock", file.name, f"{file.name}.json"]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def journalled(file: Path) -> list[str]:
    journal = file.with_name(f".{file.name}.journal")
    return journal.read_text().splitlines() if journal.exists() else []


def interrupt(*_arguments: object) -> None:
    raise KeyboardInterrupt
