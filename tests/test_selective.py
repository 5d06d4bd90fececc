import math
from dataclasses import replace
from itertools import pairwise, permutations

import pytest
import torch
from torch import tensor

from src import experiments, figures, selective, studies, tables
from src.datasets.images import Images
from src.recipes import SELECTIVE
from src.selective import answer, aurc, error_and_coverage, risk_coverage, threshold


def test_score_of_one_model_is_its_softmax_response():
    prediction, score = answer(tensor([[0.7, 0.3], [0.1, 0.9]]))
    assert prediction.tolist() == [0, 1]
    assert score.tolist() == pytest.approx([0.7, 0.9])


def test_score_of_two_models_is_the_softmax_of_the_product():
    one, two = tensor([[0.8, 0.2, 0.0], [0.6, 0.4, 0.0]]), tensor([[0.5, 0.5, 0.0], [0.1, 0.9, 0.0]])
    prediction, score = answer(one, two)
    assert prediction.tolist() == [0, 1]  # 0.4 against 0.1; 0.06 against 0.36
    first = math.exp(0.4) / (math.exp(0.4) + math.exp(0.1) + 1)
    second = math.exp(0.36) / (math.exp(0.06) + math.exp(0.36) + 1)
    assert score.tolist() == pytest.approx([first, second])
    assert all(torch.equal(a, b) for a, b in zip(answer(one, two), answer(two, one), strict=True))


def test_models_that_disagree_score_low():
    sure, other = tensor([[0.9, 0.1]]), tensor([[0.1, 0.9]])
    assert answer(sure, other)[1] < answer(sure, sure)[1]


@pytest.mark.parametrize("bad", [
    (tensor([[0.5, 0.5]]), tensor([[0.2, 0.3, 0.5]])), (tensor([0.5, 0.5]),), (tensor([[2.0, -1.0]]),),
    (tensor([[3.0, 1.0]]),), (tensor([[float("nan"), 1.0]]),)])
def test_what_are_no_probabilities_is_refused(bad):
    with pytest.raises(ValueError, match="probabilities"):
        answer(*bad)


def test_threshold_is_the_score_at_the_rank():
    scores = tensor([0.1, 0.9, 0.5, 0.7, 0.3])
    assert threshold(scores, 0.8) == pytest.approx(0.3)  # rank 4 of 5
    assert threshold(scores, 0.4) == pytest.approx(0.7)
    assert threshold(scores, 0.5) == pytest.approx(0.7)  # round(2.5) is 2 in Python
    for coverage in (0.2, 0.4, 0.6, 0.8, 1.0):
        assert error_and_coverage(scores, scores > 2, threshold(scores, coverage))[1] == pytest.approx(coverage)


def test_coverage_one_accepts_everything_and_zero_nothing():
    scores, fresh = tensor([0.6, 0.9]), tensor([0.1, 0.2, 0.95])  # lower than any that was seen on validation
    wrong = tensor([True, False, False])
    assert error_and_coverage(fresh, wrong, threshold(scores, 1.0)) == (pytest.approx(1 / 3), 1.0)
    error, coverage = error_and_coverage(fresh, wrong, threshold(scores, 0.0))
    assert math.isnan(error)
    assert coverage == 0


def test_ties_are_answered_together():
    scores = tensor([0.9, 0.5, 0.5, 0.5, 0.1])
    assert error_and_coverage(scores, scores < 0.2, threshold(scores, 0.4)) == (0.0, pytest.approx(0.8))
    same = torch.full((10,), 0.3)
    wrong = torch.arange(10) < 3
    for coverage in (0.1, 0.5, 1.0):
        assert error_and_coverage(same, wrong, threshold(same, coverage)) == (pytest.approx(0.3), 1.0)


def test_bad_validation_scores_are_refused():
    with pytest.raises(ValueError, match="0 validation scores"):
        threshold(torch.tensor([]), 0.9)
    with pytest.raises(ValueError, match="1 of them NaN"):
        threshold(tensor([0.1, float("nan")]), 0.9)
    for coverage in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="coverage="):
            threshold(tensor([0.1]), coverage)


def by_hand(scores, wrong):
    """The mean curve over all orders of images that tie."""
    curves = []
    for order in permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in pairwise(order)):
            curves.append([sum(wrong[i] for i in order[:k]) / k for k in range(1, len(order) + 1)])
    return [sum(point) / len(curves) for point in zip(*curves, strict=True)]


@pytest.mark.parametrize("scores", [[0.9, 0.2, 0.4, 0.7, 0.1], [0.5, 0.5, 0.9, 0.5, 0.1], [0.3] * 5])
@pytest.mark.parametrize("wrong", [[0, 1, 1, 0, 1], [1, 0, 0, 1, 0], [0] * 5, [1] * 5])
def test_curve_is_the_mean_over_all_orders_of_ties(scores, wrong):
    curve = risk_coverage(tensor(scores), tensor(wrong).bool())
    assert curve.tolist() == pytest.approx(by_hand(scores, wrong))
    assert aurc(tensor(scores), tensor(wrong).bool()) == pytest.approx(sum(by_hand(scores, wrong)) / 5)


def test_area_fits_another_implementation():
    sklearn = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(0)
    scores, wrong = torch.rand(1000), torch.rand(1000) < 0.2
    order = scores.argsort(descending=True)
    risks = [1 - sklearn.accuracy_score(torch.ones(k), ~wrong[order[:k]]) for k in range(1, 1001)]
    trapezoids = sklearn.auc([k / 1000 for k in range(1, 1001)], risks)
    assert aurc(scores, wrong) == pytest.approx(trapezoids + (risks[0] + risks[-1]) / 2 / 1000, abs=1e-9)


def test_area_fits_torch_uncertainty():
    theirs = pytest.importorskip("torch_uncertainty.metrics").AURC()  # trapezoids, over a width of 1 - 1/N
    torch.manual_seed(0)
    probabilities, labels = torch.rand(500, 5).softmax(1), torch.randint(0, 5, (500,))
    theirs.update(probabilities, labels)
    prediction, score = answer(probabilities)
    risks = risk_coverage(score, prediction != labels)
    trapezoids = aurc(score, prediction != labels) - (risks[0] + risks[-1]).item() / 2 / 500
    assert theirs.compute().item() == pytest.approx(trapezoids * 500 / 499, abs=1e-5)


@pytest.mark.parametrize("bad", [(torch.rand(0), torch.rand(0) > 1), (torch.rand(3), torch.rand(2) > 1)])
def test_curve_of_nothing_is_refused(bad):
    with pytest.raises(ValueError, match="both are"):
        risk_coverage(*bad)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A setting of two seeds on 60 images whose classes differ in brightness, some of them mislabelled."""
    monkeypatch.setattr(experiments, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(selective, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(selective, "DATA", tmp_path / "data")
    torch.manual_seed(0)

    def load_data(erm, seed=0, test_set=None, root=None):
        draw = torch.Generator().manual_seed({None: 0, "val": 1, "test": 2}[test_set])
        labels = torch.randint(0, 2, (60,), generator=draw)
        images = torch.randint(0, 120, (60, 3, 8, 8), generator=draw) + 100 * labels[:, None, None, None]
        flipped = torch.rand(60, generator=draw) < 0.1
        return Images(images.to(torch.uint8), labels ^ flipped.long(), ("dark", "bright"))

    monkeypatch.setattr(experiments, "load_data", load_data)
    monkeypatch.setattr(selective, "load_data", load_data)
    erm = replace(SELECTIVE[0].erm, epochs=10, batch_size=20, classes=2)
    return replace(SELECTIVE[0], erm=erm, seeds=(0, 1))


def test_study(small, monkeypatch):
    assert not selective.at_hand(small)
    rows = selective.study(small)
    assert [(row["seed"], row["method"]) for row in rows] == [(s, m) for s in (0, 1) for m in selective.METHODS]
    by = {(row["seed"], row["method"]): row for row in rows}
    one, two = by[0, "two ERM seeds"], by[1, "two ERM seeds"]
    assert one["error"] == two["error"]  # 0 with 1 and 1 with 0
    assert by[0, "ERM"]["aurc"] != by[1, "ERM"]["aurc"]
    for row in rows:
        assert row["coverage"][-1] == 1
        assert row["error"][-1] == pytest.approx(row["risks"][-1], abs=1e-5)
        assert len(row["risks"]) == 100
    assert sorted(p.name for p in (experiments.CHECKPOINTS / "cifar10").glob("*.pt")) == [
        "erm-seed0.pt", "erm-seed1.pt", "masktune-seed0.pt", "masktune-seed1.pt"]
    alone = by[1, "MaskTune alone"]
    erm = experiments.run_erm(small, 1)
    test = experiments.load_data(small.erm, 1, "test")
    guesses = experiments.infer(experiments.run_finetune(small, 1, erm).model, test.images).argmax(1)
    assert alone["error"][-1] == pytest.approx((guesses != test.labels).double().mean().item())
    monkeypatch.setattr(selective, "run_erm", None)
    assert selective.study(small) == rows  # loaded
    assert selective.at_hand(small)
    with pytest.raises(TypeError):  # another recipe is another condition
        selective.study(replace(small, erm=replace(small.erm, lr=0.05)))
    table = tables.selective(rows, selective.COVERAGES, {"others": {0.9: 0.0668}})
    assert "| others |  |  | 6.68 |  |  |  |  |" in table
    assert table.count("\n") == 1 + len(selective.METHODS) + 1
    assert len(figures.risk_coverage(rows, "miniature").axes[0].lines) == len(selective.METHODS)


def test_finetune_lr_study(small, monkeypatch):
    monkeypatch.setattr(selective, "SELECTIVE_LRS", (0.01, 0.1))
    rows = selective.finetune_lr_study(small)
    assert [(row["seed"], row["lr"]) for row in rows] == [(0, 0.01), (0, 0.1), (1, 0.01), (1, 0.1)]
    by = {(row["seed"], row["method"]): row for row in selective.study(small)}
    for row in rows[::2]:  # the recipe's own LR
        assert row["recipe"] == by[row["seed"], "ERM"]["recipe"]
        assert row["error_test"] == pytest.approx(by[row["seed"], "MaskTune alone"]["error"][-1])
        assert row["aurc_test"] == by[row["seed"], "ERM × MaskTune"]["aurc"]
    assert rows[0]["aurc_val"] != rows[0]["aurc_test"]
    assert rows[0]["aurc_val"] != rows[1]["aurc_val"]
    monkeypatch.setattr(selective, "run_erm", None)
    assert selective.finetune_lr_study(small) == rows  # loaded
    lines = tables.selective_lrs(rows).split("\n")[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| 0.01", "| 0.1"]
    assert all(line.endswith("| 2 |") for line in lines)


def test_adam_goes_on_where_it_was_killed(small, monkeypatch):
    """Cats vs Dogs' optimizer: its moments and its count of steps are part of what is resumed."""
    adam = replace(small, erm=replace(small.erm, optimizer="Adam", lr=1e-3, epochs=2), save_steps=1)
    whole = experiments.run_erm(replace(adam, name="whole"), 0)
    assert isinstance(whole.optimizer, torch.optim.Adam)
    train_epoch = experiments.train_epoch

    def killed(state, *arguments, after_step, **options):
        def after():
            after_step()
            if (state.epoch, state.step) == (1, 2):
                raise OSError("killed")

        return train_epoch(state, *arguments, after_step=after, **options)

    monkeypatch.setattr(experiments, "train_epoch", killed)
    with pytest.raises(OSError, match="killed"):
        experiments.run_erm(adam, 0)
    monkeypatch.setattr(experiments, "train_epoch", train_epoch)
    assert experiments.run_erm(adam, 0).digest() == whole.digest()
    assert experiments.run_erm(replace(small, erm=replace(adam.erm, optimizer="SGD"), name="sgd"),
                               0).digest() != whole.digest()


@pytest.mark.parametrize("setting", SELECTIVE, ids=lambda setting: setting.name)
def test_recipes_give_a_model_of_their_classes(setting):
    erm = setting.erm
    model = experiments.new_model(0, erm.model, erm.classes)
    images = torch.rand(2, 3, erm.view.height, erm.view.width, device=experiments.best_device())
    assert model(images).shape == (2, erm.classes)
    with pytest.raises(ValueError, match="optimizer='RMSprop'"):
        replace(erm, optimizer="RMSprop")


def test_published_rows_fit_the_recipes(monkeypatch):
    """A recipe that was changed after its results were published would train for hours instead of loading them."""
    monkeypatch.setattr(selective, "run_erm", None)
    for path in studies.RESULTS.glob("selective-*.json"):
        setting = next(s for s in SELECTIVE if path.stem == f"selective-{s.name}")
        assert len(selective.study(setting)) == len(setting.seeds) * len(selective.METHODS)


def test_published_lr_is_the_best_on_validation(monkeypatch):
    """And never on the test set."""
    monkeypatch.setattr(selective, "run_erm", None)
    for path in studies.RESULTS.glob("finetune-lr-*.json"):
        setting = next(s for s in SELECTIVE if path.stem == f"finetune-lr-{s.name}")
        rows = selective.finetune_lr_study(setting)
        areas = {lr: sum(row["aurc_val"] for row in rows if row["lr"] == lr) for lr in selective.SELECTIVE_LRS}
        assert setting.finetune.lr == min(areas, key=areas.get)
