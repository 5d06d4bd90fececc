"""How a picture becomes stored pixels, and how a folder of them is decoded but once."""

import json
import math
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from pathlib import Path

import torch
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize
from tqdm import tqdm

from ..files import locked, put_in_place, write_whole

CHUNK = 256  # images that threads decode before the next are handed out: more would wait in memory
LONGEST = 16  # times the frame, of a long picture that is scaled; more of its ends is cut off before
TURNS = dict(enumerate((Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
                        Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
                        Image.Transpose.ROTATE_90), start=2))  # by EXIF's number of how a camera was held
SCALED = "of 16 bits: value / 65535"
FORMAT = "masktune pixels, 4"  # of a file of decoded pixels; count it up when `decode` comes to give other pixels
OURS = json.dumps({"format": FORMAT.split(",")[0]})[:-2].encode()  # how the index of such a file begins
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # Python names it since 3.13


@dataclass(frozen=True)
class View:
    """The shorter side scaled to `resize` pixels (what just fills the frame, if not given), then the middle cut out."""

    height: int
    width: int
    resize: int | None = None

    @classmethod
    def of(cls, side: int | tuple[int, int]) -> "View":
        height, width = side if isinstance(side, (tuple, list)) else (side, side)
        if not all(length >= 1 and length % 1 == 0 for length in (height, width)):
            raise ValueError(f"expected a side in whole pixels, or (height, width), got {side!r}")
        return cls(int(height), int(width))


def fit(image: Image.Image | Tensor, view: View | None) -> Tensor:
    """Return a picture as seen by a view: (3, height, width) uint8, in RGB; one too small for it is padded with black.

    Without a view, it keeps its size. A camera's note of how it was held is followed; what is transparent shows white.
    image: a PIL image, or (1 or 3, H, W) uint8 or float in [0, 1]; others are a TypeError or ValueError.
    """
    if isinstance(image, Tensor):
        if image.dim() != 3 or image.shape[0] not in (1, 3):
            raise ValueError(f"expected an image (3, H, W), got {tuple(image.shape)}")
        if image.is_floating_point():
            low, high = image.min().item(), image.max().item()
            if not (low >= -0.01 and high <= 1.01):  # as far as rounding and interpolation may go
                raise ValueError(f"expected an image in [0, 1], got [{low:.3g}, {high:.3g}]; divide 0..255 by 255; the "
                                 "right mean= and std= undo a normalisation")
            image = (image.clamp(0, 1) * 255).round().to(torch.uint8)
        if image.dtype != torch.uint8:
            raise TypeError(f"expected an image of torch.uint8, or of floats in [0, 1] ({SCALED}), got {image.dtype}")
        image = image.expand(3, -1, -1)
    else:
        if image.mode.startswith(("I", "F")):  # Pillow would clip instead of scaling
            raise ValueError(f"expected 8 bits a channel, or floats ({SCALED}), got pixels of mode {image.mode}")
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
        image = image if turn is None else image.transpose(turn)
        if image.has_transparency_data:  # which hides colours that were never meant to be seen
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = pil_to_tensor(image.convert("RGB"))
    if view is None:
        return image
    height, width = image.shape[1:]
    shorter = view.resize or max(-(-min(height, width) * own // whole)  # rounded up, without an error of floats
                                 for own, whole in ((view.height, height), (view.width, width)))
    scale = shorter / min(height, width)
    if max(height / view.height, width / view.width) * scale > LONGEST:  # scaled whole, it would fill the memory
        image = center_crop(image, [min(height, math.ceil(LONGEST * view.height / scale)),
                                    min(width, math.ceil(LONGEST * view.width / scale))])
    return center_crop(resize(image, shorter, antialias=True), [view.height, view.width])


def decode(path: Path, view: View) -> Tensor:
    """Read a file as seen by a view; ValueError names one that is no readable image."""
    try:
        with Image.open(path) as image:
            return fit(image, view)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} has more pixels than Pillow opens ({error}); scale it down, or raise Pillow's limit, "
                         "PIL.Image.MAX_IMAGE_PIXELS") from error
    except Exception as error:  # decoders fail in any way
        raise ValueError(f"{path} is not a readable image ({type(error).__name__}: {error}); replace or remove it"
                         ) from error


def decoded(paths: Sequence[Path], view: View) -> Iterator[Tensor]:
    """Image files as seen by a view, one after another, decoded in threads; see `decode`."""
    ours = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:  # each's own
            chunks = (pool.map(decode, paths[i:i + CHUNK], repeat(view)) for i in range(0, len(paths), CHUNK))
            yield from tqdm(chain.from_iterable(chunks), "decode", len(paths), leave=False, unit="image", position=0)
    finally:
        torch.set_num_threads(ours)  # for threads yet to come, which start with what was set last


def cached(paths: Sequence[Path], view: View, file: Path) -> Tensor:
    """Return image files as seen by a view, (N, 3, height, width) uint8, mapped from `file`; build that where need be.

    What is written to the tensor stays in memory. `NAME.json` beside the file says what it was made from: the view, and
    the images' names, sizes and times. If they are others, it is built anew: in `.NAME.partial`, which takes its name
    when it is whole, so a kill costs what is decoded so far and never gives a wrong image. Of two processes at one
    file, the second waits. FileExistsError: something else is in its place; it is left as it is.
    """
    names = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath(map(os.path.dirname, names))
    images = [[os.path.relpath(name, root), (stat := os.stat(name)).st_size, stat.st_mtime_ns] for name in names]
    made_from = json.dumps({"format": FORMAT, "view": asdict(view), "images": images}).encode()
    size = len(paths) * 3 * view.height * view.width  # bytes
    if not _is_whole(file, made_from, size):
        try:
            with locked(file.with_name(f"{file.name}.json"), repr(str(file))):  # which clears what a kill left
                if not _is_whole(file, made_from, size):  # another process may have built it
                    _build(file, paths, view, made_from)
        except OSError as error:
            raise type(error)(f"{error}; decoded pictures need a folder that can be written to: pass another one as "
                              "cache=, or as root, with links to the data") from error
    how = ({"flags": mmap.MAP_PRIVATE | NORESERVE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}  # may exceed the memory
           if hasattr(mmap, "MAP_PRIVATE") else {"access": mmap.ACCESS_COPY})  # Windows
    with file.open("rb") as content:
        pages = mmap.mmap(content.fileno(), size, **how)
    return torch.frombuffer(pages, dtype=torch.uint8).view(len(paths), 3, view.height, view.width)


def _is_whole(file: Path, made_from: bytes, size: int) -> bool:
    """Whether a file can serve as it is. FileExistsError: it is not ours to replace."""
    index = file.with_name(f"{file.name}.json")
    found = index.read_bytes() if index.is_file() else b""
    if (file.exists() or index.exists()) and not (found.startswith(OURS) and not file.is_dir()):
        raise FileExistsError(f"expected {file} to be free or a file of decoded pixels with its {index.name}, "
                              "got something else, which is left as it is; move it away or use another name")
    return found == made_from and file.exists() and file.stat().st_size == size


def _build(file: Path, paths: Sequence[Path], view: View, made_from: bytes) -> None:
    """Fill a partial file, and put it in place once it is whole."""
    partial = file.with_name(f".{file.name}.partial")
    file.unlink(missing_ok=True)  # not written to: whoever has mapped it keeps what they see
    try:
        with partial.open("wb") as content:
            for pixels in decoded(paths, view):
                content.write(pixels.numpy().tobytes())
        write_whole(file.with_name(f"{file.name}.json"), made_from)
        put_in_place(partial, file)
    finally:
        partial.unlink(missing_ok=True)
