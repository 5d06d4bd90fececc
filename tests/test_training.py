import copy
import math

import pytest
import torch
import torch.nn.functional as F

from src import experiments
from src.experiments import new_model
from src.metrics import score, summarize
from src.recipes import DIGITS, FINETUNE_LRS, SquareErm
from src.seeding import epoch_order, generator
from src.state import State
from src.training import infer, pixels, sgd, train_epoch
from tests.conftest import same


def test_schedule_is_the_papers():
    rates = [SquareErm().lr_at(epoch) for epoch in range(100)]
    assert rates == [0.01] * 25 + [0.005] * 25 + [0.0025] * 25 + [0.00125] * 25


def test_the_lr_in_force_is_the_schedules(run, setting):
    assert run.erm.history["lr"] == [setting.erm.lr_at(epoch) for epoch in range(3)] == [0.01, 0.01, 0.005]
    assert [group["lr"] for group in run.erm.optimizer.param_groups] == [0.005]
    assert [group["lr"] for group in run.masktune.optimizer.param_groups] == [0.01]


def test_the_lr_scales_the_step(train):
    """Without momentum and weight decay, one step moves the weights by LR times gradient: the LR is really applied."""
    moved = {}
    for lr in (0.0, 0.01, 0.02):
        model = new_model(0)
        start = [parameter.detach().clone() for parameter in model.parameters()]
        images, labels = train.images[:32], train.labels[:32]
        train_epoch(State(model, sgd(model, 0, 0)), images, labels, lr=lr, batch_size=32, seed=0)
        moved[lr] = torch.cat([(new - old).flatten() for new, old in zip(model.parameters(), start, strict=True)])
    assert moved[0.0].abs().max() == 0
    assert moved[0.01].abs().max() > 0
    torch.testing.assert_close(moved[0.02], 2 * moved[0.01], rtol=1e-2, atol=1e-6)


def test_an_epoch_equals_a_plain_loop(train):
    """Two epochs against PyTorch's own SGD on batches cut by hand."""
    ours, theirs = new_model(1), new_model(1)
    state = State(ours, sgd(ours, 0.9, 1e-4))
    plain = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    for epoch in range(2):
        train_epoch(state, train.images[:100], train.labels[:100], lr=0.01, batch_size=32, seed=1)
        state.finish_epoch()
        theirs.train()
        for index in epoch_order(100, 1, epoch).split(32):
            plain.zero_grad()
            F.cross_entropy(theirs(pixels(train.images[index])), train.labels[index]).backward()
            plain.step()
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_the_same_seed_twice_is_equal(run, setting, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "CHECKPOINTS", tmp_path)
    torch.manual_seed(99)  # the global generator has no say
    again = experiments.run(setting, seed=0)
    for stage in ("erm", "randmask", "masktune"):
        assert same(getattr(again, stage).model, getattr(run, stage).model)
    assert again.erm.history == run.erm.history
    assert not same(new_model(1), new_model(0))


def test_random_streams_depend_on_their_purpose_alone():
    assert torch.equal(epoch_order(100, 0, 3), epoch_order(100, 0, 3))
    assert epoch_order(100, 0, 3).sort().values.tolist() == list(range(100))
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


def test_dataset_choice(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MASKTUNE_DATASET", "digits")
    assert experiments.choose_settings() == DIGITS
    monkeypatch.setenv("MASKTUNE_DATASET", "cifar")
    with pytest.raises(ValueError, match="'mnist' or 'digits'"):
        experiments.choose_settings()

    def offline(*arguments, **options):
        raise experiments.DataUnavailable("put the files there")

    monkeypatch.setattr(experiments, "ensure_mnist", offline)
    assert experiments.choose_settings(tmp_path, "mnist") == DIGITS
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "put the files there" in said


def test_finetune_lr_study_reuses_the_default(run, setting, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "CHECKPOINTS", tmp_path)
    tests = experiments.load_tests(setting)
    table = experiments.finetune_lr_study([run], tests)
    assert table[setting.title]["malicious"].shape == (1, len(FINETUNE_LRS))
    tuned = experiments.predict([run.masktune], tests)["malicious"][0]
    assert table[setting.title]["malicious"][0, 0] == (tuned == tests["malicious"].labels).double().mean()
    assert sorted(path.name for path in tmp_path.rglob("*.pt")) == [
        "masktune-lr0.00125-seed0.pt", "masktune-lr0.0025-seed0.pt", "masktune-lr0.005-seed0.pt"]


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
    with pytest.raises(ValueError, match="precision='fp16' is unknown"):
        train_epoch(state, train.images, train.labels, lr=0.01, batch_size=32, seed=0, precision="fp16")
