"""Models of all kinds: what was frozen stays, outputs of every form are read, what cannot be worked on is named."""

import sys
import warnings
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import nn

from src.classifier import Classifier, copied
from src.datasets.images import Images
from src.repair import masktune
from src.saliency import suggest_layers
from tests.strangers import Net, View, equal, images, repair

pytestmark = pytest.mark.filterwarnings("ignore:the model is right on only:UserWarning")


# what the user froze


def test_the_same_seed_draws_the_same_dropout():
    model = nn.Sequential(Net().f, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 2))
    torch.manual_seed(1)
    first = repair(model, layer="0")[0]
    after = torch.rand(1)
    torch.manual_seed(2)
    assert equal(first, repair(model, layer="0")[0])
    assert not equal(first, repair(model, layer="0", seed=1)[0])
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)  # the user's own stream goes on as if nothing had been drawn


@pytest.mark.parametrize(("freeze", "moves"), [
    (lambda model: None, True), (lambda model: model.eval(), True), (lambda model: model.f[1].eval(), False),
    (lambda model: model.f.eval(), False), (lambda model: model.f.requires_grad_(False), True),
    (lambda model: model.eval().f.requires_grad_(False), False)])
def test_batchnorm_stays_as_the_user_left_it(freeze, moves):
    """Frozen is what is in eval mode in a model in train mode; in one in eval mode, what asks for no gradient."""
    model = Net()
    freeze(model)
    modes = [part.training for part in model.modules()]
    repaired = repair(model)[0]
    assert [part.training for part in model.modules()] == modes
    assert (int(repaired.f[1].num_batches_tracked), not torch.equal(repaired.f[1].running_mean,
                                                                   model.f[1].running_mean)) == (2 * moves, moves)


def test_frozen_weights_stay_and_all_frozen_is_an_error():
    model = Net()
    model.f.requires_grad_(False)
    repaired = repair(model)[0]
    assert torch.equal(repaired.f[0].weight, model.f[0].weight)
    assert not torch.equal(repaired.head.weight, model.head.weight)
    assert not repaired.f[0].weight.requires_grad
    with pytest.raises(ValueError, match="got a model in which requires_grad is False for all"):
        repair(Net().requires_grad_(False))


class NoGrad(Net):
    def forward(self, x):
        with torch.no_grad():
            y = self.f(x)
        return self.head(y.mean((2, 3)))


def test_a_layer_without_a_gradient_is_an_error():
    with pytest.raises(ValueError, match=r"layer 'f.2': expected a gradient from the logits back .*torch.no_grad"):
        repair(NoGrad(), layer="f.2")
    assert suggest_layers(NoGrad(), images().images) == []
    assert not Net.trained


def test_repairs_where_gradients_are_off():
    with torch.no_grad():
        assert equal(repair(Net())[0], repair(Net())[0])
    assert Net.trained


class Soft(Net):
    def forward(self, x):
        return (9 * super().forward(x)).softmax(1)


class Sigmoid(Net):
    def forward(self, x):
        logits = super().forward(x)
        return (1e5 * (logits - logits.quantile(0.3, 0))).sigmoid()


class LogSoft(Net):
    def forward(self, x):
        return super().forward(x).log_softmax(1)


def test_probabilities_in_the_place_of_logits_are_warned_of():
    for model, message in ((Soft(), "the model's outputs add up to 1.*take the softmax off"),
                           (Sigmoid(1), "the model's output goes .*take the sigmoid off"),
                           (Sigmoid(2), "the model's outputs go .*take the sigmoid off")):
        with pytest.warns(UserWarning, match=message):
            repair(model)
    for model in (LogSoft(), Net(), Net(1)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            repair(model)
        assert not [one for one in said if "probabilit" in str(one.message)]


# outputs and models as they are met


Output = namedtuple("Output", "logits aux_logits")


class Wrapped(Net):
    """Gives what a function makes of its logits."""

    def __init__(self, wrap, outputs: int = 2) -> None:
        super().__init__(outputs)
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(super().forward(x), self.training)


@pytest.mark.parametrize("wrap", [
    lambda y, _: {"logits": y}, lambda y, _: SimpleNamespace(logits=y, hidden_states=None), lambda y, _: (y, None),
    lambda y, _: [y, torch.rand(len(y), 3, 4)], lambda y, _: y[..., None, None],
    lambda y, training: (y, y.detach()) if training else y, lambda y, training: Output(y, 0 * y) if training else y])
def test_outputs_of_every_form_give_the_same_repair(wrap):
    assert equal(repair(Wrapped(wrap))[0], repair(Net())[0])


@pytest.mark.parametrize("wrap", [lambda y, _: y, lambda y, _: y[:, 0], lambda y, _: {"logits": y}])
def test_one_logit_is_that_of_the_second_class(wrap):
    model = Wrapped(wrap, outputs=1)
    logits = Classifier(model, "f").eval()(images().images / 255)
    torch.testing.assert_close(logits.softmax(1)[:, 1], Net(1).eval()(images().images / 255)[:, 0].sigmoid())
    repaired, report = repair(model)
    assert 0.001 < report.hidden < 0.5
    assert not torch.equal(repaired.head.weight, model.head.weight)


@pytest.mark.parametrize(("wrap", "message"), [
    (lambda y, _: (y, y), r"one tensor of logits in the model's tuple, got \[\(8, 2\), \(8, 2\)\]"),
    (lambda y, _: {"out": y}, "got a dict with the keys out"), (lambda y, _: None, "got a NoneType"),
    (lambda y, _: y.argmax(1), "got torch.int64"), (lambda y, _: y[..., None, None].expand(-1, -1, 4, 4), r", 4, 4\)"),
    (lambda y, _: y / 0, "expected finite logits")])
def test_outputs_that_could_be_anything_are_named(wrap, message):
    with pytest.raises(ValueError, match=message):
        repair(Wrapped(wrap))
    assert not Net.trained


def test_aux_logits_of_googlenet_in_train_mode():
    model = torchvision.models.googlenet(num_classes=2, aux_logits=True, init_weights=False)
    repaired, _ = masktune(model, images(6, 64), layer="inception4e", lr=0.01, batch_size=6)
    assert not torch.equal(model.fc.weight, repaired.fc.weight)
    assert torch.equal(model.aux1.fc2.weight, repaired.aux1.fc2.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_comes_back_in_its_own_precision(dtype):
    model = Net().to(dtype)
    repaired, report = repair(model)
    assert {weight.dtype for weight in repaired.parameters()} == {dtype}
    assert report.before["train"].average in (0.5, 1.0)
    assert not torch.equal(model.head.weight, repaired.head.weight)


def test_one_channel_and_coloured_images():
    grey = images()
    grey = Images(grey.images[:, :1].expand(-1, 3, -1, -1).contiguous(), grey.labels, grey.classes)
    assert repair(Net(channels=1), grey, mean=(0.1307,), std=(0.3081,))[1].hidden > 0.001
    grey.images[3, 2] = 0
    for coloured in (grey, images()):
        with pytest.raises(ValueError, match="the model takes one channel, and there are coloured images"):
            repair(Net(channels=1), coloured)


def test_what_wraps_a_model_is_taken_off(monkeypatch):
    monkeypatch.setattr(sys.modules["torch.nn.parallel.data_parallel"], "_get_available_device_type", lambda: None)
    whole = repair(Net())[0]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        distributed = nn.parallel.DistributedDataParallel(Net())
    finally:
        dist.destroy_process_group()
    for wrapped in (nn.DataParallel(Net()), distributed, torch.compile(Net(), backend="eager")):
        for layer in ("f", "module.f", "_orig_mod.f"):
            repaired = repair(wrapped, layer=layer)[0]
            assert type(repaired) is Net
            assert equal(repaired, whole)


class Keeps(Net):
    def forward(self, x):
        self.seen = [self.f(x)]
        return self.head(self.seen[0].mean((2, 3)))


class Extra(Net):
    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        assert state == {"version": 1}


class Mask(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("attn_mask", torch.full((4, 4), float("-inf")).triu(1))



def normed() -> nn.Module:
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would have its newer one
        model.head = nn.utils.weight_norm(model.head)
    return model


@pytest.mark.parametrize("make", [Keeps, Extra, Mask, View, normed])
def test_models_that_a_plain_copy_or_check_does_not_stand(make, tmp_path):
    model = make()
    model(torch.rand(2, 3, 32, 32))
    repaired, _ = repair(model, checkpoint=tmp_path / "c.pt")
    assert not equal(model, repaired)
    assert equal(repair(model, checkpoint=tmp_path / "c.pt")[0], repaired)
    copied(repaired)


def test_models_that_cannot_be_worked_on():
    class Locked(Net):
        def __init__(self) -> None:
            super().__init__()
            self.stream = (i for i in range(3))

    lazy = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(2))
    for model, message in ((Locked(), "expected a model that copy.deepcopy can copy, got Locked"),
                           (lazy, "lazy layers that have seen no image"), (nn.Flatten(), "layer to name a module"),
                           (lambda x: x, "expected model to be a torch.nn.Module, got a function"),
                           (torchvision.models.vit_b_32(num_classes=2), r"VisionTransformer fails on images \(8, 3")):
        with pytest.raises((TypeError, ValueError), match=message):
            repair(model, layer="encoder.layers.encoder_layer_10" if "Vision" in message else
                   "0" if model is lazy else "f")
