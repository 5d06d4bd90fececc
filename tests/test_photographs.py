"""The whole path of the benchmarks of photographs, on miniature data sets in their exact layouts."""

import signal
from dataclasses import replace
from itertools import count

import pytest
import torch
import torchvision

from src.augmentation import Augmentation
from src.datasets import View
from src.experiments import stages, study, workers
from src.experiments.recipes import PHOTOS, Places
from src.experiments.stages import load_data, new_model, run
from src.inference import accuracy
from src.seeding import epoch_order
from src.state import State, digest
from src.training import sgd, train_epoch
from tests.conftest import same
from tests.miniature import make_celeba, make_waterbirds

pytestmark = pytest.mark.filterwarnings("ignore:(Waterbirds|CelebA).*published")
WATERBIRDS, CELEBA = PHOTOS
FEW = {"train": (3, 2, 2, 3), "val": (1, 1, 1, 1), "test": (2, 2, 2, 2)}


def small(setting, side=28, **changes):
    """A setting for SmallCNN on views of 28 pixels, with the recipe otherwise as it is."""
    erm = replace(setting.erm, **{"model": "SmallCNN", "weights": None, "options": {"view": View(side, side, side)},
                                  "augmentation": replace(setting.erm.augmentation, side=side), **changes})
    return replace(setting, erm=erm, finetune=replace(setting.finetune, lr=erm.lr), seeds=(0,))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Where a miniature Waterbirds lies."""
    folder = tmp_path_factory.mktemp("photographs")
    make_waterbirds(folder / "data")
    return Places(folder / "checkpoints", folder / "data", folder / "results")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(workers, "cores", lambda: 1)


@pytest.fixture(scope="module")
def trained(places):
    return run(places, small(WATERBIRDS, epochs=4, batch_size=32, lr=0.01), seed=0)


def test_from_files_to_the_row(trained, places, monkeypatch):
    """ERM leans on the ground, which goes with the label in 95 % of the training images: the worst group tells."""
    rows = study.ask([trained.setting], "benchmark", places=places)
    assert rows["method"].tolist() == ["erm", "masktune"]
    erm = rows.iloc[0]
    groups = erm[["landbird, land", "landbird, water", "waterbird, land", "waterbird, water"]].tolist()
    assert erm["worst"] == min(groups) < erm["average"] - 0.2
    assert erm["average"] == pytest.approx(sum(groups) / 4)  # the test groups are equally large
    assert erm["adjusted_average"] == pytest.approx(0.475 * (groups[0] + groups[3]) + 0.025 * (groups[1] + groups[2]))
    assert rows["hidden"][1] == pytest.approx(trained.finetuned.history["hidden"][0])
    monkeypatch.setattr("src.datasets.decode.decode", None)  # a finished benchmark decodes nothing ...
    monkeypatch.setattr(stages, "train_epoch", None)  # ... and trains nothing
    assert study.ask([trained.setting], "benchmark", places=places).equals(rows)
    assert same(run(places, trained.setting, seed=0).finetuned.model, trained.finetuned.model)


def test_what_is_selected_is_the_best_epoch_on_validation(trained, places):
    seen = trained.erm.history["validation"]
    best = trained.erm.best
    assert best["accuracy"] == max(seen)
    assert best["epoch"] == seen.index(max(seen)) + 1
    validation = load_data(places, trained.setting.erm, part="val")
    assert accuracy(trained.erm.model, validation.images, validation.labels) == max(seen)
    assert trained.finetuned.parents["erm"] == trained.erm.digest()


@pytest.mark.parametrize(("optimizer", "step", "stages_saved"), [("SGD", 3, 0), ("Adam", 12, 1), ("SGD", 23, 1)])
def test_an_interrupted_training_with_augmentation_and_selection_resumes_exactly(optimizer, step, stages_saved, places,
                                                                                  tmp_path, monkeypatch):
    """An epoch has seven steps. Adam's moments and its count of steps are part of what is resumed."""
    setting = small(WATERBIRDS, epochs=3, batch_size=64, lr=0.01, optimizer=optimizer)
    whole = run(replace(places, checkpoints=tmp_path / "whole"), setting, seed=1)
    assert type(whole.erm.optimizer).__name__ == optimizer
    there, calls, call = replace(places, checkpoints=tmp_path / "cut"), count(), Augmentation.__call__
    with monkeypatch.context() as patch:
        patch.setattr(Augmentation, "__call__", lambda *arguments: call(*arguments) if next(calls) != step
                      else signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            run(there, setting, seed=1)
    assert len(list(tmp_path.rglob("cut/waterbirds/*.pt"))) == stages_saved
    cut = run(there, setting, seed=1)
    assert [cut.erm.digest(), cut.finetuned.digest()] == [whole.erm.digest(), whole.finetuned.digest()]
    assert whole.erm.history == cut.erm.history
    assert digest(whole.erm.best) == digest(cut.erm.best)


def test_pixels_are_hidden_before_the_view_is_cropped():
    """The augmentation gets images whose hidden pixels are black already, exactly where the mask says."""
    images, labels = torch.full((4, 3, 28, 28), 200, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    masks, given, model = torch.rand(4, 28, 28) > 0.5, [], new_model(0)
    train_epoch(State(model, sgd(model.parameters(), 0.9, 0)), images, labels, lr=0.01, batch_size=4, seed=0,
                masks=masks, augmentation=lambda inputs: given.append(inputs.clone()) or inputs)
    assert torch.equal((given[0] == 0).all(1), masks[epoch_order(4, 0, 0)])


@pytest.mark.parametrize("kaggle", [False, True])
def test_celeba(kaggle, tmp_path):
    make_celeba(tmp_path, FEW, kaggle)
    places = Places(tmp_path, tmp_path, tmp_path)
    assert load_data(places, CELEBA.erm).images.shape == (10, 3, 218, 178)  # as published: nothing is scaled or cut
    assert load_data(places, CELEBA.erm, part="test").images.shape == (8, 3, 224, 224)
    rows = study.ask([small(CELEBA, epochs=1)], "benchmark", places=places)
    assert rows["blond, male"].between(0, 1).all()


def test_the_layer_of_a_recipe_is_the_one_that_is_explained():
    assert [new_model(0, name, layer="layer3").layer for name in ("ResNet50", "resnet18")] == ["layer3", "layer3"]


@pytest.mark.parametrize(("field", "value", "word"), [
    ("model", "SmallCNN", "weights and layer to be None for SmallCNN"), ("select", "first", "last or best"),
    ("optimizer", "RMSprop", "SGD or Adam")])
def test_a_recipe_that_cannot_be_is_refused(field, value, word):
    with pytest.raises(ValueError, match=word):
        replace(WATERBIRDS.erm, **{field: value})


def test_a_recipe_with_a_backbone_of_torchvision(places, tmp_path):
    torch.manual_seed(0)
    torch.save(torchvision.models.mobilenet_v2().features.state_dict(prefix="features."), tmp_path / "w.pt")
    setting = small(WATERBIRDS, side=64, model="mobilenet_v2", weights=str(tmp_path / "w.pt"), layer="features.3",
                    epochs=1, batch_size=32, lr=0.01)
    one = run(replace(places, checkpoints=tmp_path), setting, seed=0)
    assert one.erm.model.saliency_layer is one.erm.model.model.features[3]
    assert 0 < one.finetuned.masks.share() < 0.5
    assert not same(one.erm.model, one.finetuned.model)
