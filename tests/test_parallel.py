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
from torch import nn
from torch._subclasses import FakeTensorMode

from src import parallel
from src.device import cpu_threads
from src.experiments import stages, workers
from src.experiments.recipes import Places
from src.experiments.workers import side_by_side
from src.state import digest
from tests.conftest import REPOSITORY
from tests.harness import SETTING, double, results

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=REPOSITORY, text=True, capture_output=True,
                          check=False, env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"})


SCRIPT = """
import sys
import torch
from torch import nn
from src import inference, masktune, parallel
from src.augmentation import Augmentation
from src.datasets import Images
from src.device import prepare
from src.experiments.stages import new_model
from src.experiments.workers import side_by_side
from src.masking import find_masks
from tests.harness import SETTING, Places, load_data

prepare()
torch.set_num_threads(1)
parallel.start()
data, model, refused = load_data(Places(), SETTING.erm), new_model(0), ""
seen = find_masks(model, data.images, batch_size=100).bits, inference.infer(model, data.images, batch_size=100)
own = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).double()
for weight in own.parameters():
    nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(0))
few = Images(data.images[:309], data.labels[:309], ("low", "high"))  # in batches of 32, the last of 21
repaired, report = masktune(own, few, layer="1", lr=0.1, batch_size=32, iterations=2, augment=Augmentation(side=28),
                            tests={"again": few})
try:
    list(side_by_side(abs, [1], "studies"))
except RuntimeError as error:
    refused = str(error)
if parallel.leads():
    torch.save((seen, (repaired.state_dict(), report.hidden, report.after["again"].average), refused), sys.argv[1])
parallel.stop()
"""


def test_two_processes_do_as_one(tmp_path):
    """The same masks and logits, and a repair in double precision, of a network without BatchNorm; but no studies."""
    found = []
    (tmp_path / "script.py").write_text(SCRIPT)
    for launcher in ((), TORCHRUN):
        done = start(*launcher, tmp_path / "script.py", tmp_path / "found.pt")
        assert done.returncode == 0, done.stderr[-3000:]
        assert "deprecated" not in done.stderr
        found.append(torch.load(tmp_path / "found.pt", weights_only=True))
    (seen, one, _), (also_seen, two, refused) = found
    assert seen[0].any()
    assert digest(seen) == digest(also_seen)
    torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-9)
    assert one[1] > 0.001  # hidden
    assert "without torchrun" in refused


def test_a_killed_process_ends_all_and_the_run_goes_on_to_the_same_bits(tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    killed = start(*TORCHRUN, "-m", "tests.harness", resumed, "dies")
    assert killed.returncode != 0
    assert {path.name for path in resumed.rglob("*.pt")} == {"erm-seed0.pt", "masktune-seed0.pt"}
    for folder, said in ((straight, "starts"), (resumed, "continues after 1 epochs")):
        done = start(*TORCHRUN, "-m", "tests.harness", folder)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count(f"masktune-seed0: {said}") == 1  # the first process speaks for all
        saved = torch.load(folder / SETTING.name / "masktune-seed0.pt", weights_only=True)
        assert saved["model"]["backbone.1.num_batches_tracked"] == 5 * 18
    assert results(resumed) == results(straight)


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


# Side by side


@pytest.mark.parametrize("processes", [1, 2])
def test_all_results_come_or_the_first_error(processes, monkeypatch):
    """Each from one thread, in other processes if there are several; none of them stays, none is torchrun's."""
    monkeypatch.setattr(workers, "cores", lambda: 2)
    if processes == 2:
        monkeypatch.setenv("WORLD_SIZE", "2")
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
    monkeypatch.setattr(workers, "cores", lambda: 2)
    places = Places(tmp_path)
    with cpu_threads(2):
        runs = stages.run_all((setting,), seeds=(0, 1), places=places)
    assert runs[0].finetuned.digest() != runs[1].finetuned.digest()
    there, here = results(trained[1]), results(tmp_path)
    assert {name: here[name] for name in there if "seed0" in name} == there
    assert capfd.readouterr().out.count("starts") == 4
    monkeypatch.setattr(stages, "train_epoch", None)  # any training would fail
    again = stages.run_all((setting,), seeds=(0, 1), places=places)
    assert not capfd.readouterr().out
    assert [one.finetuned.digest() for one in again] == [one.finetuned.digest() for one in runs]
