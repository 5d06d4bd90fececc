"""Two processes on the CPU, started by torchrun, against one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from src.state import digest
from tests.conftest import REPOSITORY
from tests.harness import results
from tests.processes import SETTING

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(folder: Path, *arguments: str, processes: int = 2) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *(TORCHRUN if processes > 1 else ()), "-m", "tests.processes", str(folder),
                           *arguments], cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                          capture_output=True, check=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The checkpoints of one process, and of two."""
    root = tmp_path_factory.mktemp("parallel")
    for processes in (1, 2):
        done = start(root / str(processes), processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("erm-seed0: starts") == 1  # the first process speaks for all
    return root / "1", root / "2"


SCRIPT = """
import sys
import torch
from src import parallel, training
from src.augmentation import Augmentation
from src.experiments import load_data, new_model
from src.masktune import find_masks, random_masks
from src.state import State
from tests.processes import SETTING

training.prepare()
torch.set_num_threads(1)
parallel.start()
data, model = load_data(SETTING.erm), new_model(0)
seen = find_masks(model, data.images, batch_size=100).bits, training.infer(model, data.images, batch_size=100)

pixels = training.pixels
training.pixels = lambda *arguments: pixels(*arguments).double()
state = State(model.double(), training.sgd(model, 0.9, 1e-4))
trained = training.train_epoch(
    state, data.images[:309], data.labels[:309], masks=random_masks(309, 28, seed=0, epoch=0), lr=0.01, batch_size=32,
    seed=0, augmentation=Augmentation(side=28))
if parallel.rank() == 0:
    torch.save((seen, (state.model.state_dict(), state.optimizer.state_dict()["state"], state.losses, trained)),
               sys.argv[1])
parallel.stop()
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What the script finds in one process, and in two."""
    folder, found = tmp_path_factory.mktemp("script"), []
    (folder / "script.py").write_text(SCRIPT)
    for launcher in ((), TORCHRUN):
        done = subprocess.run([sys.executable, *launcher, str(folder / "script.py"), str(folder / "found.pt")],
                              cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
                              text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(folder / "found.pt", weights_only=True))
    return found


def test_masks_and_logits_by_shards_are_exactly_those_of_one_process(both):
    (one, _), (two, _) = both
    assert one[0].any()
    assert digest(one) == digest(two)


def test_two_processes_train_as_one(both):
    """In double precision: the same weights, momentum, BatchNorm statistics, losses and accuracy after an epoch."""
    (_, one), (_, two) = both
    torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-9)
    assert one[0]["backbone.1.num_batches_tracked"] == 10


def test_two_processes_run_all_stages(folders):
    """In single precision, rounding is worth a percent of a gradient here, in one process too; so only the outline."""
    for stage in ("erm", "randmask", "masktune"):
        one, two = (torch.load(folder / SETTING.name / f"{stage}-seed0.pt", weights_only=True) for folder in folders)
        assert one["epoch"] == two["epoch"]
        assert one["model"]["backbone.1.num_batches_tracked"] == two["model"]["backbone.1.num_batches_tracked"]
        if stage == "erm":
            assert two["history"]["loss"][0] == pytest.approx(one["history"]["loss"][0], abs=0.05)


def test_a_killed_process_ends_all_and_the_run_goes_on_to_the_same_bits(folders, tmp_path):
    killed = start(tmp_path, "dies")
    assert killed.returncode != 0
    assert not (tmp_path / SETTING.name / "masktune-seed0.pt").exists()
    done = start(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "continues after" in done.stdout
    assert results(tmp_path) == results(folders[1])
