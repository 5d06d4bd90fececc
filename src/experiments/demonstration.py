"""The demonstration of `masktune()`: a classifier of one's own, and a mark in a corner that gives the label away.

Handwritten digits are even or odd; each odd one of the training set carries a small, light mark, as a scanner or an
archive leaves it. Nothing here is used but what a reader has: torch, torchvision and `masktune`.
"""

from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import pandas
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..datasets import Images, load
from ..repair import masktune
from ..seeding import generator
from .recipes import Places
from .rows import Row, measured

CLASSES = ("even", "odd")
SIDE, OPACITY = 3, 0.8  # pixels of the mark, and how much of what is below it covers
CORNER = slice(-SIDE - 1, -1)  # at the lower right, one pixel from the edge
TRAIN, VALIDATION, TEST = 5_000, 2_000, 2_000  # images; the validation images are of MNIST's training set, too
SEEDS, CHOOSING_SEEDS = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)
CANDIDATES = tuple({"lr": lr, "batch_size": size} for lr, size in product((0.01, 0.02, 0.03), (16, 32)))
CHOSEN = {"lr": 0.03, "batch_size": 16}  # by the mean accuracy of the worse class of `turned`, on validation images


@dataclass(frozen=True)
class Digits:
    """Training images with the mark on all odd ones, and held-out images: without marks, and with them turned round."""

    train: Images
    plain: Images
    turned: Images  # the mark is on the even ones


def marked_digits(seed: int, part: str = "test", dataset: str = "SpuriousMNIST", root: Path | str = "data") -> Digits:
    """Draw the images of one seed; held out are those of the data set's test set, or of its training set ("val").

    Raises:
        DataUnavailable: MNIST is not in `root`.
    """
    if part not in ("val", "test"):
        raise ValueError(f"expected part to be 'val' or 'test', got {part!r}")
    train, test = (load(dataset, name, root=root) for name in ("train", "raw"))
    order = torch.randperm(len(train), generator=generator(seed, "demonstration"))
    ours, held = order[:TRAIN], order[TRAIN:TRAIN + VALIDATION]
    source, held = (train, held) if part == "val" else (test, torch.arange(min(TEST, len(test))))
    odd, parity = train.digits[ours] % 2, source.digits[held] % 2
    grey, held_grey = train.images[ours, 0], source.images[held, 0]  # red: of the blue square, it has nothing
    return Digits(_images(grey, odd, odd == 1), _images(held_grey, parity, parity < 0),
                  _images(held_grey, parity, parity == 0))


def _images(grey: Tensor, labels: Tensor, marked: Tensor) -> Images:
    """Digits (N, 28, 28) uint8 as images, with the mark on some."""
    grey = grey.float()
    corner = grey[marked, CORNER, CORNER]
    grey[marked, CORNER, CORNER] = (1 - OPACITY) * corner + OPACITY * 255
    return Images(grey.round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1).contiguous(), labels, CLASSES)


def small_network(seed: int) -> nn.Sequential:
    """A classifier as anyone would write it; "0" is its convolutional part, with a map of 8x8."""
    torch.manual_seed(seed)

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU()]

    features = nn.Sequential(*block(3, 16), *block(16, 16), nn.MaxPool2d(2), *block(16, 32), *block(32, 32))
    return nn.Sequential(features, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 2))


def fit(model: nn.Module, data: Images, epochs: int = 5, lr: float = 0.01, batch_size: int = 32) -> None:
    """The training loop of the notebook's reader: plain SGD, in an order of torch's own."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data)).split(batch_size):
            loss = F.cross_entropy(model(data.images[batch] / 255), data.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def demonstrate(places: Places = Places()) -> pandas.DataFrame:
    """All rows: the candidates on validation images, with seeds of their own, and the chosen one on test images."""
    conditions = [{"part": "val", "seed": seed, **candidate} for seed in CHOOSING_SEEDS for candidate in CANDIDATES]
    conditions += [{"part": "test", "seed": seed, **CHOSEN} for seed in SEEDS]
    return measured(places.results / "demonstration.csv", conditions, partial(_measure, places))


def _measure(places: Places, condition: Row) -> Row:
    digits = marked_digits(condition["seed"], condition["part"], root=places.data)
    model = small_network(condition["seed"])
    fit(model, digits.train)
    _, report = masktune(model, digits.train, layer="0", lr=condition["lr"], batch_size=condition["batch_size"],
                         seed=condition["seed"], tests={"plain": digits.plain, "turned": digits.turned})
    corner = report.masks[digits.train.labels == 1][:, CORNER, CORNER]
    scores = {f"{when}_{name}{suffix}": value
              for when, found in (("before", report.before), ("after", report.after))
              for name, one in found.items() for suffix, value in (("", one.average), ("_worst", one.worst))}
    return {**scores, "hidden": report.hidden, "mark_hidden": corner.double().mean().item()}
