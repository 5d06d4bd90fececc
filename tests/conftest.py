"""What the tests share: one small experiment on scikit-learn's digits, trained once, and MNIST where it is present."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from src import experiments
from src.datasets import DataUnavailable
from src.datasets.mnist import ensure_mnist
from src.recipes import DIGITS
from src.training import prepare

REPOSITORY = Path(__file__).parents[1]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
prepare()


@pytest.fixture(scope="session")
def setting():
    """The random digits setting, shortened to three epochs with the LR halved at the third."""
    digits = DIGITS[0]
    return replace(digits, erm=replace(digits.erm, epochs=3, lr_halved_every=2))


@pytest.fixture(scope="session")
def trained(setting, tmp_path_factory):
    """ERM, RandMask and MaskTune of that setting, trained by the project's own functions, and their folder."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "CHECKPOINTS", folder)
        return experiments.run(setting, seed=0), folder


@pytest.fixture(scope="session")
def run(trained):
    return trained[0]


@pytest.fixture(scope="session")
def train(setting):
    return experiments.load_data(setting.erm, seed=0)


@pytest.fixture(scope="session")
def mnist_root():
    """The folder with MNIST; the test is skipped where it is absent."""
    root = REPOSITORY / "data"
    try:
        ensure_mnist(root, download=False)
    except DataUnavailable as reason:
        pytest.skip(str(reason))
    return root


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether two models have equal weights and buffers, bit for bit."""
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
