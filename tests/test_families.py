"""Models of others: the layer that is suggested, its map against grad-cam's, a repair, and what is left as it was."""

import sys
import warnings
from collections import namedtuple
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from pytorch_grad_cam import XGradCAM
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from src import suggest_layers
from src.classifier import Classifier, copied
from src.datasets.images import Images
from src.saliency import xgradcam
from tests.strangers import Net, View, Wrapped, equal, images, repair

pytestmark = [pytest.mark.filterwarnings("ignore:the model is right on only:UserWarning"),
              pytest.mark.filterwarnings("ignore::FutureWarning")]  # torch's own, of initial weights and weight_norm


def tv(name: str, **options):
    return lambda: torchvision.models.get_model(name, num_classes=2, **options)


def tm(name: str, **options):
    return lambda: timm.create_model(name, num_classes=2, **options)


def vit() -> nn.Module:
    model = VisionTransformer(64, patch_size=16, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=2)
    nn.init.normal_(model.heads.head.weight, std=0.1)  # torchvision's zeros would make all maps zero
    return model


def tokens(prefix: int):
    return lambda output: output[:, prefix:].transpose(1, 2).unflatten(2, (4, 4))


def last(output):
    return output.permute(0, 3, 1, 2)


MODELS = {  # model, pixels, the layer preferred, the side of its map, the transform that grad-cam needs
    "resnet18": (tv("resnet18"), 64, "layer3", 4, None),
    "mobilenet_v3_small": (tv("mobilenet_v3_small"), 64, "features.6.block.0", 4, None),
    "squeezenet1_1": (tv("squeezenet1_1"), 96, "features", 5, None),
    "shufflenet_v2_x0_5": (tv("shufflenet_v2_x0_5"), 64, "stage2", 8, None),
    "regnet_x_400mf": (tv("regnet_x_400mf"), 64, "trunk_output.block3", 4, None),
    "vit": (vit, 64, "encoder.layers.encoder_layer_1", 4, tokens(1)),
    "timm tinynet_e": (tm("tinynet_e"), 64, "blocks.3", 4, None),
    "timm convnext_atto": (tm("convnext_atto"), 64, "stages.2", 4, None),
    "timm vit": (tm("vit_tiny_patch16_224", img_size=64, depth=3), 64, "blocks.1", 4, tokens(1)),
    "timm vit, averaged": (tm("vit_tiny_patch16_224", img_size=64, depth=3, class_token=False, global_pool="avg"), 64,
                           "blocks", 4, tokens(0)),
    "timm deit, distilled": (tm("deit_tiny_distilled_patch16_224", img_size=64, depth=3), 64, "blocks.1", 4, tokens(2)),
    "timm swin": (tm("swin_tiny_patch4_window7_224", img_size=64, window_size=2, embed_dim=24, depths=(1, 1, 1, 1),
                     num_heads=(1, 2, 4, 8)), 64, "layers.2", 4, last),
    "one channel": (lambda: Net(channels=1), 32, "f", 30, None),
    "one logit": (lambda: Net(1), 32, "f", 30, None)}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_explained_as_by_grad_cam_and_repaired(name, monkeypatch):
    make, side, layer, size, transform = MODELS[name]
    data = images(6, side)
    torch.manual_seed(0)
    model = make()
    if name == "one channel":
        data = Images(data.images[:, :1].repeat(1, 3, 1, 1), data.labels, data.classes)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # of all batches seen: so one is enough, and activations do not fade away
    with torch.no_grad():
        Classifier(model.train(), None)(data.images / 255)
    assert (size, size) in dict(suggest_layers(model.eval(), data.images)).values()
    monkeypatch.setattr("src.layers.worth", lambda _model, _images, layers: dict.fromkeys(layers, 1.0))  # no masks
    assert (layer, (size, size)) in suggest_layers(model, data.images)
    # a sum of tokens may be near 0, and divides: so in double precision
    exact, seen = Classifier(copied(model).double(), layer).eval(), data.images[:2].double() / 255
    ours = xgradcam(exact, seen)
    theirs = XGradCAM(exact, [exact.saliency_layer], reshape_transform=transform)(seen.clone(), targets=None)
    torch.testing.assert_close(ours, torch.from_numpy(theirs).float(), rtol=0, atol=1e-5)
    assert ours.max() > 0.9  # no comparison of zeros
    given = copied(model)
    repaired, report = repair(model, data, layer=layer, lr=1e-3, batch_size=3, k=1, mean=(0,), std=(1,))
    assert 0.001 < report.hidden < 0.5
    assert type(repaired) is type(model)
    assert equal(model, given)
    assert not equal(model, repaired)


@pytest.mark.parametrize(("freeze", "moves"), [
    (lambda model: None, True), (lambda model: model.eval(), True), (lambda model: model.f[1].eval(), False),
    (lambda model: model.f.requires_grad_(False), True), (lambda model: model.eval().f.requires_grad_(False), False)])
def test_batchnorm_and_weights_stay_as_the_user_left_them(freeze, moves):
    """Frozen is what is in eval mode in a model in train mode; in one in eval mode, what asks for no gradient."""
    model = Net()
    freeze(model)
    modes = [part.training for part in model.modules()]
    repaired = repair(model)[0]
    assert [part.training for part in model.modules()] == modes
    assert repaired.f[1].num_batches_tracked == 2 * moves
    assert torch.equal(repaired.f[1].running_mean, model.f[1].running_mean) != moves
    assert torch.equal(repaired.f[0].weight, model.f[0].weight) != model.f[0].weight.requires_grad
    assert not torch.equal(repaired.head.weight, model.head.weight)


def steep(y: torch.Tensor, _: bool) -> torch.Tensor:
    """Probabilities near 0 and 1, of both on the images of the tests."""
    return (1e5 * (y - Net(y.shape[1]).eval()(images().images / 255).quantile(0.3, 0))).sigmoid()


@pytest.mark.parametrize(("wrap", "outputs", "warned"), [
    (lambda y, _: (9 * y).softmax(1), 2, True), (steep, 1, True), (steep, 2, True),
    (lambda y, _: y.log_softmax(1), 2, False), (lambda y, _: y, 2, False), (lambda y, _: y, 1, False)])
def test_probabilities_in_the_place_of_logits_are_warned_of(wrap, outputs, warned):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        repair(Wrapped(wrap, outputs))
    assert any("probabilit" in str(one.message) for one in said) == warned


Output = namedtuple("Output", "logits aux_logits")


@pytest.mark.parametrize("wrap", [
    lambda y, _: {"logits": y}, lambda y, _: SimpleNamespace(logits=y, hidden_states=None), lambda y, _: (y, None),
    lambda y, _: [y, torch.rand(len(y), 3, 4)], lambda y, _: y[..., None, None],
    lambda y, training: (y, y.detach()) if training else y, lambda y, training: Output(y, 0 * y) if training else y])
def test_outputs_of_every_form_give_the_same_repair(wrap):
    assert equal(repair(Wrapped(wrap))[0], repair(Net())[0])


@pytest.mark.parametrize("wrap", [lambda y, _: y, lambda y, _: y[:, 0]])
def test_one_logit_is_that_of_the_second_class(wrap):
    seen = images().images / 255
    logits = Classifier(Wrapped(wrap, outputs=1), "f").eval()(seen)
    torch.testing.assert_close(logits.softmax(1)[:, 1], Net(1).eval()(seen)[:, 0].sigmoid())


def test_what_wraps_a_model_is_taken_off(monkeypatch):
    monkeypatch.setattr(sys.modules["torch.nn.parallel.data_parallel"], "_get_available_device_type", lambda: None)
    for wrapped in (nn.DataParallel(Net()), torch.compile(Net(), backend="eager")):
        repaired = repair(wrapped)[0]
        assert type(repaired) is Net
        assert equal(repaired, repair(Net())[0])


class Keeps(Net):
    def forward(self, x):
        self.seen = [self.f(x)]
        return self.head(self.seen[0].mean((2, 3)))


class Grid(Net):
    def train(self, mode=True):
        super().train(mode)  # and returns nothing

    def forward(self, x):
        if len(x) > 2 and not hasattr(self, "grid"):
            self.register_buffer("grid", torch.ones(1))
        return super().forward(x)


def masked() -> nn.Module:
    model = Net()
    model.register_buffer("attn_mask", torch.full((4, 4), float("-inf")).triu(1))
    return model


def normed() -> nn.Module:
    model = Net()
    model.head = nn.utils.weight_norm(model.head)
    return model


@pytest.mark.parametrize("make", [Keeps, Grid, masked, View, normed, Net().half, Net().bfloat16, Net().double],
                         ids=lambda make: make.__name__)
def test_models_that_a_plain_copy_or_check_does_not_stand_and_in_any_precision(make):
    model = make()
    model(torch.rand(2, 3, 32, 32, dtype=model.f[0].weight.dtype))
    repaired, _ = repair(model)
    assert {weight.dtype for weight in repaired.parameters()} == {model.f[0].weight.dtype}
    assert not torch.equal(model.head.weight, repaired.head.weight)
    assert equal(repair(model)[0], repaired)
    copied(repaired)
    model.stream = (i for i in range(3))
    with pytest.raises(ValueError, match="generator"):
        copied(model)


class Mixed(nn.Module):
    """A convolution whose map follows the image, then two modules of the same output that do not, or give none."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.stem, self.good = nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.last, self.head = last, nn.Linear(8, 1)

    def forward(self, images):
        return self.head(self.last(self.good(self.stem(images).relu()).relu()).mean((2, 3))).flatten()


class Everywhere(nn.Module):
    """Each position sees the whole image; on the way, a loss of no dimension and complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.loss, self.waves = (Function(function) for function in (torch.mean, torch.fft.rfft2))

    def forward(self, maps):
        mixed = torch.einsum("bkhw,hwij->bkij", maps, torch.linspace(-1, 1, 16 ** 4).view(16, 16, 16, 16).cos())
        return mixed + self.loss(maps) + self.waves(maps).abs().mean()


class Picky(Mixed):
    def forward(self, images):  # normalised ones alone; and its last module is for two of them alone
        assert images.amin() < 0
        maps = self.good(self.stem(images).relu()).relu()
        return self.head((self.last(maps) if len(images) == 2 else maps).mean((2, 3))).flatten()


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, maps):
        return self.function(maps)


def test_a_layer_is_suggested_whatever_the_others_give():
    torch.manual_seed(0)
    assert suggest_layers(Mixed(Everywhere()), images(6, 64).images) == [("good", (16, 16))]
    picky, normalisation = Picky(nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())), {"mean": (0.5,), "std": (0.2,)}
    assert suggest_layers(picky, images(6, 64).images, **normalisation) == [("good", (16, 16))]
    with pytest.raises(ValueError, match="normalises by its own"):
        suggest_layers(Classifier(picky, None, **normalisation), images(6, 64).images, **normalisation)
    many = nn.Sequential(*(part for i in range(14) for part in (nn.Conv2d(8 if i else 3, 8, 3), nn.ReLU())),
                         nn.Flatten(), nn.Linear(8 * 36 ** 2, 2))
    assert len(suggest_layers(many, images(6, 64).images)) == 14  # more sizes than layers that may be tried
