"""All families of classifiers in torchvision: the layer that is suggested, its map against grad-cam's, and a repair."""

import warnings

import pytest
import torch
import torchvision
from pytorch_grad_cam import XGradCAM
from torch import Tensor, nn
from torchvision.models.maxvit import MaxVit
from torchvision.models.vision_transformer import VisionTransformer

from src.classifier import Classifier, copied
from src.datasets.images import Images
from src.repair import masktune
from src.saliency import suggest_layers, xgradcam


def alexnet() -> nn.Module:
    model = torchvision.models.alexnet()
    model.classifier = nn.Linear(9216, 2)  # the three that it has would take seconds
    return model


def vgg11() -> nn.Module:
    model = torchvision.models.vgg11()
    model.classifier = nn.Linear(25088, 2)
    return model


def inception() -> nn.Module:
    return torchvision.models.inception_v3(num_classes=2, aux_logits=False, init_weights=False)  # they want 299 pixels


def vit() -> nn.Module:
    model = VisionTransformer(64, patch_size=16, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=2)
    nn.init.normal_(model.heads.head.weight, std=0.1)  # torchvision's zeros would make all maps zero
    return model


def maxvit() -> nn.Module:
    return MaxVit((64, 64), stem_channels=16, partition_size=2, block_channels=[16, 32], block_layers=[1, 1],
                  head_dim=16, stochastic_depth_prob=0.2, num_classes=2)


def tokens(side: int):
    return lambda output: output[:, 1:].transpose(1, 2).unflatten(2, (side, side))


def channels_last(output: Tensor) -> Tensor:
    return output.permute(0, 3, 1, 2)


FAMILIES = {  # model, pixels, the layer suggested first, the size of its map, the transform that grad-cam needs
    "alexnet": (alexnet, 96, "features.11", 5, None),
    "vgg11": (vgg11, 64, "features.19", 4, None),
    "resnet18": (torchvision.models.resnet18, 64, "layer3", 4, None),
    "densenet121": (torchvision.models.densenet121, 64, "features.denseblock3", 4, None),
    "googlenet": (torchvision.models.googlenet, 64, "inception4e", 4, None),
    "inception_v3": (inception, 96, "Mixed_6e", 4, None),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, 64, "features.13", 4, None),
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, 64, "features.8", 4, None),
    "squeezenet1_1": (torchvision.models.squeezenet1_1, 96, "features", 5, None),
    "shufflenet_v2_x0_5": (torchvision.models.shufflenet_v2_x0_5, 64, "stage3", 4, None),
    "efficientnet_b0": (torchvision.models.efficientnet_b0, 64, "features.5", 4, None),
    "regnet_y_400mf": (torchvision.models.regnet_y_400mf, 64, "trunk_output.block3", 4, None),
    "mnasnet0_5": (torchvision.models.mnasnet0_5, 64, "layers.11", 4, None),
    "convnext_tiny": (torchvision.models.convnext_tiny, 64, "features.5", 4, None),
    "vit": (vit, 64, "encoder.layers.encoder_layer_1", 4, tokens(4)),
    "swin_t": (torchvision.models.swin_t, 64, "features.5", 4, channels_last),
    "maxvit": (maxvit, 64, "blocks.1", 8, None)}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_explained_as_by_grad_cam_and_repaired(name):
    make, side, layer, size, transform = FAMILIES[name]
    draw = torch.Generator().manual_seed(0)
    data = Images(torch.randint(256, (6, 3, side, side), dtype=torch.uint8, generator=draw), torch.arange(6) % 2,
                  ("a", "b"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's own, of initial weights
        torch.manual_seed(0)
        model = make() if make in (alexnet, vgg11, inception, vit, maxvit) else make(num_classes=2)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # of all batches seen: so one is enough, and activations do not fade away
    with torch.no_grad():
        model.train()(data.images / 255)
    assert suggest_layers(model.eval(), data.images)[0] == (layer, (size, size))
    exact, images = copied(model).double(), data.images[:2].double() / 255  # a sum of tokens may be near 0, and divides
    ours = xgradcam(Classifier(exact, layer), images)
    theirs = XGradCAM(exact, [exact.get_submodule(layer)], reshape_transform=transform)(images.clone(), targets=None)
    print(f"\n| {name} | {layer} | {size}x{size} | {(ours - torch.from_numpy(theirs)).abs().max():.1e} |")
    torch.testing.assert_close(ours, torch.from_numpy(theirs).float(), rtol=0, atol=1e-5)
    assert ours.max() > 0.9  # no comparison of zeros
    repaired, report = masktune(model, data, layer=layer, lr=1e-3, batch_size=3, k=1)
    assert 0.001 < report.hidden < 0.5
    assert type(repaired) is type(model)
    assert any(not torch.equal(one, two) for one, two in zip(model.parameters(), repaired.parameters(), strict=True))
