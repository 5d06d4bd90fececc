"""An epoch against a loop of PyTorch's own, the schedule, and where random choices come from."""

import copy

import pytest
import torch
import torch.nn.functional as F

from src.device import cpu_threads
from src.experiments import stages
from src.experiments.recipes import MNIST, Places
from src.experiments.stages import new_model
from src.holes import pixels
from src.inference import infer, score
from src.seeding import epoch_order, generator
from src.state import State
from src.training import epoch_batches, sgd, train_epoch
from tests.conftest import same


def test_the_lr_in_force_is_the_schedules(run, setting):
    assert [MNIST[0].erm.lr_at(epoch) for epoch in range(100)] == (
        [0.01] * 25 + [0.005] * 25 + [0.0025] * 25 + [0.00125] * 25)  # the paper's
    assert run.erm.history["lr"] == [setting.erm.lr_at(epoch) for epoch in range(3)] == [0.01, 0.01, 0.005]
    assert [group["lr"] for group in run.erm.optimizer.param_groups] == [0.005]
    assert [group["lr"] for group in run.finetuned.optimizer.param_groups] == [0.01]


@pytest.mark.parametrize("options", [{}, {"order": 3}, {"masks": torch.rand(100, 28, 28) < 0.5}], ids=list)
def test_two_epochs_equal_a_plain_loop(train, options):
    """Of PyTorch's own SGD, on batches cut by hand; the model arrives in eval mode."""
    ours, theirs, plain = (new_model(1) for _ in range(3))
    state = State(ours.eval(), sgd(ours.parameters(), 0.9, 1e-4))
    images, labels = train.images[:100], train.labels[:100]
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    for epoch in range(2):
        loss, right = train_epoch(state, images, labels, lr=0.01, batch_size=32, seed=1, **options)
        state.finish_epoch()
        met = []
        for index in epoch_order(100, 1, epoch, options.get("order", 0)).split(32):
            optimizer.zero_grad()
            seen = pixels(images[index], options["masks"][index] if "masks" in options else None)
            logits = theirs.train()(seen)
            one = F.cross_entropy(logits, labels[index])
            one.backward()
            optimizer.step()
            met.append((one.item() * len(index), (logits.argmax(1) == labels[index]).sum().item()))
        assert (loss, right) == tuple(pytest.approx(sum(each) / 100, rel=1e-3) for each in zip(*met, strict=True))
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-4, atol=1e-5)
    train_epoch(State(plain, sgd(plain.parameters(), 0.9, 1e-4)), images, labels, lr=0.01, batch_size=32, seed=1)
    assert not same(plain, ours)


def test_the_same_seed_twice_is_equal(run, setting, tmp_path):
    torch.manual_seed(99)  # the global generator has no say
    with cpu_threads(3):  # nor have the threads
        again = stages.run(Places(tmp_path), setting, seed=0)
        assert torch.get_num_threads() == 3
    assert same(again.erm.model, run.erm.model)
    assert same(again.finetuned.model, run.finetuned.model)
    assert again.erm.history == run.erm.history
    assert not same(new_model(1), new_model(0))


def test_random_streams_depend_on_their_purpose_alone():
    orders = [epoch_order(100, 0, 3, order) for order in range(5)] + [epoch_order(100, 0, 4), epoch_order(100, 1, 3)]
    assert len({tuple(order.tolist()) for order in orders}) == 7
    assert torch.equal(torch.cat(epoch_batches(100, 32, 0, 3, order=2)), orders[2])
    # pinned: another value here would give every shipped checkpoint another history
    assert torch.randint(1000, (4,), generator=generator(0, "order", 7)).tolist() == [573, 833, 301, 247]


def test_infer_is_in_eval_mode_and_leaves_the_mode(run, train):
    model = copy.deepcopy(run.erm.model).train()
    logits = infer(model, train.images, batch_size=100)
    assert model.training
    assert same(model, run.erm.model)
    torch.testing.assert_close(logits, model.eval()(pixels(train.images)), rtol=1e-4, atol=1e-4)


def test_score_per_group_and_worst():
    scored = score(torch.tensor([0, 1, 1, 0, 1]), torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 0, 2, 3, 3]))
    assert (scored.average, scored.groups, scored.worst) == (pytest.approx(0.6), {0: 0.5, 2: 1.0, 3: 0.5}, 0.5)


def test_bf16_trains_to_nearly_the_same_weights(train):
    """Autocast changes the third digit; weights and optimizer state stay in fp32."""
    moved, start = {}, new_model(0).state_dict()
    for precision in ("fp32", "bf16"):
        model = new_model(0)
        train_epoch(State(model, sgd(model.parameters(), 0.9, 0)), train.images[:96], train.labels[:96], lr=0.01,
                    batch_size=32, seed=0, precision=precision)
        moved[precision] = torch.cat([(value - start[name]).flatten() for name, value in model.named_parameters()])
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert 0 < (moved["bf16"] - moved["fp32"]).norm() < 0.2 * moved["fp32"].norm()
