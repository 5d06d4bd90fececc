"""Files that are whole or not there, and one process at a time."""

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


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
    """Be the only process at a file, waiting if need be; clear away what a killed `write_whole` left behind."""
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
