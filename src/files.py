"""Files that are whole or not there, and one process at a time."""

import errno
import hashlib
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LACKING = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EPERM, errno.ENOTTY,
           errno.EACCES, errno.EBADF}  # what a file system says that has no fsync, of files or folders, or no locks


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block has run.

    Python handles signals in the main thread only; in another one the block just runs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    noted: list[int] = []
    before = {number: signal.signal(number, lambda number, _frame: noted.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)
              if signal.getsignal(number) is not None}  # None: not Python's to replace
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if noted:
        signal.raise_signal(noted[0])


def write_whole(path: Path, content: bytes) -> None:
    """Write a whole file or none: a temporary file in the same folder, flushed to disk, then put in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with signals_held():
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=_hidden(path), suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                flush_to_disk(file.fileno())
            with suppress(OSError):  # mkstemp's own mode would keep others from reading it
                os.chmod(temporary, 0o644)
            put_in_place(Path(temporary), path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def put_in_place(written: Path, path: Path) -> None:
    """Give a file that is on disk its final name, in the same folder, and see that this is on disk, too, if possible.

    An error means that the file at `path` is what it was before.
    """
    os.replace(written, path)
    with suppress(OSError):  # too late to undo, and the file is whole; some systems do not open folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def flush_to_disk(file: int) -> None:
    """fsync of an open file, where the file system has it."""
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in LACKING:  # a full or a failing disk
            raise


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
    except (NotImplementedError, OSError) as error:  # no locks here: one process at a time is up to the user
        if isinstance(error, OSError) and error.errno not in LACKING - {errno.EACCES}:
            raise
    try:
        for leftover in path.parent.glob(f"{_hidden(path)}*.tmp"):
            with suppress(OSError):
                leftover.unlink()
        yield
    finally:
        lock.release()


def _hidden(path: Path) -> str:
    """How the names of a file's lock and of its temporary files begin: as long for the longest of names."""
    return f".{hashlib.sha256(path.name.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}."
