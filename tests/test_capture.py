"""Recorded steps give the weights of those that are not: on the virtual device and, where there is one, on a GPU."""

import copy

import pytest
import torch
from torch import nn

from src import experiments
from src.augmentation import Affine
from src.experiments import new_model, new_optimizer
from src.masktune import random_masks
from src.recipes import MNIST
from src.state import State
from src.training import train_epoch
from tests.virtual_device import gpu
from tests.virtual_graph import virtual_graphs

BATCH = 8


def trained(train, capture: bool, n: int = 48, lrs=(0.1, 0.01), stop: int | None = None, **options) -> State:
    """A SmallCNN after an epoch for each LR, without masks and with them; with `stop`, resumed after that step."""
    device = experiments.best_device()
    images, labels = train.images[:n].to(device), train.labels[:n].to(device)
    model = new_model(0)
    state = State(model, new_optimizer(model, MNIST[0].erm))

    def press() -> None:
        if state.step == stop:
            raise KeyboardInterrupt

    for epoch, lr in enumerate(lrs):
        arguments = dict(lr=lr, batch_size=BATCH, seed=0, capture=capture, **options,
                         masks=random_masks(n, 28, 0, 0, device) if epoch % 2 else None)
        try:
            loss, accuracy = train_epoch(state, images, labels, after_step=press, **arguments)
        except KeyboardInterrupt:
            state = copy.deepcopy(state)  # the same content in other memory, as from a file
            loss, accuracy = train_epoch(state, images, labels, **arguments)
        state.finish_epoch(loss=loss, accuracy=accuracy)
    return state


@pytest.mark.parametrize(("options", "replays"), [
    ({}, [3, 3]), ({"augmentation": Affine(degrees=15, shift=3.2, flip=0.5)}, [3, 3]),
    ({"n": 45}, [2, 2]),  # the last five run as they are
    ({"n": 24}, []), ({"n": 27}, [1, 1]),  # three steps; three, and a rest
    ({"n": 80, "stop": 4}, [1, 3, 1, 3])],  # each half of an epoch has a recording of its own
    ids=str)
def test_the_same_weights(options, replays, train):
    with gpu():
        expected = trained(train, capture=False, **options)
        expected, history = expected.digest(), expected.history
    with gpu() as device, virtual_graphs(device) as graphs:
        state = trained(train, capture=True, **options)
        assert (state.digest(), state.history) == (expected, history)
    assert [graph.replays for graph in graphs] == replays


def test_recording_a_step_computes_nothing(train):
    with gpu() as device, virtual_graphs(device) as graphs:
        here = torch.arange(4.0, device=device.name)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=None):
            here += 1
            twice = 2 * here
        assert here.tolist() == [0, 1, 2, 3]
        assert twice.isnan().all()
        for times in (1, 2):
            graph.replay()
            assert here.tolist() == [times, 1 + times, 2 + times, 3 + times]
            assert twice.tolist() == [2 * number for number in here.tolist()]
    assert graphs == [graph]


@pytest.mark.parametrize("wait", [lambda logits: logits.sum().item(), lambda logits: logits.cpu(),
                                  lambda logits: torch.ones(2).to(logits.device)])
def test_a_step_that_waits_cannot_be_recorded(wait, train):
    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3 * 28 * 28, 2)

        def forward(self, images):
            logits = self.linear(images.flatten(1))
            wait(logits)
            return logits

    with gpu() as device, virtual_graphs(device):
        model = Waits().to(device.name)
        state = State(model, new_optimizer(model, MNIST[0].erm))
        images, labels = train.images[:48].to(device.name), train.labels[:48].to(device.name)
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            train_epoch(state, images, labels, lr=0.01, batch_size=BATCH, seed=0, capture=True)


@pytest.mark.parametrize(("optimizer", "here"), [(torch.optim.SGD, "cpu, SGD"), (torch.optim.Adam, "virtual:0, Adam")])
def test_what_cannot_be_captured_is_said_before_anything_is_trained(optimizer, here, train):
    with gpu() as device:
        where = device.name if "virtual" in here else torch.device("cpu")
        model = new_model(0).to(where)
        state = State(model, optimizer(model.parameters()))
        with pytest.raises(ValueError, match=f"here are images on {here} and 1 processes"):
            train_epoch(state, train.images[:48].to(where), train.labels[:48].to(where), lr=0.01, batch_size=BATCH,
                        seed=0, capture=True)
        assert state.step == 0


def test_captures_where_the_environment_asks_for_it(monkeypatch):
    monkeypatch.delenv("MASKTUNE_CAPTURE", raising=False)
    assert not experiments._options(MNIST[0].erm, 0)["capture"]
    for value in "01":
        monkeypatch.setenv("MASKTUNE_CAPTURE", value)
        assert experiments._options(MNIST[0].erm, 0)["capture"] == (value == "1")
    monkeypatch.setenv("MASKTUNE_CAPTURE", "yes")
    with pytest.raises(ValueError, match="MASKTUNE_CAPTURE='yes' is unknown; it is '0' or '1'"):
        experiments._options(MNIST[0].erm, 0)


@pytest.mark.skipif(experiments.best_device().type != "cuda", reason="there is no CUDA device")
def test_the_same_weights_on_cuda(train):
    lrs = (0.1, 0.01, 0.001, 0.001)
    expected, state = (trained(train, capture, n=480, lrs=lrs) for capture in (False, True))
    for name, value in state.model.state_dict().items():
        torch.testing.assert_close(value, expected.model.state_dict()[name], rtol=0, atol=1e-5)
