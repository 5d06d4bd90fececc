"""Files that are whole or not there, and one process at a time."""

import errno
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}  # what a file system without them answers


def write_whole(path: Path, content: bytes) -> None:
    """Write a whole file or none; an error means that the file at `path` is what it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_hidden(path)}{os.getpid()}.tmp")

    def write() -> None:
        try:
            temporary.write_bytes(content)
            put_in_place(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    with ThreadPoolExecutor(1) as thread:  # for which Ctrl-C waits: it is for the main thread alone
        thread.submit(write).result()


def put_in_place(written: Path, path: Path) -> None:
    """Give a file its final name, in the same folder, once it is on disk; an error leaves the one there as it was."""
    with written.open("r+b") as file:
        os.fsync(file.fileno())
    os.replace(written, path)


@contextmanager
def locked(path: Path, name: str | None = None) -> Iterator[None]:
    """Be the only process at a file, waiting if need be; clear away what a killed `write_whole` left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f"{_hidden(path)}lock"))  # an empty file that stays; a killed process holds no lock
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"{name or path}: another process is at work on it; waiting", flush=True)
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:  # with none, one process at a time is up to the user
            raise
    try:
        for leftover in path.parent.glob(f"{_hidden(path)}*.tmp"):
            leftover.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def _hidden(path: Path) -> str:
    """How the names of a file's lock and of its temporary file begin: short, whatever its own name."""
    return f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}."
