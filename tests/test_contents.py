"""What a function or an object is by its content."""

from functools import partial

import pytest
import torch
from torch import nn

from src.state import contents, digest

SHIFT, CUT = 0.5, nn.Threshold(0.1, 0)


def scaled(factor):
    return lambda batch: [CUT(one) * factor + SHIFT for one in batch]


class Noise:
    def __init__(self, strength) -> None:
        self.strength = strength

    def __call__(self, batch):
        return batch + self.strength


@pytest.mark.parametrize("make", [scaled, Noise, lambda factor: partial(torch.clamp, max=factor),
                                  lambda factor: nn.CrossEntropyLoss(label_smoothing=factor / 10),
                                  lambda factor: Noise(factor).__call__,
                                  lambda factor: type("Noisier", (Noise,), {"more": factor})(1)])
def test_content_is_what_it_does(make):
    one, same, other = (digest(contents(make(factor))) for factor in (1, 1, 2))
    assert one == same != other


def test_a_changed_global_is_another_content(monkeypatch):
    for name, value in (("SHIFT", 0.6), ("CUT", nn.Threshold(0.2, 0))):
        before = digest(contents(scaled(1)))
        monkeypatch.setitem(globals(), name, value)
        assert digest(contents(scaled(1))) != before
    with pytest.raises(TypeError, match="pickle"), open(__file__) as file:
        contents(file)
