import math
from dataclasses import replace
from itertools import pairwise, permutations

import pytest
import torch
from torch import tensor

from src.datasets import Images
from src.experiments import selective, stages
from src.experiments.recipes import SELECTIVE, Places
from src.experiments.selective import answer, error_and_coverage, risk_coverage, threshold
from src.inference import infer
from src.report import figures, tables


def test_score_of_one_model_is_its_softmax_response():
    prediction, score = answer(tensor([[0.7, 0.3], [0.1, 0.9]]))
    assert prediction.tolist() == [0, 1]
    assert score.tolist() == pytest.approx([0.7, 0.9])


def test_score_of_two_models_is_the_softmax_of_the_product():
    one, two = tensor([[0.8, 0.2, 0.0], [0.6, 0.4, 0.0]]), tensor([[0.5, 0.5, 0.0], [0.1, 0.9, 0.0]])
    prediction, score = answer(one, two)
    assert prediction.tolist() == [0, 1]  # 0.4 against 0.1; 0.06 against 0.36
    assert score.tolist() == pytest.approx([math.exp(a) / (math.exp(a) + math.exp(b) + 1)
                                            for a, b in ((0.4, 0.1), (0.36, 0.06))])
    assert all(torch.equal(a, b) for a, b in zip(answer(one, two), answer(two, one), strict=True))
    sure, other = tensor([[0.9, 0.1]]), tensor([[0.1, 0.9]])
    assert answer(sure, other)[1] < answer(sure, sure)[1]  # who disagree score low


def test_threshold_is_the_score_at_the_rank():
    scores = tensor([0.1, 0.9, 0.5, 0.7, 0.3])
    assert threshold(scores, 0.8) == pytest.approx(0.3)  # rank 4 of 5
    assert threshold(scores, 0.4) == pytest.approx(0.7)
    assert threshold(scores, 0.5) == pytest.approx(0.7)  # round(2.5) is 2 in Python
    for coverage in (0.2, 0.4, 0.6, 0.8, 1.0):
        assert error_and_coverage(scores, scores > 2, threshold(scores, coverage))[1] == pytest.approx(coverage)


def test_coverage_one_accepts_everything_zero_nothing_and_ties_are_answered_together():
    fresh, wrong = tensor([0.1, 0.2, 0.95]), tensor([True, False, False])  # lower than any that was seen on validation
    assert error_and_coverage(fresh, wrong, threshold(tensor([0.6, 0.9]), 1.0)) == (pytest.approx(1 / 3), 1.0)
    nothing = error_and_coverage(fresh, wrong, threshold(tensor([0.6, 0.9]), 0.0))
    assert nothing == (pytest.approx(math.nan, nan_ok=True), 0.0)
    same = torch.full((10,), 0.3)
    for coverage in (0.1, 0.5, 1.0):
        assert error_and_coverage(same, torch.arange(10) < 3, threshold(same, coverage)) == (pytest.approx(0.3), 1.0)
    scores = tensor([0.9, 0.5, 0.5, 0.5, 0.1])
    assert error_and_coverage(scores, scores < 0.2, threshold(scores, 0.4)) == (0.0, pytest.approx(0.8))


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
    assert curve.mean().item() == pytest.approx(sum(by_hand(scores, wrong)) / 5)


@pytest.fixture
def small(monkeypatch):
    """A setting of two seeds on 60 images whose classes differ in brightness, some of them mislabelled."""
    def load_data(places, erm, seed=0, part="train"):
        draw = torch.Generator().manual_seed(("train", "val", "test").index(part))
        labels = torch.randint(0, 2, (60,), generator=draw)
        images = torch.randint(0, 120, (60, 3, 8, 8), generator=draw) + 100 * labels[:, None, None, None]
        flipped = torch.rand(60, generator=draw) < 0.1
        return Images(images.to(torch.uint8), labels ^ flipped.long(), ("dark", "bright"))

    monkeypatch.setattr(stages, "load_data", load_data)
    erm = replace(SELECTIVE[0].erm, epochs=10, batch_size=20, classes=2)
    return replace(SELECTIVE[0], erm=erm, seeds=(0, 1))


def test_study(small, tmp_path, monkeypatch):
    places = Places(tmp_path, tmp_path, tmp_path)
    rows = selective.selective_study(small, places)
    assert list(zip(rows["seed"], rows["method"], strict=True)) == [(s, m) for s in (0, 1) for m in selective.VOICES]
    by = {(row["seed"], row["method"]): row for row in rows.to_dict("records")}
    assert by[0, "two ERM seeds"]["error_0.9"] == by[1, "two ERM seeds"]["error_0.9"]  # 0 with 1 and 1 with 0
    assert by[0, "ERM"]["aurc"] != by[1, "ERM"]["aurc"]
    assert (rows["coverage_1.0"] == 1).all()
    assert rows["error_1.0"].tolist() == pytest.approx(rows["risk_100"].tolist(), abs=1e-5)
    assert sorted(p.name for p in (places.checkpoints / "cifar10").glob("*.pt")) == [
        "erm-seed0.pt", "erm-seed1.pt", "masktune-seed0.pt", "masktune-seed1.pt"]
    test, tuned = stages.load_data(places, small.erm, 1, "test"), stages.run(places, small, 1).finetuned
    wrong = infer(tuned.model, test.images).argmax(1) != test.labels
    assert by[1, "MaskTune alone"]["error_1.0"] == pytest.approx(wrong.double().mean().item())
    assert by[1, "MaskTune alone"]["hidden"] == tuned.history["hidden"][0]
    monkeypatch.setattr(selective, "LRS", (0.01, 0.1))
    lrs = selective.selective_lrs(small, places)
    assert lrs["error_test"][2] == pytest.approx(by[1, "MaskTune alone"]["error_1.0"])  # the recipe's own LR
    assert lrs["aurc_test"][2] == by[1, "ERM × MaskTune"]["aurc"]
    assert lrs["aurc_val"].nunique() > 1
    monkeypatch.setattr(stages, "run_erm", None)
    assert selective.selective_study(small, places).equals(rows)  # loaded
    assert selective.selective_lrs(small, places).equals(lrs)
    with pytest.raises(TypeError):  # another recipe is another condition
        selective.selective_study(replace(small, erm=replace(small.erm, lr=0.05)), places)
    table = tables.selective(rows, selective.COVERAGES)
    assert (table["score of"].tolist(), table.shape[1]) == (rows["method"].unique().tolist(), 1 + 5 + 1)
    assert len(figures.risk_curves(rows, "miniature").axes[0].lines) == len(selective.VOICES)


@pytest.mark.parametrize("setting", SELECTIVE, ids=lambda setting: setting.name)
def test_recipes_give_a_model_of_their_classes(setting):
    erm = setting.erm
    view = erm.options["view"]
    images = torch.rand(2, 3, view.height, view.width, device=stages.best_device())
    assert stages.new_model(0, erm.model, erm.classes)(images).shape == (2, erm.classes)
