import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from src.device import cpu_threads
from src.experiments import stages
from src.experiments.recipes import DIGITS, FineTune, SquareErm
from src.experiments.stages import new_model
from src.inference import infer, pixels
from src.metrics import score, spread, summarize
from src.seeding import epoch_order, generator
from src.state import State
from src.training import epoch_batches, sgd, train_epoch
from tests.conftest import same


def test_schedule_is_the_papers():
    rates = [SquareErm().lr_at(epoch) for epoch in range(100)]
    assert rates == [0.01] * 25 + [0.005] * 25 + [0.0025] * 25 + [0.00125] * 25


def test_the_lr_in_force_is_the_schedules(run, setting):
    assert run.erm.history["lr"] == [setting.erm.lr_at(epoch) for epoch in range(3)] == [0.01, 0.01, 0.005]
    assert [group["lr"] for group in run.erm.optimizer.param_groups] == [0.005]
    assert [group["lr"] for group in run.finetuned.optimizer.param_groups] == [0.01]


def plain_loop(model, data, epochs=1, decay=False, order=0) -> list[dict[str, torch.Tensor]]:
    """Train on 100 images by PyTorch's own SGD, on batches cut by hand; the weights after each step."""
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4), []
    for epoch in range(epochs):
        model.train()
        for step, index in enumerate(epoch_order(100, 1, epoch, order).split(32)):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 4) if decay else 0.01
            optimizer.zero_grad()
            F.cross_entropy(model(pixels(data.images[index])), data.labels[index]).backward()
            optimizer.step()
            seen.append(copy.deepcopy(model.state_dict()))
    return seen


def close(one: dict, two: dict) -> bool:
    return all(torch.allclose(one[name].float(), two[name].float(), rtol=1e-4, atol=1e-5) for name in one)


@pytest.mark.parametrize("options", [{}, {"decay": True}, {"order": 3}], ids=str)
def test_two_epochs_equal_a_plain_loop(train, options):
    ours, theirs = new_model(1), new_model(1)
    state = State(ours, sgd(ours, 0.9, 1e-4))
    for _ in range(2):
        train_epoch(state, train.images[:100], train.labels[:100], lr=0.01, batch_size=32, seed=1, **options)
        state.finish_epoch()
    assert close(ours.state_dict(), plain_loop(theirs, train, epochs=2, **options)[-1])
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(0.0025 if options.get("decay") else 0.01)
    if options:
        assert not close(ours.state_dict(), plain_loop(new_model(1), train, epochs=2)[-1])


@pytest.mark.parametrize("ending", ["constant", "decay", "average"])
def test_a_fine_tune_ends_as_its_recipe_says(ending, train, setting, tmp_path, monkeypatch):
    """The average is that of the weights and statistics after steps 3 and 4 of 4; it is what is saved."""
    few = SimpleNamespace(images=train.images[:100], labels=train.labels[:100])
    monkeypatch.setattr(stages, "load_data", lambda *_: few)
    monkeypatch.setattr(stages, "CHECKPOINTS", tmp_path)
    start = new_model(1)
    finetune = FineTune("plain", ending=ending)
    run = partial(stages.run_finetune, setting, 1, State(start, sgd(start, 0.9, 1e-4)), finetune)
    first, loaded = run().model, run().model
    assert same(first, loaded)
    tuned = first.state_dict()
    seen = plain_loop(start, train, decay=ending == "decay")
    mean = {name: (seen[2][name] + seen[3][name]) / 2 for name in tuned if tuned[name].is_floating_point()}
    assert close(mean if ending == "average" else seen[3], tuned)
    assert close(mean, tuned) == (ending == "average")


def test_the_same_seed_twice_is_equal(run, setting, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "CHECKPOINTS", tmp_path)
    torch.manual_seed(99)  # the global generator has no say
    with cpu_threads(3):  # nor have the threads
        again = stages.run(setting, seed=0)
        assert torch.get_num_threads() == 3
    assert same(again.erm.model, run.erm.model)
    assert same(again.finetuned.model, run.finetuned.model)
    assert again.erm.history == run.erm.history
    assert not same(new_model(1), new_model(0))


def test_random_streams_depend_on_their_purpose_alone():
    assert torch.equal(epoch_order(100, 0, 3), epoch_order(100, 0, 3))
    assert torch.equal(epoch_order(100, 0, 3, 0), torch.randperm(100, generator=generator(0, "order", 3)))
    orders = [epoch_order(100, 0, 3, order) for order in range(5)]
    assert all(order.sort().values.tolist() == list(range(100)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 5
    assert torch.equal(torch.cat(epoch_batches(100, 32, 0, 3, order=2)), orders[2])
    assert not torch.equal(epoch_order(100, 0, 3), epoch_order(100, 0, 4))
    assert not torch.equal(epoch_order(100, 0, 3), epoch_order(100, 1, 3))
    # pinned: another value here would give every shipped checkpoint another history
    assert torch.randint(1000, (4,), generator=generator(0, "order", 7)).tolist() == [573, 833, 301, 247]


def test_infer_is_in_eval_mode_and_leaves_the_mode(run, train):
    model = copy.deepcopy(run.erm.model).train()
    before = copy.deepcopy(model.state_dict())
    logits = infer(model, train.images, batch_size=100)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(logits, model.eval()(pixels(train.images)), rtol=1e-4, atol=1e-4)


def test_score_per_group_and_worst():
    scored = score(torch.tensor([0, 1, 1, 0, 1]), torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 0, 2, 3, 3]))
    assert scored.average == pytest.approx(0.6)
    assert scored.groups == {0: 0.5, 2: 1.0, 3: 0.5}
    assert scored.worst == 0.5


def test_summary_is_mean_and_sample_std():
    assert str(summarize([0.98, 0.99, 1.0])) == "99.0 ± 1.0"
    assert str(summarize([0.5])) == "50.0"
    assert math.isnan(summarize([0.5]).std)


def test_spread_over_seeds_and_orders():
    over_seeds, over_orders = spread([[1.0, 3.0], [4.0, 8.0]])
    assert over_seeds == pytest.approx(math.sqrt(8))  # of the means 2 and 6
    assert over_orders == pytest.approx(math.sqrt(5))  # of the variances 2 and 8
    assert math.isnan(spread([[1.0, 3.0]])[0])
    assert spread([[1.0], [4.0]]) == (pytest.approx(math.sqrt(4.5)), 0.0)


def test_dataset_choice(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MASKTUNE_DATASET", "digits")
    assert stages.choose_settings() == DIGITS
    with pytest.raises(ValueError, match="expected dataset to be 'mnist' or 'digits', got 'cifar'"):
        stages.choose_settings(dataset="cifar")
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").mkdir(parents=True)  # no place for a file
    assert stages.choose_settings(tmp_path, "mnist") == DIGITS
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "MNIST is unavailable, so everything below runs on scikit-learn's digits instead: " in said


def test_bf16_trains_to_nearly_the_same_weights(train):
    """Autocast changes the third digit; weights and optimizer state stay in fp32."""
    moved, start = {}, new_model(0).state_dict()
    for precision in ("fp32", "bf16"):
        model = new_model(0)
        state = State(model, sgd(model, 0.9, 0))
        train_epoch(state, train.images[:96], train.labels[:96], lr=0.01, batch_size=32, seed=0, precision=precision)
        moved[precision] = torch.cat([(value - start[name]).flatten() for name, value in model.named_parameters()])
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert 0 < (moved["bf16"] - moved["fp32"]).norm() < 0.2 * moved["fp32"].norm()
    with pytest.raises(ValueError, match=r"expected precision to be one of \('fp32', 'bf16'\), got 'fp16'"):
        train_epoch(state, train.images, train.labels, lr=0.01, batch_size=32, seed=0, precision="fp16")
