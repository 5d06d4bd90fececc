"""Several processes: those of torchrun at one training, against one process; and trainings side by side."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from src.device import cpu_threads
from src.experiments import stages, workers
from src.experiments.workers import side_by_side
from src.state import digest
from tests.conftest import REPOSITORY
from tests.harness import results
from tests.processes import SETTING, double

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=REPOSITORY, text=True, capture_output=True,
                          check=False, env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"})


SCRIPT = """
import sys
import torch
from torch import nn
from src import inference, masktune, parallel, training
from src.augmentation import Augmentation
from src.datasets import Images
from src.device import prepare
from src.experiments.stages import load_data, new_model
from src.masking import find_masks, random_masks
from src.state import State
from tests.processes import SETTING

prepare()
torch.set_num_threads(1)
parallel.start()
data, model = load_data(SETTING.erm), new_model(0)
seen = find_masks(model, data.images, batch_size=100).bits, inference.infer(model, data.images, batch_size=100)

torch.manual_seed(0)
own = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                    nn.Linear(8, 2)).double()
few = Images(data.images[:309], data.labels[:309], ("low", "high"))
repaired, report = masktune(own, few, layer="2", lr=0.01, batch_size=32, tests={"again": few})

pixels = inference.pixels
inference.pixels = training.pixels = lambda *arguments: pixels(*arguments).double()
state = State(model.double(), training.sgd(model, 0.9, 1e-4))
trained = training.train_epoch(
    state, data.images[:309], data.labels[:309], masks=random_masks(309, 28, seed=0, epoch=0), lr=0.01, batch_size=32,
    seed=0, augmentation=Augmentation(side=28))
if parallel.leads():
    torch.save((seen, (state.model.state_dict(), state.optimizer.state_dict()["state"], trained),
                (repaired.state_dict(), report.hidden, report.after["again"].average)), sys.argv[1])
parallel.stop()
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What the script finds in one process, and in two."""
    folder, found = tmp_path_factory.mktemp("script"), []
    (folder / "script.py").write_text(SCRIPT)
    for launcher in ((), TORCHRUN):
        done = start(*launcher, folder / "script.py", folder / "found.pt")
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(folder / "found.pt", weights_only=True))
    return found


def test_masks_and_logits_by_shards_are_exactly_those_of_one_process(both):
    (one, *_), (two, *_) = both
    assert one[0].any()
    assert digest(one) == digest(two)


def test_two_processes_train_as_one(both):
    """In double precision: the same weights, momentum, BatchNorm statistics, loss and accuracy after an epoch."""
    (_, one, _), (_, two, _) = both
    torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-9)
    assert one[0]["backbone.1.num_batches_tracked"] == 10


def test_a_classifier_of_ones_own_is_repaired_by_two_processes_as_by_one(both):
    (*_, one), (*_, two) = both
    torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-9)
    assert one[0]["1.num_batches_tracked"] == 10
    assert one[1] > 0.001


def test_a_killed_process_ends_all_and_the_run_goes_on_to_the_same_bits(tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    killed = start(*TORCHRUN, "-m", "tests.processes", resumed, "dies")
    assert killed.returncode != 0
    assert [path.name for path in resumed.rglob("*.pt")] == ["erm-seed0.pt"]
    for folder, said in ((straight, "starts"), (resumed, "continues after 1 epochs")):
        done = start(*TORCHRUN, "-m", "tests.processes", folder)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count(f"erm-seed0: {said}") == 1  # the first process speaks for all
        saved = torch.load(folder / SETTING.name / "masktune-seed0.pt", weights_only=True)
        assert saved["model"]["backbone.1.num_batches_tracked"] == 4 * 10
    assert results(resumed) == results(straight)


# Side by side


@pytest.mark.parametrize("processes", [1, 2])
def test_all_results_come_or_the_first_error(processes, capfd):
    """Each from one thread, in other processes if there are several; none of them stays."""
    with cpu_threads(2):
        found = list(side_by_side(double, range(4), "doubles", processes))
        assert torch.get_num_threads() == 2
        with pytest.raises(ValueError, match="-1 is negative"):
            list(side_by_side(double, [-1, *range(50)], "doubles", processes))
    assert sorted(number for number, *_ in found) == [0, 2, 4, 6]
    assert {threads for *_, threads in found} == {1}
    assert (os.getpid() in {process for _, process, _ in found}) == (processes == 1)
    deadline = time.monotonic() + 60
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)  # the pool's own thread may have met the end of one, and not yet said so
    assert not multiprocessing.active_children()
    assert ("4 tasks in 2 processes, CPU threads each: 1" in capfd.readouterr().out) == (processes == 2)


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
    """The same files, and loaded in this process afterwards."""
    monkeypatch.setattr(stages, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(workers, "cores", lambda: 2)
    with cpu_threads(2):
        runs = stages.run_all((setting,), seeds=(0, 1))
    assert [one.seed for one in runs] == [0, 1]
    assert runs[0].finetuned.digest() != runs[1].finetuned.digest()
    there, here = results(trained[1]), results(tmp_path)
    assert {name: here[name] for name in there if "seed0" in name} == there
    said = capfd.readouterr().out
    assert said.count("starts") == 4
    assert "2 of 2 runs are to be trained, or go on: at most 0.0 hours" in said
    monkeypatch.setattr(stages, "train_epoch", None)  # any training would fail
    again = stages.run_all((setting,), seeds=(0, 1))
    assert not capfd.readouterr().out
    assert [one.finetuned.digest() for one in again] == [one.finetuned.digest() for one in runs]
