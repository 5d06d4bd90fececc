"""Independent trainings side by side, in processes that share the cores."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager

import torch
from tqdm import tqdm

from .. import parallel
from ..device import cores, cpu_threads, prepare

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def side_by_side(work: Callable, tasks: Iterable, desc: str, processes: int | None = None, threads: int = 1
                 ) -> Iterator:
    """Yield `work(task)` for each task as it is done.

    With one thread each, the number of cores decides how long it takes, and nothing else. Of several GPUs, each process
    has one of its own. A single task, and all on a single GPU, run in this process, one after another. Interrupted, it
    ends the other processes; what they have saved stays.

    Args:
        work: a function that can be imported, of one argument.
        processes: at a time; one for each core, or each GPU, if not given.
        threads: of each process.

    Raises:
        RuntimeError: under torchrun, whose processes would wait for each other.
    """
    if parallel.world() > 1:
        raise RuntimeError(f"{desc}: many small runs are measured side by side; start them without torchrun")
    tasks, gpus = list(tasks), torch.cuda.device_count()
    processes = min(processes or gpus or cores(), len(tasks), gpus or len(tasks))
    if processes <= 1:
        for task in tqdm(tasks, desc=desc, position=0, disable=len(tasks) <= 1):
            with cpu_threads(threads):
                result = work(task)
            yield result
        return
    others = set(multiprocessing.active_children())
    print(f"{desc}: {len(tasks)} tasks in {processes} processes, CPU threads each: {threads}", flush=True)
    context = multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(processes):
        numbers.put(number)
    with _no_bars(), ProcessPoolExecutor(processes, context, _begin, (threads, numbers)) as pool:
        try:
            done = as_completed([pool.submit(work, task) for task in tasks])
            for future in tqdm(done, desc=desc, total=len(tasks), position=0):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            ours = set(multiprocessing.active_children()) - others
            for process in ours:
                process.terminate()
            for process in ours:
                process.join()
            raise


@contextmanager
def _no_bars() -> Iterator[None]:
    """Let processes that are started inside the block show no progress bars, by tqdm's own variable."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TQDM_DISABLE") if before is None else os.environ.update(TQDM_DISABLE=before)


def _begin(threads: int, numbers: multiprocessing.SimpleQueue) -> None:
    """Set up a worker, which does not live on after its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them; the parent decides
    torch.set_num_threads(threads)
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC") or name in TORCHRUN]:
        del os.environ[name]  # a worker is alone, whoever started its parent
    if gpus := torch.cuda.device_count():
        torch.cuda.set_device(numbers.get() % gpus)
    prepare()
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
