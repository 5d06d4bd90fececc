"""The whole path of the benchmarks of photographs, on miniature data sets in their exact layouts."""

import json
import signal
from dataclasses import replace

import pytest
import torch
import torchvision

from src.augmentation import Augmentation
from src.datasets import ImageNet9, View
from src.experiments import photos, stages
from src.experiments.recipes import PHOTOS
from src.experiments.stages import load_data, new_model, run
from src.inference import accuracy
from src.models import ResNet50
from src.report import tables
from src.rows import pivot
from src.seeding import epoch_order
from src.state import State, digest
from src.training import sgd, train_epoch
from tests.conftest import same
from tests.miniature import make_celeba, make_imagenet9, make_waterbirds

pytestmark = pytest.mark.filterwarnings("ignore:(Waterbirds|CelebA|ImageNet9).*published")
WATERBIRDS, CELEBA, IMAGENET9 = PHOTOS
FEW = {"train": (3, 2, 2, 3), "val": (1, 1, 1, 1), "test": (2, 2, 2, 2)}


def small(setting, **changes):
    """A setting for SmallCNN on views of 28 pixels, with the recipe otherwise as it is."""
    erm = replace(setting.erm, model="SmallCNN", weights=None, train_view=View(28, 28, 28), test_view=View(28, 28, 28),
                  augmentation=replace(setting.erm.augmentation, side=28), **changes)
    return replace(setting, erm=erm, finetune=replace(setting.finetune, lr=erm.lr), seeds=(0,))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a miniature Waterbirds, where stages are kept, too."""
    folder = tmp_path_factory.mktemp("photographs")
    make_waterbirds(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "CHECKPOINTS", folder / "checkpoints")
        patch.setattr(stages, "DATA", folder / "data")
        yield folder


@pytest.fixture(scope="module")
def trained(place):
    return run(small(WATERBIRDS, epochs=4, batch_size=32, lr=0.01), seed=0)


def test_from_files_to_the_table(trained, place, monkeypatch):
    """ERM leans on the ground, which goes with the label in 95 % of the training images: the worst group tells."""
    with monkeypatch.context() as patch:
        patch.setattr("src.datasets.decode.decode", None)  # a finished benchmark decodes nothing ...
        patch.setattr(stages, "train_epoch", None)  # ... and trains nothing
        again = run(trained.setting, seed=0)
    rows = photos.measures([trained, again])
    assert {(row["benchmark"], row["seed"]) for row in rows} == {("Waterbirds", 0)}
    both = pivot(rows, ("method", "measure"), "value")
    assert {method for method, _ in both} == {"ERM", "MaskTune"}
    assert all(one == two for one, two in both.values())
    erm = {measure: values[0] for (method, measure), values in both.items() if method == "ERM"}
    groups = [erm[name] for name in ("landbird, land", "landbird, water", "waterbird, land", "waterbird, water")]
    assert erm["worst group"] == min(groups) < erm["average"] - 0.2
    assert erm["average"] == pytest.approx(sum(groups) / 4)  # the test groups are equally large
    assert erm["adjusted average"] == pytest.approx(0.475 * (groups[0] + groups[3]) + 0.025 * (groups[1] + groups[2]))
    assert 0 < trained.finetuned.history["hidden"][0] < 0.3
    assert "| Waterbirds | ERM | MaskTune | n |" in tables.photos(rows)
    assert f"| average | {100 * erm['average']:.1f} ± 0.0 |" in tables.photos(rows)


def test_what_is_selected_is_the_best_epoch_on_validation(trained):
    seen = trained.erm.history["validation"]
    best = trained.erm.best
    assert best["accuracy"] == max(seen)
    assert best["epoch"] == seen.index(max(seen)) + 1
    validation = load_data(trained.setting.erm, part="val")
    assert accuracy(trained.erm.model, validation.images, validation.labels) == max(seen)
    assert trained.finetuned.parents["erm"] == trained.erm.digest()


@pytest.mark.parametrize(("place_to_stop", "stages_saved"), [(3, 0), (12, 1), (23, 1)])  # an epoch has seven steps
def test_an_interrupted_training_with_augmentation_and_selection_resumes_exactly(place_to_stop, stages_saved, trained,
                                                                                  tmp_path, monkeypatch):
    setting = small(WATERBIRDS, epochs=3, batch_size=64, lr=0.01)
    monkeypatch.setattr(stages, "CHECKPOINTS", tmp_path / "whole")
    whole = run(setting, seed=1)
    monkeypatch.setattr(stages, "CHECKPOINTS", tmp_path / "cut")
    calls = iter(range(100))
    call = Augmentation.__call__

    def stop(*arguments):
        if next(calls) == place_to_stop:
            signal.raise_signal(signal.SIGINT)
        return call(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Augmentation, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            run(setting, seed=1)
    assert len(list(tmp_path.rglob("cut/waterbirds/*.pt"))) == stages_saved
    cut = run(setting, seed=1)
    assert same(whole.erm.model, cut.erm.model)
    assert same(whole.finetuned.model, cut.finetuned.model)
    assert whole.erm.history == cut.erm.history
    assert digest(whole.erm.best) == digest(cut.erm.best)


def test_pixels_are_hidden_before_the_view_is_cropped(monkeypatch):
    """The augmentation gets images whose hidden pixels are black already, exactly where the mask says."""
    images, labels = torch.full((4, 3, 28, 28), 200, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    masks = torch.rand(4, 28, 28) > 0.5
    given = []
    call = Augmentation.__call__

    def spy(self, inputs, drawn):
        given.append(inputs.clone())
        return call(self, inputs, drawn)

    monkeypatch.setattr(Augmentation, "__call__", spy)
    model = new_model(0)
    train_epoch(State(model, sgd(model, 0.9, 0)), images, labels, lr=0.01, batch_size=4, seed=0, masks=masks,
                augmentation=Augmentation(side=28))
    black = (given[0] == 0).all(1)
    assert torch.equal(black, masks[epoch_order(4, 0, 0)])


@pytest.mark.parametrize("kaggle", [False, True])
def test_celeba(kaggle, tmp_path, monkeypatch):
    make_celeba(tmp_path / "data", FEW, kaggle)
    monkeypatch.setattr(stages, "DATA", tmp_path / "data")
    monkeypatch.setattr(stages, "CHECKPOINTS", tmp_path)
    assert load_data(CELEBA.erm).images.shape == (10, 3, 218, 178)  # as published: nothing is scaled or cut
    assert load_data(CELEBA.erm, part="test").images.shape == (8, 3, 224, 224)
    rows = photos.measures([run(small(CELEBA, epochs=1), seed=0)])
    assert ("MaskTune", "blond, male") in {(row["method"], row["measure"]) for row in rows}


def test_the_background_challenge_with_a_resnet50(tmp_path, monkeypatch):
    """The recipe's own model, normalisation and all, on views of 64 pixels."""
    make_imagenet9(tmp_path / "data", each=1)
    monkeypatch.setattr(stages, "DATA", tmp_path / "data")
    monkeypatch.setattr(stages, "CHECKPOINTS", tmp_path)
    view = View(64, 64, 64)
    erm = replace(IMAGENET9.erm, weights=None, epochs=1, batch_size=9, train_view=view, test_view=view,
                  augmentation=replace(IMAGENET9.erm.augmentation, side=64))
    one = run(replace(IMAGENET9, erm=erm), seed=0)
    assert one.finetuned.model(torch.rand(1, 3, 224, 224)).shape == (1, 9)
    measures = {row["measure"]: row["value"] for row in photos.measures([one]) if row["method"] == "ERM"}
    assert list(measures) == ["original", "mixed_same", "mixed_rand", "BG-gap"]
    assert measures["BG-gap"] == measures["mixed_same"] - measures["mixed_rand"]


def test_what_is_missing_is_named(place, tmp_path, monkeypatch):
    assert photos.missing_files(WATERBIRDS) is None
    monkeypatch.setattr(stages, "DATA", tmp_path)
    monkeypatch.setattr(photos, "RESULTS", tmp_path)
    costs = [{"model": "ResNet50", "side": 224, "precision": precision, "train_ms": train, "masks_ms": 36}
             for precision, train in (("fp32", 100), ("bf16", 50))]
    (tmp_path / "photographs.json").write_text(json.dumps({"rows": costs}))
    rows = photos.to_fetch(PHOTOS)
    assert [row["epochs"] for row in rows] == [100, 20, 100]
    hours = [row["hours on two cores, fp32 / bf16"] for row in rows]
    assert hours[0] == "14 / 7"  # 4,795 images x 101 epochs x 0.1 s, and their masks
    assert hours[2] == "?"
    table = tables.listed(rows)
    for part in ("waterbird_complete95_forest2water2/metadata.csv is missing", "list_eval_partition.txt is missing",
                 "in9l/train is missing", "nlp.stanford.edu", "Kaggle's jessicali9530", "github.com/MadryLab"):
        assert part in table
    make_imagenet9(tmp_path, variants=("original",))
    assert "mixed_same/val is missing" in photos.missing_files(IMAGENET9)


def test_classes_that_differ_between_training_and_test(tmp_path):
    make_imagenet9(tmp_path)
    (tmp_path / "bg_challenge" / "mixed_rand" / "val" / "03_class3").rename(
        tmp_path / "bg_challenge" / "mixed_rand" / "val" / "03_reptile")
    with pytest.raises(ValueError, match=r"the classes of .*in9l/train, .*03_class3.*, got .*03_reptile"):
        ImageNet9(tmp_path, "mixed_rand")


def test_recipes_are_the_papers():
    assert [(setting.erm.batch_size, setting.erm.epochs, setting.erm.lr, setting.erm.lr_at(99), setting.erm.classes)
            for setting in PHOTOS] == [
                (128, 100, 1e-4, 1e-4, 2), (512, 20, 1e-4, 1e-4, 2), (128, 100, 1e-4, 1e-4, 9)]
    assert WATERBIRDS.erm.augmentation == Augmentation(224, (0.7, 1), (3 / 4, 4 / 3), 0.5, 0)
    assert CELEBA.erm.augmentation == Augmentation(224, (0.7, 1), (1, 4 / 3), 0.5, 0)
    assert IMAGENET9.erm.augmentation == Augmentation(224, (0.08, 1), (3 / 4, 4 / 3), 0.5, 0.1)
    with pytest.raises(ValueError, match="expected weights to be None for SmallCNN, got 'IMAGENET1K_V1'"):
        replace(WATERBIRDS.erm, model="SmallCNN")
    with pytest.raises(ValueError, match=r"expected select to be one of \('last', 'best'\), got 'first'"):
        replace(WATERBIRDS.erm, select="first")


def test_a_recipe_with_a_backbone_of_torchvision(place, tmp_path):
    torch.manual_seed(0)
    torch.save(torchvision.models.mobilenet_v2().features.state_dict(prefix="features."), tmp_path / "w.pt")
    many = small(WATERBIRDS, epochs=1, batch_size=32, lr=0.01)
    erm = replace(many.erm, model="mobilenet_v2", weights=str(tmp_path / "w.pt"), layer="features.3",
                  train_view=View(64, 64), test_view=View(64, 64), augmentation=Augmentation(side=64))
    one = run(replace(many, name="backbone", erm=erm), seed=0, threads=1)
    assert one.erm.model.saliency_layer is one.erm.model.model.features[3]
    assert 0 < one.finetuned.masks.share() < 0.5
    assert not same(one.erm.model, one.finetuned.model)
    with pytest.raises(ValueError, match="expected layer to be None for ResNet50"):
        replace(WATERBIRDS.erm, layer="layer3")
    with pytest.raises(ValueError, match="or a classifier of torchvision, got 'resnet19'"):
        replace(WATERBIRDS.erm, model="resnet19")


def test_imagenet_weights_from_a_file(tmp_path, monkeypatch):
    source = torchvision.models.resnet50()
    torch.save(source.state_dict(), tmp_path / "resnet50.pth")
    model = ResNet50(2, tmp_path / "resnet50.pth")
    assert torch.equal(model.model.layer4[2].conv3.weight, source.layer4[2].conv3.weight)
    assert model.model.fc.weight.shape == (2, 2048)
    assert torch.equal(ResNet50(1000, tmp_path / "resnet50.pth").model.fc.weight, source.fc.weight)
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name, message in (("other.pth", r"conv1.weight in .*other.pth to be \(64, 3, 7, 7\), got \(1,\)"),
                          ("text.pth", "text.pth holds no weights of torchvision's resnet50")):
        with pytest.raises(ValueError, match=message):
            ResNet50(2, tmp_path / name)
    with pytest.raises(ValueError, match=r"expected weights to be a file or one of IMAGENET1K_V1.*, got 'IMAGENET'"):
        ResNet50(2, "IMAGENET")

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"IMAGENET1K_V1 are unavailable \(no network\); get https://.*"
                                                r"resnet50-0676ba61.pth and put it into .*hub/checkpoints"):
        ResNet50(2, "IMAGENET1K_V1")
