"""Files that are whole or not there, and one process at a time.

A file system may lack some of what this takes: what cannot be had is done without, and a warning says so once.
"""

import errno
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

LACKING = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EPERM, errno.ENOTTY}


@cache
def _say_once(what: str) -> None:
    warnings.warn(f"this file system {what}", stacklevel=4)


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
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                flush_to_disk(file.fileno())
            try:
                os.chmod(temporary, 0o644)  # mkstemp's own mode would keep others from reading it
            except OSError:
                _say_once("takes no file modes; files keep those that it gives them")
            put_in_place(Path(temporary), path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def put_in_place(written: Path, path: Path) -> None:
    """Give a file that is on disk its final name, in the same folder, and see that this is on disk, too.

    An error means that the file at `path` is what it was before.
    """
    os.replace(written, path)
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError:  # too late to undo, and the file is whole
        _say_once("does not confirm that a new name is on disk; after a power cut an older file may be back")


def flush_to_disk(file: int) -> None:
    """fsync of an open file, where the file system has it."""
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in LACKING:  # a full or a failing disk
            raise
        _say_once("does not confirm that files are on disk; after a power cut the last may be damaged")


@contextmanager
def locked(path: Path, name: str | None = None) -> Iterator[None]:
    """Be the only process at a file, waiting if need be; clear away what a killed `write_whole` left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))  # an empty file that stays; a killed process holds no lock
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            print(f"{name or path}: another process is at work on it; waiting")
            lock.acquire()
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in LACKING:
            raise
        _say_once("takes no locks; see that no two processes work at one file")
    try:
        for leftover in path.parent.glob(f".{path.name}.*.tmp"):
            with suppress(OSError):
                leftover.unlink()
        yield
    finally:
        lock.release()
