"""What the tests share: one small experiment on scikit-learn's digits, trained once, and MNIST."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

if "gpu" not in sys.argv:  # `-m gpu` runs on a real one; all else must not depend on what is there
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait for a core that another test uses do not spin

import pytest
import torch

from src.datasets import ensure_mnist
from src.device import prepare
from src.experiments import stages
from src.experiments.recipes import DIGITS, Places

REPOSITORY = Path(__file__).parents[1]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
torch.set_num_threads(1)  # as the project trains; then two ways to one result agree bit for bit
prepare()


def pytest_collection_modifyitems(items):  # the longest first, so that no process waits long for the other's last
    items.sort(key=lambda item: item.path.stem not in ("test_notebook", "test_study", "test_parallel"))


@pytest.fixture(scope="session")
def setting():
    """The random digits setting, shortened to three epochs with the LR halved at the third."""
    digits = DIGITS[0]
    return replace(digits, erm=replace(digits.erm, epochs=3, lr_halved_every=2))


@pytest.fixture(scope="session")
def trained(setting, tmp_path_factory):
    """ERM and MaskTune of that setting, trained by the project's own functions, and their folder."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return stages.run(Places(folder), setting, seed=0), folder


@pytest.fixture(scope="session")
def run(trained):
    return trained[0]


@pytest.fixture(scope="session")
def train(setting):
    return stages.load_data(Places(), setting.erm, seed=0)


@pytest.fixture(scope="session")
def mnist_root():
    """The folder with MNIST as it is shipped."""
    ensure_mnist(REPOSITORY / "data", download=False)
    return REPOSITORY / "data"


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether two models have equal weights and buffers, bit for bit."""
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
