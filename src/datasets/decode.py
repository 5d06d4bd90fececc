"""How a picture becomes stored pixels, and how a folder of them is decoded but once."""

import json
import math
import mmap
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize
from tqdm import tqdm

from ..files import flush_to_disk, locked, put_in_place, write_whole

LONGEST = 100  # times the shorter side
CHUNK = 32  # images: what a thread decodes at a time
FORMAT = "masktune pixels, 3"  # of a file of decoded pixels; count it up when `decode` comes to give other pixels
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # Python names it since 3.13


@dataclass(frozen=True)
class View:
    """The shorter side scaled to `resize` pixels (what just fills the frame, if not given), then the middle cut out."""

    height: int
    width: int
    resize: int | None = None


def fit(image: Image.Image | Tensor, view: View) -> Tensor:
    """Return a picture as seen by a view: (3, height, width) uint8. Grey, CMYK and palettes become RGB.

    A camera's note of how it was held (EXIF) is followed; what is transparent shows white, as viewers show it.

    image: a PIL image, or (1 or 3, H, W) uint8 or float in [0, 1]. One that `resize` leaves too small for the frame is
    padded with black.

    Raises:
        TypeError, ValueError: it is no such image; the message says what it is.
    """
    if isinstance(image, Tensor):
        if image.dim() != 3 or image.shape[0] not in (1, 3):
            raise ValueError(f"expected an image (3, H, W), got {tuple(image.shape)}")
        if image.is_floating_point():
            low, high = image.min().item(), image.max().item()
            if not (low >= 0 and high <= 1):
                raise ValueError(f"expected an image in [0, 1], got values in [{low:.3g}, {high:.3g}]; leave "
                                 "normalisation to the model, or pass mean= and std= to have it undone")
            image = (image * 255).round().to(torch.uint8)
        if image.dtype != torch.uint8:
            raise TypeError(f"expected an image of torch.uint8, or of floats in [0, 1], got {image.dtype}")
        image = image.expand(3, -1, -1)
    elif isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):  # Pillow would clip instead of scaling
            raise ValueError(f"expected 8 bits a channel, got pixels of mode {image.mode}")
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:  # which hides colours that were never meant to be seen
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = pil_to_tensor(image.convert("RGB"))
    else:
        raise TypeError(f"expected a PIL image or a tensor (3, H, W), got a {type(image).__name__}")
    height, width = image.shape[1:]
    if max(height, width) > LONGEST * min(height, width):  # scaled, it could fill the memory
        raise ValueError(f"expected no side over {LONGEST} times the other, got {height} x {width} pixels")
    shorter = view.resize or math.ceil(min(height, width) * max(view.height / height, view.width / width))
    return center_crop(resize(image, shorter, antialias=True), [view.height, view.width])


def decode(path: Path, view: View) -> Tensor:
    """Read a file as seen by a view; ValueError names one that is no readable image, or too large for one."""
    try:
        with Image.open(path) as image:
            return fit(image, view)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path} is not a readable image ({error}); replace or remove it") from error


def cached(paths: Sequence[Path], view: View, file: Path, workers: int | None = None) -> Tensor:
    """Return image files as seen by a view, (N, 3, height, width) uint8, mapped from `file`; build that where need be.

    What is written to the tensor stays in memory. `NAME.json` beside the file says what it was made from: the view, and
    the images' names, sizes and times. If they are others, it is built anew: in `.NAME.partial`, which takes its name
    when it is whole, so a kill costs what is decoded so far and never gives a wrong image. Of two processes at one
    file, the second waits.

    Args:
        workers: threads that decode; one a core if not given.

    Raises:
        FileExistsError: something else is in the file's place; it is left as it is.
        ValueError: there are no paths, or an image is not readable; it is named.
        FileNotFoundError: an image is missing.
        OSError: the disk has no room for the file, or it cannot be written.
    """
    if not paths:
        raise ValueError("expected at least one image file, got none")
    names = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath(map(os.path.dirname, names))
    images = [[os.path.relpath(name, root), (stat := os.stat(name)).st_size, stat.st_mtime_ns] for name in names]

    def chunk(start: int) -> Tensor:
        return torch.stack([decode(path, view) for path in paths[start:start + CHUNK]])

    return mapped(file, (len(paths), 3, view.height, view.width), {"view": asdict(view), "images": images}, chunk,
                  workers=workers or os.cpu_count())[0]


def mapped(file: Path, shape: tuple[int, int, int, int], made_from: dict, chunk: Callable[[int], Tensor],
           beside: Callable[[], object] = lambda: None, workers: int = 1) -> tuple[Tensor, object]:
    """Return pixels (N, 3, height, width) uint8, mapped from a file that `chunk` fills if need be, and what is beside.

    chunk: the next `CHUNK` images, or what is left of them, from an index on. beside: what else the index file keeps,
    as JSON, asked for once all chunks are made. Otherwise as of `cached`.
    """
    made_from = {"format": FORMAT, **made_from}
    if _reason_to_build(file, made_from, math.prod(shape)):
        with locked(file):
            if reason := _reason_to_build(file, made_from, math.prod(shape)):  # another process may have built it
                if file.exists():
                    print(f"{file} {reason}; it is built anew")
                _build(file, shape, made_from, chunk, beside, workers)
    with file.open("rb") as content:  # copy-on-write; torch.from_file has the system promise memory, and may be refused
        pages = mmap.mmap(content.fileno(), math.prod(shape), mmap.MAP_PRIVATE | NORESERVE,
                          mmap.PROT_READ | mmap.PROT_WRITE)
    return torch.frombuffer(pages, dtype=torch.uint8).view(shape), _index(file).get("beside")


def _reason_to_build(file: Path, made_from: dict, size: int) -> str | None:
    """Why a file cannot serve as it is; None if it can. FileExistsError: it is not ours to replace."""
    try:
        found = _index(file)
        ours = str(found["format"]).startswith(FORMAT.split(",")[0])
    except FileNotFoundError:
        found, ours = None, not file.exists()
    except (OSError, KeyError, TypeError, ValueError):
        ours = False
    if not ours or file.is_dir():
        raise FileExistsError(f"expected {file} to be free or a file of decoded pixels with its {file.name}.json, got "
                              "something else, which is left as it is; move it away or use another name")
    if found is None or not file.exists():
        return "is missing"
    if {key: value for key, value in found.items() if key != "beside"} != made_from:
        return "was made from other images or for another view"
    return None if file.stat().st_size == size else "is damaged: it has another size"


def _index(file: Path) -> dict:
    return json.loads(file.with_name(f"{file.name}.json").read_bytes())


def _build(file: Path, shape: tuple[int, int, int, int], made_from: dict, chunk: Callable[[int], Tensor],
           beside: Callable[[], object], workers: int) -> None:
    """Fill a partial file, in threads if there are to be several, and put it in place once it is whole."""
    partial, image = file.with_name(f".{file.name}.partial"), math.prod(shape[1:])  # bytes
    partial.unlink(missing_ok=True)
    size = math.prod(shape)
    free = shutil.disk_usage(file.parent).free + (file.stat().st_blocks * 512 if file.exists() else 0)
    if size > free:
        raise OSError(f"{file} needs {size / 1e6:,.1f} MB on its disk, where {free / 1e6:,.1f} MB are free; free some "
                      "space or use another folder, and run again")
    file.unlink(missing_ok=True)  # not written to: whoever has mapped it keeps what they see
    partial.touch()

    def store(start: int) -> int:
        pixels = chunk(start)
        with partial.open("r+b") as content:
            content.seek(start * image)
            content.write(pixels.numpy())
        return len(pixels)

    ours = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))  # that thread's own
    starts = range(0, shape[0], CHUNK)
    try:
        with (warnings.catch_warnings(),  # around all threads, since they share filters
              tqdm(total=shape[0], unit="image", leave=False, position=0, desc="decode") as bar):
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            for count in (pool.map if workers > 1 else map)(store, starts):  # a data set may want this very thread
                bar.update(count)
        with partial.open("r+b") as content:
            flush_to_disk(content.fileno())
        kept = beside()
        index = made_from if kept is None else made_from | {"beside": kept}
        write_whole(file.with_name(f"{file.name}.json"), json.dumps(index).encode())
        put_in_place(partial, file)
    finally:
        pool.shutdown(cancel_futures=True)
        partial.unlink(missing_ok=True)
        torch.set_num_threads(ours)  # for threads yet to come, which start with what was set last
