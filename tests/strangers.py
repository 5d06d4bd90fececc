"""Models and data that are not ours, for the tests of `masktune()`."""

import torch
from torch import nn

from src.datasets.images import Images
from src.repair import masktune


def images(n: int = 16, side: int = 32, classes: tuple[str, ...] = ("a", "b")) -> Images:
    draw = torch.Generator().manual_seed(0)
    return Images(torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=draw),
                  torch.arange(n) % len(classes), classes)


class Net(nn.Module):
    """Counts the images that it is trained on, in a list that copies share."""

    trained: list

    def __init__(self, outputs: int = 2, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, outputs)
        Net.trained = []

    def forward(self, x):
        if self.training:
            Net.trained.append(len(x))
        return self.head(self.f(x).mean((2, 3)))


class Wrapped(Net):
    """Gives what a function makes of its logits."""

    def __init__(self, wrap, outputs: int = 2) -> None:
        super().__init__(outputs)
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(super().forward(x), self.training)


class View(Net):
    """`view` does not stand images whose channels come last."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8 * 30 * 30, 2)

    def forward(self, x):
        return self.head(self.f(x).view(len(x), -1))


def repair(model: nn.Module, data=None, **options):
    options = {"layer": "f", "lr": 0.01, "batch_size": 8} | options
    return masktune(model, images() if data is None else data, **options)


def equal(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip((*one.parameters(), *one.buffers()),
                                                 (*two.parameters(), *two.buffers()), strict=True))
