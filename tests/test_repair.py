"""What `masktune()` promises its user: a repair, an LR that is chosen, options, a report that survives its failures."""

import copy
import json
import re
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import src.evidence
import src.repair
from src import masktune, preview, suggest_layers
from src.classifier import Classifier
from src.datasets import SpuriousDigits
from src.datasets.images import Images
from src.holes import HOLES, Holes
from src.masking import find_masks
from src.masks import Masks
from src.models import SmallCNN
from src.state import State
from src.training import sgd, train_epoch
from tests.strangers import Net, equal, images, repair

pytestmark = pytest.mark.filterwarnings("ignore:the model is right on only:UserWarning")


@pytest.fixture(scope="module")
def shortcut():
    """A network of our own on the digits, trained where a square goes with 0 to 4."""
    sets = (SpuriousDigits(train=True), SpuriousDigits(train=False, test_set="malicious"))
    train, lie = (Images(data.images, data.labels, ("low", "high")) for data in sets)
    torch.manual_seed(0)
    model = nn.Sequential(*SmallCNN().backbone[:13], nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 2))
    state = State(Classifier(model, "12"), sgd(model.parameters(), 0.9, 1e-4))
    for _ in range(6):
        state.finish_epoch(loss=train_epoch(state, train.images, train.labels, lr=0.01, batch_size=32, seed=0)[0])
    return model, train, lie


@pytest.fixture(scope="module")
def repaired(shortcut):
    model, train, lie = shortcut
    before = copy.deepcopy(model)
    found = masktune(model, train, layer="12", lr=0.01, batch_size=32, tests={"lie": lie})
    assert equal(model, before)  # what was given is as it was
    assert model.training
    return found


def test_a_shortcut_is_found_and_repaired(shortcut, repaired):
    (model, train, _), (new, report) = shortcut, repaired
    assert type(new) is type(model)
    assert not new.training
    assert torch.equal(report.masks[:], find_masks(Classifier(model, "12"), train.images)[:])
    assert report.hidden == pytest.approx(report.masks.share())
    assert report.exchanged == 0
    torch.testing.assert_close(report.mean_masks[1], report.masks[:][train.labels == 1].float().mean(0))
    assert report.mean_masks[0, :4, :4].mean() > 0.9
    assert report.mean_masks[1, :4, :4].mean() < 0.1
    assert report.after["lie"].average > report.before["lie"].average + 0.2
    assert re.search(r"One spot is hot in (9\d|100)% .* class low: a shortcut .* leaned on it", report.verdict)
    half = report.masks[:]
    half[::2] = False
    assert "Nothing is hidden in 50% of the images" in replace(report, masks=Masks.of(half)).verdict


def test_the_report_is_shown_and_saved(repaired, tmp_path):
    report = repaired[1]
    shown = report._repr_html_()
    assert shown.count("data:image/jpeg;base64,") == 4
    labels, before, after, images, exchanged = report.twins
    assert labels.shape == before.shape == after.shape == (4,)
    assert images.shape == exchanged.shape == (4, 3, 28, 28)
    assert not torch.equal(images, exchanged)
    for text in (str(report), repr(report), shown):
        assert all(name in text for name in ("low", "average", "lie", f"{report.after['lie'].average:.1%}"))
        assert "tensor" not in text
    for _ in range(2):  # a report may take the place of an earlier one
        report.save(tmp_path / "report")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "report.json", *(f"{name}.jpg" for name in ("mean_masks", "mean_masks_after", "gallery", "twins"))}
    saved = json.loads((tmp_path / "report" / "report.json").read_text())
    assert saved["after"]["lie"]["average"] == report.after["lie"].average
    with pytest.raises(FileExistsError, match="free"):
        report.save(tmp_path)
    few = Images(report.examples[3].mul(255).byte(), report.examples[0], report.classes)
    other = masktune(nn.Sequential(*SmallCNN().backbone[:13], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2)),
                     few, layer="12", lr=0.01,
                     tests={"big": Images(torch.zeros(2, 3, 40, 40).byte(), torch.arange(2), report.classes)})[1]
    assert other.swaps.keys() == {"train"}  # for another size, nobody has tested how the layer is read
    odd = replace(report, classes=("$$", "\udcff"))  # matplotlib cannot write the one, UTF-8 the other
    with pytest.warns(UserWarning, match="the report lacks pictures"):
        odd.save(tmp_path / "odd")
    assert json.loads((tmp_path / "odd" / "report.json").read_text())["classes"] == ["$$", "\udcff"]


@pytest.mark.parametrize("error", [OSError("no disk"), KeyboardInterrupt()])
def test_the_model_is_returned_whatever_happens_to_the_report(monkeypatch, error):
    whole = repair(Net())[0]
    monkeypatch.setattr(src.evidence, "examples", Mock(side_effect=error))
    with pytest.warns(UserWarning, match=f"not complete: {type(error).__name__}"):
        model, report = repair(Net())
    assert equal(model, whole)
    assert report.after == {}
    for text in (str(report), report._repr_html_(), json.dumps(report.as_dict())):
        assert type(error).__name__ in text


def test_options_of_a_practitioner(shortcut):
    model, train, lie = shortcut
    few = replace(train, images=train.images[:320], labels=train.labels[:320])
    run = partial(masktune, model, few, layer="12", batch_size=32)
    once = run(lr=0.01)[0]
    assert equal(once, run(lr=0.01, device="cpu", tests={"lie": lie})[0])  # test sets change nothing
    others = [run(**{"lr": 0.01, **options})[0] for options in (
        {"iterations": 2}, {"precision": "bf16"}, {"seed": 1}, {"k": 1}, {"augment": torch.rand_like},
        {"lr": 1e-3, "optimizer": lambda weights: torch.optim.AdamW(weights, weight_decay=0.1)})]
    assert not any(equal(once, other) for other in others)
    assert equal(others[4], run(lr=0.01, augment=torch.rand_like)[0])  # torch's generator is seeded
    assert int(others[0][1].num_batches_tracked) - int(once[1].num_batches_tracked) == 10


def test_of_several_lrs_the_best_by_as_is_and_swapped_is_returned_as_alone(shortcut, capsys, monkeypatch):
    model, train, lie = shortcut
    run = partial(masktune, model, train, batch_size=32, holes="transplants", tests={"lie": lie})
    best, report = run(lr=[1e-4, 0.01, 0.005], layer="12")
    assert "3 LRs are tried; 0.0001 took" in capsys.readouterr().out
    low = {one["lr"]: min(one["as is"], one["swapped"]) for one in report.trials}
    assert low[0.0001] < low[0.01]
    chosen = report.settings["lr"]
    assert chosen == report.trials[0]["lr"] == min(lr for lr in low if low[lr] > max(low.values()) - src.repair.TIED)
    alone, single = run(lr=chosen, layer="12")
    assert equal(best, alone)
    assert report.swaps == single.swaps
    assert single.swaps["train"] == [report.swaps["train"][0], pytest.approx(report.trials[0]["swapped"])]
    assert single.swaps["train"][0] < 0.2 < 0.8 < single.swaps["train"][1]
    assert single.swaps.keys() == {"train", "lie"}
    assert re.search(r"exchanged for that of another class, it was right on .* and the repaired model is on",
                     str(report))
    assert "0.0001" in str(report)
    assert "0.005" in report._repr_html_()
    monkeypatch.setattr(src.repair, "LRS", (0.003, 0.005, 0.01))
    first = suggest_layers(model, train.images)[0][0]
    found = masktune(model, train)[1].settings
    assert found["layer"] == first
    assert found["lr"] in src.repair.LRS


def test_of_lrs_within_half_a_point_of_the_best_it_is_the_smallest(monkeypatch):
    low = {0.1: 0.85, 0.2: 0.9, 0.3: 0.904, 0.4: 0.906, 0.5: 0.8}
    monkeypatch.setattr(src.repair, "accuracy", lambda lr, *_: low[lr])
    monkeypatch.setattr(src.repair, "swap_test", lambda *_: None)
    tuned = lambda lr: Mock(model=lr)  # noqa: E731
    state, trials = src.repair._best(tuned, sorted(low), images(), None, 0)
    assert state.model == trials[0]["lr"] == 0.3  # 0.2 is within half a point of it, but not of the best
    assert [one["lr"] for one in trials] == [0.3, 0.1, 0.2, 0.4, 0.5]


def test_lrs_are_numbers_of_any_kind():
    given = [0.01, 0.02]
    kinds = given, numpy.array(given), torch.tensor(given, dtype=torch.float64)
    found = [repair(Net(), lr=lr)[1].tried() for lr in kinds]
    assert all(one.equals(found[0]) for one in found)


def test_lrs_that_destroy_are_passed_over_but_not_if_all_do(shortcut):
    model, train, _ = shortcut
    few = replace(train, images=train.images[:320], labels=train.labels[:320])
    explode = 1e-3, 1e30
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(src.repair, "rehearse", lambda *_, **__: None)
        report = masktune(model, few, layer="12", lr=explode)[1]
        assert report.settings["lr"] == explode[0]
        assert report.tried()["swapped"].isna().tolist() == [False, True]
        with pytest.raises(FloatingPointError):
            masktune(model, few, layer="12", lr=explode[1:])
    for lr in ([], [1e-3, 1e9]):
        with pytest.raises(ValueError, match="expected lr to"):
            masktune(model, few, layer="12", lr=lr)


def test_iterations_end_where_no_new_spot_is_left(shortcut, monkeypatch):
    model, train, _ = shortcut
    few = replace(train, images=train.images[:320], labels=train.labels[:320])
    run = partial(masktune, model, few, layer="12", lr=0.01, batch_size=32, holes="transplants", iterations=None)
    corner, calls = torch.zeros(320, 28, 28).bool(), []

    def find(_, images, k, hidden=None, **__):
        """In each call but the last of three, a spot beside those before."""
        new = corner[:len(images)].clone()
        new[:, 0, len(calls)] = len(calls) < 2
        calls.append(hidden)
        return Masks.of(new if hidden is None else new | hidden[:])

    monkeypatch.setattr(src.repair, "find_masks", find)
    _, report = run()
    assert len(report.history["loss"]) == 2
    assert report.masks[:][0, 0, :3].tolist() == [True, True, False]


def test_a_second_look_says_where_the_repaired_model_leans_now(repaired):
    report = repaired[1]
    assert report.again.means.shape == (2, 28, 28)
    assert 0 <= report.again.swapped <= 1
    moved = replace(report, again=replace(report.again, spots={1: (27, 26)}))
    assert "Now it leans on a spot at the lower right in images of class high: iterate" in moved.verdict


def test_one_class_alone_is_repaired_with_black_holes_and_has_no_swap_test():
    data = replace(images(), labels=torch.zeros(16, dtype=torch.int64))
    report = repair(Net(), data)[1]
    assert report.swaps == {"train": [None, None]}
    assert not report.failure
    assert repair(Net(), data, lr=[0.01, 0.02])[1].settings["lr"] in (0.01, 0.02)
    with pytest.raises(ValueError, match="at least two classes"):
        repair(Net(), data, holes="transplants")


def test_the_report_is_of_the_model_that_is_returned():
    """In bf16, as it was given, and not in fp32, in which it was trained."""
    model, data = Net().bfloat16(), images()
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[1.0], [1.0 + 2 ** -7]]).expand(2, 8))
    repaired, report = repair(model, data, lr=1e-4)
    logits = repaired((data.images / 255).bfloat16())
    assert report.after["train"].average == (logits.argmax(1) == data.labels).double().mean()


def test_a_repair_that_does_little_is_doubted(shortcut, monkeypatch):
    flat, (model, train, _) = Net(), shortcut
    nn.init.zeros_(flat.head.weight)
    for one, k in ((flat, 2), (Net(), 50)):
        with pytest.warns(UserWarning, match="0.00% of the pixels .*name a finer layer"):
            report = repair(one, k=k)[1]
        assert report.verdict.startswith("0.00% of the pixels")
        assert (report.failure, report.twins) == ("", None)
    with pytest.warns(UserWarning, match="right on only .* of the training images"):
        masktune(model, replace(train, labels=1 - train.labels), layer="12", lr=0.01)
    monkeypatch.setattr(src.repair, "find_masks", lambda *_, **__: Masks.of(torch.ones(16, 32, 32).bool()))
    with pytest.warns(UserWarning, match="100.00% of the pixels .*raise k"):
        repair(Net())


def test_data_sets_are_taken_as_they_are():
    pairs = TensorDataset(images().images, images().labels)
    whole = repair(Net())[0]
    for given in (pairs, [(numpy.asarray(x), int(y)) for x, y in pairs]):
        repaired, report = repair(Net(), given, tests={"same": given})
        assert equal(repaired, whole)
        assert report.before["same"] == report.before["train"]


def test_images_that_are_not_square_and_groups():
    report = repair(Net(), replace(images(), images=images().images[:, :, :20], groups=torch.arange(16) % 3))[1]
    assert report.mean_masks.shape == (2, 20, 32)
    assert report.before["train"].groups.keys() == {0, 1, 2}
    assert "group 2" in str(report)


def test_each_training_image_is_looked_at_three_times(shortcut, monkeypatch):
    model, train, _ = shortcut
    seen = []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(model)

        def forward(self, x):
            seen.append(len(x))
            return self.model(x)

    monkeypatch.setattr(src.evidence, "SWAPPED", 100)
    masktune(Counting(), train, layer="model.12", lr=0.01, batch_size=64)
    assert 3 * len(train) <= sum(seen) < 3 * len(train) + 1100  # the door, the swap test, the second look


def test_a_preview_trains_nothing_and_shows_what_would_be_hidden(shortcut):
    model, train, lie = shortcut
    report = preview(copy.deepcopy(model), train, layer="12", tests={"lie": lie})
    tuned = masktune(copy.deepcopy(model), train, layer="12", lr=0.01, batch_size=64, tests={"lie": lie})[1]
    assert torch.equal(report.masks[:], tuned.masks[:])
    assert (report.before, report.covered) == (tuned.before, tuned.covered)
    assert report.after == report.history == {}
    assert "gallery" in report.pictures()
    assert "goes from" not in report.verdict
    assert report.swaps == {"train": tuned.swaps["train"][:1]}
    assert 'ask for holes="transplants"' in report.verdict
    shown = preview(copy.deepcopy(model), train, layer="12", holes="transplants")
    asked = masktune(copy.deepcopy(model), train, layer="12", lr=0.01, batch_size=64, holes="transplants")[1]
    assert (shown.hidden, shown.exchanged) == (asked.hidden, asked.exchanged)
    assert shown.exchanged > 0.01
    assert torch.equal(shown.examples[-1], asked.examples[-1])


def test_the_first_layer_suggested_is_one_whose_masks_hit_the_square(shortcut):
    model, train, _ = shortcut
    found, squares = suggest_layers(model, train.images), SpuriousDigits(train=True).known[:]
    hit = {name: find_masks(Classifier(copy.deepcopy(model), name), train.images)[:][squares].double().mean().item()
           for name, _ in found}
    assert len(found) > 1
    assert hit[found[0][0]] > 0.9


def test_a_loss_and_holes_of_ones_own_are_taken(shortcut):
    model, train, _ = shortcut
    few = replace(train, images=train.images[:320], labels=train.labels[:320])
    run = partial(masktune, model, few, layer="12", lr=0.01, batch_size=64)
    plain, usual = run(loss=nn.CrossEntropyLoss())
    assert equal(run()[0], plain)
    weighted = nn.CrossEntropyLoss(torch.tensor([1.0, 5.0]))
    for change in ({"loss": weighted}, {"holes": "decoys"}, {"holes": "transplants"}, {"holes": Holes(fill="smooth")}):
        model, report = run(**change)
        assert not equal(model, plain)
        assert (report.hidden + report.exchanged > usual.hidden + 0.01) == (change.get("holes") in tuple(HOLES))


def test_what_a_repair_destroyed_or_cannot_tell_is_said(shortcut):
    model, train, lie = shortcut
    report = masktune(model, train, layer="12", lr=2.0, batch_size=64, tests={"lie": lie})[1]
    assert "answers one class to everything" in report.verdict
    for lr in (1e-13, 1e9):
        with pytest.raises(ValueError, match=r"LR|lr to move the weights"):
            masktune(model, train, layer="12", lr=lr, batch_size=64)
