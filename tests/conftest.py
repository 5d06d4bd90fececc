"""What the tests share: one small experiment on scikit-learn's digits, trained once, and MNIST."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from src.datasets import ensure_mnist
from src.device import prepare
from src.experiments import stages
from src.experiments.recipes import DIGITS

REPOSITORY = Path(__file__).parents[1]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
torch.set_num_threads(1)  # as the project trains; then two ways to one result agree bit for bit
prepare()


@pytest.fixture(scope="session")
def setting():
    """The random digits setting, shortened to three epochs with the LR halved at the third."""
    digits = DIGITS[0]
    return replace(digits, erm=replace(digits.erm, epochs=3, lr_halved_every=2))


@pytest.fixture(scope="session")
def trained(setting, tmp_path_factory):
    """ERM and MaskTune of that setting, trained by the project's own functions, and their folder."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "CHECKPOINTS", folder)
        return stages.run(setting, seed=0), folder


@pytest.fixture(scope="session")
def run(trained):
    return trained[0]


@pytest.fixture(scope="session")
def train(setting):
    return stages.load_data(setting.erm, seed=0)


@pytest.fixture(scope="session")
def mnist_root(tmp_path_factory):
    """The folder with MNIST, unpacked from what is shipped; a copy where the repository is read-only."""
    root = REPOSITORY / "data"
    if not os.access(root / "MNIST" / "raw", os.W_OK):
        root = Path(shutil.copytree(root / "MNIST", tmp_path_factory.mktemp("data") / "MNIST")).parent
    ensure_mnist(root, download=False)
    return root


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether two models have equal weights and buffers, bit for bit."""
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
