"""A stage is run once: loaded where it is finished, continued to the same bits where it was interrupted."""

import errno
import os
import pickle
import signal
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from unittest.mock import Mock

import filelock
import numpy as np
import pytest
import torch

from src import checkpoint, files, masking
from src.checkpoint import CheckpointError, finished, load_or_run
from src.experiments import stages
from src.experiments.recipes import Places
from src.models import SmallCNN
from src.state import State, digest
from src.training import sgd
from tests.conftest import same
from tests.harness import SETTING, first_images, results


def press(monkeypatch, owner, name, *calls):
    """Let Ctrl-C come as some calls of a function begin, by their numbers."""
    real, numbers = getattr(owner, name), count()

    def pressed(*arguments, **options):
        if next(numbers) in calls:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, pressed)


def stage(path, config=None, epochs=2, **more):
    """A stage of one weight, whose `advance` returns what is given; and how often it was called."""
    def fresh() -> State:
        model = torch.nn.Linear(1, 1)
        return State(model, sgd(model.parameters(), 0.9, 0))

    trained = []
    return load_or_run(path, config or {}, epochs, fresh, lambda state: trained.append(0) or more), len(trained)


def test_what_an_epoch_returns_is_kept_as_numbers(tmp_path):
    seen = {"a": np.float64(0.5), "b": np.int64(2), "c": torch.tensor(0.5), "d": True}
    for trained in (2, 0):
        state, calls = stage(tmp_path / "a.pt", **seen)
        assert (calls, state.history) == (trained, {"a": [0.5] * 2, "b": [2.0] * 2, "c": [0.5] * 2, "d": [1.0] * 2})


@pytest.mark.parametrize(("value", "word"), [
    (Path("/x"), "Path"), (np.int64(3), "numpy"), (float("nan"), "nan"), (len, "len"), (lambda: 0, "lambda")])
def test_a_configuration_that_a_file_cannot_give_back_is_refused_first(value, word, tmp_path):
    with pytest.raises((ValueError, pickle.PickleError, AttributeError), match=word):
        stage(tmp_path / "a.pt", {"x": value})
    assert not (tmp_path / "a.pt").exists()


def test_a_finished_stage_is_loaded_silently(run, trained, setting, monkeypatch, capsys):
    places = Places(trained[1])
    path = stages.erm_path(places, setting, 0)
    monkeypatch.setattr(stages, "train_epoch", None)  # any training would fail
    monkeypatch.setattr(filelock.FileLock, "acquire", Mock(side_effect=OSError(errno.EROFS, "Read-only file system")))
    again = stages.run_erm(places, setting, 0)
    assert capsys.readouterr().out == ""
    assert (again.digest(), again.history) == (run.erm.digest(), run.erm.history)
    assert torch.load(path, weights_only=True)["config"] == {"stage": "erm", "seed": 0, **asdict(setting.erm)}
    assert [finished(path, 3), finished(path, 4), finished(path.with_name("none.pt"), 3)] == [True, False, False]
    with pytest.raises(OSError, match="Read-only"):  # what is not finished is refused before it is trained
        stages.run_erm(places, setting, 1)


def test_ctrl_c_anywhere_and_any_number_of_times(tmp_path, monkeypatch):
    """In a forward and a backward pass, in an update, in a heat map, and as a file is written: the same files."""
    monkeypatch.setattr(stages, "load_data", first_images)
    stages.run(Places(tmp_path / "straight"), SETTING, seed=0)  # three epochs and two, of ten steps each
    places = ((SmallCNN, "forward", (0, 5, 22, 70)), (torch.Tensor, "backward", (9, 40)), (os, "fsync", (0, 2, 4)),
              (torch.optim.SGD, "step", (30, 53)), (masking, "hottest", (1, 2)))
    for owner, name, calls in places:
        press(monkeypatch, owner, name, *calls)
    stops = 0
    while True:
        try:
            stages.run(Places(tmp_path / "interrupted"), SETTING, seed=0)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == sum(len(calls) for *_, calls in places)
    assert results(tmp_path / "interrupted") == results(tmp_path / "straight")


def test_a_file_begun_elsewhere_says_so(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "device_name", lambda _: "an abacus")
        stage(tmp_path / "a.pt", epochs=1)
    assert stage(tmp_path / "a.pt", epochs=2)[1] == 1
    assert "an abacus" in capsys.readouterr().out


def test_another_configuration_is_refused_by_name(tmp_path):
    stage(tmp_path / "a.pt", {"lr": 1, "erm": {"k": 2, "same": 3}})
    before = results(tmp_path)
    with pytest.raises(CheckpointError, match=r"\(erm.k: expected 4, got 2; lr: expected 5, got 1\)"):
        stage(tmp_path / "a.pt", {"lr": 5, "erm": {"k": 4, "same": 3}}, epochs=3)
    assert results(tmp_path) == before


def test_a_fine_tune_with_other_options_has_its_own_file_and_of_other_weights_is_stale(
        run, setting, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "load_data", first_images)
    places, path = Places(tmp_path), tmp_path / setting.name / "masktune-seed0.pt"
    first = stages.run_finetune(places, setting, 0, run.erm)
    stages.run_finetune(places, setting, 0, run.erm, replace(setting.finetune, threshold_std=3.0))
    assert {file.name for file in path.parent.glob("*.pt")} == {path.name, "masktune-threshold_std-3.0-seed0.pt"}
    saved = torch.load(path, weights_only=True)
    assert saved["config"] | {"holes": "black"} == {
        "stage": "finetune", "seed": 0, **asdict(setting.finetune), "erm": asdict(setting.erm)}
    assert saved["parents"] == {"erm": run.erm.digest(), "masks": digest(first.masks)}
    other = stages.run_erm(places, replace(setting, name="other"), 1)
    tuned, again = (stages.run_finetune(places, setting, 0, other) for _ in range(2))
    assert capsys.readouterr().out.count("masktune-seed0: stale") == 1
    assert same(again.model, tuned.model)


def test_a_loss_that_is_no_number_stops_before_anything_is_overwritten(setting, tmp_path, monkeypatch):
    real = stages.train_epoch
    monkeypatch.setattr(stages, "load_data", first_images)
    monkeypatch.setattr(stages, "train_epoch", lambda state, *data, lr, **options: real(
        state, *data, lr=1e20 if state.epoch == 1 else lr, **options))
    with pytest.raises(FloatingPointError, match=r"not finite in epoch 2, step \d+ of 10, LR 1e\+20;"):
        stages.run_erm(Places(tmp_path), setting, 0)
    saved = torch.load(tmp_path / setting.name / "erm-seed0.pt", weights_only=True)
    assert saved["epoch"] == 1
    assert all(value.isfinite().all() for value in saved["model"].values())


@pytest.mark.parametrize(("name", "number"), [("fsync", errno.EIO), ("fsync", errno.ENOSPC), ("replace", errno.EACCES)])
def test_a_failed_write_leaves_what_was_there_and_a_run_goes_on_when_it_can(name, number, tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    stage(path, epochs=1)
    before = results(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, name, Mock(side_effect=OSError(number, os.strerror(number))))
        with pytest.raises(OSError, match=os.strerror(number)):
            stage(path, epochs=2)
    assert results(tmp_path) == before
    assert stage(path, epochs=2)[1] == 1


def test_ctrl_c_waits_for_the_file_under_way(tmp_path, monkeypatch):
    press(monkeypatch, os, "fsync", 0)
    with pytest.raises(KeyboardInterrupt):
        files.write_whole(tmp_path / "file", b"whole")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]


def test_a_lock_clears_away_what_was_left_and_is_done_without_where_there_is_none(tmp_path, monkeypatch):
    mine, others = (tmp_path / f"{files._hidden(tmp_path / name)}1.tmp" for name in ("n" * 250, "b"))
    for path in (mine, others):
        path.write_bytes(b"half")
    monkeypatch.setattr(filelock.FileLock, "acquire", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with files.locked(tmp_path / ("n" * 250)):
        files.write_whole(tmp_path / ("n" * 250), b"whole")  # the longest of names
    assert not mine.exists()
    assert others.exists()  # another process may be writing it


def test_digest_sees_values_names_and_shapes_but_not_strides():
    weight = torch.rand(2, 3, 4, 4)
    assert digest({"w": weight}) == digest({"w": weight.to(memory_format=torch.channels_last)})
    assert len({digest(content) for content in (
        {"w": weight}, {"v": weight}, {"w": weight.view(3, 2, 4, 4)}, {"w": weight + 1}, {"w": weight.double()},
        [weight], {"w": [1, 2]}, {"w": [1, 2.0]}, {"w": [[1], 2]})}) == 9
    pinned = digest({"a": torch.arange(3), "b": [1, 2.5, None, "x"], "c": (True,)})  # results/ names weights by it
    assert pinned == "2ebb5ecb3c7090e396efcae8de2c9b571b591d71bcd6582ae1ea33640f0483ae"
