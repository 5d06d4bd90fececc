"""What is shipped: checkpoints and rows of results, whole, of one origin, and in agreement wherever they meet."""

import re
from statistics import fmean

import pytest
import torch

from src.experiments import birds, stages, studies
from src.experiments.recipes import BIRDS, MNIST
from src.rows import pivot, saved
from tests.conftest import REPOSITORY

CONDITION = ("setting", "seed", "erm", *studies.BASE)


@pytest.fixture(scope="module", params=MNIST, ids=lambda setting: setting.name)
def setting(request):
    return request.param


@pytest.fixture(scope="module")
def rows(setting):
    return saved(REPOSITORY / "results" / f"{setting.name}.json")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch, mnist_root):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(stages, "DATA", mnist_root)


def test_checkpoints_are_whole_and_small(setting):
    folder = REPOSITORY / "checkpoints" / setting.name
    assert {path.name for path in folder.glob("*.pt")} == {f"{stage}-seed{seed}.pt" for stage in ("erm", "masktune")
                                                          for seed in setting.seeds}
    for seed in setting.seeds:
        erm = torch.load(folder / f"erm-seed{seed}.pt", weights_only=True)
        assert erm["epoch"] == setting.erm.epochs == 100
        assert erm["model"]["backbone.1.num_batches_tracked"] == 100 * 469
        tuned = torch.load(folder / f"masktune-seed{seed}.pt", weights_only=True)
        assert tuned["model"]["backbone.1.num_batches_tracked"] == 101 * 469
    assert sum(path.stat().st_size for path in folder.glob("*.pt")) <= 10e6


def test_every_question_is_answered_without_a_training(setting, monkeypatch):
    monkeypatch.setattr(studies, "side_by_side", None)
    for question in studies.QUESTIONS:
        assert studies.ask([setting], question) or question == "squares"  # which is asked of one training set


def test_a_condition_has_one_row(rows):
    conditions = [tuple(row[key] for key in CONDITION) for row in rows]
    assert len(set(conditions)) == len(conditions) > 100


def test_all_rows_are_of_one_clean_commit_one_processor_and_one_thread():
    rows = [row for name in (*(setting.name for setting in MNIST), "ratio")
            for row in saved(REPOSITORY / "results" / f"{name}.json")]
    origin, = {row["made_with"] for row in rows}
    assert re.search(r"family \d+, model \d+\), 1 thread, commit \w+$", origin)


def test_rows_of_the_same_masks_agree_on_what_these_hit(rows):
    same = [row for row in rows if row["iteration"] == 1 and row["squares"] == "as found" and "hidden" in row]
    for fact in ("hidden", "shortcut_hidden", "shortcut_visible", "erm_on_masked"):
        for values in pivot(same, ("seed", "method", "k", "cam", "made_with"), fact).values():
            assert len(set(values)) == 1


def test_shipped_weights_give_the_rows(setting, rows):
    """The stage that the notebook loads and the row of the same condition are two runs of one code."""
    tests = stages.load_tests(setting)
    for run in stages.run_all((setting,), seeds=(0, 4)):
        own = [row for row in rows if row["seed"] == run.seed]
        assert {row["erm"] for row in own} == {run.erm.digest()[:16]}
        for state, method in ((run.erm, "erm"), (run.finetuned, "masktune")):
            row, = (row for row in own if {**studies.BASE, "method": method}.items() <= row.items())
            for name, guesses in stages.predict([state], tests).items():
                accuracy = (guesses[0] == tests[name].labels).double().mean().item()
                assert accuracy == pytest.approx(row[name], abs=3e-4)  # another processor may flip a few


def test_the_study_on_birds_is_whole_and_its_choices_are_those_of_the_validation_set():
    rows = birds.shipped(*birds.QUESTIONS)
    assert None not in rows
    assert len(rows) == len(saved(REPOSITORY / "results" / f"{BIRDS[1].name}.json"))
    assert all(re.search(r"family \d+, model \d+\), 1 thread, commit \w+$", row["made_with"]) for row in rows)
    tried = saved(REPOSITORY / "results" / f"{BIRDS[1].name}-erm.json")
    assert len(tried) == len(birds.CANDIDATES) * len(birds.CHOOSING_SEEDS)
    best = {}
    for measure in ("average", "worst"):
        means = {(one["lr"], one["batch_size"], epoch + 1): fmean(row[measure][epoch] for row in tried
                                                                  if one.items() <= row.items())
                 for one in birds.CANDIDATES for epoch in range(birds.CHOOSING_EPOCHS)}
        best[measure] = max(means, key=means.get)
    erm = BIRDS[1].erm
    assert best["average"] == (erm.lr, erm.batch_size, erm.epochs)
    assert best["worst"] == (erm.lr, erm.batch_size, 3)
    lrs = pivot([row for row in birds.shipped("lr") if row["method"] == "masktune"], ("lr",), "val_average")
    assert max(lrs, key=lambda lr: fmean(lrs[lr])) == (BIRDS[1].finetune.lr,) == (birds.BASE["lr"],)
