"""Every question to one small setting, asked once in this process; and two processes that must agree with it."""

import json
import multiprocessing
import os
from dataclasses import replace

import pytest
import torch
from matplotlib.colors import to_rgba

from src.experiments import stages, studies, workers
from src.experiments.recipes import ENDINGS, FINETUNE_LRS, FineTune
from src.report import figures, tables
from src.rows import matching, measured, pivot, row, saved

TITLES = {"digits-random": "random"}
measure = studies._measure


def test_a_study_is_measured_once_row_by_row(tmp_path):
    path, asked = tmp_path / "results" / "study.json", []

    def measure(missing: list[dict]):
        for condition in missing:
            asked.append(condition["x"])
            if condition["x"] == 3 and len(asked) < 4:
                raise KeyboardInterrupt
            yield row(condition, {"y": 10 * condition["x"]})

    conditions = [{"x": x} for x in (1, 2, 3)]
    with pytest.raises(KeyboardInterrupt):
        measured(path, conditions, measure)
    rows = measured(path, conditions, measure)
    assert asked == [1, 2, 3, 3]  # what was measured before the interrupt is kept
    assert [one["y"] for one in rows] == [10, 20, 30]
    assert all("torch" in one["made_with"] for one in rows)
    assert json.loads(path.read_text()) == rows
    assert measured(path, [{"x": 2}], None) == rows[1:2]


@pytest.fixture(scope="module")
def asked(trained, setting, tmp_path_factory):
    """The setting of one seed and two orders, and the rows of each question."""
    one = replace(setting, seeds=(0,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "CHECKPOINTS", trained[1])
        patch.setattr(studies, "RESULTS", tmp_path_factory.mktemp("results"))
        patch.setattr(workers, "cores", lambda: 1)
        studies._subject.cache_clear()
        everything = studies.ask([one], *studies.QUESTIONS)
        patch.setattr(studies, "_measure", None)  # from here on, all is loaded
        rows = {question: studies.ask([one], question) for question in studies.QUESTIONS}
        assert len(json.loads((studies.RESULTS / f"{one.name}.json").read_text())) == len(everything)  # each but once
        yield one, rows
        studies._subject.cache_clear()


def accuracies(finetuned, setting) -> dict:
    return studies._accuracies(finetuned.model, stages.load_tests(setting))


@pytest.mark.parametrize(("question", "change", "finetune"), [
    ("results", {}, FineTune()), ("results", {"order": 1}, FineTune(order=1)),
    ("results", {"method": "randmask"}, FineTune("randmask")), ("reference", {"method": "plain"}, FineTune("plain")),
    ("ending", {"ending": "decay"}, FineTune(ending="decay")),
    ("ending", {"ending": "average", "order": 1}, FineTune(ending="average", order=1)),
    ("lr", {"lr": 0.0025}, FineTune(lr=0.0025)), ("threshold", {"k": 1.0}, FineTune(threshold_std=1.0)),
    ("iterations", {"iteration": 2, "accumulate": True}, FineTune(iterations=2, accumulate=True))])
def test_a_row_is_what_a_run_gives(question, change, finetune, asked, run, tmp_path, monkeypatch):
    """What is computed twice agrees: the stage that trains, saves and loads, and the study that does neither."""
    one, rows = asked
    found = matching(rows[question], {**studies.BASE, **change})
    state = run.finetuned
    if change:
        monkeypatch.setattr(stages, "CHECKPOINTS", tmp_path)
        state = stages.run_finetune(one, 0, run.erm, finetune)
    assert accuracies(state, one).items() <= found.items()
    assert found.get("hidden", 0.0) == pytest.approx(state.history["hidden"][-1], abs=1e-12)


def test_orders_and_methods(asked):
    rows = asked[1]["results"]
    assert [(row["method"], row["order"]) for row in rows] == [
        ("erm", 0), ("randmask", 0), ("randmask", 1), ("masktune", 0), ("masktune", 1)]
    malicious = [row["malicious"] for row in rows]
    assert malicious[1] != malicious[2]
    assert malicious[3] != malicious[4]
    masked = pivot(rows, ("method",), "erm_on_masked")
    assert masked["masktune",][0] == masked["masktune",][1] < 0.7 < masked["randmask",][0]
    lines = tables.results(rows, TITLES).split("\n")
    assert len(lines) == 2 + 3
    assert lines[-1].startswith(f"| random | MaskTune | {50 * (rows[3]['raw'] + rows[4]['raw']):.1f} ± ")
    lowest = min(rows[3:], key=lambda row: row["malicious"])
    assert lines[-1].endswith(f"| {100 * lowest['malicious']:.1f} (seed 0, order {lowest['order']}) | 2 |")
    image = torch.rand(3, 28, 28)
    figure = figures.overview(image, image[0], image[0] > 0.5, rows, {rows[0]["setting"]: figures.TRAINING_SETS[0]})
    assert len(figure.axes) == 4 + 1
    assert {bar.get_facecolor() for bar in figure.axes[-1].patches} == {
        to_rgba(figures.COLOURS[name]) for name in ("ERM", "RandMask", "MaskTune")}


def test_endings(asked):
    cells = pivot(asked[1]["ending"], ("ending", "order"), "malicious")
    assert list(cells) == [(ending, order) for ending in ENDINGS for order in (0, 1)]
    assert len({cells[ending, 0][0] for ending in ENDINGS}) == len(ENDINGS)


def test_thresholds_and_lrs(asked):
    rows = asked[1]["threshold"]
    assert [row["k"] for row in rows] == list(studies.THRESHOLDS)
    hidden = [row["hidden"] for row in rows]
    assert hidden == sorted(hidden, reverse=True)
    assert hidden[0] > hidden[-1]
    assert matching(rows, studies.BASE)["shortcut_hidden"] > 0.9
    lrs = asked[1]["lr"]
    assert [row["lr"] for row in lrs] == list(FINETUNE_LRS)
    assert len({row["malicious"] for row in lrs}) == len(lrs)
    both = lrs + [{**row, "setting": "again"} for row in lrs]
    names = dict(zip((lrs[0]["setting"], "again"), figures.TRAINING_SETS, strict=False))
    figure = figures.panels({"LR": (both, "lr"), "k": (rows, "k")}, "worst group, %", names, lines={"chance": 0.5})
    first, second = figure.axes[:2]
    assert [line.get_label() for line in first.lines if line.get_label()[0] != "_"] == [*names.values(), "chance"]
    assert [tick.get_text() for tick in first.get_xticklabels()] == list(map(str, sorted(FINETUNE_LRS)))
    means = next(line for line in second.lines if line.get_label() == names[lrs[0]["setting"]]).get_ydata()
    assert list(means) == pytest.approx([100 * row["worst"] for row in rows])


def test_heat_maps_of_others(asked, run):
    rows = {row["cam"]: row for row in asked[1]["cam"]}
    assert list(rows) == list(studies.CAMS)
    assert rows["random"]["shortcut_hidden"] < 0.3 < rows["GradCAM"]["shortcut_hidden"]
    assert len({row["hidden"] for row in rows.values()}) == len(rows)  # no two heat maps are the same
    assert not run.erm.model.saliency_layer._forward_hooks


def test_squares_are_hidden_whole(asked):
    rows = asked[1]["squares"]
    assert [(row["squares"], row["order"]) for row in rows] == [
        ("as found", 0), ("as found", 1), ("whole", 0), ("whole", 1)]
    assert {(row["shortcut_hidden"], row["shortcut_visible"]) for row in rows[2:]} == {(1, 0)}
    thin = matching(asked[1]["threshold"], {"k": 3.0})
    assert 0 < thin["shortcut_visible"] < 700  # of about 670 squares
    assert 0.8 < thin["shortcut_hidden"] < 1
    assert tables.squares(rows).count("\n") == 2


def test_frozen_statistics_stay(asked, monkeypatch):
    one, rows = asked
    states, start = [], stages.start_finetune
    monkeypatch.setattr(stages, "start_finetune", lambda *given: states.append(start(*given)) or states[-1])
    subject = studies._subject(one, 0)
    seen = [subject.answers([row])[1, "constant"] for row in rows["batchnorm"]]
    assert [row["batchnorm"] for row in rows["batchnorm"]] == ["moving", "frozen"]
    assert all(new.items() <= row.items() for new, row in zip(seen, rows["batchnorm"], strict=True))  # and once more
    before = int(subject.erm.model.backbone[1].num_batches_tracked)
    assert [int(state.model.backbone[1].num_batches_tracked) - before for state in states] == [43, 0]
    assert seen[0]["malicious"] != seen[1]["malicious"]


def test_a_model_that_diverges_is_a_row_too(asked):
    subject = studies._subject(asked[0], 0)
    seen = subject.answers([{**studies.BASE, "lr": 1e30}])[1, "constant"]
    assert seen["diverged"]
    assert seen["malicious"] == (subject.tests["malicious"].labels == 0).double().mean().item()


def test_iterations(asked):
    rows = tables.iterations(asked[1]["iterations"])
    assert [row["iterations"] for row in rows] == ["1", "2", "3", "2, accumulated", "3, accumulated"]
    hidden = [row["hidden"] for row in rows]
    assert hidden[0] < hidden[3] < hidden[4]
    assert hidden[4] > hidden[2]
    lines = tables.study(rows, "iterations", TITLES).split("\n")
    assert len(lines) == 2 + 5
    assert lines[-1].startswith(f"| 3, accumulated | {100 * rows[4]['raw']:.1f} |")


def test_references(asked):
    erm, (plain, refitted) = asked[1]["results"][0], asked[1]["reference"]
    assert "hidden" not in plain
    assert refitted["malicious"] > erm["malicious"] + 0.05
    lines = tables.study(asked[1]["reference"], "method", TITLES).split("\n")[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| plain epoch", "| DFR"]


def test_what_is_asked(asked, run, monkeypatch):
    """Of other weights everything anew, no DFR where a group is empty, all seeds of two questions only."""
    asked_for = []
    monkeypatch.setattr(studies, "_measure_all", lambda setting, missing: asked_for.extend(missing) or [])
    monkeypatch.setattr(stages, "run_erm", lambda setting, seed: run.erm)
    one = replace(asked[0], seeds=(0, 7))
    none = replace(one, name="none", erm=replace(one.erm, class_mix_ratio=0.0))
    studies.ask([one, none], "reference")
    assert [(row["setting"], row["method"]) for row in asked_for] == [("none", "plain")]  # the others are measured
    asked_for.clear()
    studies.ask([none], "ending")
    assert {(row["seed"], row["order"]) for row in asked_for} == {(0, 0), (0, 1), (7, 0), (7, 1)}
    asked_for.clear()
    monkeypatch.setattr(run.erm, "digest", lambda: 64 * "0")
    studies.ask([one], "reference")
    assert [(row["erm"], row["method"]) for row in asked_for] == [(16 * "0", "plain"), (16 * "0", "dfr")]


def test_two_processes_measure_the_same(asked, tmp_path, monkeypatch, capfd):
    """They know the folders of this one. A failure in one is raised here; what was measured before it is kept."""
    one, rows = asked
    wanted = [{**row, "made_with": None} for row in rows["reference"]]
    monkeypatch.setattr(workers, "cores", lambda: 2)
    monkeypatch.setattr(studies, "_measure", measure)
    monkeypatch.setattr(studies, "RESULTS", tmp_path)
    monkeypatch.setitem(studies.QUESTIONS, "broken", [{"cam": "NoSuchCAM"}])
    with pytest.raises(AttributeError, match="NoSuchCAM"):
        studies.ask([one], "reference", "broken")
    kept = saved(tmp_path / f"{one.name}.json")
    assert kept
    assert all({**row, "made_with": None} in wanted for row in kept)
    assert [{**row, "made_with": None} for row in studies.ask([one], "reference")] == wanted
    said = capfd.readouterr().out
    assert "3 tasks in 2 processes" in said
    assert "starts" not in said  # ERM is found
    assert "TQDM_DISABLE" not in os.environ
    for process in multiprocessing.active_children():
        process.join()  # ended


def test_ratio_study(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "RESULTS", tmp_path)
    monkeypatch.setattr(studies, "SEEDS", (0,))
    monkeypatch.setattr(studies, "RATIOS", (0.0, 0.2))
    monkeypatch.setattr(studies, "RATIO_EPOCHS", 2)
    none, many = studies.ratio_study(setting)
    assert none["erm_malicious"] < many["erm_malicious"]  # one image in five contradicts the square
    assert none["malicious"] > none["erm_malicious"] + 0.1
    monkeypatch.setattr(studies, "_measure_ratio", None)
    assert studies.ratio_study(setting) == [none, many]  # loaded
    assert tables.study([none, many], "ratio", TITLES).startswith("| ratio | ERM raw | ERM malicious |")
    spread = [{"setting": "random", "x": 1, "raw": raw} for raw in (0.98, 0.01, 0.5)]
    assert tables.study(spread, "x", TITLES).endswith("| 1 | 98.0, 1.0, 50.0 |")  # ± 48 would say nothing
