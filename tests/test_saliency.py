import copy

import numpy as np
import pytest
import torch
from pytorch_grad_cam import XGradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from src.inference import pixels
from src.models import ResNet50
from src.saliency import resized, xgradcam


def reference(model, images, classes=None):
    """The grad-cam library's heat maps, on a copy, since it leaves its traces."""
    model = copy.deepcopy(model).eval()
    targets = None if classes is None else [ClassifierOutputTarget(int(label)) for label in classes]
    return torch.from_numpy(XGradCAM(model=model, target_layers=[model.saliency_layer])(images, targets))


@pytest.fixture(scope="module")
def images(train):
    return pixels(train.images[:256])


def test_equals_grad_cam_on_a_trained_small_cnn(run, images, train):
    """For the predicted classes, and for given ones."""
    for classes in (None, 1 - train.labels[:256]):
        ours = xgradcam(run.erm.model, images, classes=classes)
        assert ours.amax() > 0.9
        np.testing.assert_allclose(ours, reference(run.erm.model, images, classes), atol=1e-5)


def test_equals_grad_cam_on_resnet50():
    torch.manual_seed(0)
    model = ResNet50(num_classes=9).eval()
    images = torch.rand(3, 3, 96, 64)  # not square
    ours = xgradcam(model, images)
    assert ours.shape == (3, 96, 64)
    assert ours.amax() > 0.9
    np.testing.assert_allclose(ours, reference(model, images), atol=1e-5)


def test_leaves_no_trace(run, images):
    model = copy.deepcopy(run.erm.model).train()
    model.backbone[1].eval()  # a part in another mode than the whole
    model.backbone[0].bias.requires_grad = False
    learning = [weight.requires_grad for weight in model.parameters()]
    model.linear[0].weight.grad = torch.ones_like(model.linear[0].weight)
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    xgradcam(model, images)
    for wrong in (dict(layer=model.linear[0]), dict(classes=torch.full((len(images),), 2))):
        with pytest.raises(ValueError, match=r"expected a \(B, K, h, w\) output|expected labels in"):
            xgradcam(model, images, **wrong)  # an error half-way must not leave a trace either
    assert [module.training for module in model.modules()] == modes
    assert [weight.requires_grad for weight in model.parameters()] == learning
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert list(gradients) == ["linear.0.weight"]
    assert (gradients["linear.0.weight"] == 1).all()


def test_keeps_nothing_of_what_comes_before_the_layer(run, images):
    """Of a ResNet50 that would be 100 MB an image."""
    model, kept = copy.deepcopy(run.erm.model), []
    for part in model.backbone[:12]:
        part.register_forward_hook(lambda _module, _inputs, output: kept.append(output.requires_grad))
    xgradcam(model, images)
    assert kept == [False] * 12


@pytest.mark.parametrize(("old", "new"), [((8, 8), (28, 28)), ((7, 5), (224, 96)), ((1, 1), (4, 4)), ((6, 4), (3, 4))])
def test_resizes_as_pytorch_does(old, new):
    maps = torch.rand(3, *old)
    expected = torch.nn.functional.interpolate(maps[:, None], new, mode="bilinear")[:, 0]
    torch.testing.assert_close(resized(maps, *new), expected, rtol=0, atol=1e-6)


def test_works_without_gradients_enabled(run, images):
    with torch.no_grad():
        assert torch.equal(xgradcam(run.erm.model, images), xgradcam(run.erm.model, images))
