"""The demonstration of `masktune()`: a classifier of one's own, and a mark in a corner that gives the label away.

Handwritten digits are even or odd; each odd one of the training set carries a small, light mark, as a scanner or an
archive leaves it. Nothing here is used but what a reader has: torch, torchvision and `masktune`.
"""

from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

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


def marked_digits(seed: int, validation: bool = False, dataset: str = "SpuriousMNIST", root: Path | str = "data"
                  ) -> SimpleNamespace:
    """Draw images from a seed: `train`, with the mark on all odd ones, and `plain` without, `turned` on all even ones.

    The last two are held out, of the data set's test set, or of its training set.
    """
    train, test = (load(dataset, name, root=root) for name in ("train", "raw"))
    order = torch.randperm(len(train), generator=generator(seed, "demonstration"))
    held, chosen = (train, order[TRAIN:TRAIN + VALIDATION]) if validation else (test, slice(TEST))
    return SimpleNamespace(train=_marked(train, order[:TRAIN], 1), plain=_marked(held, chosen, -1),
                           turned=_marked(held, chosen, 0))


def _marked(digits: Images, chosen: Tensor | slice, label: int) -> Images:
    """Some digits, even or odd, with the mark on all of one label; -1: on none."""
    labels = digits.digits[chosen] % 2
    marked, grey = labels == label, digits.images[chosen, 0].float()  # red: of the blue square, it has nothing
    grey[marked, CORNER, CORNER] = (1 - OPACITY) * grey[marked, CORNER, CORNER] + OPACITY * 255
    return Images(grey.round().to(torch.uint8)[:, None].repeat(1, 3, 1, 1), labels, CLASSES)


def small_network(seed: int) -> nn.Sequential:
    """A classifier as anyone would write it; "0" is its convolutional part, with a map of 8x8."""
    torch.manual_seed(seed)

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU()]

    features = nn.Sequential(*block(3, 16), *block(16, 16), nn.MaxPool2d(2), *block(16, 32), *block(32, 32))
    return nn.Sequential(features, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 2))


def fit(model: nn.Module, data: Images, epochs: int = 5) -> None:
    """The training loop of the notebook's reader: plain SGD, in an order of torch's own."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data)).split(32):
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
    digits = marked_digits(condition["seed"], condition["part"] == "val", root=places.data)
    model = small_network(condition["seed"])
    fit(model, digits.train)
    _, report = masktune(model, digits.train, layer="0", lr=condition["lr"], batch_size=condition["batch_size"],
                         seed=condition["seed"], tests={"plain": digits.plain, "turned": digits.turned})
    scores = {f"{when}_{name}{suffix}": value
              for when, found in (("before", report.before), ("after", report.after))
              for name, one in found.items() for suffix, value in (("", one.average), ("_worst", one.worst))}
    corner = report.masks[digits.train.labels == 1][:, CORNER, CORNER]
    return {**scores, "hidden": report.hidden, "mark_hidden": corner.double().mean().item()}
