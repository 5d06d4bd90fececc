"""The networks against their origins, and the files of weights that they read."""

from functools import partial

import pytest
import torch
import torchvision
from torch import nn

from src.experiments import study
from src.models import Backbone, ResNet32, ResNet50, SmallCNN
from src.saliency import xgradcam

SHAPES = {  # of the weights that the official code publishes for 2 classes
    "backbone.0": (16, 3, 3, 3), "backbone.1": (16,), "backbone.3": (16, 16, 3, 3), "backbone.4": (16,),
    "backbone.7": (32, 16, 3, 3), "backbone.8": (32,), "backbone.10": (32, 32, 3, 3), "backbone.11": (32,),
    "linear.0": (256, 512), "linear.1": (256,), "linear.3": (2, 256)}


def test_official_weights_have_their_names_and_shapes():
    own = SmallCNN(num_classes=2).state_dict()
    assert {name.removesuffix(".weight"): value.shape for name, value in own.items() if "weight" in name} == SHAPES
    assert len(own) == 2 * len(SHAPES) + 3 * 5  # biases, and what BatchNorm keeps


@pytest.mark.parametrize(("make", "side", "shape", "parameters"), [
    (SmallCNN, 28, (32, 8, 8), 149_202), (ResNet50, 64, (2048, 2, 2), 23_512_130),
    (partial(ResNet32, 2), 32, (64, 8, 8), 463_634),  # with 10 classes 464,154; He et al. 2016: 0.46 million
    (partial(Backbone, "mobilenet_v2"), 64, (1280, 2, 2), None),
    (partial(Backbone, "shufflenet_v2_x0_5", layer="conv5"), 64, (1024, 2, 2), None)])
def test_networks_name_the_layer_that_is_explained(make, side, shape, parameters):
    torch.manual_seed(0)
    model, images, kept = make().eval(), torch.rand(2, 3, side, side), []
    model.saliency_layer.register_forward_hook(lambda _layer, _inputs, output: kept.append(output))
    assert model(images).shape == (2, 2)
    assert getattr(model, "reading", lambda maps: maps)(kept[0]).shape == (2, *shape)
    assert parameters in (None, sum(parameter.numel() for parameter in model.parameters()))
    assert xgradcam(model, images).shape == (2, side, side)


def test_resnet50_normalises_inside_and_is_torchvisions():
    torch.manual_seed(0)
    model, images = ResNet50(num_classes=9).eval(), torch.rand(2, 3, 64, 64)
    plain = torchvision.models.resnet50(num_classes=9).eval()
    plain.load_state_dict(model.model.state_dict(), strict=True)
    normalise = torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(model(images), plain(normalise(images)), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=2).state_dict()


@pytest.mark.parametrize(("change", "kept"), [
    (lambda s: {name: value for name, value in s.items() if "num_ba" not in name}, True),  # torchvision's first files
    (lambda s: {name: value for name, value in s.items() if name[:2] != "fc"}, False),
    (lambda s: s | {"fc.weight": torch.rand(1000, 512), "fc.bias": torch.rand(1000)}, False)])
def test_weights_are_read_as_torchvision_writes_them(change, kept, resnet, tmp_path):
    torch.save(change(dict(resnet)), tmp_path / "w.pth")
    model = Backbone("resnet18", 2, tmp_path / "w.pth", "layer4").model
    assert all(torch.equal(value, resnet[name]) for name, value in model.state_dict().items() if name[:2] != "fc")
    assert torch.equal(model.fc.weight, resnet["fc.weight"]) == kept


def test_weights_of_something_else_are_named(resnet, tmp_path, monkeypatch):
    (tmp_path / "text.pth").write_text("no weights")
    for content, said in (({**resnet, "layer3.6.conv1.weight": torch.zeros(1)}, "layer3.6.conv1.weight"),
                          ({**resnet, "conv1.weight": torch.zeros(1)}, "for conv1.weight"),
                          ({"conv1.weight": resnet["conv1.weight"]}, "bn1.bias"), ([1], "list")):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=said):
            Backbone("resnet18", 2, tmp_path / "w.pth", "layer4")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: 1 / 0)  # no network
    for name, said in ((tmp_path / "text.pth", "text.pth"), ("IMAGENET9", "IMAGENET1K_V1"), ("IMAGENET1K_V1", "put ")):
        with pytest.raises(ValueError, match=said):
            Backbone("resnet18", 2, name, "layer4")
    with pytest.raises(ValueError, match="resnet19"):
        Backbone("resnet19")


def test_another_layer_of_the_small_network_is_the_one_that_is_explained():
    model = study.explained(SmallCNN(), "backbone.5")
    assert model.saliency_layer is model.model.backbone[5]
    assert xgradcam(model, torch.rand(2, 3, 28, 28)).any()


def test_pooling_before_relu_changes_no_bit():
    """Forward and backward of SmallCNN against its layers run one after the other, as the official code does."""
    torch.manual_seed(0)
    images, results, model = torch.rand(16, 3, 28, 28), [], SmallCNN()
    for run in (model, nn.Sequential(*model.backbone, *model.linear)):
        model.zero_grad()
        logits = run(images)
        logits[:, 0].sum().backward()
        results.append([logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
