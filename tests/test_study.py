"""Every question to one small setting of digits, and to birds whose pixels are known; each condition is one row."""

import base64
import io
import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import torch
from PIL import Image

from src.augmentation import Augmentation
from src.datasets import View
from src.experiments import questions, stages, study, workers
from src.experiments.recipes import BIRDS, DIGITS, MNIST, FineTune, Places
from src.experiments.rows import measured, saved
from src.inference import accuracy
from src.report import figures, tables
from tests.miniature import make_waterbirds

VIEW = View(48, 48)
COUNTS = {"train": (24, 4, 3, 20), "val": (4, 4, 3, 3), "test": (6, 6, 4, 4)}


def test_a_study_is_measured_once_row_by_row(tmp_path):
    path, asked = tmp_path / "results" / "study.csv", []

    def measure(condition: dict) -> dict:
        asked.append(condition["x"])
        if condition["x"] == 3 and len(asked) < 4:
            raise KeyboardInterrupt
        return {"y": condition["x"] / 3, **({"late": True} if condition["x"] == 3 else {})}

    conditions = [{"x": x, "erm": f"00{x}"} for x in (1, 2, 3)]
    with pytest.raises(KeyboardInterrupt):
        measured(path, conditions, measure)
    rows = measured(path, conditions, measure)
    assert asked == [1, 2, 3, 3]  # what was measured before the interrupt is kept
    assert rows["y"].tolist() == [1 / 3, 2 / 3, 1.0]  # bit for bit, through text
    assert rows["made_with"].str.contains("torch").all()
    assert measured(path, conditions[1:2], None)["y"].tolist() == [2 / 3]
    for damage in ("", "<<<<<<< HEAD\n" + path.read_text(), path.read_text()[:-40]):
        path.write_text(damage)
        with pytest.raises(ValueError, match=r"study.csv is no table of results"):
            saved(path)


@pytest.fixture(autouse=True, scope="module")
def in_this_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "cores", lambda: 1)
        yield


@pytest.fixture(scope="module")
def places(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return Places(Path(shutil.copytree(trained[1], folder / "checkpoints")), results=folder / "results")


@pytest.fixture(scope="module")
def one(setting):
    return replace(setting, seeds=(0,))


@pytest.fixture(scope="module")
def asked(one, places):
    """The rows of each question to the setting of one seed and two orders; ratios of two, with fewer epochs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(questions.ON_SQUARES, "ratio", [{**change, "erm_epochs": 2}
                                                      for change in questions.ON_SQUARES["ratio"][-2:]])
        patch.setitem(questions.ON_SQUARES, "holes", [
            {"holes": "transplants"}, {"holes": "transplants", "iteration": 0, "accumulate": True}])
        patch.setitem(questions.ON_SQUARES, "threshold", [{"k": k} for k in (0.0, 1.0, 2.0, 3.0)])
        patch.setattr(study, "SWAPPED", 200)  # to be quick
        study._subject.cache_clear()
        everything = study.ask([one], *questions.ON_SQUARES, places=places)
        with patch.context() as inner:
            inner.setattr("src.experiments.rows.side_by_side", None)  # from here on, all is loaded
            rows = {question: study.ask([one], question, places=places) for question in questions.ON_SQUARES}
        assert len(saved(places.results / f"{one.name}.csv")) == len(everything)  # each but once
        yield rows
        study._subject.cache_clear()


def found(rows, **change):
    """The one row of a condition that differs from the base in this alone."""
    for key, value in ({**questions.BASE, "erm_epochs": 3} | change).items():
        rows = rows[rows[key] == value]
    row, = rows.to_dict("records")
    return row


@pytest.mark.parametrize(("question", "change", "finetune"), [
    ("results", {}, FineTune()), ("results", {"order": 1}, FineTune(order=1)),
    ("results", {"method": "randmask"}, FineTune("randmask")), ("reference", {"method": "plain"}, FineTune("plain")),
    ("lr", {"lr": 0.0025}, FineTune(lr=0.0025)), ("threshold", {"k": 1.0}, FineTune(threshold_std=1.0)),
    ("iterations", {"iteration": 2, "accumulate": True}, FineTune(iterations=2, accumulate=True)),
    ("holes", {"holes": "transplants"}, FineTune(holes="transplants"))])
def test_a_row_is_what_a_run_gives(question, change, finetune, asked, one, run, places, tmp_path):
    """What is computed twice agrees: the stage that trains, saves and loads, and the study that does neither."""
    row = found(asked[question], **change)
    state = stages.run_finetune(replace(places, checkpoints=tmp_path), one, 0, run.erm, finetune)
    for name, test in stages.load_tests(places, one).items():
        assert accuracy(state.model, test.images, test.labels) == row[name]
    assert row["met"] == state.history["accuracy"][-1]
    if finetune.method != "plain":
        assert row["replaced"] == pytest.approx(state.history["hidden"][-1])


def test_orders_methods_and_the_main_table(asked, one):
    rows = asked["results"]
    assert list(zip(rows["method"], rows["order"], strict=True)) == [
        ("erm", 0), ("randmask", 0), ("randmask", 1), ("masktune", 0), ("masktune", 1)]
    assert rows["malicious"].nunique() == 5
    masked = rows["erm_on_masked"]
    assert masked[3] == masked[4] < 0.7 < masked[1]
    last = tables.results(rows).iloc[-1]
    assert last["raw"].split()[:2] == [f"{50 * (rows['raw'][3] + rows['raw'][4]):.1f}", "±"]
    lowest = rows.loc[rows["malicious"][3:].idxmin()]
    assert last["lowest malicious"] == f"{100 * lowest.malicious:.1f} (seed 0, order {lowest.order})"
    assert last["n"] == 2
    image = torch.rand(3, 28, 28)
    moving = figures.animation(image, image[0], image[0] > 0.5, image, {0: image[0], 1: image[1]}, {0: 0.2, 1: 0.9})
    with Image.open(io.BytesIO(base64.b64decode(moving["image/gif"]))) as gif:
        assert gif.n_frames == 2
    assert base64.b64decode(moving["image/png"])[1:4] == b"PNG"
    figure = figures.panels({"all": (rows, "method")}, tables.NAMES, "method", "malicious")
    assert sum(len(line.get_ydata()) for line in figure.axes[0].lines) == 3 + 5  # means and runs


def test_thresholds_and_lrs(asked, one):
    rows, lrs = asked["threshold"], asked["lr"]
    assert rows["hidden"].is_monotonic_decreasing
    assert found(rows)["known_hidden: 0-4, square"] > 0.9
    assert 0 < found(rows, k=3.0)["known_visible: 0-4, square"] < 700  # of about 670 squares
    assert lrs["malicious"].nunique() == len(lrs)
    names = {one.name: tables.TRAINING_SETS["mnist-random"]}
    figure = figures.panels({"LR": (lrs, "lr"), "k": (rows, "k")}, names, lines={"chance": 0.5}, chosen={"k": 2.0})
    first, second = figure.axes[:2]
    assert [text.get_text() for text in (*first.texts, *second.texts)] == [" chance"]  # beside the last of a row
    assert [tick.get_text() for tick in first.get_xticklabels()] == list(map(str, sorted(questions.FINETUNE_LRS)))
    assert [label.get_text() for label in second.get_xticklabels() if label.get_fontweight() == "bold"] == ["2.0"]
    means = next(line for line in second.lines if line.get_label() == names[one.name]).get_ydata()
    assert list(means) == pytest.approx((100 * rows["worst"]).tolist())


def test_other_questions(asked, one, run):
    cams = asked["cam"].set_index("cam")
    shortcut = cams["known_hidden: 0-4, square"]
    assert shortcut["random"] < 0.3 < shortcut["GradCAM"]
    assert cams["hidden"].is_unique  # no two heat maps are the same
    assert not run.erm.model.saliency_layer._forward_hooks
    hidden = asked["iterations"]["hidden"]
    assert hidden[0] < hidden[3] < hidden[4] > hidden[2]
    assert asked["batchnorm"]["malicious"].nunique() == 2
    plain, refitted = asked["reference"].to_dict("records")
    assert pandas.isna(plain["hidden"])
    assert refitted["malicious"] > found(asked["results"], method="erm")["malicious"] + 0.05
    erm = asked["ratio"].iloc[0]
    assert (erm["ratio"], erm["erm_epochs"]) == (0.2, 2)
    assert erm["malicious"] > found(asked["results"], method="erm")["malicious"] + 0.2  # one in five contradicts
    assert tables.study(asked["cam"], "cam").shape[0] == len(questions.CAMS)


def test_what_is_known_without_an_image_that_breaks_the_shortcut(asked):
    erm, repaired = found(asked["results"], method="erm"), found(asked["holes"], holes="transplants")
    assert erm["swapped"] < 0.2 < 0.9 < erm["as_is"]
    assert min(repaired["as_is"], repaired["swapped"]) > erm["swapped"] + 0.3
    until = found(asked["holes"], holes="transplants", iteration=0, accumulate=True)
    assert 1 <= until["iterations"] <= 5
    assert repaired["replaced"] > repaired["hidden"] > found(asked["results"])["replaced"]


def test_frozen_statistics_stay_and_a_model_that_diverges_is_a_row_too(asked, one, places, monkeypatch):
    states, start = [], stages.start_finetune
    monkeypatch.setattr(stages, "start_finetune", lambda *given: states.append(start(*given)) or states[-1])
    subject = study._subject(places, one, 0)
    for kind in ("moving", "frozen"):
        seen = subject.measure(found(asked["batchnorm"], batchnorm=kind))
        assert seen["malicious"] == found(asked["batchnorm"], batchnorm=kind)["malicious"]  # once more
    before = int(subject.erm.model.backbone[1].num_batches_tracked)
    assert [int(state.model.backbone[1].num_batches_tracked) - before for state in states] == [43, 0]
    seen = subject.measure({**questions.base(one), "lr": 1e30})
    assert seen["diverged"]
    assert seen["malicious"] == (subject.tests["malicious"].labels == 0).double().mean().item()


def test_what_is_asked(one, places, monkeypatch):
    """No DFR where a group is empty, oracles where pixels are known; of other weights, everything anew."""
    none = replace(one, name="none", erm=replace(one.erm, options={"class_mix_ratio": 0.0}))
    assert [row["method"] for row in questions.conditions(none, "reference")] == ["plain"]
    assert not questions.conditions(MNIST[1], "ratio")
    assert {row["method"] for row in questions.conditions(BIRDS[0], "results")}.isdisjoint(questions.ORACLES)
    assert {row["seed"] for row in questions.conditions(MNIST[0], "lr")} == {0, 1, 2}
    monkeypatch.setattr(study, "_weights", lambda *_: 16 * "0")
    monkeypatch.setattr(stages, "side_by_side", lambda *_: [])
    monkeypatch.setattr(study, "_measure", lambda *_: {"met": 0.0})
    rows = study.ask(DIGITS[:1], "reference", places=replace(places, results=places.results / "other"))
    assert rows["erm"].tolist() == 4 * [16 * "0"]


def test_two_processes_measure_the_same(asked, one, places, tmp_path, monkeypatch, capfd):
    """A failure in one is raised here; what was measured before it is kept."""
    elsewhere = replace(places, results=tmp_path)
    monkeypatch.setattr(workers, "cores", lambda: 2)
    monkeypatch.setattr(study, "measured", lambda *given, **_: measured(*given))  # which takes one process for digits
    monkeypatch.setitem(questions.ON_SQUARES, "broken", [{"cam": "NoSuchCAM"}])
    with pytest.raises(AttributeError, match="NoSuchCAM"):
        study.ask([one], "reference", "broken", places=elsewhere)
    assert len(saved(tmp_path / f"{one.name}.csv"))
    trial = ["as_is", "swapped", "covered", "swapped_again", "spots"]  # of more images
    again = study.ask([one], "reference", places=elsewhere).dropna(axis=1).drop(columns=["made_with", *trial])
    assert again.equals(asked["reference"][again.columns])
    said = capfd.readouterr().out
    assert "3 tasks in 2 processes" in said
    assert "starts" not in said  # ERM is found
    assert "TQDM_DISABLE" not in os.environ
    for process in multiprocessing.active_children():
        process.join()  # ended


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """The places of a set in Waterbirds' layout, with a bird's mask for each image: a quarter of it."""
    folder = tmp_path_factory.mktemp("birds")
    make_waterbirds(folder, COUNTS)
    root = (folder / "waterbird_complete95_forest2water2").rename(folder / "waterbirds_rebuilt")
    for path in sorted(root.glob("*/*.jpg")):
        mask = Image.new("1", Image.open(path).size)
        mask.paste(1, (0, 0, mask.width // 2, mask.height // 2))
        target = root / "masks" / path.relative_to(root).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        mask.save(target)
    return Places(folder / "checkpoints", folder, folder / "results")


@pytest.fixture(scope="module")
def few():
    """A setting with random weights on views of 48 pixels, of a ResNet-18 for one epoch, explained at a map of 6x6."""
    erm = replace(BIRDS[1].erm, options={"view": VIEW}, model="resnet18", weights=None, layer="layer2", epochs=1,
                  batch_size=4, augmentation=Augmentation(side=48))
    return replace(BIRDS[1], erm=erm, seeds=(0,))


@pytest.fixture(scope="module")
def subject(birds, few):
    return study.Subject(birds, few, 0)


def test_what_masks_hit(subject, few):
    masks = subject.found("layer2", 2.0)
    facts = subject.hit(masks, 0.0)
    for suffix, group in ("", slice(None)), (": waterbird, land", subject.train.groups == 2):
        hidden, bird = masks[:][group].double(), subject.train.known[:][group].double()
        both = (hidden * bird).sum()
        assert [facts[f"{name}{suffix}"] for name in ("hidden", "on_known", "known_hidden")] == pytest.approx(
            [hidden.mean().item(), (both / hidden.sum()).item(), (both / bird.sum()).item()])
        assert facts[f"known_visible{suffix}"] == (bird > hidden).flatten(1).any(1).sum()
    assert facts["known"] == pytest.approx(0.25, abs=0.02)
    assert facts["untouched"] == (~masks[:].flatten(1).any(1)).double().mean()
    for method, on_known, share in (("rest hidden", 0, 0.75), ("known hidden", 1, 0.25)):
        row = subject.measure({**questions.base(few), "method": method})
        assert row["on_known"] == on_known
        assert row["hidden"] == pytest.approx(share, abs=0.02)


def test_birds_from_files_to_rows(birds, few, monkeypatch):
    monkeypatch.setitem(questions.ON_PHOTOGRAPHS, "lateness", questions.ON_PHOTOGRAPHS["lateness"][1:5:3])
    rows = study.ask([few], "results", "lateness", places=birds)
    assert rows["method"][:7].tolist() == ["erm", "plain", "randmask", "masktune", "rest hidden", "known hidden", "dfr"]
    assert rows[["average", "adjusted_average", "worst", "val_average"]].stack().between(0, 1).all()
    assert {path.parent.name for path in birds.checkpoints.glob("*/erm-*")} == {few.name, f"{few.name}-2"}
    names = [f"{label}, {ground}" for label in ("landbird", "waterbird") for ground in ("land", "water")]
    assert (rows[names].min(axis=1) == rows["worst"]).all()
    assert len(tables.summary(rows, ["method"], names)) == 7
    tuned = stages.run_finetune(birds, few, 0, stages.run_erm(birds, few, 0))
    assert tuned.history["accuracy"] == [rows["met"][3]]  # the stage and the study agree
