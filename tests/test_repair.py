"""What `masktune()` does for its user: a repair, its report, its options, an interrupt, data as they are met."""

import copy
import json
import re
import sys
from dataclasses import replace

import numpy
import pytest
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import src
import src.report.report
from src.checkpoint import CheckpointError
from src.classifier import Classifier
from src.datasets import SpuriousDigits
from src.datasets.images import Images
from src.masking import find_masks
from src.masks import Masks
from src.models import SmallCNN
from src.repair import masktune
from src.report.report import Report
from src.state import State
from src.training import sgd, train_epoch
from tests.strangers import Net, equal, images, repair

pytestmark = pytest.mark.filterwarnings("ignore:the model is right on only:UserWarning")


@pytest.fixture(scope="module")
def shortcut():
    """A network of our own on the digits, trained where a square goes with 0 to 4."""
    made = {"train": SpuriousDigits(train=True), "lie": SpuriousDigits(train=False, test_set="malicious")}
    train, lie = (Images(data.images, data.labels, ("low", "high")) for data in made.values())
    torch.manual_seed(0)
    model = nn.Sequential(*SmallCNN().backbone[:13], nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 2))
    state = State(Classifier(model, "12"), sgd(model, 0.9, 1e-4))
    for _ in range(6):
        state.finish_epoch(loss=train_epoch(state, train.images, train.labels, lr=0.01, batch_size=32, seed=0)[0])
    return model, train, lie


def test_a_shortcut_is_found_and_repaired(shortcut, tmp_path):
    model, train, lie = shortcut
    before = copy.deepcopy(model.state_dict())
    repaired, report = masktune(model, train, layer="12", lr=0.01, batch_size=32, tests={"lie": lie})
    assert (type(repaired), type(report), src.masktune) == (type(model), Report, masktune)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert not repaired.training
    assert torch.equal(report.masks[:], find_masks(Classifier(model, "12"), train.images)[:])
    assert report.hidden == report.masks.share()
    torch.testing.assert_close(report.mean_masks[1], report.masks[:][train.labels == 1].float().mean(0))
    assert report.hidden_by_class["high"] == pytest.approx(report.mean_masks[1].mean().item())
    assert report.mean_masks[0, :4, :4].mean() > 0.9
    assert report.mean_masks[1, :4, :4].mean() < 0.1
    assert report.after["lie"].average > report.before["lie"].average + 0.2
    assert report.before_on_masked.average < report.before["train"].average
    assert re.search(r"One spot is hidden in (9\d|100)% of the images of class low: a shortcut in one", report.verdict)
    assert "it leaned on it" in report.verdict
    assert "Nothing is hidden in" not in report.verdict
    half = report.masks[:]
    half[::2] = False
    assert "Nothing is hidden in 50% of the images" in replace(report, masks=Masks.of(half)).verdict
    assert report.before["lie"].classes.keys() == {0, 1}
    for name in ("low", "high", "average"):
        assert name in report._repr_html_()
    assert report._repr_html_().count("data:image/png;base64,") == 2
    for _ in range(2):  # a report may take the place of an earlier one
        report.save(tmp_path / "report")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.json", "mean_masks.png", "gallery.png"}
    saved = json.loads((tmp_path / "report" / "report.json").read_text())
    assert saved["after"]["lie"]["average"] == report.after["lie"].average
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="free, or to hold a report and nothing else"):
        report.save(tmp_path)


def test_options_of_a_practitioner(shortcut):
    model, train, _ = shortcut

    def run(**options) -> tuple[nn.Module, Report]:
        return masktune(model, train, layer="12", **{"lr": 0.01, "batch_size": 32, **options})

    once = run()[0]
    assert equal(once, run(device="cpu", epochs=1)[0])
    twice = run(epochs=2)[0]
    assert int(twice[1].num_batches_tracked) - int(once[1].num_batches_tracked) == 43  # 1,347 images in batches of 32
    adam = run(lr=1e-3, optimizer=lambda weights: torch.optim.AdamW(weights, weight_decay=0.1))[0]
    half = run(precision="bf16")[0]
    shifted = run(augment=lambda batch: torch.roll(batch, int(torch.randint(5, ())), -1))[0]
    again = run(augment=lambda batch: torch.roll(batch, int(torch.randint(5, ())), -1))[0]
    assert equal(shifted, again)  # torch's generator is seeded
    assert not any(equal(once, other) for other in (twice, adam, half, shifted))


def test_a_repair_goes_on_where_it_was_interrupted(shortcut, tmp_path, monkeypatch):
    model, train, _ = shortcut
    calls, stop = [], 60  # in the third of four epochs of 22 steps, after two of the dry run

    def noise(batch: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return batch + 0.1 * torch.rand_like(batch)

    options = dict(layer="12", lr=0.01, batch_size=64, iterations=2, epochs=2, augment=noise)
    with pytest.raises(KeyboardInterrupt):
        masktune(model, train, **options, checkpoint=tmp_path / "repair.pt")
    calls, stop = [], 0
    resumed, report = masktune(model, train, **options, checkpoint=tmp_path / "repair.pt")
    assert len(calls) == 2 + 2 * 22
    assert equal(resumed, masktune(model, train, **options)[0])
    loaded, again = masktune(model, train, **options, checkpoint=tmp_path / "repair.pt")
    assert equal(loaded, resumed)
    assert torch.equal(again.masks[:], report.masks[:])
    with pytest.raises(CheckpointError, match=r"belongs to another experiment \(k: expected 1.0, got 2.0"):
        masktune(model, train, **options, k=1, checkpoint=tmp_path / "repair.pt")
    other = copy.deepcopy(model)
    nn.init.zeros_(other[-1].weight)
    with pytest.raises(CheckpointError, match=r"belongs to another experiment \(model: "):
        masktune(other, train, **options, checkpoint=tmp_path / "repair.pt")
    torch.save(model.state_dict(), tmp_path / "mine.pt")
    with pytest.raises(CheckpointError, match="no checkpoint of this version"):
        masktune(model, train, **options, checkpoint=tmp_path / "mine.pt")
    assert torch.load(tmp_path / "mine.pt").keys() == model.state_dict().keys()


def test_the_model_is_returned_whatever_happens_to_the_report(monkeypatch):
    whole = repair(Net())[0]
    scored = src.report.report.scored

    def fails(model, data, masks=None):
        if masks is not None:
            raise OSError("no disk")
        return scored(model, data)

    monkeypatch.setattr(src.report.report, "scored", fails)
    with pytest.warns(UserWarning, match="before_on_masked is missing from the report: OSError: no disk"):
        model, report = repair(Net())
    assert equal(model, whole)
    assert report.before_on_masked is None
    assert "no disk" in str(report) + report._repr_html_()
    monkeypatch.setattr(src.report.report, "scored", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.warns(UserWarning, match="after is missing from the report: KeyboardInterrupt"):
        assert equal(repair(Net())[0], whole)


def test_a_model_that_sees_other_images_than_it_was_trained_on_is_doubted(shortcut):
    model, train, _ = shortcut
    with pytest.warns(UserWarning, match=r"right on only \d+\.\d% of the training images: are mean and std"):
        masktune(model, Images(train.images, 1 - train.labels, train.classes), layer="12", lr=0.01)


# a repair that does nothing


def test_maps_that_are_too_coarse():
    resnet = torchvision.models.resnet18(num_classes=2)
    with pytest.raises(ValueError, match=r"got 1x1 from 'layer4': such a map hides nothing. Layers with larger maps: "
                                         r"'layer2' \(4x4\), 'layer1' \(8x8\), 'relu' \(16x16\)"):
        repair(resnet, layer="layer4")
    with pytest.raises(ValueError, match="got 1x1 from 'avgpool'"):
        repair(resnet, layer="avgpool")
    with pytest.warns(UserWarning, match="the map of layer 'layer3' has only 2x2 positions"):
        repair(resnet, layer="layer3")
    assert repair(resnet, layer=resnet.layer2)[1].settings["layer"] == "layer2"  # the module in the place of its name


@pytest.mark.filterwarnings("ignore:the map of layer")
def test_nothing_and_nearly_all_hidden_are_told():
    flat = Net()
    nn.init.zeros_(flat.head.weight)
    for model, k in ((flat, 2), (Net(), 50)):
        with pytest.warns(UserWarning, match=r"Only 0.000% of the pixels are hidden, .*name a finer layer"):
            report = repair(model, k=k)[1]
        assert report.hidden == 0
        assert report.verdict.startswith("Only 0.000% of the pixels are hidden")

    class Bright(Net):  # its map is as bright all over, but for one dark pixel
        def forward(self, x):
            y = self.f(x * 0) * 0 + 1 + 0 * x[:, :1, 1:-1, 1:-1]
            y = torch.cat([y[..., :1] * 0.5, y[..., 1:]], -1)
            return self.head(self.spot(y).mean((2, 3)))

        def __init__(self) -> None:
            super().__init__()
            self.spot = nn.Identity()

    with pytest.warns(UserWarning, match=r"9\d\.\d% of the pixels are hidden, .*raise k"):
        assert repair(Bright(), k=0, layer="spot")[1].hidden > 0.5


# data as they are met


def test_data_sets_and_loaders_are_taken_as_they_are():
    data = images()
    pairs = TensorDataset(data.images, data.labels)
    whole = repair(Net(), data)[0]
    for given in (pairs, DataLoader(pairs, batch_size=3, shuffle=True), list(pairs),
                  [(numpy.asarray(image), int(label)) for image, label in pairs]):
        repaired, report = repair(Net(), given, tests={"same": given})
        assert equal(repaired, whole)
        assert report.before["same"] == report.before["train"]


def test_images_that_are_not_square_and_groups():
    data = images()
    wide = Images(data.images[:, :, :20], data.labels, data.classes, torch.arange(16) % 3)
    report = repair(Net(), wide)[1]
    assert report.mean_masks.shape == (2, 20, 32)
    assert report.before["train"].groups.keys() == {0, 1, 2}
    assert "group 2" in report._repr_html_()


def test_images_stay_on_the_host_where_they_do_not_fit(monkeypatch):
    asked = []
    monkeypatch.setattr(sys.modules["src.repair"], "room_for",
                        lambda data, device: asked.append((len(data), device.type)) or data.device)
    repair(Net())
    assert asked == [(16, "cpu")] * 2
