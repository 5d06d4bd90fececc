"""The demonstration: a mark gives the label away, and masktune() takes that from a network of one's own."""

import pytest
import torch

from src.experiments.demonstration import CHOSEN, CORNER, fit, marked_digits, small_network
from src.repair import masktune


@pytest.fixture(scope="module")
def digits():
    return marked_digits(0, dataset="SpuriousDigits")


def test_the_mark_goes_with_the_label_and_is_turned_round(digits):
    corners = {name: data.images[:, :, CORNER, CORNER].float().mean((1, 2, 3)) for name, data in vars(digits).items()}
    assert ((corners["train"] > 200) == (digits.train.labels == 1)).all()
    assert ((corners["turned"] > 200) == (digits.turned.labels == 0)).all()
    assert not (corners["plain"] > 100).any()
    assert digits.train.images.shape == (1347, 3, 28, 28)
    assert torch.equal(digits.train.images[:, 0], digits.train.images[:, 2])
    again = marked_digits(0, dataset="SpuriousDigits").train.images
    assert torch.equal(again, digits.train.images)
    assert not torch.equal(marked_digits(1, dataset="SpuriousDigits").train.images, again)


def test_validation_images_are_none_of_the_training_images(mnist_root):
    held = marked_digits(5, validation=True, root=mnist_root)
    ours = {image.numpy().tobytes() for image in held.train.images[:, 0, :-4]}  # without the row of the mark
    assert len(held.train) == 5000
    assert len(held.plain) == len(held.turned) == 2000
    assert not ours & {image.numpy().tobytes() for image in held.plain.images[:, 0, :-4]}


def test_a_network_of_ones_own_is_repaired(digits):
    model = small_network(0)
    fit(model, digits.train, epochs=8)
    _, report = masktune(model, digits.train, layer="0", **CHOSEN, tests={"turned": digits.turned})
    assert report.before["turned"].average < 0.4
    assert report.after["turned"].average > report.before["turned"].average + 0.2
    assert report.masks[digits.train.labels == 1][:, CORNER, CORNER].double().mean() > 0.8
