"""Peak memory of a piece of a program, and a process of its own for it."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import torch


class Memory:
    """In a `with` block: the peak MB of host memory over what was in use before, and the device's peak, or None.

    Child processes count, pages that they share count once (Linux).
    """

    def __enter__(self) -> "Memory":
        self.before, self.peak, self.done = resident(), 0.0, threading.Event()
        self.watcher = threading.Thread(target=self._watch)
        self.watcher.start()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.05):
            self.peak = max(self.peak, resident())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.watcher.join()
        self.host = max(self.peak, resident()) - self.before
        self.device = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else None


def resident() -> float:
    """MB of this process and its children."""
    main = Path(f"/proc/self/task/{threading.main_thread().native_id}/children")
    total = 0
    for process in (Path("/proc/self"), *(Path("/proc") / pid for pid in main.read_text().split())):
        try:
            lines = (process / "smaps_rollup").read_text().split("\n")
        except OSError:  # it has just ended
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total * 1024 / 1e6


def in_own_process(module: str, *arguments: str) -> dict:
    """Run a module in a new process, where nothing was allocated before; return its last line, which is JSON."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.rstrip().split("\n")[-1])
