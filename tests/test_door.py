"""What `masktune()` turns away before anything is trained, and what it reads by name instead of by position."""

import warnings
from dataclasses import replace
from functools import partial
from types import MethodType

import pytest
import torch
import torchvision
from torch import nn

from src import suggest_layers
from src.datasets.images import Images
from tests.strangers import Net, View, Wrapped, equal, images, repair

pytestmark = pytest.mark.filterwarnings("ignore:the model is right on only:UserWarning")
DATA = images()
changed = partial(replace, DATA)


class NoGradient(Net):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


def replaced() -> nn.Module:
    """The usual recipe to change a forward pass, which holds on to the module that it was written for."""
    model = Net()
    model.f[0].forward = (lambda one: lambda x: torch.conv2d(x, one.weight, one.bias))(model.f[0])
    model(torch.rand(2, 3, 32, 32)).sum().backward()  # gradients left over from its training
    return model


class Framed(Net):
    """Crops or pads its images itself."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (self.left, 0, 0, 0)))


class Dropped(Net):
    def forward(self, x):
        return self.head(nn.functional.dropout(self.f(x).mean((2, 3)), 0.5))


def together() -> nn.Module:
    model = Net()
    model.f[1] = nn.BatchNorm2d(8, track_running_stats=False)
    return model


class Twice(Net):
    def forward(self, x):
        return super().forward(x) + super().forward(x.flip(-1))


class Delegates(nn.Module):
    """Passes on what it lacks, of a compiled model within."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.compile(Net(), backend="eager")

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return self.inner(x).flip(1)


class Alike(Net):
    """Its first convolution in the order of its parts takes one channel, but not the images."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleDict({"late": nn.Conv2d(1, 1, 1), "first": self.f})

    def forward(self, x):
        seen = self.f["first"](x)
        return self.head(seen.mean((2, 3))) + 0 * self.f["late"](seen[:, :1]).mean()


BAD = [  # the model, the training set, options, and what the message says
    (lambda: lambda x: x, DATA, {}, "got a function"),
    (lambda: nn.Sequential(Net().f, nn.Flatten(), nn.LazyLinear(2)), DATA, {"layer": "0"}, "lazy layers"),
    (lambda: torch.jit.trace(Net().eval(), DATA.images / 255), DATA, {}, "a model in Python"),
    (lambda: torch.export.export(Net().eval(), (DATA.images / 255,)).module(), DATA, {}, "the forward pass"),
    *((lambda wrap=wrap: Wrapped(wrap), DATA, {}, said) for wrap, said in (
        (lambda y, _: (y, y), "one tensor of logits"), (lambda y, _: {"out": y}, "a dict of out"),
        (lambda y, _: None, "NoneType"), (lambda y, _: y.argmax(1), "torch.int64"), (lambda y, _: y / 0, "finite"),
        (lambda y, _: y[..., None, None].expand(-1, -1, 4, 4), "4, 4"))),
    (lambda: torchvision.models.vit_b_32(num_classes=2), DATA, {"layer": "conv_proj"}, "the forward pass in eval mode"),
    (lambda: Net(1000), DATA, {}, "one logit for each of the 2 classes, got a model with 1000"),
    (Net, images(classes=("a", "b", "c")), {}, "each of the 3 classes, got a model with 2"),
    (lambda: Net().requires_grad_(False), DATA, {}, "all are frozen"),
    (Net, DATA, {"loss": nn.CrossEntropyLoss(reduction="none")}, "a training step: expected loss to give one number"),
    (Net, DATA, {"device": "cuda"}, "PyTorch sees no CUDA"),
    (NoGradient, DATA, {}, "the heat map of layer 'f'"),
    (replaced, DATA, {}, "forward, replaced by a function"),
    (lambda: Framed(-9), DATA, {}, r"of 32 columns of pixels it never sees \d+: the model crops"),
    (lambda: Framed(4), DATA, {}, r"\d+ of its 34 columns are the same for any image: the model pads"),
    (Dropped, DATA, {}, "two passes differ, as with dropout"), (together, DATA, {}, "depends on the other images"),
    (Twice, DATA, {}, "calls once"), (Twice, DATA, {"reshape_transform": nn.Identity()}, "calls once"),
    (lambda: Wrapped(lambda y, _: y.squeeze()), changed(images=DATA.images[:3], labels=DATA.labels[:3]),
     {"batch_size": 1}, "squeezes"),
    (lambda: Net(channels=1), DATA, {}, "coloured"),
    (lambda: Net(channels=1), changed(images=DATA.images * 0), {"tests": {"t": DATA}}, "coloured"),
    (Net, DATA, {"layer": "layer9"}, "'layer9'; it has f, f.0, .*suggest_layers"),
    (Net, DATA, {"layer": "head"}, r"the heat map of layer 'head'.*suggest_layers finds \[\('f', \(30, 30\)\)"),
    (lambda: torchvision.models.resnet18(num_classes=2), DATA, {"layer": "layer4"}, r"'layer4'.*finds \[.*'layer2'"),
    (lambda: torchvision.models.resnet18(num_classes=2), DATA, {"layer": "layer1.0.relu"}, "the model calls once"),
    (Net, "photos/train", {}, "the training set.*load_folder reads folders"),
    (Net, changed(labels=torch.arange(16) % 6), {}, "the training set.*0..5"),
    (Net, DATA, {"tests": {"train": DATA}}, "names but 'train'"),
    (Net, DATA, {"tests": [DATA]}, "expected tests as a dict .*got a list"),
    (Net, DATA, {"tests": DATA}, "expected tests as a dict .*got a Images"),
    (Net, DATA, {"tests": {"train": DATA}}, "'train'"),
    *((Net, DATA, {"tests": {"t": test}}, rf"tests\['t'\]: .*{said}") for test, said in (
        (changed(images=DATA.images / 255), "torch.float32"), (changed(images=DATA.images[:0]), r"\(0, 3, 32, 32\)"),
        (changed(labels=DATA.labels[:, None]), r"\(16, 1\)"), (changed(labels=DATA.labels + 5), "5..6"),
        (changed(classes=("a", "fox")), "expected fox once"), ([("a.jpg", 0)], "a str"))),
    (Net, DATA, {"tests": {"t": changed(groups=torch.zeros(3).long())}}, r"groups: .*\(3,\)"),
    (View, DATA, {"tests": {"big": images(side=40)}}, r"the images of big, \(16, 3, 40, 40\)"),
    *((Net, DATA, {name: value}, name) for name, values in {
        "epochs": (0, 1.5), "iterations": (0,), "batch_size": (0,), "lr": (-1, float("inf")), "seed": (0.5,),
        "precision": ("fp16",), "k": (float("nan"), -5)}.items() for value in values),
    (Net, DATA, {"lr": 0}, "weights to move"),
    (Net, DATA, {"mean": (0.5,)}, "mean and std, or neither"),
    (Net, DATA, {"mean": (123.7, 116.3, 103.5), "std": (1,)}, r"mean in \[0, 1\]"),
    (Net, DATA, {"mean": (0,), "std": (0, 0, 0)}, r"std in \(0, 1\]"),
    (Net, DATA, {"reshape_transform": lambda output: output[0]}, "the heat map of layer 'f'"),
    *((Net, DATA, {"optimizer": made}, f"the optimizer.*{said}") for made, said in (
        (torch.optim.SGD(Net().parameters()), "'SGD' object is not callable"), (lambda weights: None, "NoneType"),
        (lambda weights: torch.optim.SGD([{"params": [one], "lr": len(one)} for one in weights]), "share one LR"))),
    (Net, DATA, {"optimizer": torch.optim.LBFGS}, "a training step.*closure"),
    (Net, DATA, {"optimizer": lambda weights: torch.optim.SGD(Net().parameters())}, "a training step.*weights to move"),
    *((Net, DATA, {"augment": augment}, f"augment.*{said}") for augment, said in (
        (lambda batch: batch.mean(1), r"\(8, 32, 32\)"), (lambda batch: batch.byte(), "torch.uint8"),
        (lambda batch: None, "NoneType"), (lambda batch: batch[:4], r"\(4, 3, 32, 32\)"),
        (lambda batch: 9 * batch - 4, r"\[-4, 5\]"), (lambda batch: batch / 0, "nan")))]


@pytest.mark.parametrize(("make", "data", "options", "said"), BAD)
def test_bad_input_is_named_before_anything_is_trained(make, data, options, said):
    model = make()
    Net.trained = []
    with pytest.raises((TypeError, ValueError, FloatingPointError), match=said):
        repair(model, data, **options)
    assert sum(Net.trained) <= 8  # the trial's at most


@pytest.mark.filterwarnings("ignore:0.00% of the pixels")
def test_test_sets_are_matched_by_the_names_of_their_classes():
    colours = torch.zeros(8, 3, 8, 8, dtype=torch.uint8)
    colours[::2, 0] = colours[1::2, 2] = 255
    labels = torch.arange(8) % 2
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model[0].weight.data = 9 * torch.tensor([[1.0, 0, 0], [0, 0, 1]])[:, :, None, None]  # red is cat, blue is dog
    tests = {"dogs": Images(colours[1::2], torch.zeros(4, dtype=torch.int64), ("dog",)),
             "turned": Images(colours, 1 - labels, ("dog", "cat"))}
    before = repair(model, Images(colours, labels, ("cat", "dog")), tests=tests, layer="0", lr=1e-3)[1].before
    assert [score.average for score in before.values()] == [1, 1, 1]
    namesakes = Images(colours, labels, ("crane", "crane"))  # as in ImageNet: then by position
    assert repair(model, namesakes, tests={"t": namesakes}, layer="0", lr=1e-3)[1].before["t"].average == 1


def test_other_layouts_are_read_as_the_user_says():
    model = nn.Sequential(Net().f, nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 2))
    flat = repair(model, layer=model[1], reshape_transform=lambda output: output.unflatten(2, (30, 30)))[1]
    assert flat.settings["layer"] == "1"
    assert torch.equal(flat.masks[:], repair(model, layer="0")[1].masks[:])


def test_a_forward_that_was_bound_goes_with_its_copy():
    model = Net()
    model.f[0].forward = MethodType(lambda one, x: torch.conv2d(x, one.weight, one.bias), model.f[0])
    with torch.inference_mode():  # nor does a mode of the caller's stand in the way
        assert equal(repair(model)[0], repair(Net())[0])


def test_layers_that_cannot_be_explained_are_told_why():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))
    for model, why in ((NoGradient(), "use_reentrant"), (flat, "none has a map")):
        with pytest.raises(ValueError, match=why):
            suggest_layers(model, DATA.images)


def test_sets_of_which_one_alone_names_its_classes_are_matched_by_number():
    numbers = changed(classes=("0", "1"), numbered=True)
    for train, test in ((DATA, numbers), (numbers, DATA)):
        with pytest.warns(UserWarning, match="matched by number"):
            report = repair(Net(), train, tests={"same": test})[1]
        assert report.after["same"] == report.after["train"]


def test_a_transform_that_is_given_is_tested_too():
    for turn, told in ((nn.Identity(), 0), (lambda maps: maps.flip(3), 1), (lambda maps: maps.flip(2), 1)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            repair(Net(), reshape_transform=turn)
        assert sum("do not follow the image" in str(one.message) for one in said) == told


def test_the_very_model_that_was_given_comes_back():
    model = Delegates()
    repaired, report = repair(model, layer="inner._orig_mod.f")
    assert type(repaired) is Delegates
    right = repaired(DATA.images / 255).argmax(1) == DATA.labels
    assert report.after["train"].average == right.double().mean()


def test_channels_are_tried_and_not_guessed_from_the_first_convolution_that_is_declared():
    assert repair(Alike(), layer="f.first")[1].before["train"] == repair(Net())[1].before["train"]
    grey = changed(images=DATA.images[:, :1].expand(-1, 3, -1, -1).contiguous())
    assert repair(Net(channels=1), grey)[1].after
