"""A stage is run once: loaded where it is finished, continued to the same bits where it was interrupted."""

import errno
import os
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from src import checkpoint, saliency
from src.checkpoint import CheckpointError, finished, load_or_run
from src.experiments import stages
from src.experiments.stages import run_erm, run_finetune
from src.files import write_whole
from src.state import State, digest
from src.training import sgd
from tests.conftest import same
from tests.harness import SETTING, first_images, results


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "CHECKPOINTS", tmp_path)
    return tmp_path


@pytest.fixture
def erm(folder, setting, trained):
    """The trained ERM, its file in a folder of the test's own."""
    (folder / setting.name).mkdir()
    shutil.copy(trained[1] / setting.name / "erm-seed0.pt", folder / setting.name)
    return run_erm(setting, 0)


def press(monkeypatch, owner, name, *calls):
    """Let Ctrl-C come as some calls of a function begin, by their numbers."""
    real, numbers = getattr(owner, name), count()

    def pressed(*arguments, **options):
        if next(numbers) in calls:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, pressed)


def stage(path, config=None, epochs=2, **more):
    """A stage of one weight, whose `advance` returns what is given."""
    def fresh() -> State:
        model = torch.nn.Linear(1, 1)
        return State(model, sgd(model, 0.9, 0))

    trained = []
    return load_or_run(path, config or {}, epochs, fresh, lambda state: trained.append(0) or more), trained


@pytest.mark.parametrize("value", [np.float64(0.5), np.int64(2), torch.tensor(0.5), True])
def test_what_an_epoch_returns_is_kept_as_numbers(value, tmp_path):
    state, trained = stage(tmp_path / "a.pt", auc=value)
    again, more = stage(tmp_path / "a.pt", auc=value)
    assert (len(trained), len(more)) == (2, 0)
    assert again.history == state.history == {"auc": [float(value)] * 2}


@pytest.mark.parametrize(("config", "message"), [
    ({"root": Path("/x")}, "plain numbers, strings and tensors"), ({"n": np.int64(3)}, "plain numbers, strings"),
    ({"p": float("nan")}, "equal to its copy, got p: expected nan, got nan"), ({"f": len}, "plain numbers, strings")])
def test_a_configuration_that_a_file_cannot_give_back_is_refused_first(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        stage(tmp_path / "a.pt", config)
    assert not (tmp_path / "a.pt").exists()


def test_a_finished_stage_is_loaded_silently(erm, setting, folder, monkeypatch, capsys):
    monkeypatch.setattr(stages, "train_epoch", None)  # any training would fail
    again = run_erm(setting, 0)
    assert capsys.readouterr().out == ""
    assert (again.digest(), again.history) == (erm.digest(), erm.history)
    path = stages.erm_path(setting, 0)
    assert [finished(path, 3), finished(path, 4), finished(path.with_name("none.pt"), 3)] == [True, False, False]


def test_an_interrupted_stage_continues_to_the_same_weights(run, setting, folder, monkeypatch, capsys):
    real, epochs = stages.train_epoch, []

    def interrupted(state, *arguments, **options):
        epochs.append(state.epoch)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return real(state, *arguments, **options)

    monkeypatch.setattr(stages, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_erm(setting, 0)
    assert "interrupted; the 2 epochs done are saved, run again to go on" in capsys.readouterr().out
    state = run_erm(setting, 0)
    assert "continues after 2 epochs" in capsys.readouterr().out
    assert epochs == [0, 1, 2, 2]
    assert (state.digest(), state.history) == (run.erm.digest(), run.erm.history)


def test_ctrl_c_anywhere_and_any_number_of_times(tmp_path, monkeypatch):
    """In a forward and a backward pass, in an update, in a heat map, and as a file is written: the same files."""
    monkeypatch.setattr(stages, "load_data", first_images)
    monkeypatch.setattr(stages, "CHECKPOINTS", tmp_path / "straight")
    stages.run(SETTING, seed=0)  # three epochs and two, of ten steps each
    monkeypatch.setattr(stages, "CHECKPOINTS", tmp_path / "interrupted")
    places = ((F, "cross_entropy", (0, 5, 22, 70)), (torch.Tensor, "backward", (9, 40)), (os, "fsync", (0, 3, 7)),
              (torch.optim.SGD, "step", (30, 53)), (saliency, "unit_range", (1, 3)))
    for owner, name, calls in places:
        press(monkeypatch, owner, name, *calls)
    stops = 0
    while True:
        try:
            stages.run(SETTING, seed=0)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == sum(len(calls) for *_, calls in places)
    assert results(tmp_path / "interrupted") == results(tmp_path / "straight")


def test_ctrl_c_while_masks_are_sought_leaves_the_model_usable(erm, run, setting, folder, monkeypatch):
    before = erm.digest()
    press(monkeypatch, saliency, "unit_range", 2)
    with pytest.raises(KeyboardInterrupt):
        run_finetune(setting, 0, erm)
    assert erm.digest() == before
    assert same(run_finetune(setting, 0, erm).model, run.finetuned.model)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_file_under_way(number, tmp_path, monkeypatch):
    def arrive(*_):
        raise InterruptedError

    before, fsync = signal.signal(number, arrive), os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: os.kill(os.getpid(), number) or fsync(handle))
    with pytest.raises(InterruptedError):
        write_whole(tmp_path / "file", b"whole")
    assert signal.signal(number, before) is arrive
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]
    monkeypatch.undo()
    with ThreadPoolExecutor() as pool:  # where Python handles no signals
        pool.submit(write_whole, tmp_path / "file", b"again").result()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"again"]


def test_a_file_begun_elsewhere_says_so(setting, folder, monkeypatch, capsys):
    short = replace(setting, erm=replace(setting.erm, epochs=2))
    press(monkeypatch, F, "cross_entropy", 50)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "device_name", lambda _: "an abacus")
        with pytest.raises(KeyboardInterrupt):
            run_erm(short, 0)
    run_erm(short, 0)
    assert "begun with" in (said := capsys.readouterr().out)
    assert "an abacus" in said


def test_every_field_of_the_configuration_is_held_and_what_a_stage_came_from(erm, setting, folder):
    saved = torch.load(folder / setting.name / "erm-seed0.pt", weights_only=True)
    assert saved["config"] == {"stage": "erm", "seed": 0, **asdict(setting.erm)}
    tuned = run_finetune(setting, 0, erm)
    saved = torch.load(folder / setting.name / "masktune-seed0.pt", weights_only=True)
    assert saved["config"] == {"stage": "finetune", "seed": 0, **asdict(setting.finetune), "erm": asdict(setting.erm)}
    assert saved["parents"] == {"erm": erm.digest(), "masks": digest(tuned.masks)}
    assert run_finetune(setting, 0, erm).parents == saved["parents"]


def test_another_configuration_is_refused_by_name(erm, setting, folder):
    path = folder / setting.name / "erm-seed0.pt"
    content = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"lr: expected 0.02, got 0.01.*momentum: expected 0.5, got 0.9"):
        run_erm(replace(setting, erm=replace(setting.erm, lr=0.02, momentum=0.5)), 0)
    run_finetune(setting, 0, erm)
    with pytest.raises(CheckpointError, match=r"\(erm.precision: expected 'bf16', got 'fp32'\)"):
        run_finetune(replace(setting, erm=replace(setting.erm, precision="bf16")), 0, erm)
    other = replace(setting.finetune, threshold_std=3.0)
    with pytest.raises(CheckpointError, match=r"\(threshold_std: expected 3.0, got 2.0\)"):
        run_finetune(replace(setting, finetune=other), 0, erm)
    assert path.read_bytes() == content
    run_finetune(setting, 0, erm, other)  # beside the setting's own
    assert {path.name for path in path.parent.glob("*.pt")} == {
        "erm-seed0.pt", "masktune-seed0.pt", "masktune-threshold_std-3.0-seed0.pt"}


def test_a_fine_tune_of_other_weights_is_stale(erm, setting, folder, capsys):
    run_finetune(setting, 0, erm)
    other = run_erm(setting, 1)
    capsys.readouterr()
    tuned = run_finetune(setting, 0, other)
    assert "masktune-seed0: stale" in capsys.readouterr().out
    assert same(run_finetune(setting, 0, other).model, tuned.model)
    assert capsys.readouterr().out == ""


def test_a_failed_write_keeps_the_old_file_and_no_litter(erm, setting, folder, monkeypatch):
    path = folder / setting.name / "erm-seed0.pt"
    content = path.read_bytes()
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space")))
            with pytest.raises(CheckpointError, match=r"erm-seed0.*cannot be written \(No space\).*Free some space"):
                checkpoint._write(path, b"new")
        assert path.read_bytes() == content
        assert [file.name for file in path.parent.iterdir() if file.suffix != ".lock"] == [path.name]


def test_a_full_disk_stops_the_run_and_it_goes_on_when_there_is_room(run, setting, monkeypatch, small_disk):
    monkeypatch.setattr(stages, "CHECKPOINTS", small_disk)
    stuffing = small_disk / "stuffing"
    real = stages.train_epoch

    def fill(state, *arguments, **options):
        if state.epoch == 1:
            with suppress(OSError), stuffing.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        return real(state, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "train_epoch", fill)
        with pytest.raises(CheckpointError, match=r"erm-seed0.*No space left on device"):
            run_erm(setting, 0)
    path = small_disk / setting.name / "erm-seed0.pt"
    assert torch.load(path, weights_only=True)["epoch"] == 1
    assert not list(path.parent.glob("*.tmp"))
    stuffing.unlink()
    assert run_erm(setting, 0).digest() == run.erm.digest()


def test_a_read_only_folder_is_refused_before_training_and_loads_what_is_finished(setting, trained, small_disk,
                                                                                  monkeypatch):
    monkeypatch.setattr(stages, "CHECKPOINTS", small_disk)
    shutil.copytree(trained[1] / setting.name, small_disk / setting.name)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    monkeypatch.setattr(stages, "train_epoch", None)  # any training would fail
    run_erm(setting, 0)
    with pytest.raises(CheckpointError, match=r"erm-seed1.*cannot be written"):
        run_erm(setting, 1)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=False,
                      capture_output=True).returncode:
        pytest.skip("a small file system needs root and the right to mount one")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_path_that_cannot_be_one_is_refused_before_training(setting, folder, monkeypatch):
    monkeypatch.setattr(stages, "train_epoch", None)
    (folder / setting.name / "erm-seed0.pt").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"erm-seed0.pt to be a checkpoint, got a folder"):
        run_erm(setting, 0)
    (folder / "file").write_text("")
    monkeypatch.setattr(stages, "CHECKPOINTS", folder / "file")
    with pytest.raises(CheckpointError, match="cannot be"):
        run_erm(setting, 0)


def test_leftovers_of_a_killed_write_are_cleared_away(setting, folder):
    setting = replace(setting, erm=replace(setting.erm, epochs=1))
    mine, others = folder / setting.name / ".erm-seed0.pt.abc.tmp", folder / setting.name / ".erm-seed1.pt.abc.tmp"
    mine.parent.mkdir()
    mine.write_bytes(b"half")
    others.write_bytes(b"half")
    run_erm(setting, 0)
    assert not mine.exists()
    assert others.exists()  # another process may be writing it


@pytest.mark.parametrize("lr", [1e20, 1e38])
def test_a_loss_that_is_no_number_stops_before_anything_is_overwritten(setting, folder, monkeypatch, lr):
    path = folder / setting.name / "erm-seed0.pt"
    real = stages.train_epoch

    def diverge(state, *arguments, **options):
        return real(state, *arguments, **{**options, "lr": lr if state.epoch == 1 else options["lr"]})

    monkeypatch.setattr(stages, "train_epoch", diverge)
    with pytest.raises(FloatingPointError, match=r"the loss is not finite in epoch 2, step \d+ of 43, LR 1e\+\d\d;"):
        run_erm(setting, 0)
    saved = torch.load(path, weights_only=True)
    assert saved["epoch"] == 1
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_digest_sees_values_names_and_shapes_but_not_strides():
    weight = torch.rand(2, 3, 4, 4)
    assert digest({"w": weight}) == digest({"w": weight.to(memory_format=torch.channels_last)})
    assert len({digest(content) for content in (
        {"w": weight}, {"v": weight}, {"w": weight.view(3, 2, 4, 4)}, {"w": weight + 1}, {"w": weight.double()},
        [weight], {"w": [1, 2]}, {"w": [1, 2.0]}, {"w": [[1], 2]})}) == 9
