"""Heat maps against the grad-cam library, without a trace, and how a layer's output is laid out."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_grad_cam import XGradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from src import layout
from src.holes import pixels
from src.models import ResNet50
from src.saliency import xgradcam
from src.state import digest


@pytest.fixture(scope="module")
def images(train):
    return pixels(train.images[:256])


def test_equals_grad_cam(run, images, train):
    """For the predicted classes, and for given ones; of a large network on images that are not square."""
    torch.manual_seed(0)
    for model, seen, classes in ((run.erm.model, images, None), (run.erm.model, images, 1 - train.labels[:256]),
                                 (ResNet50(num_classes=9).eval(), torch.rand(3, 3, 96, 64), None)):
        with torch.no_grad():  # gradients are its own affair
            ours = xgradcam(model, seen, classes=classes)
        copied = copy.deepcopy(model)  # since theirs leaves its traces
        targets = None if classes is None else [ClassifierOutputTarget(int(label)) for label in classes]
        theirs = XGradCAM(model=copied, target_layers=[copied.saliency_layer])(seen, targets)
        assert ours.shape == (len(seen), *seen.shape[2:])
        assert ours.amax() > 0.9
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def traces(model):
    """What an explanation could leave behind in a model."""
    return [(part.training, len(part._forward_hooks)) for part in model.modules()], digest(model.state_dict()), {
        name: (weight.requires_grad, weight.grad is not None and weight.grad.tolist())
        for name, weight in model.named_parameters()}


def test_leaves_no_trace(run, images):
    model, kept = copy.deepcopy(run.erm.model).train(), []
    for part in model.backbone[:12]:
        part.register_forward_hook(lambda _module, _inputs, output: kept.append(output.requires_grad))
    model.backbone[1].eval()  # a part in another mode than the whole
    model.backbone[0].bias.requires_grad = False
    model.linear[0].weight.grad = torch.ones_like(model.linear[0].weight)
    before = traces(model)
    xgradcam(model, images)
    assert kept == [False] * 12  # nothing of what comes before the layer: of a ResNet50 that would be 100 MB an image
    for wrong in (dict(layer=model.linear[0]), dict(classes=torch.full((len(images),), 2))):
        with pytest.raises(ValueError, match=r"a map of the image|labels in"):
            xgradcam(model, images, **wrong)  # an error half-way must not leave a trace either
    assert traces(model) == before


def tokens(maps, prefix=0):
    return F.pad(maps.flatten(2).transpose(1, 2), (0, 0, prefix, 0))


LAYOUTS = [  # what a layer makes of true maps (B, 12, 6, 8), and how that is read
    (lambda maps: maps, "(B, K, h, w)"), (lambda maps: maps.permute(0, 2, 3, 1), "(B, h, w, K)"),
    (tokens, "(B, h w, K)"), (lambda maps: tokens(maps, 1), "(B, 1 + h w, K)"),
    (lambda maps: tokens(maps, 2), "(B, 2 + h w, K)"), (lambda maps: tokens(maps, 5), "(B, 5 + h w, K)"),
    (lambda maps: maps[..., :3].transpose(2, 3), None), (lambda maps: maps.flip(3), None),
    (lambda maps: maps.roll(3, 2), None), (lambda maps: tokens(maps.transpose(2, 3)), None),
    (lambda maps: maps.flatten(2), None), (lambda maps: tokens(maps).unflatten(2, (3, 4)).transpose(1, 2), None),
    (lambda maps: maps.mean((2, 3)), None),
    (lambda maps: maps.mean((2, 3), keepdim=True) + 0 * maps, None),  # the same everywhere
    (lambda maps: (tokens(maps) @ tokens(maps).mT).softmax(2)[:, None], None),  # attention of positions
    (lambda maps: (tokens(maps).mT @ tokens(maps)).softmax(2)[:, None], None)]  # of channels


@pytest.mark.parametrize(("make", "name"), LAYOUTS)
def test_a_layout_is_read_in_its_own_order_or_refused(make, name):
    torch.manual_seed(0)
    seen = layout.probe((48, 64), torch.device("cpu")).requires_grad_()
    maps = F.conv2d(F.avg_pool2d(seen, 8), torch.randn(12, 3, 3, 3), padding=1)
    found = layout.reading_of(make(maps), seen)
    assert (found and found[0]) == name
    if found:
        assert torch.equal(found[1](make(maps)), maps)
