"""Ctrl-C and SIGTERM: held back while something must not be cut in half, and turned into exceptions elsewhere."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

HELD = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the body has run: a training step, or a write, is whole or not begun.

    If the body fails, it is the failure that is raised: nobody may take a half-done step for a whole one, and save it.
    Python handles signals in the main thread only; in another one the body just runs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    noted: list[int] = []
    before = {number: signal.signal(number, lambda number, _frame: noted.append(number))
              for number in HELD if signal.getsignal(number) is not None}  # None: not Python's to replace
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if noted:
        signal.raise_signal(noted[0])


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """Turn SIGTERM, by which clusters pre-empt and kernels are shut down, into SystemExit, so that it can be met."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is None:
        yield
        return

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
