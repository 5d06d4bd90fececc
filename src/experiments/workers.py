"""Independent trainings side by side, in processes that share the cores, or of which each has a GPU."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch
from tqdm import tqdm

from .. import parallel
from ..device import cores, cpu_threads, prepare


def side_by_side(work: Callable, tasks: Iterable, desc: str, processes: int | None = None, threads: int = 1
                 ) -> Iterator:
    """Yield `work(task)` for each task as it is done.

    Of several GPUs, each process has its own; several share one if so many are asked for. A single task, and all on a
    single GPU, run in this process. Interrupted, it ends the other processes. RuntimeError: a process has died; or this
    is one of torchrun's, which would wait for each other.

    work: a function of one argument that can be imported; processes: at a time, one for each GPU, or each core, if not
    given; threads: of each process.
    """
    if parallel.world() > 1:
        raise RuntimeError(f"{desc}: many small runs are done side by side; start them without torchrun")
    tasks, gpus = list(tasks), torch.cuda.device_count()
    processes = min(processes or gpus or cores(), cores(), len(tasks))
    if processes <= 1:
        for task in tqdm(tasks, desc=desc, position=0, disable=len(tasks) <= 1):
            with cpu_threads(threads):
                result = work(task)
            yield result
        return
    print(f"{desc}: {len(tasks)} tasks in {processes} processes, CPU threads each: {threads}", flush=True)
    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    started = context.Value("i")
    with ProcessPoolExecutor(processes, context, _begin, (threads, started)) as pool:
        try:
            done = as_completed([pool.submit(work, task) for task in tasks])
            for future in tqdm(done, desc=desc, total=len(tasks), position=0):
                yield future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(f"{desc}: a process died: killed for want of memory, or it could not start, as where a "
                               "script does all its work without `if __name__ == '__main__':`") from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
                process.join()
            raise


def _begin(threads: int, started: object) -> None:
    """Set up a worker, which does not live on after its parent, and is alone, whoever started that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them; the parent decides
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ["TQDM_DISABLE"] = "1"  # see `parallel.bars`
    torch.set_num_threads(threads)
    prepare()
    if torch.cuda.is_available():
        with started:
            torch.cuda.set_device(started.value % torch.cuda.device_count())
            started.value += 1
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
