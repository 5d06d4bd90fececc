"""`masktune()` on models and data that are not ours: every kind of stranger works, or is turned away at the door."""

import copy
import json
import re
import sys
import warnings
from collections import namedtuple
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.distributed as dist
import torchvision
from pytorch_grad_cam import XGradCAM
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import src
import src.repair
from src.checkpoint import CheckpointError
from src.classifier import Classifier, copied
from src.datasets import SpuriousDigits
from src.datasets.images import Images
from src.masktune import find_masks, masktune
from src.models import SmallCNN
from src.repair import Report
from src.saliency import suggest_layers, xgradcam
from src.state import State
from src.training import sgd, train_epoch

pytestmark = pytest.mark.filterwarnings("ignore:the model is right on only:UserWarning")


def images(n: int = 16, side: int = 32, classes: tuple[str, ...] = ("a", "b")) -> Images:
    draw = torch.Generator().manual_seed(0)
    return Images(torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=draw),
                  torch.arange(n) % len(classes), classes)


class Net(nn.Module):
    """Counts the images that it is trained on, in a list that copies share."""

    trained: list

    def __init__(self, outputs: int = 2, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, outputs)
        Net.trained = []

    def forward(self, x):
        if self.training:
            Net.trained.append(len(x))
        return self.head(self.f(x).mean((2, 3)))


def repair(model: nn.Module, data=None, **options):
    options = {"layer": "f", "lr": 0.01, "batch_size": 8} | options
    return masktune(model, images() if data is None else data, **options)


def equal(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip((*one.parameters(), *one.buffers()),
                                                 (*two.parameters(), *two.buffers()), strict=True))


# a repair


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


# meaning that is carried by position


class Red(nn.Module):
    """Always right: red is cat, blue is dog."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Conv2d(3, 2, 1, bias=False)
        self.f.weight.data = 9 * torch.tensor([[1.0, 0, 0], [0, 0, 1]])[:, :, None, None]

    def forward(self, x):
        return self.f(x).mean((2, 3))


@pytest.mark.filterwarnings("ignore:Only 0.000% of the pixels")
def test_test_sets_are_matched_by_the_names_of_their_classes():
    colours = torch.zeros(8, 3, 8, 8, dtype=torch.uint8)
    colours[::2, 0] = colours[1::2, 2] = 255
    train = Images(colours, torch.arange(8) % 2, ("cat", "dog"))
    tests = {"dogs": Images(colours[1::2], torch.zeros(4, dtype=torch.int64), ("dog",)),
             "turned": Images(colours, 1 - torch.arange(8) % 2, ("dog", "cat")),
             "nameless": SimpleNamespace(images=colours, labels=torch.arange(8) % 2)}
    before = repair(Red(), train, tests=tests, lr=1e-4)[1].before
    assert [score.average for score in before.values()] == [1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"tests\['t'\]: expected classes among cat, dog, got fox"):
        repair(Red(), train, tests={"t": Images(colours, torch.arange(8) % 2, ("cat", "fox"))})


@pytest.mark.parametrize("layer", ["permute", "norm", "features.3", "features.5"])
def test_swin_is_read_in_its_own_layout(layer):
    torch.manual_seed(0)
    swin, x = torchvision.models.swin_t(num_classes=2).eval(), torch.rand(2, 3, 64, 96)
    transform = None if layer == "permute" else lambda output: output.permute(0, 3, 1, 2)
    theirs = XGradCAM(swin, [swin.get_submodule(layer)], reshape_transform=transform)(x.clone(), targets=None)
    torch.testing.assert_close(xgradcam(Classifier(swin, layer), x), torch.from_numpy(theirs), rtol=0, atol=1e-5)
    if transform:
        given = xgradcam(Classifier(swin, layer, reshape_transform=transform), x)
        torch.testing.assert_close(given, torch.from_numpy(theirs), rtol=0, atol=1e-5)


class Last(Net):
    """Of nobody's family, with the channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Identity()

    def forward(self, x):
        return self.head(self.last(self.f(x).permute(0, 2, 3, 1)).mean((1, 2)))


class Tokens(Net):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Identity()

    def forward(self, x):
        return self.head(self.last(self.f(x).flatten(2).transpose(1, 2)).mean(1))


class Prefixed(Tokens):
    """Two tokens of the model's own come before those of the grid."""

    num_prefix_tokens = 2

    def forward(self, x):
        tokens = self.f(x).flatten(2).transpose(1, 2)
        tokens = self.last(torch.cat([torch.ones_like(tokens[:, :2]), tokens], 1))
        return self.head(tokens[:, 2:].mean(1))


@pytest.mark.parametrize(("model", "shape", "transform"), [
    (Last(), r"\(2, 30, 30, 8\), which looks like \(B, h, w, K\)", lambda output: output.permute(0, 3, 1, 2)),
    (Tokens(), r"\(2, 900, 8\)", lambda output: output.transpose(1, 2).unflatten(2, (30, 30)))])
def test_layouts_are_asked_for_and_not_guessed(model, shape, transform):
    with pytest.raises(ValueError, match=rf"layer 'last': expected a \(B, K, h, w\) output .* got {shape}"):
        repair(model, layer="last")
    masks = repair(model, layer="last", reshape_transform=transform)[1].masks
    assert torch.equal(masks[:], repair(model, layer="f")[1].masks[:])
    with pytest.raises(ValueError, match=r"expected reshape_transform to make \(B, K, h, w\)"):
        repair(model, layer="last", reshape_transform=lambda output: output[0])


def test_models_of_timm_are_known_by_name():
    """timm is not installed here: classes of its names and layouts stand for its own."""
    vit = type("VisionTransformer", (Prefixed,), {"__module__": "timm.models.vision_transformer"})()
    swin = type("SwinTransformerV2", (Last,), {"__module__": "timm.models.swin_transformer_v2"})()
    plain = repair(Net())[1].masks[:]
    for model in (vit, swin):
        assert torch.equal(repair(model, layer="last")[1].masks[:], plain)
    vit.num_prefix_tokens = 3
    with pytest.raises(ValueError, match="tokens of a grid in proportion to images of 20 x 32 pixels, got 539"):
        xgradcam(Classifier(vit, "last"), torch.rand(2, 3, 20, 32))


@pytest.mark.parametrize(("outputs", "data", "message"), [
    (1000, images(), r"one logit for each of the 2 classes \(a, b\), got a model with 1000; give it a new last layer"),
    (2, images(classes=("a", "b", "c")), r"each of the 3 classes \(a, b, c\), got a model with 2"),
    (2, Images(images().images, torch.arange(16) % 6, ("a", "b")), "labels in 0..1, .* 2 classes, got 0..5")])
def test_outputs_and_classes_are_as_many(outputs, data, message):
    with pytest.raises(ValueError, match=message):
        repair(Net(outputs), data)
    assert not Net.trained


# errors before the work


@pytest.mark.parametrize(("tests", "message"), [
    ([images()], "expected tests to be a dict of data sets by name, got a list"), (images(), "got a Images"),
    ({"train": images()}, "names of tests other than 'train'"),
    ({"t": Images(images().images / 255, images().labels, ("a", "b"))}, r"tests\['t'\]: .*got torch.float32"),
    ({"t": Images(images().images[:0], images().labels[:0], ("a", "b"))}, r"tests\['t'\]: .*got an empty data set"),
    ({"t": Images(images().images, images().labels, ("a", "b"), torch.zeros(3).long())}, r"groups torch.int64 \(16,\)"),
    ({"t": Images(images().images, images().labels[:, None], ("a", "b"))}, r"got torch.int64 \(16, 1\)"),
    ({"t": Images(images().images, images().labels + 5, ("a", "b"))}, r"labels in 0..1, .*got 5..6"),
    ({"t": [("a.jpg", 0)]}, r"tests\['t'\]: item 0 of the data set: .*got a str")])
def test_what_is_wrong_with_test_sets_is_found_at_the_door(tests, message):
    model = Net()
    with pytest.raises((TypeError, ValueError), match=message):
        repair(model, tests=tests)
    assert not Net.trained


@pytest.mark.parametrize(("option", "value", "message"), [
    ("k", float("nan"), "expected k to be .*got nan"), ("k", -5, "got -5"), ("lr", -1, "expected lr to be .*got -1"),
    ("lr", float("inf"), "got inf"), ("lr", 0, "expected lr to be a positive"), ("epochs", 0, "expected epochs"),
    ("iterations", 0, "expected iterations to be .*got 0"), ("batch_size", 0, "expected batch_size"),
    ("precision", "fp16", "expected precision to be one of"), ("mean", (123.7, 116.3, 103.5), r"mean in \[0, 1\]"),
    ("std", (0, 0, 0), r"std in \(0, 1\]"), ("layer", "layer9", r"got 'layer9'; it has f, f.0, .*suggest_layers"),
    ("layer", None, "suggest_layers"), ("layer", "head", r"output of the layer Linear, got \(2, 2\)"),
    ("optimizer", lambda weights: torch.optim.LBFGS(weights), "cannot be trained on .*closure"),
    ("optimizer", lambda weights: torch.optim.SGD([{"params": weights[:1], "lr": 1}, {"params": weights[1:]}]),
     "parameter groups share one LR"),
    ("optimizer", lambda weights: None, "a torch.optim.Optimizer of a list of weights, got a NoneType"),
    ("optimizer", lambda weights: torch.optim.SGD(Net().parameters()), "an optimizer of the weights that it is made"),
    ("augment", lambda batch: batch.mean(1), r"expected augment to give a batch \(8, 3, 32, 32\) of floats, .*got"),
    ("augment", lambda batch: batch.byte(), "got torch.uint8"), ("augment", lambda batch: None, "got NoneType"),
    ("augment", lambda batch: 9 * batch - 4, r"images in \[0, 1\], got \[-4, 5\]; leave normalisation"),
    ("seed", 0.5, "expected seed to be a whole number, got 0.5")])
def test_options_have_bounds(option, value, message):
    model = Net()
    with pytest.raises((TypeError, ValueError), match=message):
        repair(model, **{option: value})
    assert sum(Net.trained) <= 8  # the dry run at most


def test_where_nothing_can_be_trained():
    with pytest.raises(ValueError, match="expected a model of Python modules, got one of TorchScript"):
        repair(torch.jit.trace(Net().eval(), torch.rand(2, 3, 32, 32)))
    with torch.inference_mode(), pytest.raises(ValueError, match=r"outside of torch\.inference_mode"):
        repair(Net())
    with pytest.raises(ValueError, match=r"big: View fails on images \(16, 3, 40, 40\)"):
        repair(View(), tests={"big": images(side=40)})
    with pytest.raises(TypeError, match="got the path 'photos/train'; load_folder reads folders of images"):
        repair(Net(), "photos/train")


def test_the_model_is_returned_whatever_happens_to_the_report(monkeypatch):
    whole = repair(Net())[0]
    scored = src.repair.scored

    def fails(model, data, masks=None):
        if masks is not None:
            raise OSError("no disk")
        return scored(model, data)

    monkeypatch.setattr(src.repair, "scored", fails)
    with pytest.warns(UserWarning, match="before_on_masked is missing from the report: OSError: no disk"):
        model, report = repair(Net())
    assert equal(model, whole)
    assert report.before_on_masked is None
    assert "no disk" in str(report) + report._repr_html_()
    monkeypatch.setattr(src.repair, "scored", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.warns(UserWarning, match="after is missing from the report: KeyboardInterrupt"):
        assert equal(repair(Net())[0], whole)


# what the user froze


def test_the_same_seed_draws_the_same_dropout():
    model = nn.Sequential(Net().f, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 2))
    torch.manual_seed(1)
    first = repair(model, layer="0")[0]
    after = torch.rand(1)
    torch.manual_seed(2)
    assert equal(first, repair(model, layer="0")[0])
    assert not equal(first, repair(model, layer="0", seed=1)[0])
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)  # the user's own stream goes on as if nothing had been drawn


@pytest.mark.parametrize(("freeze", "moves"), [
    (lambda model: None, True), (lambda model: model.eval(), True), (lambda model: model.f[1].eval(), False),
    (lambda model: model.f.eval(), False), (lambda model: model.f.requires_grad_(False), True),
    (lambda model: model.eval().f.requires_grad_(False), False)])
def test_batchnorm_stays_as_the_user_left_it(freeze, moves):
    """Frozen is what is in eval mode in a model in train mode; in one in eval mode, what asks for no gradient."""
    model = Net()
    freeze(model)
    modes = [part.training for part in model.modules()]
    repaired = repair(model)[0]
    assert [part.training for part in model.modules()] == modes
    assert (int(repaired.f[1].num_batches_tracked), not torch.equal(repaired.f[1].running_mean,
                                                                   model.f[1].running_mean)) == (2 * moves, moves)


def test_frozen_weights_stay_and_all_frozen_is_an_error():
    model = Net()
    model.f.requires_grad_(False)
    repaired = repair(model)[0]
    assert torch.equal(repaired.f[0].weight, model.f[0].weight)
    assert not torch.equal(repaired.head.weight, model.head.weight)
    assert not repaired.f[0].weight.requires_grad
    with pytest.raises(ValueError, match="got a model in which requires_grad is False for all"):
        repair(Net().requires_grad_(False))


class NoGrad(Net):
    def forward(self, x):
        with torch.no_grad():
            y = self.f(x)
        return self.head(y.mean((2, 3)))


def test_a_layer_without_a_gradient_is_an_error():
    with pytest.raises(ValueError, match=r"layer 'f.2': expected a gradient from the logits back .*torch.no_grad"):
        repair(NoGrad(), layer="f.2")
    assert suggest_layers(NoGrad(), images().images) == []
    assert not Net.trained


def test_repairs_where_gradients_are_off():
    with torch.no_grad():
        assert equal(repair(Net())[0], repair(Net())[0])
    assert Net.trained


class Soft(Net):
    def forward(self, x):
        return (9 * super().forward(x)).softmax(1)


class Sigmoid(Net):
    def forward(self, x):
        logits = super().forward(x)
        return (1e5 * (logits - logits.quantile(0.3, 0))).sigmoid()


class LogSoft(Net):
    def forward(self, x):
        return super().forward(x).log_softmax(1)


def test_probabilities_in_the_place_of_logits_are_warned_of():
    for model, message in ((Soft(), "the model's outputs add up to 1.*take the softmax off"),
                           (Sigmoid(1), "the model's output goes .*take the sigmoid off"),
                           (Sigmoid(2), "the model's outputs go .*take the sigmoid off")):
        with pytest.warns(UserWarning, match=message):
            repair(model)
    for model in (LogSoft(), Net(), Net(1)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            repair(model)
        assert not [one for one in said if "probabilit" in str(one.message)]


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


# outputs and models as they are met


Output = namedtuple("Output", "logits aux_logits")


class Wrapped(Net):
    """Gives what a function makes of its logits."""

    def __init__(self, wrap, outputs: int = 2) -> None:
        super().__init__(outputs)
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(super().forward(x), self.training)


@pytest.mark.parametrize("wrap", [
    lambda y, _: {"logits": y}, lambda y, _: SimpleNamespace(logits=y, hidden_states=None), lambda y, _: (y, None),
    lambda y, _: [y, torch.rand(len(y), 3, 4)], lambda y, _: y[..., None, None],
    lambda y, training: (y, y.detach()) if training else y, lambda y, training: Output(y, 0 * y) if training else y])
def test_outputs_of_every_form_give_the_same_repair(wrap):
    assert equal(repair(Wrapped(wrap))[0], repair(Net())[0])


@pytest.mark.parametrize("wrap", [lambda y, _: y, lambda y, _: y[:, 0], lambda y, _: {"logits": y}])
def test_one_logit_is_that_of_the_second_class(wrap):
    model = Wrapped(wrap, outputs=1)
    logits = Classifier(model, "f").eval()(images().images / 255)
    torch.testing.assert_close(logits.softmax(1)[:, 1], Net(1).eval()(images().images / 255)[:, 0].sigmoid())
    repaired, report = repair(model)
    assert 0.001 < report.hidden < 0.5
    assert not torch.equal(repaired.head.weight, model.head.weight)


@pytest.mark.parametrize(("wrap", "message"), [
    (lambda y, _: (y, y), r"one tensor of logits in the model's tuple, got \[\(8, 2\), \(8, 2\)\]"),
    (lambda y, _: {"out": y}, "got a dict with the keys out"), (lambda y, _: None, "got a NoneType"),
    (lambda y, _: y.argmax(1), "got torch.int64"), (lambda y, _: y[..., None, None].expand(-1, -1, 4, 4), r", 4, 4\)"),
    (lambda y, _: y / 0, "expected finite logits")])
def test_outputs_that_could_be_anything_are_named(wrap, message):
    with pytest.raises(ValueError, match=message):
        repair(Wrapped(wrap))
    assert not Net.trained


def test_aux_logits_of_googlenet_in_train_mode():
    model = torchvision.models.googlenet(num_classes=2, aux_logits=True, init_weights=False)
    repaired, _ = masktune(model, images(6, 64), layer="inception4e", lr=0.01, batch_size=6)
    assert not torch.equal(model.fc.weight, repaired.fc.weight)
    assert torch.equal(model.aux1.fc2.weight, repaired.aux1.fc2.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_comes_back_in_its_own_precision(dtype):
    model = Net().to(dtype)
    repaired, report = repair(model)
    assert {weight.dtype for weight in repaired.parameters()} == {dtype}
    assert report.before["train"].average in (0.5, 1.0)
    assert not torch.equal(model.head.weight, repaired.head.weight)


def test_one_channel_and_coloured_images():
    grey = images()
    grey = Images(grey.images[:, :1].expand(-1, 3, -1, -1).contiguous(), grey.labels, grey.classes)
    assert repair(Net(channels=1), grey, mean=(0.1307,), std=(0.3081,))[1].hidden > 0.001
    grey.images[3, 2] = 0
    for coloured in (grey, images()):
        with pytest.raises(ValueError, match="the model takes one channel, and there are coloured images"):
            repair(Net(channels=1), coloured)


def test_what_wraps_a_model_is_taken_off(monkeypatch):
    monkeypatch.setattr(sys.modules["torch.nn.parallel.data_parallel"], "_get_available_device_type", lambda: None)
    whole = repair(Net())[0]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        distributed = nn.parallel.DistributedDataParallel(Net())
    finally:
        dist.destroy_process_group()
    for wrapped in (nn.DataParallel(Net()), distributed, torch.compile(Net(), backend="eager")):
        for layer in ("f", "module.f", "_orig_mod.f"):
            repaired = repair(wrapped, layer=layer)[0]
            assert type(repaired) is Net
            assert equal(repaired, whole)


class Keeps(Net):
    def forward(self, x):
        self.seen = [self.f(x)]
        return self.head(self.seen[0].mean((2, 3)))


class Extra(Net):
    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        assert state == {"version": 1}


class Mask(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("attn_mask", torch.full((4, 4), float("-inf")).triu(1))


class View(Net):
    """`view` does not stand images whose channels come last."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8 * 30 * 30, 2)

    def forward(self, x):
        return self.head(self.f(x).view(len(x), -1))


def normed() -> nn.Module:
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would have its newer one
        model.head = nn.utils.weight_norm(model.head)
    return model


@pytest.mark.parametrize("make", [Keeps, Extra, Mask, View, normed])
def test_models_that_a_plain_copy_or_check_does_not_stand(make, tmp_path):
    model = make()
    model(torch.rand(2, 3, 32, 32))
    repaired, _ = repair(model, checkpoint=tmp_path / "c.pt")
    assert not equal(model, repaired)
    assert equal(repair(model, checkpoint=tmp_path / "c.pt")[0], repaired)
    copied(repaired)


def test_models_that_cannot_be_worked_on():
    class Locked(Net):
        def __init__(self) -> None:
            super().__init__()
            self.stream = (i for i in range(3))

    lazy = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(2))
    for model, message in ((Locked(), "expected a model that copy.deepcopy can copy, got Locked"),
                           (lazy, "lazy layers that have seen no image"), (nn.Flatten(), "layer to name a module"),
                           (lambda x: x, "expected model to be a torch.nn.Module, got a function"),
                           (torchvision.models.vit_b_32(num_classes=2), r"VisionTransformer fails on images \(8, 3")):
        with pytest.raises((TypeError, ValueError), match=message):
            repair(model, layer="encoder.layers.encoder_layer_10" if "Vision" in message else
                   "0" if model is lazy else "f")


def test_a_model_that_sees_other_images_than_it_was_trained_on_is_doubted(shortcut):
    model, train, _ = shortcut
    with pytest.warns(UserWarning, match=r"right on only \d+\.\d% of the training images: are mean and std"):
        masktune(model, Images(train.images, 1 - train.labels, train.classes), layer="12", lr=0.01)


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
    monkeypatch.setattr(sys.modules["src.masktune"], "room_for",
                        lambda data, device: asked.append((len(data), device.type)) or data.device)
    repair(Net())
    assert asked == [(16, "cpu")] * 2
