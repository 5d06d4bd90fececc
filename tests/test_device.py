"""The project on a virtual device: no GPU is needed, yet what CUDA would refuse is refused, and every wait counted."""

import os
import signal
from collections import Counter
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from src import device as devices
from src.augmentation import Affine, Augmentation
from src.datasets import Images
from src.experiments import stages, studies
from src.experiments.recipes import DIGITS, FineTune
from src.inference import infer, pixels
from src.masking import find_masks, random_masks
from src.models import SmallCNN
from src.repair import masktune
from src.report import figures
from src.saliency import xgradcam
from src.state import State, digest
from src.training import train_epoch
from tests.harness import results
from tests.virtual_device import gpu

CPU = torch.device("cpu")
IMAGES = 48
ERM = replace(DIGITS[0].erm, class_mix_ratio=0.25, epochs=2, batch_size=16)
SETTING = replace(DIGITS[0], erm=ERM, seeds=(0,), finetune=FineTune(iterations=2, accumulate=True))
load_data = stages.load_data


def both(job):
    """Run job(device) on the CPU and on the virtual device: the same bits."""
    expected = digest(job(CPU))
    with gpu() as device:
        assert digest(job(device.name)) == expected


def new_state() -> State:
    model = stages.new_model(0)
    assert place(model) == devices.best_device()
    return State(model, stages.new_optimizer(model, ERM))


def place(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


# Training


OPTIONS = {"plain": {}, "affine": {"augmentation": Affine(degrees=15, shift=3.2, flip=0.5)},
           "augmentation": {"augmentation": Augmentation(side=28, jitter=0.1)}}


@pytest.mark.parametrize("kept", ["device", "host"])
@pytest.mark.parametrize("options", OPTIONS)
def test_an_epoch(options, kept, train):
    """Images on the device, or, where they do not fit, in host memory."""
    def job(device):
        where = device if kept == "device" else CPU
        images, labels = train.images[:IMAGES].to(where), train.labels[:IMAGES].to(where)
        state = new_state()
        masked = random_masks(IMAGES, 28, 0, 0, where)
        seen = [train_epoch(state, images, labels, lr=0.01, batch_size=8, seed=0, masks=masks, **OPTIONS[options])
                for masks in (None, masked) if state.finish_epoch() is None]
        return seen, state.digest(), infer(state.model, train.images[:IMAGES]), infer(state.model, images, masked)

    both(job)


def noted(train, n: int, kept: str = "device", **options) -> Counter:
    """How often each kind of event occurs in an epoch of n images, in batches of 8."""
    with gpu() as device:
        where = device.name if kept == "device" else CPU
        images, labels, masks = train.images[:n].to(where), train.labels[:n].to(where), random_masks(n, 28, 0, 0, where)
        state = new_state()
        device.events.clear()
        train_epoch(state, images, labels, lr=0.01, batch_size=8, seed=0, masks=masks, **options)
        return Counter(event.kind for event in device.events)


@pytest.mark.parametrize(("kept", "options", "uploads"), [
    ("device", "plain", 0), ("device", "affine", 0), ("device", "augmentation", 0), ("host", "augmentation", 4)])
def test_no_step_waits_for_the_device(kept, options, uploads, train):
    """Nor uploads to it, where the images are there; else images, masks, labels and what the augmentation drew."""
    few, many = (noted(train, n, kept, **OPTIONS[options]) for n in (32, 64))
    assert few["sync"] == many["sync"]
    assert many["upload"] - few["upload"] == uploads * 4


# Heat maps and masks


def test_heat_maps_and_masks(train):
    def job(device):
        images, state = train.images[:IMAGES].to(device), new_state()
        state.model.eval()
        first = find_masks(state.model, images, batch_size=20)
        return (xgradcam(state.model, pixels(images)), xgradcam(state.model, pixels(images), state.model.backbone[9],
                classes=train.labels[:IMAGES].to(device)), first, find_masks(state.model, images, hidden=first),
                first.share(), first.mean(train.labels[:IMAGES].to(device) == 1))

    both(job)


def test_masks_of_images_in_host_memory(train):
    """As the notebook asks for them: the model is on the device, the images are not."""
    def job(_):
        masks = find_masks(new_state().model, train.images[:IMAGES])
        assert masks.bits.device == CPU
        again = find_masks(new_state().model, train.images[:IMAGES], hidden=masks)
        figures.gallery(pixels(train.images[:2]), masks[:2], ("one", "two"))
        return masks, again, masks[train.squares[:IMAGES]][:, :4, :4].float().mean().item()

    both(job)


@pytest.mark.parametrize(("job", "waits"), [(find_masks, 1), (infer, 0)])
def test_what_a_batch_waits_for(job, waits, train):
    """Heat maps: for whether all are finite."""
    with gpu() as device:
        images, model, counts = train.images[:64].to(device.name), stages.new_model(0), []
        for n in (32, 64):
            device.events.clear()
            job(model, images[:n], batch_size=16)
            counts.append(Counter(event.kind for event in device.events))
    assert counts[1]["sync"] - counts[0]["sync"] == 2 * waits
    assert counts[1]["upload"] == counts[0]["upload"]


# Whole runs


@cache
def few_images(erm, seed: int = 0, part: str = "train", root=None) -> SimpleNamespace:
    """The first images; the digits have no validation set."""
    data = load_data(erm, seed, "raw" if part == "val" else part)
    return SimpleNamespace(**{name: getattr(data, name)[:IMAGES] for name in ("images", "labels", "squares", "groups")})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where runs and studies on the first images are kept, measured in this process; nothing stays in a cache."""
    monkeypatch.setattr(stages, "load_data", few_images)
    monkeypatch.setattr("src.experiments.workers.cores", lambda: 1)
    monkeypatch.setattr(studies, "_subject", studies._subject.__wrapped__)
    return tmp_path


def run(folder, setting=SETTING) -> stages.Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "CHECKPOINTS", folder)
        return stages.run(setting, seed=0)


@pytest.mark.parametrize("setting", [
    SETTING, replace(SETTING, name="host", erm=replace(ERM, select="best", optimizer="Adam"))],
    ids=lambda setting: setting.name)
def test_a_run_saved_loaded_and_resumed(setting, folder, monkeypatch):
    """The files hold the same bits, whatever the device, and however often the run is interrupted on it."""
    if setting.name == "host":
        monkeypatch.setattr(stages, "room_for", lambda images: images.device)
    tests = stages.load_tests(setting)

    def job(device):
        first = run(folder / device.type, setting)
        loaded = run(folder / device.type, setting)
        assert {place(one.finetuned.model) for one in (first, loaded)} == {device}
        kept = stages.on_device(setting, 0)()
        assert {part.device for part in kept} == {CPU if setting.name == "host" else device}
        return [(one.erm.digest(), loaded.erm.digest(), one.finetuned.history, stages.predict([one.finetuned], tests))
                for one in (first, loaded)]

    both(job)
    assert results(folder / "virtual") == results(folder / "cpu")

    real, steps, stops = F.cross_entropy, [], 0

    def press(*arguments):
        steps.append(None)
        if len(steps) % 5 == 0:  # an epoch has three steps: some epochs are cut, and each is done at last
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(F, "cross_entropy", press)
    with gpu():
        while True:
            try:
                run(folder / "resumed", setting)
                break
            except KeyboardInterrupt:
                stops += 1
    assert stops == len(steps) // 5 >= 3
    assert results(folder / "resumed") == results(folder / "cpu")


def test_studies(folder, monkeypatch):
    """Heat maps of the grad-cam library and of chance, the last layer refitted, BatchNorm frozen, squares hidden."""
    def job(device):
        monkeypatch.setattr(stages, "CHECKPOINTS", folder / device.type)
        monkeypatch.setattr(studies, "RESULTS", folder / device.type)
        rows = studies.ask([SETTING], *studies.QUESTIONS)
        subject = studies.Subject(SETTING, 0)
        return [{**row, "made_with": ""} for row in rows], [subject._masks_of(cam) for cam in studies.CAMS]

    both(job)


def test_a_classifier_of_ones_own(train):
    data = Images(train.images[:IMAGES], train.labels[:IMAGES], ("low", "high"), train.groups[:IMAGES])

    def job(device):
        torch.manual_seed(0)
        model = nn.Sequential(*SmallCNN().backbone[:13], nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 2))
        repaired, report = masktune(model.to(device), data, layer="12", lr=0.01, batch_size=8, iterations=2,
                                    mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), tests={"again": data})
        assert (place(repaired), report.mean_masks.device) == (device, CPU)
        figures.mean_masks(report.mean_masks, data.classes)
        shown = report.masks[torch.arange(3).to(device)].cpu()
        figures.gallery(pixels(data.images[:3]), shown, "abc")
        return repaired.state_dict(), str(report), report.masks, report.mean_masks, shown

    both(job)
