"""The study on photographs of birds, from files to rows, on a miniature in Waterbirds' layout whose birds are known."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from src.augmentation import Augmentation
from src.datasets import View, open_files
from src.experiments import birds, stages, workers
from src.experiments.recipes import BIRDS
from src.masking import find_masks, random_masks
from src.masks import Masks
from src.metrics import score
from src.rows import saved
from tests.miniature import make_waterbirds

VIEW = View(48, 48)
COUNTS = {"train": (24, 4, 3, 20), "val": (4, 4, 3, 3), "test": (6, 6, 4, 4)}


def small(setting):
    """A setting with random weights on views of 48 pixels, of a ResNet-18 for one epoch, explained at a map of 6x6."""
    erm = replace(setting.erm, model="resnet18", weights=None, epochs=1, batch_size=4, train_view=VIEW, test_view=VIEW,
                  augmentation=Augmentation(side=48))
    return replace(setting, erm=erm, seeds=(0,))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the set, and a birds' mask for each image: a quarter of it."""
    folder = tmp_path_factory.mktemp("birds")
    make_waterbirds(folder, COUNTS)
    root = (folder / "waterbird_complete95_forest2water2").rename(folder / "waterbirds_rebuilt")
    for path in sorted(root.glob("*/*.jpg")):
        mask = Image.new("1", Image.open(path).size)
        mask.paste(1, (0, 0, mask.width // 2, mask.height // 2))
        target = root / "masks" / path.relative_to(root).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        mask.save(target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "CHECKPOINTS", folder / "checkpoints")
        patch.setattr(stages, "DATA", folder)
        patch.setattr(birds, "RESULTS", folder / "results")
        patch.setattr(birds, "SEEDS", (0,))
        patch.setitem(birds.BASE, "erm_epochs", 1)
        patch.setitem(birds.BASE, "layer", "layer2")
        yield folder


@pytest.fixture(scope="module")
def subject(place):
    return birds.Subject(small(BIRDS[1]), 0)


def test_the_birds_pixels_are_seen_by_the_view(place):
    files = open_files("Waterbirds, rebuilt", "val", place)
    masks = files.objects(VIEW)
    assert masks.shape == (14, 48, 48)
    assert masks[:][:, :23, :20].all()
    assert not masks[:][:, 26:].any()
    missing = place / "waterbirds_rebuilt" / "masks" / files.paths[3].relative_to(files.root).with_suffix(".png")
    kept = missing.rename(place / "kept.png")
    with pytest.raises(ValueError, match=missing.name):
        files.objects(VIEW)
    kept.rename(missing)


def test_masktune_of_the_study_is_masktune_of_the_stages(subject, monkeypatch):
    """The same weights as the stage of the recipe, which has the family's own layer."""
    setting = subject.setting
    monkeypatch.setitem(birds.BASE, "layer", subject.erm.model.layer)
    for method in ("masktune", "randmask", "plain"):
        row = subject.answers([{**birds.BASE, "method": method, "lr": 0.003}])[1]
        state = stages.run_finetune(setting, 0, subject.erm, replace(setting.finetune, method=method, lr=0.003))
        guesses = stages.predict([state], {"test": subject.test})["test"][0]
        expected = score(guesses, subject.test.labels, subject.test.groups)
        assert (row["average"], row["worst"], row["groups"]) == (expected.average, expected.worst,
                                                                 list(expected.groups.values()))
        assert row["met"] == state.history["accuracy"][-1]


def test_what_masks_hit(subject):
    bird = subject.objects[:]
    found = find_masks(birds.explained(subject.erm.model, birds.BASE["layer"]), subject.train.images)
    facts = subject.hit(found)
    assert facts["bird"] == pytest.approx(0.25, abs=0.02)
    assert facts["hidden"] == pytest.approx(found.share())
    assert facts["on_bird"] == pytest.approx((found[:] & bird).sum().item() / found[:].sum().item())
    group = subject.train.groups == 2
    assert facts["hidden_by_group"][2] == pytest.approx(found[:][group].double().mean().item())
    assert facts["on_bird_by_group"][2] == pytest.approx((found[:] & bird)[group].sum().item() / found[:][group].sum())
    assert facts["untouched"] == pytest.approx((~found[:].flatten(1).any(1)).double().mean().item())
    assert subject.hit(subject.objects)["on_bird"] == 1
    assert subject.hit(None) == {}


def test_oracles_hide_the_background_or_the_bird(subject):
    for method, on_bird, hidden in (("background hidden", 0, 0.75), ("bird hidden", 1, 0.25)):
        row = subject.answers([{**birds.BASE, "method": method}])[1]
        assert row["on_bird"] == on_bird
        assert row["hidden"] == pytest.approx(hidden, abs=0.02)


def test_masks_can_be_shuffled(subject):
    found, state = subject.found(birds.BASE["layer"], 2.0), stages.start_finetune(subject.setting.erm, subject.erm)
    shuffled = subject.masks({**birds.BASE, "method": "shuffled"}, state, None)
    assert shuffled.share() == found.share()
    assert not torch.equal(shuffled.bits, found.bits)
    assert sorted(shuffled.bits.tolist()) == sorted(found.bits.tolist())


def test_hidden_pixels_can_show_another_image(subject):
    masks = random_masks(len(subject.train), 48, 0, 0)
    before = subject.train.images.clone()
    filled, hidden = subject.filled(masks), masks[:][:, None].expand(-1, 3, -1, -1)
    assert torch.equal(filled[~hidden], before[~hidden])
    assert torch.equal(subject.train.images, before)
    sources = [[i for i, other in enumerate(before) if torch.equal(image[own], other[own])]
               for image, own in zip(filled, hidden, strict=True)]
    assert all(sources)
    assert len({source[0] for source in sources}) > len(before) * 3 // 4  # a permutation, but for small, dark holes


def test_iterations_go_on_from_each_other_and_accumulate(subject, monkeypatch):
    asked = [{**birds.BASE, "iteration": i, "accumulate": True} for i in (1, 2)]
    both = subject.answers(asked)
    assert both[1] == subject.answers([birds.BASE])[1]
    assert both[2]["hidden"] > both[1]["hidden"]
    seen = []
    monkeypatch.setattr(birds, "find_masks", lambda model, images, k, hidden=None: seen.append(hidden) or Masks(
        (len(images), 48, 48)))
    subject.answers([{**asked[1], "k": 1.0}])
    assert seen[0] is None  # of ERM
    assert seen[1] is not None


def test_rows_are_measured_once_and_oracles_need_the_birds(place, capsys, monkeypatch):
    setting = small(BIRDS[1])
    monkeypatch.setattr(workers, "cores", lambda: 1)  # in this process
    rows = birds.ask(setting, "results")
    assert "about 5 epochs" in capsys.readouterr().out
    assert [row["method"] for row in rows] == [
        "erm", "plain", "randmask", "masktune", "background hidden", "bird hidden", "dfr"]
    assert all(0 <= row[key] <= 1 for row in rows for key in ("average", "adjusted_average", "worst", "val_average"))
    monkeypatch.setattr(birds, "side_by_side", None)
    assert birds.ask(setting, "results") == rows
    assert len(saved(place / "results" / f"{setting.name}.json")) == len(rows)
    json.dumps(rows, allow_nan=False)
    assert {row["recipe"] for row in rows} == {row["recipe"] for row in birds.conditions(
        setting, "results", counts=list(COUNTS["train"]))}  # it names the data, too
    assert {row["recipe"] for row in rows} != {row["recipe"] for row in birds.conditions(setting, "results")}
    assert {row["method"] for row in birds.conditions(BIRDS[0], "results")} == {
        "erm", "plain", "randmask", "masktune", "dfr"}  # of Waterbirds itself, the birds' pixels are not published


def test_candidates_see_the_validation_set_alone(place, monkeypatch):
    setting, opened = small(BIRDS[1]), []
    load = stages.load_data
    monkeypatch.setattr(stages, "load_data", lambda erm, seed, part, root: opened.append(part) or load(
        erm, seed, part, root))
    monkeypatch.setattr(birds, "CHOOSING_EPOCHS", 2)
    row = birds._choose(setting, place, {"setting": setting.name, "seed": 10, "lr": 0.003, "batch_size": 16})
    assert set(opened) == {"train", "val"}
    assert len(row["average"]) == len(row["worst"]) == len(row["train"]) == 2


def test_another_number_of_epochs_has_a_folder_of_its_own(place):
    setting = small(BIRDS[1])
    assert birds.after(setting, 1) is setting
    late = birds.after(setting, 3)
    assert stages.erm_path(late, 0) != stages.erm_path(setting, 0)
    assert late.erm.epochs == 3
