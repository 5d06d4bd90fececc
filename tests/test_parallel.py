"""Several processes: those of torchrun at one training, against one process; and trainings side by side."""

import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing import connection
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from src import parallel
from src.device import cpu_threads
from src.experiments import stages, workers
from src.experiments.recipes import Places
from src.state import digest
from tests.conftest import REPOSITORY
from tests.harness import SETTING, double, main, results


def start(*folders: Path) -> subprocess.CompletedProcess:
    """The harness's `main` under torchrun."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
                           "tests.harness", *folders], cwd=REPOSITORY, text=True, capture_output=True,
                          check=False, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_processes_do_as_one_and_go_on_to_the_same_bits(tmp_path, monkeypatch):
    """After one was killed, which ends both; the first speaks for all. A study is refused."""
    alone, straight, resumed = (tmp_path / name for name in ("alone", "straight", "resumed"))
    first = start(straight, resumed)
    assert first.returncode != 0
    assert first.stdout.count("masktune-seed0: starts") == 2
    assert {path.name for path in resumed.rglob("*.pt")} == {"erm-seed0.pt", "masktune-seed0.pt"}
    second = start(resumed)
    assert second.returncode == 0, second.stderr[-3000:]
    assert "deprecated" not in first.stderr + second.stderr
    assert all("start them without torchrun" in one.stdout for one in (first, second))
    assert second.stdout.count("masktune-seed0: continues after 1 epochs") == 1
    saved = torch.load(straight / SETTING.name / "masktune-seed0.pt", weights_only=True)
    assert saved["model"]["backbone.1.num_batches_tracked"] == 5 * 18
    assert results(resumed) == results(straight)
    monkeypatch.setattr(stages, "load_data", stages.load_data)  # which `main` replaces
    main(alone)
    (seen, one), (also_seen, two) = (torch.load(folder.with_suffix(".found"), weights_only=True)
                                     for folder in (alone, straight))
    assert seen[0].any()
    assert digest(seen) == digest(also_seen)
    torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-9)
    assert one[1] > 0.001  # hidden


def test_torchs_own_batchnorm_is_joined_on_gpus_and_another_refused(monkeypatch):
    """On tensors that only say that they are on a GPU."""
    class WithReLU(nn.BatchNorm2d):
        """As timm's BatchNormAct2d."""

    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel, "DistributedDataParallel", lambda model, **_: model)
    monkeypatch.setattr(parallel.dist, "broadcast", lambda *_: None)
    with FakeTensorMode():
        plain, other = (nn.Sequential(kind(3, track_running_stats=False, device="cuda"))
                        for kind in (nn.BatchNorm2d, WithReLU))
        with parallel.joined(plain) as model:
            assert type(model[0]) is nn.SyncBatchNorm
        assert type(plain[0]) is nn.BatchNorm2d
        with pytest.raises(ValueError, match="WithReLU"), parallel.joined(other):
            pass


@pytest.mark.parametrize("processes", [1, 2])
def test_all_results_come_or_the_first_error(processes, monkeypatch):
    """Each from one thread, in other processes if there are several; none of them stays, none is torchrun's."""
    monkeypatch.setattr(workers, "cores", lambda: 2)
    if processes == 2:
        monkeypatch.setenv("WORLD_SIZE", "2")
    found = []
    with cpu_threads(2), pytest.raises(ValueError, match="-1 is negative"):
        found.extend(workers.side_by_side(double, [*range(4), -1], "doubles", processes))
    assert {number for number, *_ in found} <= {0, 2, 4, 6}  # of two processes, the error may come before some
    assert len(found) == 4 or processes == 2
    assert {threads for *_, threads in found} <= {1}
    assert all((process == os.getpid()) == (processes == 1) for _, process, _ in found)
    for process in multiprocessing.active_children():  # not joined: the pool's own thread does that
        assert connection.wait([process.sentinel], timeout=60)


LINGER = """
from src.experiments.workers import side_by_side
list(side_by_side(exec, 3 * ["import os, time; os.write(1, b'here' + bytes([10])); time.sleep(600)"], "lingering", 2))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_their_parent(number):
    """It is killed; or at Ctrl-C, which reaches all processes of a terminal, it ends them."""
    parent = subprocess.Popen([sys.executable, "-c", LINGER], cwd=REPOSITORY, start_new_session=True, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert [next(parent.stdout) for _ in range(3)][1:] == ["here\n"] * 2
    (os.killpg if number == signal.SIGINT else os.kill)(parent.pid, number)
    assert parent.communicate(timeout=60) == ("", None)  # no process is left that could write
    assert parent.returncode in (-number, 1)


def test_stages_trained_side_by_side_are_those_of_one_process(setting, trained, tmp_path, monkeypatch, capfd):
    """The same files, which are loaded in this process, then and later."""
    monkeypatch.setattr(workers, "cores", lambda: 2)
    monkeypatch.setattr(stages, "train_epoch", None)  # any training in this process would fail
    with cpu_threads(2):
        runs, again = (stages.run_all((setting,), seeds=(0, 1), places=Places(tmp_path)) for _ in range(2))
    assert [one.finetuned.digest() for one in again] == [one.finetuned.digest() for one in runs]
    assert results(trained[1]).items() <= results(tmp_path).items()
    assert capfd.readouterr().out.count("starts") == 4
