"""The virtual device: what CUDA refuses is refused, what it allows is allowed, and every wait and upload is noted."""

import inspect
import io

import numpy
import pytest
import torch
from torch import Tensor, nn

from src.masks import Masks
from tests.virtual_device import virtual_device


@pytest.mark.parametrize("mix", [
    lambda here, there: here + there, lambda here, there: there.add_(here), lambda here, there: here.mul_(there),
    lambda here, there: torch.cat([here, there]), lambda here, there: torch.stack([here[0], there[0]]),
    lambda here, there: here @ there, lambda here, there: torch.equal(here, there),
    lambda here, there: torch.where(here > 0, here, there), lambda here, there: here.masked_fill(there > 0, 0),
    lambda here, there: here.index_select(0, torch.tensor([0])), lambda here, there: there[here.long()],
    lambda here, there: here.index_put_((torch.tensor([0, 1, 2]),), there),
    lambda here, there: torch.rand(3, device=here.device, generator=torch.Generator()),
    lambda here, there: here.uniform_(generator=torch.Generator()),
    lambda here, there: there[0].add_(here[0]),
    lambda here, there: nn.Linear(3, 2)(here)])
def test_what_cuda_refuses_is_refused(mix):
    with virtual_device() as device, pytest.raises(RuntimeError, match=r"same device|generator but found 'cpu'"):
        mix(torch.ones(3, device=device.name), torch.ones(3))


def test_what_cuda_allows_is_allowed():
    with virtual_device() as device:
        here = torch.arange(6.0, device=device.name).view(2, 3)
        assert here.device == device.name
        assert (here * torch.tensor(2.0)).tolist() == [[0, 2, 4], [6, 8, 10]]
        assert here[torch.tensor([1])].tolist() == here[[False, True]].tolist() == [[3, 4, 5]]
        here[0] = torch.tensor([7.0, 8.0, 9.0])  # a copy
        here[:, 0].add_(1)  # a view
        there = torch.zeros(2, 3).copy_(here)
        assert there.tolist() == [[8, 8, 9], [4, 4, 5]]
        weight = here.clone().requires_grad_()
        (weight[1] ** 2).sum().backward()
        assert weight.grad.tolist() == [[0, 0, 0], [8, 8, 10]]
        for convert in (lambda: here.numpy(), lambda: numpy.asarray(here), lambda: torch.from_numpy(here)):
            with pytest.raises((TypeError, RuntimeError), match=r"numpy|np\.ndarray"):
                convert()


@pytest.mark.parametrize("wait", [
    lambda here: here.sum().item(), lambda here: bool(here.all()), lambda here: here[1:].cpu(),
    lambda here: here.tolist(), Tensor.nonzero, Tensor.unique, lambda here: here[here > 0],
    lambda here: torch.zeros(3).copy_(here), lambda here: torch.equal(here, here + 1),
    lambda here: torch.save(here, io.BytesIO())])
def test_each_wait_is_noted(wait):
    assert kinds(wait) == ["sync"]


@pytest.mark.parametrize("upload", [
    lambda here: torch.zeros(3).to(here.device), lambda here: torch.tensor([1], device=here.device),
    lambda here: here[torch.tensor([0])], lambda here: here.copy_(torch.zeros(3))])
def test_each_upload_is_noted(upload):
    assert kinds(upload) == ["upload"]


def test_nothing_else_is_noted():
    assert kinds(lambda here: torch.zeros(3, device=here.device) + here.to(here.device)[1] * torch.tensor(2)) == []


def kinds(job) -> list[str]:
    with virtual_device() as device:
        job(torch.ones(3, device=device.name))
        return [event.kind for event in device.events]


def test_a_wait_is_noted_with_its_line(train):
    with virtual_device() as device:
        Masks.of(train.images[:2, 0].to(device.name) > 9).share()
    (_, operation, function, line), = (event for event in device.events if event.kind == "sync")
    assert (operation, function) == ("_local_scalar_dense", "<genexpr>")
    lines = inspect.getsource(inspect.getmodule(Masks)).splitlines()
    assert ".item()" in lines[int(line.removeprefix("masks.py:")) - 1]
