"""Bad input: a clear error before anything is trained, or a right result."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from src.datasets import SpuriousDigits
from src.experiments.recipes import FineTune, SquareErm
from src.experiments.stages import new_model
from src.inference import infer, pixels
from src.masking import find_masks, hottest, masktune_epoch, randmask_epoch
from src.models import ResNet50, SmallCNN
from src.saliency import xgradcam
from src.seeding import generator
from src.state import State
from src.training import sgd, train_epoch

LABELS = torch.arange(8) % 2
IMAGES = torch.randint(256, (8, 3, 28, 28), dtype=torch.uint8, generator=generator(0, "test"))


def fresh(model: nn.Module | None = None) -> State:
    model = model or new_model(0)
    return State(model, sgd(model, 0.9, 1e-4))


WRONG_IMAGES = [
    (IMAGES.numpy(), TypeError, r"expected images as a torch.uint8 tensor \(N, 3, H, W\), got ndarray"),
    (IMAGES / 255, TypeError, r"got torch.float32 \(8, 3, 28, 28\); multiply floats"),
    (IMAGES.to(torch.int64), TypeError, "got torch.int64"),
    (IMAGES[:, :1], ValueError, r"got \(8, 1, 28, 28\); repeat grey images to three channels"),
    (IMAGES[0], ValueError, r"expected images \(N, 3, H, W\), got \(3, 28, 28\)"),
    (IMAGES.permute(0, 2, 3, 1), ValueError, r"got \(8, 28, 28, 3\)"),
    (IMAGES[:0], ValueError, "expected at least one image"),
    (IMAGES[..., :20, :20], ValueError, r"SmallCNN: expected images \(B, 3, 28, 28\), got \(\d, 3, 20, 20\)"),
]


@pytest.mark.parametrize(("images", "kind", "message"), WRONG_IMAGES)
@pytest.mark.parametrize("use", [
    lambda state, images: train_epoch(state, images, LABELS, lr=0.01, batch_size=4, seed=0),
    lambda state, images: masktune_epoch(state, images, LABELS, lr=0.01, batch_size=4, seed=0),
    lambda state, images: randmask_epoch(state, images, LABELS, lr=0.01, batch_size=4, seed=0),
    lambda state, images: find_masks(state.model, images),
    lambda state, images: infer(state.model, images)], ids=["train", "masktune", "randmask", "find_masks", "infer"])
def test_images(images, kind, message, use):
    state = fresh()
    before = copy.deepcopy(state.model.state_dict())
    with pytest.raises(kind, match=message):
        use(state, images)
    assert all(torch.equal(before[name], value) for name, value in state.model.state_dict().items())
    assert state.masks is None


@pytest.mark.parametrize(("images", "kind", "message"), [
    (IMAGES, TypeError, "floats in"),
    (IMAGES.float(), ValueError, r"expected images in \[0, 1\], before any normalisation, got \[0, 255\]"),
    ((pixels(IMAGES) - 0.5) / 0.25, ValueError, "before any normalisation"),
    (pixels(IMAGES).masked_fill(torch.rand(8, 1, 28, 28) < 0.1, torch.nan), ValueError, r"got \[nan, nan\]"),
    (pixels(IMAGES)[:0], ValueError, "B >= 1"),
    (pixels(IMAGES)[0], ValueError, r"\(B, 3, H, W\)")])
def test_pixels_of_a_heat_map(images, kind, message):
    with pytest.raises(kind, match=message):
        xgradcam(new_model(0), images)


@pytest.mark.parametrize(("labels", "message"), [
    (LABELS + 1, r"expected labels in 0..1, since the model has 2 classes, got 1..2"),
    (LABELS - 1, r"got -1..0"),
    (LABELS[:5], r"expected labels torch.int64 \(8,\), one for each image, got torch.int64 \(5,\)"),
    (LABELS.float(), r"got torch.float32 \(8,\)"),
    (LABELS[:, None], r"got torch.int64 \(8, 1\)"),
    (LABELS.tolist(), "got list")])
def test_labels(labels, message):
    state = fresh()
    with pytest.raises(ValueError, match=message):
        train_epoch(state, IMAGES, labels, lr=0.01, batch_size=4, seed=0)
    assert state.model.backbone[1].num_batches_tracked == 0
    with pytest.raises(ValueError, match=message):
        xgradcam(state.model, pixels(IMAGES), classes=labels)


@pytest.mark.parametrize("masks", [torch.zeros(8, 28, 28), torch.zeros(7, 28, 28).bool(),
                                   torch.zeros(8, 1, 28, 28).bool(), np.zeros((8, 28, 28), bool)])
def test_masks(masks):
    for use in (lambda: train_epoch(fresh(), IMAGES, LABELS, masks=masks, lr=0.01, batch_size=4, seed=0),
                lambda: infer(new_model(0), IMAGES, masks), lambda: find_masks(new_model(0), IMAGES, hidden=masks)):
        with pytest.raises(ValueError, match=r"expected masks torch.bool \(8, 28, 28\), one for each image, .* got "):
            use()


def test_a_last_batch_of_one_joins_the_one_before_it():
    """Nine images in batches of four: four and five, none left out, none alone."""
    images, labels = torch.cat([IMAGES, IMAGES[:1]]), torch.cat([LABELS, LABELS[:1]])
    state = fresh()
    train_epoch(state, images, labels, lr=0.01, batch_size=4, seed=0)
    assert state.model.backbone[1].num_batches_tracked == 2


@pytest.mark.parametrize(("n", "batch_size"), [(1, 4), (8, 1)])
def test_batches_of_one_are_refused_where_batchnorm_cannot_take_them(n, batch_size):
    state = fresh()
    with pytest.raises(ValueError, match="expected batches of at least two images, which BatchNorm needs"):
        train_epoch(state, IMAGES[:n], LABELS[:n], lr=0.01, batch_size=batch_size, seed=0)
    assert state.model.backbone[1].num_batches_tracked == 0
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 2))
    train_epoch(fresh(plain), IMAGES[:n], LABELS[:n], lr=0.01, batch_size=batch_size, seed=0)


def test_a_single_image_is_evaluated_and_masked():
    assert infer(new_model(0), IMAGES[:1]).shape == (1, 2)
    assert find_masks(new_model(0), IMAGES[:1]).shape == (1, 28, 28)


def test_a_model_without_a_saliency_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 26 * 26, 2))
    with pytest.raises(ValueError, match="Sequential names no saliency_layer; pass layer="):
        xgradcam(model, pixels(IMAGES))
    assert xgradcam(model, pixels(IMAGES), layer=model[1]).shape == (8, 28, 28)
    for layer, what in ((model[3], r"got \(8, 2\)"), (new_model(0).saliency_layer, "which Sequential did not give")):
        with pytest.raises(ValueError, match=rf"expected a \(B, K, h, w\) output of the layer \w+, {what}"):
            xgradcam(model, pixels(IMAGES), layer=layer)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_maps_that_are_not_finite(value):
    maps = torch.rand(3, 5, 5)
    maps[1, 2, 2] = value
    with pytest.raises(ValueError, match="expected finite heat maps, got NaN or infinity"):
        hottest(maps)
    model = new_model(0)
    with torch.no_grad():
        model.linear[0].weight[0, 0] = value
    with pytest.raises(ValueError, match="expected finite heat maps, got NaN or infinity"):
        find_masks(model, IMAGES)


@pytest.mark.parametrize("make", [SmallCNN, ResNet50])
def test_models_take_other_numbers_of_classes(make):
    assert infer(make(num_classes=7), IMAGES).shape == (8, 7)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: SquareErm(model="LargeCNN"), r"SquareErm: expected model to be .*'ResNet50'\) or a .*, got 'LargeCNN'"),
    (lambda: SquareErm(dataset="MNIST"), r"dataset to be one of \('Spurious.*, got 'MNIST'"),
    (lambda: SquareErm(epochs=0), "epochs to be at least 1, got 0"),
    (lambda: SquareErm(batch_size=0), "batch_size to be at least 1 image, got 0"),
    (lambda: SquareErm(lr=float("nan")), "lr to be positive and finite, got nan"),
    (lambda: SquareErm(lr=-0.01), "lr to be .*, got -0.01"), (lambda: SquareErm(classes=1), "at least 2, got 1"),
    (lambda: SquareErm(lr_halved_every=0), "lr_halved_every to be at least 1 epoch, got 0"),
    (lambda: FineTune(method="Masktune"), r"method to be one of \('masktune', 'randmask', 'plain'\), got 'Masktune'"),
    (lambda: FineTune(lr=0), "FineTune: expected lr to be positive and finite, got 0"),
    (lambda: FineTune(threshold_std=float("inf")), "threshold_std to be finite, got inf"),
    (lambda: FineTune(ending="mean"), r"ending to be one of \('constant', 'decay', 'average'\), got 'mean'"),
    (lambda: FineTune(order=-1), "order to be at least 0, got -1"),
    (lambda: replace(FineTune(), iterations=0), "iterations to be at least 1, got 0")])
def test_configurations(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_seeds_are_whole_numbers():
    same = [SpuriousDigits(train=True, seed=seed).squares for seed in (3, np.int64(3), torch.tensor(3))]
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])
    for seed in (1.5, "3", None):
        with pytest.raises(TypeError):
            SpuriousDigits(train=True, seed=seed)
