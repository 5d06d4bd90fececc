"""What `masktune()` turns away, or reads by name or layout instead of by position, before anything is trained."""

from types import SimpleNamespace

import pytest
import torch
import torchvision
from pytorch_grad_cam import XGradCAM
from torch import nn

from src.classifier import Classifier
from src.datasets.images import Images
from src.saliency import xgradcam
from tests.strangers import Net, View, images, repair

pytestmark = pytest.mark.filterwarnings("ignore:the model is right on only:UserWarning")


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
