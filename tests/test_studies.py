import json
from dataclasses import replace

import pytest

from src import experiments, studies, tables


def test_a_study_is_measured_once_row_by_row(tmp_path):
    path, asked = tmp_path / "results" / "study.json", []

    def measure(condition: dict) -> dict:
        asked.append(condition["x"])
        if condition["x"] == 3 and len(asked) < 4:
            raise KeyboardInterrupt
        return {"y": 10 * condition["x"]}

    conditions = [{"x": x} for x in (1, 2, 3)]
    with pytest.raises(KeyboardInterrupt):
        studies.measured(path, conditions, measure)
    rows = studies.measured(path, conditions, measure)
    assert asked == [1, 2, 3, 3]  # what was measured before the interrupt is kept
    assert [row["y"] for row in rows] == [10, 20, 30]
    assert all("torch" in row["made_with"] for row in rows)
    assert json.loads(path.read_text()) == rows
    assert studies.measured(path, [{"x": 2}], None) == rows[1:2]


@pytest.fixture
def tests(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "RESULTS", tmp_path)
    return experiments.load_tests(setting)


def own(run, tests) -> float:
    """MaskTune's accuracy on malicious, as the run itself has it."""
    tuned = experiments.predict([run.masktune], tests)["malicious"][0]
    return (tuned == tests["malicious"].labels).double().mean().item()


def test_order_study(run, tests, monkeypatch):
    monkeypatch.setattr(studies, "ORDERS", 2)
    rows = studies.order_study([run], tests)
    assert [(row["squares"], row["order"]) for row in rows] == [
        ("as found", 0), ("as found", 1), ("whole", 0), ("whole", 1)]
    assert rows[0]["malicious"] == own(run, tests)  # order 0 is the run's own
    assert len({row["malicious"] for row in rows}) > 1
    monkeypatch.setattr(studies, "find_masks", None)
    assert studies.order_study([run], tests) == rows  # loaded


def test_threshold_study(run, tests):
    rows = studies.threshold_study([run], tests)
    assert [row["k"] for row in rows] == list(studies.THRESHOLDS)
    hidden = [row["hidden"] for row in rows]
    assert hidden == sorted(hidden, reverse=True)
    assert hidden[0] > hidden[-1]
    assert rows[4]["malicious"] == own(run, tests)  # k = 2
    assert rows[4]["hidden"] == pytest.approx(run.masktune.history["hidden"][0])
    assert rows[4]["squares_covered"] > 0.9


def test_cam_study(run, tests):
    rows = {row["cam"]: row for row in studies.cam_study([run], tests)}
    assert list(rows) == [*studies.CAMS, "label"]
    assert rows["XGradCAM"]["malicious"] == own(run, tests)
    assert rows["random"]["squares_covered"] < 0.3 < rows["GradCAM"]["squares_covered"]
    assert len({row["hidden"] for row in rows.values()}) == len(rows)  # no two heat maps are the same
    assert not run.erm.model.saliency_layer._forward_hooks


def test_batchnorm_study(run, tests, monkeypatch):
    states = []
    train_epoch = studies.train_epoch
    monkeypatch.setattr(studies, "train_epoch", lambda state, *rest, **options: (
        states.append(state), train_epoch(state, *rest, **options)))
    moving, frozen = studies.batchnorm_study([run], tests)
    assert moving["malicious"] == own(run, tests)
    assert frozen["malicious"] != moving["malicious"]
    before = int(run.erm.model.backbone[1].num_batches_tracked)
    assert [int(state.model.backbone[1].num_batches_tracked) - before for state in states] == [43, 0]


def test_a_model_that_diverges_is_a_row_too(run, tests, monkeypatch):
    far = replace(run, setting=replace(run.setting, finetune=replace(run.setting.finetune, lr=1e30)))
    monkeypatch.setattr(studies, "_inputs", lambda _: studies._training_data(run.setting, run.seed))
    seen = studies._finetuned(far, tests, None)
    assert seen["diverged"]
    assert seen["malicious"] == (tests["malicious"].labels == 0).double().mean().item()


def test_iteration_study(run, tests):
    apart, together = studies.iteration_study([run], tests)
    assert apart["malicious"][0] == together["malicious"][0] == own(run, tests)
    assert len(apart["malicious"]) == len(together["hidden"]) == studies.ITERATIONS
    assert together["hidden"] == sorted(together["hidden"])
    assert together["hidden"][2] > apart["hidden"][2]
    rows = tables.each_iteration([apart, together])
    assert [row["iteration"] for row in rows] == ["1", "2", "3", "2, accumulated", "3, accumulated"]
    assert rows[-1]["malicious"] == together["malicious"][2]
    shown = tables.study(rows, "iteration", {run.setting.name: "random"}).split("\n")
    assert len(shown) == 2 + 5
    assert shown[-1].startswith(f"| random | 3, accumulated | {100 * together['hidden'][2]:.1f} |")


def test_reference_study(run, setting, tests):
    plain, refitted = studies.reference_study([run], tests)
    assert "hidden" not in plain
    erm = experiments.predict([run.erm], tests)["malicious"][0]
    before = (erm == tests["malicious"].labels).double().mean().item()
    assert refitted["malicious"] > before + 0.05
    assert plain["malicious"] != refitted["malicious"]
    groupless = replace(run, setting=replace(setting, name="none", erm=replace(setting.erm, class_mix_ratio=0.0)))
    rows = studies.reference_study([run, groupless], tests)
    assert [(row["setting"], row["training"]) for row in rows] == [
        (setting.name, "plain"), ("none", "plain"), (setting.name, "DFR")]  # no DFR where a group is empty
    lines = tables.study(rows, "training", {setting.name: "random", "none": "none"}).split("\n")[2:]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| random", "plain"], ["| random", "DFR"], ["| none", "plain"]]


def test_ratio_study(setting, tests, monkeypatch):
    monkeypatch.setattr(studies, "RATIOS", (0.0, 0.2))
    monkeypatch.setattr(studies, "RATIO_EPOCHS", 2)
    none, many = studies.ratio_study(replace(setting, seeds=(0,)), tests)
    assert none["erm_malicious"] < many["erm_malicious"]  # one image in five contradicts the square
    assert none["malicious"] > none["erm_malicious"] + 0.1
