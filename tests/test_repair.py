"""MaskTune on models and images that are not ours."""

import copy

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import src
from src.datasets import SpuriousDigits
from src.datasets.decode import View, fit
from src.datasets.images import load_dataset, load_folder, save_folder
from src.masktune import find_masks, masktune
from src.models import Classifier, SmallCNN
from src.repair import Report
from src.state import State
from src.training import sgd, train_epoch
from tests.miniature import make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    make_folder(root / "train", n=20, stamped={"cross": 0.0, "disc": 1.0})
    make_folder(root / "test", n=10, stamped={"cross": 1.0, "disc": 0.0})
    return root


@pytest.fixture(scope="module")
def train(folder):
    return load_folder(folder / "train", side=64)


def test_a_folder_is_decoded_once_into_bytes(folder, train, tmp_path):
    assert torch.equal(load_folder(folder / "train", side=64, cache=tmp_path / "cache").images, train.images)
    assert train.images.shape == (40, 3, 64, 64)
    assert train.images.dtype == torch.uint8
    assert train.classes == ("cross", "disc")
    assert train.labels.tolist() == [0] * 20 + [1] * 20
    with Image.open(folder / "train" / "disc" / "00003.jpg") as image:
        assert torch.equal(train.images[23], fit(image, View(64, 64)))
    stamp = train.images[:, :, 58, 55].float()  # inside the bar: yellow
    assert (stamp[20:, 0] > 200).all()
    assert (stamp[20:, 2] < 90).all()
    assert not ((stamp[:20, 0] > 200) & (stamp[:20, 2] < 90)).any()


@pytest.mark.parametrize(("make", "layer"), [
    (torchvision.models.resnet18, "layer4"), (torchvision.models.mobilenet_v3_small, "features"),
    (torchvision.models.squeezenet1_1, "features")])
def test_classifiers_of_torchvision(make, layer, train, folder):
    torch.manual_seed(0)
    model = make(num_classes=2)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    test = load_folder(folder / "test", side=64, classes=train.classes)
    repaired, report = masktune(model, train, layer=layer, lr=0.01, batch_size=16, tests={"test": test})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert (type(repaired), type(report), src.masktune) == (type(model), Report, masktune)
    assert not repaired.training
    assert repaired is not model
    assert any(not torch.equal(before[name], value) for name, value in repaired.state_dict().items())
    assert torch.equal(report.masks[:], find_masks(Classifier(model, layer), train.images)[:])
    assert report.hidden == report.masks.share()
    assert report.mean_masks.shape == (2, 64, 64)
    torch.testing.assert_close(report.mean_masks[1], report.masks[:][20:].float().mean(0))
    assert report.before.keys() == report.after.keys() == {"train", "test"}
    assert "of the pixels hidden" in str(report)


def test_batchnorm_moves_by_one_epoch_and_the_same_seed_repairs_alike(train):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=2)
    first, second = (masktune(model, train, layer="layer4", lr=0.01, batch_size=16)[0] for _ in range(2))
    assert first.bn1.num_batches_tracked == 3  # 40 images in batches of 16
    assert all(torch.equal(one, two) for one, two in zip(first.state_dict().values(), second.state_dict().values(),
                                                         strict=True))


def test_wrong_layers_are_named(train):
    model = torchvision.models.resnet18(num_classes=2)
    with pytest.raises(ValueError, match=r"name a module of ResNet, got 'layer9'; it has conv1, bn1"):
        masktune(model, train, layer="layer9", lr=0.01)
    with pytest.raises(ValueError, match=r"expected a \(B, K, h, w\) output of the layer Linear"):
        masktune(model, train, layer="fc", lr=0.01)
    with pytest.raises(ValueError, match=r"expected labels in 0..0, since the model has 1 classes, got 0..1"):
        masktune(torchvision.models.resnet18(num_classes=1), train, layer="layer4", lr=0.01)
    with pytest.raises(ValueError, match="expected at least 1 iteration, got 0"):
        masktune(model, train, layer="layer4", lr=0.01, iterations=0)


def test_data_sets_of_torch(train):
    items = [(train.images[i] / 255, int(train.labels[i]), int(i % 3)) for i in range(40)]
    loaded = load_dataset(items, side=64)
    assert torch.equal(loaded.images, train.images)
    assert torch.equal(loaded.labels, train.labels)
    assert loaded.groups.tolist() == [i % 3 for i in range(40)]
    pictures = load_dataset([(Image.new("L", (30, 50), 7), 0), (Image.new("CMYK", (80, 20)), 1)], side=16)
    assert pictures.images.shape == (2, 3, 16, 16)
    assert (pictures.images[0] == 7).all()
    assert pictures.groups is None
    _, report = masktune(Flat(), loaded, layer="0", lr=0.01, batch_size=16)
    assert report.before["train"].groups.keys() == {0, 1, 2}


class Flat(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize(("picture", "message"), [
    (Image.new("I;16", (20, 20), 30000), "expected 8 bits a channel, got pixels of mode I;16"),
    (Image.new("F", (20, 20)), "expected 8 bits a channel, got pixels of mode F"),
    (Image.new("L", (5000, 2)), "expected no side over 100 times the other, got 2 x 5000 pixels")])
def test_pictures_that_would_come_out_wrong_are_refused(picture, message):
    with pytest.raises(ValueError, match=message):
        fit(picture, View(16, 16))


@pytest.mark.parametrize(("items", "message"), [
    ([], "expected a data set with items"), ([(torch.zeros(3, 9, 9), 0), (torch.zeros(3, 9, 9), 1, 2)], "all of them"),
    ([(torch.full((3, 9, 9), 2.0), 0)], r"item 0 .*expected an image in \[0, 1\]"),
    ([(torch.zeros(9, 9), 0)], r"item 0 .*got \(9, 9\)"),
    ([(torch.zeros(3, 9, 9).long(), 0)], "item 0 .*got torch.int64"), ([("a.jpg", 0)], "item 0 .*got a str"),
    ([(torch.zeros(3, 9, 9), "cat")], "item 0 .*invalid literal")])
def test_wrong_items_are_named(items, message):
    with pytest.raises((TypeError, ValueError), match=message):
        load_dataset(items, side=8)


def test_hostile_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError):
        load_folder(tmp_path, side=8)
    with pytest.raises(ValueError, match=r"to have the classes cat, dog, got cross, disc"):
        load_folder(folder / "test", side=8, classes=("cat", "dog"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 20)).save(tmp_path / name / "1.jpg")
    (tmp_path / "b" / "2.jpg").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"2\.jpg is not a readable image"):
        load_folder(tmp_path, side=8)


def test_a_shortcut_is_found_and_repaired(tmp_path):
    """A network of our own on the digits, as PNG files: the mean mask shows the square, and the repair holds."""
    made = {"train": SpuriousDigits(train=True), "lie": SpuriousDigits(train=False, test_set="malicious")}
    for name, data in made.items():
        save_folder(tmp_path / name, data.images, data.labels, ("low", "high"))
    train, lie = (load_folder(tmp_path / name, side=28) for name in made)
    assert sorted(train.classes) == ["high", "low"]
    torch.manual_seed(0)
    model = nn.Sequential(*SmallCNN().backbone[:13], nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 2))
    state = State(Classifier(model, "12"), sgd(model, 0.9, 1e-4))
    for _ in range(6):
        state.finish_epoch(loss=train_epoch(state, train.images, train.labels, lr=0.01, batch_size=32, seed=0)[0])
    _, report = masktune(model, train, layer="12", lr=0.01, batch_size=32, tests={"lie": lie})
    low = train.classes.index("low")
    assert report.mean_masks[low, :4, :4].mean() > 0.9
    assert report.mean_masks[1 - low, :4, :4].mean() < 0.1
    assert report.after["lie"].average > report.before["lie"].average + 0.2
    assert report.before_on_masked.average < report.before["train"].average
