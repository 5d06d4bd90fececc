"""The project on a virtual device: no GPU is needed, yet what CUDA would refuse is refused, and every wait counted."""

import io
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from src import device as devices
from src.augmentation import Augmentation
from src.datasets import Images
from src.experiments import stages, study
from src.experiments.recipes import DIGITS, FineTune, Places
from src.holes import Shown, pixels
from src.inference import infer
from src.masking import find_masks, random_masks
from src.models import SmallCNN
from src.repair import masktune
from src.saliency import xgradcam
from src.state import State, digest
from src.training import train_epoch
from tests.conftest import same
from tests.harness import first_images, results
from tests.virtual_device import gpu

CPU = torch.device("cpu")
IMAGES = 48
ERM = replace(DIGITS[0].erm, options={"class_mix_ratio": 0.25}, epochs=2, batch_size=16)
SETTING = replace(DIGITS[0], erm=ERM, seeds=(0,), finetune=FineTune(iterations=2, accumulate=True))

REFUSED = (  # of a, on the device, and b, which is not
    lambda a, b: a + b, lambda a, b: b.add_(a), lambda a, b: torch.cat((a, b)), lambda a, b: torch.stack([a[0], b[0]]),
    lambda a, b: torch.where(a > 0, a, b), lambda a, b: a.masked_fill(b > 0, 0), lambda a, b: nn.Linear(3, 2)(a),
    lambda a, b: a.index_select(0, torch.tensor([0])), lambda a, b: b[a.long()], lambda a, b: b[0].add_(a[0]),
    lambda a, b: a.index_put_((torch.tensor([0, 1, 2]),), b),
    lambda a, _: torch.rand(3, device=a.device, generator=torch.Generator()))
SYNCS = (Tensor.nonzero, Tensor.unique, lambda a: a.tolist(), lambda a: a[1:].cpu(), lambda a: a.sum().item(),
         lambda a: bool(a.all()), lambda a: a[a > 0], lambda a: torch.zeros(3).copy_(a),
         lambda a: torch.save(a, io.BytesIO()))
UPLOADS = (lambda a: torch.zeros(3).to(a.device), lambda a: torch.tensor([1], device=a.device),
           lambda a: a[torch.tensor([0])], lambda a: a.copy_(torch.zeros(3)))


def test_what_cuda_refuses_is_refused_and_each_wait_and_upload_noted():
    with gpu() as device:
        for job in REFUSED:
            with pytest.raises(RuntimeError, match=r"same device|generator but found 'cpu'"):
                job(torch.ones(3, device=device.name), torch.ones(3))
        for events, jobs in ((["sync"], SYNCS), (["upload"], UPLOADS), ([], [
                lambda a: torch.zeros(3, device=a.device) + a.to(a.device)[1] * torch.tensor(2)])):
            for job in jobs:
                here = torch.ones(3, device=device.name)
                device.events.clear()
                job(here)
                assert device.events == events


def both(job):
    """Run job(device) on the CPU and on the virtual device: the same bits."""
    expected = digest(job(CPU))
    with gpu() as device:
        assert digest(job(device.name)) == expected


def new_state() -> State:
    model = stages.new_model(0)
    assert next(model.parameters()).device == devices.best_device()
    return State(model, stages.new_optimizer(model, ERM))


OPTIONS = {"plain": None, "turned": Augmentation(None, degrees=15, shift=3.2), "cropped": Augmentation(28)}


@pytest.mark.parametrize("kept", ["device", "host"])
@pytest.mark.parametrize("options", OPTIONS)
def test_an_epoch_and_its_masks(options, kept, train):
    """Images on the device, or, where they do not fit, in host memory."""
    def job(device):
        where = device if kept == "device" else CPU
        images, labels = train.images[:IMAGES].to(where), train.labels[:IMAGES].to(where)
        state = new_state()
        first = find_masks(state.model, images, batch_size=20)
        assert first.bits.device == where
        seen = [train_epoch(state, images, labels, lr=0.01, batch_size=8, seed=0, masks=masks,
                            augmentation=OPTIONS[options], holes="transplants")
                for masks in (None, random_masks(IMAGES, 28, 0, 0, where)) if state.finish_epoch() is None]
        maps = xgradcam(state.model, pixels(images.to(device)), state.model.backbone[9], classes=labels.to(device))
        shown = Shown(images, first, "transplants", labels)
        return (seen, state.digest(), infer(state.model, shown), maps, first, first.mean(labels == 1),
                find_masks(state.model, images, hidden=first, holes="transplants"))

    both(job)


@pytest.mark.parametrize(("what", "kept", "syncs", "uploads"), [
    ("plain", "device", 0, 0), ("turned", "device", 0, 0), ("cropped", "device", 0, 0), ("cropped", "host", 0, 4),
    (find_masks, "device", 1, 0), (infer, "device", 0, 0)])
def test_what_a_batch_waits_for_and_uploads(what, kept, syncs, uploads, train):
    """A step from host memory uploads images, masks, labels and what was drawn; heat maps wait: are all finite?"""
    counts = []
    with gpu() as device:
        state, where = new_state(), device.name if kept == "device" else CPU
        for n in (32, 64):
            images, labels, masks = train.images[:n].to(where), train.labels[:n].to(where), random_masks(
                n, 28, 0, 0, where)
            device.events.clear()
            if what in OPTIONS:
                train_epoch(state, images, labels, lr=0.01, batch_size=8, seed=0, masks=masks,
                            augmentation=OPTIONS[what])
            else:
                what(state.model, images, batch_size=8)
            counts.append(Counter(device.events))
    few, many = counts
    assert [many[event] - few[event] for event in ("sync", "upload")] == [4 * syncs, 4 * uploads]  # four batches more


@pytest.mark.parametrize("setting", [
    SETTING, replace(SETTING, name="host", erm=replace(ERM, select="best", optimizer="Adam"))],
    ids=lambda setting: setting.name)
def test_runs_and_studies(setting, tmp_path, monkeypatch):
    """The files hold the same bits, whatever the device; heat maps of others, DFR, frozen BatchNorm, oracles."""
    monkeypatch.setattr(stages, "load_data", lambda places, erm, seed=0, part="train": first_images(
        places, erm, seed, "raw" if part == "val" else part, n=IMAGES))  # the digits have no validation set
    monkeypatch.setattr("src.experiments.workers.cores", lambda: 1)
    monkeypatch.setattr(study, "_subject", study._subject.__wrapped__)
    asked = ("results", "cam", "reference", "batchnorm")
    if setting.name == "host":
        asked = ("threshold",)
        monkeypatch.setattr(stages, "room_for", lambda images: images.device)

    def job(device):
        study._weights.cache_clear()
        places = Places(tmp_path / device.type, results=tmp_path / "results" / device.type)
        first, loaded = (stages.run(places, setting, seed=0) for _ in range(2))
        assert same(first.finetuned.model, loaded.finetuned.model)
        assert {next(one.finetuned.model.parameters()).device for one in (first, loaded)} == {device}
        rows = study.ask([setting], *asked, places=places).drop(columns="made_with").to_csv()
        return first.erm.digest(), first.finetuned.history, rows

    both(job)
    assert results(tmp_path / "virtual") == results(tmp_path / "cpu")


@pytest.mark.parametrize("kept", ["device", "host"])
def test_a_classifier_of_ones_own(kept, train, monkeypatch):
    data = Images(train.images[:IMAGES], train.labels[:IMAGES], ("low", "high"), train.groups[:IMAGES])
    if kept == "host":
        monkeypatch.setattr("src.repair.room_for", lambda images, device: images.device)

    def job(device):
        torch.manual_seed(0)
        model = nn.Sequential(*SmallCNN().backbone[:13], nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 2))
        repaired, report = masktune(model.to(device), data, layer="12", lr=0.01, batch_size=8, iterations=2,
                                    mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), tests={"again": data})
        assert next(repaired.parameters()).device == device
        return repaired.state_dict(), report.masks, str(report)

    both(job)
