import json

import pytest

from src import experiments, studies


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


def test_order_study(run, setting, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "RESULTS", tmp_path)
    monkeypatch.setattr(studies, "ORDERS", 2)
    tests = experiments.load_tests(setting)
    rows = studies.order_study([run], tests)
    assert [(row["squares"], row["order"]) for row in rows] == [
        ("as found", 0), ("as found", 1), ("whole", 0), ("whole", 1)]
    tuned = experiments.predict([run.masktune], tests)["malicious"][0]
    assert rows[0]["malicious"] == (tuned == tests["malicious"].labels).double().mean()  # order 0 is the run's own
    assert len({row["malicious"] for row in rows}) > 1
    monkeypatch.setattr(studies, "find_masks", None)
    assert studies.order_study([run], tests) == rows  # loaded
