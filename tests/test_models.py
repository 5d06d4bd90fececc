import pytest
import torch
import torchvision
from torch import nn

from src.models import Backbone, ResNet32, ResNet50, SmallCNN
from src.saliency import xgradcam
from tests.conftest import REPOSITORY

SHAPES = {  # of the weights that the official code publishes for 2 classes
    "backbone.0": (16, 3, 3, 3), "backbone.1": (16,), "backbone.3": (16, 16, 3, 3), "backbone.4": (16,),
    "backbone.7": (32, 16, 3, 3), "backbone.8": (32,), "backbone.10": (32, 32, 3, 3), "backbone.11": (32,),
    "linear.0": (256, 512), "linear.1": (256,), "linear.3": (2, 256)}
OFFICIAL = {f"{layer}.{name}": shape if name == "weight" else () if "num" in name else shape[:1]
            for layer, shape in SHAPES.items() for name in ("weight", "bias", *(
                ("running_mean", "running_var", "num_batches_tracked") if len(shape) == 1 else ()))}


def test_official_weights_load_strictly():
    torch.manual_seed(0)
    weights = {name: torch.rand(shape) if shape or "num" not in name else torch.tensor(7)
               for name, shape in OFFICIAL.items()}
    model = SmallCNN(num_classes=2)
    model.load_state_dict(weights, strict=True)
    assert list(model.state_dict()) == list(OFFICIAL)
    assert torch.equal(model.linear[3].weight, weights["linear.3.weight"])


def test_saliency_layers_have_the_documented_shapes():
    for model, side, shape in ((SmallCNN(), 28, (32, 8, 8)), (ResNet50(), 64, (2048, 2, 2))):
        kept = []
        model.saliency_layer.register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(output))
        logits = model.eval()(torch.rand(2, 3, side, side))
        assert logits.shape == (2, 2)
        assert kept[0].shape == (2, *shape)
    assert sum(parameter.numel() for parameter in SmallCNN().parameters()) == 149_202


def test_resnet50_normalises_inside_and_is_torchvisions():
    torch.manual_seed(0)
    model = ResNet50(num_classes=9).eval()
    images = torch.rand(2, 3, 64, 64)
    plain = torchvision.models.resnet50(num_classes=9).eval()
    plain.load_state_dict(model.model.state_dict(), strict=True)
    normalise = torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(model(images), plain(normalise(images)), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return torchvision.models.resnet50().state_dict()


@pytest.mark.parametrize(("change", "kept"), [
    (lambda s: {name: value for name, value in s.items() if "num_ba" not in name}, False),  # torchvision's first file
    (lambda s: {"module." + name: value for name, value in s.items()}, False),
    (lambda s: {"state_dict": {"model." + name: value for name, value in s.items()}, "epoch": 3}, False),
    (lambda s: {"model": s}, False), (lambda s: {name: value for name, value in s.items() if name[:2] != "fc"}, False),
    (lambda s: s | {"fc.weight": s["fc.weight"][:2], "fc.bias": s["fc.bias"][:2]}, True)])
def test_weights_of_every_wrapping_are_read(change, kept, resnet, tmp_path):
    torch.save(change(dict(resnet)), tmp_path / "w.pth")
    model = ResNet50(2, tmp_path / "w.pth").model
    assert torch.equal(model.layer4[2].conv3.weight, resnet["layer4.2.conv3.weight"])
    assert torch.equal(model.fc.weight, resnet["fc.weight"][:2]) == kept


def test_weights_of_something_else_are_named(resnet, tmp_path):
    for content, message in (
            ({**resnet, "layer3.6.conv1.weight": torch.zeros(1)}, "got layer3.6.conv1.weight and 0 more, as of a la"),
            ({**resnet, "conv1.weight": torch.zeros(1)}, r"conv1.weight in .* to be \(64, 3, 7, 7\), got \(1,\)"),
            ({"conv1.weight": resnet["conv1.weight"]}, r"to hold bn1.weight \(64,\), got 1 other names"),
            ([1], "to hold a dict of weights, got a list")):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=message):
            ResNet50(2, tmp_path / "w.pth")
    torch.save({**resnet, "n_averaged": torch.tensor(1)}, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="passed over what belongs to no part of the model: n_averaged"):
        ResNet50(2, tmp_path / "w.pth")


WEIGHTS = REPOSITORY.parent / "shared" / "weights"


@pytest.mark.parametrize(("name", "file"), [("mobilenet_v2", "mobilenet_v2_features.pt"),
                                            ("squeezenet1_1", "squeezenet1_1.pt")])
def test_backbones_of_torchvision_with_real_weights(name, file):
    """Of the first, all but the last layer is in the file; of both, that is another for two classes."""
    if not WEIGHTS.exists():
        pytest.skip(f"the ImageNet weights are not in {WEIGHTS.parent.name}/{WEIGHTS.name}")
    content = torch.load(WEIGHTS / file, weights_only=True)
    model = Backbone(name, 2, WEIGHTS / file).eval()
    assert all(torch.equal(model.model.state_dict()[key], value) for key, value in content.items()
               if key.startswith("features"))
    images = torch.rand(2, 3, 160, 160)
    assert model(images).shape == (2, 2)
    assert xgradcam(model, images).amax((1, 2)).tolist() == pytest.approx([1, 1], abs=1e-3)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "densenet121", "regnet_y_400mf", "swin_t", "alexnet"])
def test_backbones_name_their_layer_and_keep_a_head_that_fits(name, tmp_path):
    torch.manual_seed(0)
    two, thousand = Backbone(name, 2), Backbone(name, 1000)
    for source, kept in ((two, True), (thousand, False)):
        torch.save(source.model.state_dict(), tmp_path / "w.pth")
        loaded = Backbone(name, 2, tmp_path / "w.pth")
        last = list(loaded.model.parameters())[-2]  # the weights; the biases after it may be 0 in all
        assert torch.equal(last, list(two.model.parameters())[-2]) == kept
        assert torch.equal(next(loaded.model.parameters()), next(source.model.parameters()))
    assert xgradcam(two.eval(), torch.rand(1, 3, 64, 64)).shape == (1, 64, 64)
    with pytest.raises(ValueError, match=r"expected a classifier of torchvision such as resnet, .*got 'resnet19'"):
        Backbone("resnet19")


def test_pooling_before_relu_changes_no_bit():
    """Forward and backward of SmallCNN against its layers run one after the other, as the official code does."""
    torch.manual_seed(0)
    images, results = torch.rand(16, 3, 28, 28), []
    model = SmallCNN()
    plain = nn.Sequential(*model.backbone, *model.linear)
    for run in (model, plain):
        model.zero_grad()
        logits = run(images)
        logits[:, 0].sum().backward()
        results.append([logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_resnet32_is_the_one_of_cifar():
    model = ResNet32().eval()
    assert sum(p.numel() for p in model.parameters()) == 464_154  # He et al. 2016: 0.46 million
    assert sum(isinstance(part, (torch.nn.Conv2d, torch.nn.Linear)) for part in model.modules()) == 32
    kept = []
    model.saliency_layer.register_forward_hook(lambda *arguments: kept.append(arguments[2].shape))
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert kept == [(2, 64, 8, 8)]
    assert ResNet32(2).eval()(torch.rand(1, 3, 64, 64)).shape == (1, 2)


def test_resnet32_shortcut_has_no_parameters():
    block = ResNet32().eval().blocks[5]  # the first of 32 channels
    torch.nn.init.zeros_(block.bn2.weight)  # nothing but the shortcut is left
    features = torch.rand(1, 16, 8, 8)
    assert torch.equal(block(features)[:, :16], features[:, :, ::2, ::2])
    assert not block(features)[:, 16:].any()
