"""Bad input to the method's own functions: a clear error before anything is trained, or a right result."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from src.datasets import SpuriousDigits
from src.holes import pixels
from src.inference import infer
from src.masking import find_masks, hottest, masktune_epoch, randmask_epoch
from src.models import SmallCNN
from src.saliency import xgradcam
from src.seeding import generator
from src.state import State
from src.training import sgd, train_epoch

LABELS = torch.arange(8) % 2
IMAGES = torch.randint(256, (8, 3, 28, 28), dtype=torch.uint8, generator=generator(0, "test"))
FLOATS = pixels(IMAGES)
USES = {  # each with the arguments that it looks at
    train_epoch: ("images", "labels", "masks", "lr", "batch_size", "precision"),
    masktune_epoch: ("images", "labels", "lr", "batch_size", "precision", "k"),
    randmask_epoch: ("images", "labels", "lr", "batch_size", "precision"),
    find_masks: ("images", "hidden", "k"), infer: ("images",), xgradcam: ("pixels", "classes")}
MASKS = ((torch.zeros(8, 28, 28), "torch.float32"), (torch.zeros(7, 28, 28).bool(), r"\(7, 28, 28\)"),
         (torch.zeros(8, 1, 28, 28).bool(), r"\(8, 1, 28, 28\)"), (np.zeros((8, 28, 28), bool), "ndarray"))
NUMBERS = ((LABELS + 1, r"1\.\.2"), (LABELS - 1, r"-1\.\.0"), (LABELS[:5], r"\(5,\)"), (LABELS.float(), "float32"),
           (LABELS[:, None], r"\(8, 1\)"), (LABELS.tolist(), "got list"))
BAD = {  # by argument: what goes in, and the word that must be in the message
    "images": ((IMAGES.numpy(), "ndarray"), (FLOATS, "torch.float32"), (IMAGES.long(), "torch.int64"),
               (IMAGES[:, :1], r"\(8, 1, 28, 28\)"), (IMAGES[0], r"\(3, 28, 28\)"), (IMAGES[:0], r"\(0, 3, 28, 28\)"),
               (IMAGES.permute(0, 2, 3, 1), r"\(8, 28, 28, 3\)"), (IMAGES[..., :20, :20], r"SmallCNN.*, 3, 20, 20\)")),
    "pixels": ((IMAGES, "torch.uint8"), (IMAGES.float(), r"\[0, 255\]"), (FLOATS - 0.5, "normalisation"),
               (FLOATS.masked_fill(IMAGES < 9, torch.nan), "nan"), (FLOATS[:0], r"\(0, 3, 28, 28\)"),
               (FLOATS[0], r"\(3, 28, 28\)")),
    "labels": NUMBERS, "classes": NUMBERS, "masks": MASKS, "hidden": MASKS, "k": ((torch.nan, "nan"), (-1, "-1")),
    "lr": ((-0.1, "lr.*-0.1"), (torch.inf, "lr.*inf")), "batch_size": ((0, "batch_size"), (1.5, "batch_size")),
    "precision": (("fp16", "precision.*fp16"),)}


@pytest.mark.parametrize(("use", "name", "value", "said"), [
    (use, name, value, said) for use, names in USES.items() for name in names for value, said in BAD[name]])
def test_bad_input_is_named_before_anything_is_trained(use, name, value, said):
    model = SmallCNN()
    before = copy.deepcopy(model.state_dict())
    trains = use in (train_epoch, masktune_epoch, randmask_epoch)
    given = dict(lr=0.01, batch_size=4, seed=0, labels=LABELS) if trains else {}
    given |= {"images": FLOATS if use is xgradcam else IMAGES, "images" if name == "pixels" else name: value}
    with pytest.raises((TypeError, ValueError), match=said):
        use(State(model, sgd(model.parameters(), 0.9, 1e-4)) if trains else model, **given)
    assert all(torch.equal(before[key], one) for key, one in model.state_dict().items())


def test_batches_of_one_join_others_or_are_refused_where_batchnorm_cannot_take_them():
    model = SmallCNN()
    state = State(model, sgd(model.parameters(), 0.9, 1e-4))
    train_epoch(state, torch.cat([IMAGES, IMAGES])[:9], torch.cat([LABELS, LABELS])[:9], lr=0.01, batch_size=4, seed=0)
    assert state.model.backbone[1].num_batches_tracked == 2
    for n, batch_size in ((1, 4), (8, 1)):
        with pytest.raises(ValueError, match="BatchNorm"):
            train_epoch(state, IMAGES[:n], LABELS[:n], lr=0.01, batch_size=batch_size, seed=0)
    assert infer(state.model, IMAGES[:1]).shape == (1, 2)
    assert find_masks(state.model, IMAGES[:1]).shape == (1, 28, 28)


def test_maps_that_are_not_finite():
    model = SmallCNN()
    nn.init.constant_(model.linear[0].weight, torch.nan)
    for fails in (lambda: hottest(torch.full((3, 5, 5), torch.inf)), lambda: find_masks(model, IMAGES)):
        with pytest.raises(ValueError, match="finite"):
            fails()


def test_seeds_are_whole_numbers():
    for seed in (np.int64(3), torch.tensor(3)):
        assert torch.equal(SpuriousDigits(train=True, seed=seed).squares, SpuriousDigits(train=True, seed=3).squares)
    for seed in (1.5, "3", None):
        with pytest.raises(TypeError):
            SpuriousDigits(train=True, seed=seed)
