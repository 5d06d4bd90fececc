"""What is shipped: checkpoints and rows of results, whole, of one origin, and in agreement wherever they meet."""

import pytest
import torch

from src.experiments import questions, selective, stages, study
from src.experiments.recipes import BIRDS, HOLES, MARKS, MNIST, SELECTIVE, TWO, Places
from src.experiments.rows import saved
from src.inference import accuracy
from tests.conftest import REPOSITORY

CONDITION = ["setting", "seed", "erm", *questions.BASE, "ratio"]
ORIGIN = r"family \d+, model \d+\), 1 thread, commit \w+$"  # one thread of a processor that is named, a clean commit


@pytest.fixture(scope="module", params=MNIST, ids=lambda setting: setting.name)
def setting(request):
    return request.param


@pytest.fixture(scope="module")
def rows(setting):
    return saved(REPOSITORY / "results" / f"{setting.name}.csv")


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("src.experiments.rows.side_by_side", None)
    monkeypatch.setattr(stages, "side_by_side", None)


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


def test_every_question_is_answered_without_a_training(setting, rows):
    asked = [question for question in questions.ON_SQUARES if question != "ratio" or setting is MNIST[0]]
    study.ask([setting], *(question for question in asked if question != "holes"))  # which is not whole yet
    answers = study.shipped(*asked, settings=[setting]).dropna(subset="made_with")
    assert len(answers) == len(rows) == len(rows[CONDITION].drop_duplicates()) > 100  # each condition has one row
    assert rows["made_with"].str.split(", commit").str[0].nunique() == 1
    assert rows["made_with"].str.contains(ORIGIN).all()


def test_rows_of_the_same_masks_agree_on_what_these_hit(rows):
    same = rows[(rows["iteration"] == 1) & rows["hidden"].notna()]
    facts = ["hidden", "known_hidden: 0-4, square", "known_visible: 0-4, square", "erm_on_masked"]
    assert (same.groupby(["seed", "method", "k", "cam", "holes", "erm", "ratio"])[facts].nunique() <= 1).all(axis=None)


def test_shipped_weights_give_the_rows(setting, rows):
    """The stage that the notebook loads and the row of the same condition are two runs of one code."""
    tests = stages.load_tests(Places(), setting)
    for run in stages.run_all((setting,), seeds=(0, 4)):
        for state, method in ((run.erm, "erm"), (run.finetuned, "masktune")):
            own = rows[(rows["seed"] == run.seed) & (rows["erm"] == run.erm.digest()[:16])]
            for key, value in {**questions.base(setting), "method": method}.items():
                own = own[own[key] == value]
            row, = own.to_dict("records")
            for name, test in tests.items():
                found = accuracy(state.model, test.images, test.labels)
                assert found == pytest.approx(row[name], abs=3e-4)  # another processor may flip a few


def test_the_lr_of_birds_is_the_best_on_validation():
    lrs = study.shipped("lr", settings=BIRDS[1:]).groupby(["method", "lr"])["val_average"].mean()["masktune"]
    assert lrs.idxmax() == BIRDS[1].finetune.lr


@pytest.mark.parametrize("setting", [HOLES, TWO, *MARKS, BIRDS[1]], ids=lambda setting: setting.name)
def test_rows_are_of_questions_that_are_asked_and_one_machine_measured_all_of_a_seed(setting):
    """What has not been measured is no row; the claims of the page say of which rows they speak."""
    rows = study.shipped(*questions.of(setting), settings=[setting]).dropna(subset="made_with")
    assert 0 < len(rows) == len(saved(REPOSITORY / "results" / f"{setting.name}.csv"))
    assert not rows["made_with"].str.contains("dirty").any()
    alike = [name for name in ("seed", *questions.DATA, "ratio", "erm_epochs", "layer") if name in rows]
    assert (rows["made_with"].str.split(", commit").str[0].groupby([rows[name] for name in alike]).nunique() == 1).all()


def test_selective_rows_fit_the_recipe_and_its_lr_is_the_best_on_validation():
    setting = SELECTIVE[-1]
    assert len(selective.selective_study(setting)) == len(setting.seeds) * len(selective.VOICES)
    assert selective.selective_lrs(setting).groupby("lr")["aurc_val"].mean().idxmin() == setting.finetune.lr
