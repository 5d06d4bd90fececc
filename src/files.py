"""Files that are whole or not there, and one process at a time."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


def write_whole(path: Path, content: bytes) -> None:
    """Write a whole file or none: a temporary file in the same folder, flushed to disk, then put in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's own mode would keep others from reading it
        put_in_place(Path(temporary), path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def put_in_place(written: Path, path: Path) -> None:
    """Give a file that is on disk its final name, in the same folder, and see that this is on disk, too."""
    os.replace(written, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


@contextmanager
def locked(path: Path, name: str | None = None) -> Iterator[None]:
    """Be the only process at a file, if need be by waiting; clear away what a killed `write_whole` left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))  # an empty file that stays; a killed process holds no lock
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"{name or path}: another process is at work on it; waiting")
        lock.acquire()
    try:
        for leftover in path.parent.glob(f".{path.name}.*.tmp"):
            leftover.unlink()
        yield
    finally:
        lock.release()
