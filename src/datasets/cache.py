"""Image files decoded once into a memory map; a kill at any moment costs the chunks in work, and never the truth."""

import json
import math
import mmap
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from src.datasets.view import View, decode
from src.files import locked, put_in_place, write_whole

CHUNK = 32  # images: what a thread decodes at a time
FORMAT = 1  # of the file; count it up when `decode` comes to give other pixels
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # Python names it since 3.13


def cached(paths: Sequence[Path], view: View, file: Path, workers: int | None = None) -> Tensor:
    """Return image files as seen by a view, (N, 3, height, width) uint8, mapped from `file`; build that where need be.

    What is written to the tensor stays in memory. `NAME.json` has a sha256 for every chunk of `file`, and one for what
    it was made from: the view and the images' names, sizes and times. Both are checked at every call; a file that is
    damaged, or made from something else, is built anew. While that goes on, the pixels are in `.NAME.partial`, and
    `.NAME.journal` says which chunks of it are whole. Of two processes at one file, the second waits.

    Args:
        workers: threads that decode and check; one a core if not given.

    Raises:
        ValueError: there are no paths, or an image is not readable. It is named; what is decoded so far is kept.
        FileNotFoundError: an image is missing.
        OSError: the disk has no room for the file, or it cannot be written.
    """
    if not paths:
        raise ValueError("no image files are given")
    cache = _Cache(paths, view, file, workers)
    if not cache.journal.exists():
        with suppress(FileNotFoundError, ValueError):
            return cache.load()  # without the lock: the folder may be read-only
    with locked(file):
        try:
            images = cache.load()  # another process may have built it until now
        except (FileNotFoundError, ValueError) as error:
            if isinstance(error, ValueError):
                print(f"{file} {error}; it is built anew")
            cache.build()
            images = cache.map()
        cache.journal.unlink(missing_ok=True)
    return images


class _Cache:
    def __init__(self, paths: Sequence[Path], view: View, file: Path, workers: int | None) -> None:
        self.paths, self.view, self.file, self.workers = paths, view, file, workers or os.cpu_count()
        self.shape = len(paths), 3, view.height, view.width
        self.size, self.image = math.prod(self.shape), math.prod(self.shape[1:])  # bytes
        self.index = file.with_name(f"{file.name}.json")
        self.partial, self.journal = (file.with_name(f".{file.name}.{ending}") for ending in ("partial", "journal"))
        names = [os.path.abspath(path) for path in paths]
        root = os.path.commonpath(map(os.path.dirname, names))
        stats = [(os.path.relpath(name, root), (stat := os.stat(path)).st_size, stat.st_mtime_ns)
                 for name, path in zip(names, paths, strict=True)]
        self.chunks: dict[str, range] = {}  # which images, under a sha256 of all that their bytes depend on
        for start in range(0, len(paths), CHUNK):
            part = range(len(paths))[start:start + CHUNK]
            made_from = FORMAT, asdict(view), start, stats[start:part.stop]
            self.chunks[sha256(json.dumps(made_from).encode()).hexdigest()] = part

    def load(self) -> Tensor:
        """Map the finished file. FileNotFoundError: there is none. ValueError: it is not what is wanted, and why."""
        size = self.file.stat().st_size
        try:
            index = dict(json.loads(self.index.read_bytes())["chunks"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"has no readable {self.index.name}") from error
        if list(index) != list(self.chunks):
            raise ValueError("was made from other images or for another view")
        if size != self.size:
            raise ValueError(f"is damaged: {size:,} bytes, where {self.size:,} belong")
        images = self.map()
        if index != self._each(lambda _, part: sha256(images[part.start:part.stop].view(-1).numpy()).hexdigest(),
                               desc="check", disable=size < 1e9):
            raise ValueError("is damaged: its content does not match its sha256")
        return images

    def map(self) -> Tensor:
        """The file, copy-on-write. torch.from_file would have the system promise memory for it, and may be refused."""
        with self.file.open("rb") as file:
            pages = mmap.mmap(file.fileno(), self.size, mmap.MAP_PRIVATE | NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE)
        return torch.frombuffer(pages, dtype=torch.uint8).view(self.shape)

    def build(self) -> None:
        """Decode what is not in the partial file yet, and put it in place."""
        there = sum(path.stat().st_blocks * 512 for path in (self.partial, self.file) if path.exists())
        missing, free = self.size - there, shutil.disk_usage(self.file.parent).free  # holes take no blocks
        if missing > free:
            raise OSError(f"{self.file} needs {missing / 1e6:,.1f} MB more on its disk, where {free / 1e6:,.1f} MB are "
                          "free; free some space or use another folder, and run again")
        self.file.unlink(missing_ok=True)  # and not written to: whoever has mapped it keeps what they see
        self.partial.touch()
        os.truncate(self.partial, self.size)
        self.journal.touch()
        whole = dict(re.findall("([0-9a-f]{64}) ([0-9a-f]{64})\n", self.journal.read_text(errors="replace")))
        with warnings.catch_warnings():  # around all threads: within each, it would be undone out of order
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            index = self._each(lambda chunk, part: self._finish(part, chunk, whole.get(chunk)),
                               desc=f"decode, {self.size / 1e6:,.0f} MB")
        content = {"shape": self.shape, "view": asdict(self.view), "chunks": index}
        write_whole(self.index, json.dumps(content, indent=1).encode())
        put_in_place(self.partial, self.file)  # before the journal goes

    def _finish(self, part: range, chunk: str, expected: str | None) -> str:
        """See that a chunk is in the partial file, if only by its sha256 in the journal; return that."""
        with self.partial.open("r+b") as file:
            file.seek(part.start * self.image)
            if expected is not None and sha256(file.read(len(part) * self.image)).hexdigest() == expected:
                return expected
            pictures = [decode(path, self.view) for path in self.paths[part.start:part.stop]]
            content = torch.stack(pictures).view(-1).numpy()
            file.seek(part.start * self.image)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the journal says so
        found = sha256(content).hexdigest()
        with self.journal.open("ab", buffering=0) as lines:  # one write: not mixed with those of other threads
            lines.write(f"{chunk} {found}\n".encode())
        return found

    def _each(self, work: Callable[[str, range], str], **bar) -> dict[str, str]:
        """What `work` returns for every chunk, in threads; when one fails, those not begun are dropped."""
        ours = torch.get_num_threads()
        pool = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,))  # that thread's own
        results = {}
        try:
            with tqdm(total=len(self.paths), unit="image", leave=False, position=0, **bar) as progress:
                for chunk, result in zip(self.chunks, pool.map(work, self.chunks, self.chunks.values()), strict=True):
                    results[chunk] = result
                    progress.update(len(self.chunks[chunk]))
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(ours)  # for threads yet to come, which start with what was set last
        return results
