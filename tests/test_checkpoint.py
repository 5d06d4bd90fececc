import errno
import os
import shutil
import signal
import subprocess
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from src import checkpoint, experiments, masktune, saliency, training
from src.checkpoint import CheckpointError
from src.experiments import run_erm, run_finetune
from src.state import digest
from tests.conftest import same


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", 1)
    return tmp_path


@pytest.fixture
def erm(folder, setting, trained):
    """The trained ERM, its file in a folder of the test's own."""
    (folder / setting.name).mkdir()
    shutil.copy(trained[1] / setting.name / "erm-seed0.pt", folder / setting.name)
    return run_erm(setting, 0)


def test_a_finished_stage_is_loaded_and_says_so(erm, setting, folder, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "train_epoch", None)  # any training would fail
    again = run_erm(setting, 0)
    assert "digits-random/erm-seed0: finished, loaded" in capsys.readouterr().out
    assert same(again.model, erm.model)
    assert again.digest() == erm.digest()
    assert again.history == erm.history


def test_an_interrupted_stage_continues_to_the_same_weights(run, setting, folder, monkeypatch, capsys):
    real, epochs = experiments.train_epoch, []

    def interrupted(state, *arguments, **options):
        epochs.append(state.epoch)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return real(state, *arguments, **options)

    monkeypatch.setattr(experiments, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_erm(setting, 0)
    assert "interrupted after 2 epochs and 0 steps, saved; run again to go on" in capsys.readouterr().out
    state = run_erm(setting, 0)
    assert "continues after 2 epochs and 0 steps" in capsys.readouterr().out
    assert epochs == [0, 1, 2, 2]
    assert same(state.model, run.erm.model)
    assert state.digest() == run.erm.digest()
    assert state.history == run.erm.history


def test_ctrl_c_waits_for_the_end_of_a_step(run, setting, folder, train, monkeypatch):
    """The signal arrives inside a forward pass; the step is finished and saved, and the run ends as if undisturbed."""
    real, calls = training.pixels, []

    def press(*arguments):
        calls.append(None)
        if len(calls) == 60:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(training, "pixels", press)
    with pytest.raises(KeyboardInterrupt):
        run_erm(setting, 0)
    saved = torch.load(folder / setting.name / "erm-seed0.pt", weights_only=True)
    steps = saved["epoch"] * len(training.epoch_batches(len(train), 32, 0, 0)) + saved["step"]
    assert steps == saved["model"]["backbone.1.num_batches_tracked"] == 60 - saved["epoch"] - 1  # one probe an epoch
    assert run_erm(setting, 0).digest() == run.erm.digest()


def test_ctrl_c_while_masks_are_sought_leaves_the_model_usable(erm, setting, folder, monkeypatch):
    digest_before, real, calls = erm.digest(), saliency.unit_range, []

    def press(maps):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(maps)

    monkeypatch.setattr(saliency, "unit_range", press)
    with pytest.raises(KeyboardInterrupt):
        run_finetune(setting, 0, erm)
    assert erm.digest() == digest_before
    tuned = run_finetune(setting, 0, erm)
    (folder / setting.name / "masktune-seed0.pt").unlink()
    assert same(tuned.model, run_finetune(setting, 0, erm).model)


def test_iterations_resume_with_their_masks(erm, setting, folder, monkeypatch):
    """Two iterations with accumulating masks, cut off in the middle of the second epoch, end as if never cut off."""
    twice = replace(setting.finetune, iterations=2, accumulate=True)
    straight = run_finetune(setting, 0, erm, twice)
    (folder / setting.name / "masktune-seed0.pt").unlink()
    real, sought = masktune.find_masks, []
    monkeypatch.setattr(masktune, "find_masks", lambda *arguments: sought.append(arguments[3]) or real(*arguments))

    def press(state: training.State) -> None:
        if state.epoch == setting.erm.epochs + 1 and state.step == 5:
            raise KeyboardInterrupt

    real_epoch = masktune.train_epoch
    with monkeypatch.context() as patch:
        patch.setattr(masktune, "train_epoch", lambda state, *arguments, after_step, **options: real_epoch(
            state, *arguments, after_step=lambda: press(state), **options))
        with pytest.raises(KeyboardInterrupt):
            run_finetune(setting, 0, erm, twice)
    resumed = run_finetune(setting, 0, erm, twice)
    assert [hidden is None for hidden in sought] == [True, False]  # the second masks were kept, not sought again
    assert same(resumed.model, straight.model)
    assert torch.equal(resumed.masks[:], straight.masks[:])
    assert resumed.digest() == straight.digest()
    assert straight.history["hidden"][1] > straight.history["hidden"][0]


def test_a_file_begun_elsewhere_says_so(setting, folder, monkeypatch, capsys):
    short = replace(setting, erm=replace(setting.erm, epochs=1))
    monkeypatch.setattr(experiments, "train_epoch", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(checkpoint, "device_name", lambda _: "an abacus")
    with pytest.raises(KeyboardInterrupt):
        run_erm(short, 0)
    monkeypatch.undo()
    monkeypatch.setattr(experiments, "CHECKPOINTS", folder)
    run_erm(short, 0)
    assert "begun with" in (said := capsys.readouterr().out)
    assert "an abacus" in said


def test_masks_and_parents_are_named_by_content(erm, setting, folder):
    tuned = run_finetune(setting, 0, erm)
    saved = torch.load(folder / setting.name / "masktune-seed0.pt", weights_only=True)
    assert saved["parents"] == {"erm": erm.digest(), "masks": digest(tuned.masks)}
    assert run_finetune(setting, 0, erm).parents == saved["parents"]


def test_another_configuration_is_refused_by_name(erm, setting, folder):
    path = folder / setting.name / "erm-seed0.pt"
    content = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"lr: 0.01 in the file, 0.02 wanted.*momentum: 0.9 in the file, 0.5"):
        run_erm(replace(setting, erm=replace(setting.erm, lr=0.02, momentum=0.5)), 0)
    run_finetune(setting, 0, erm)
    with pytest.raises(CheckpointError, match=r"\(threshold_std: 2.0 in the file, 3.0 wanted\)"):
        run_finetune(setting, 0, erm, replace(setting.finetune, threshold_std=3.0))
    assert path.read_bytes() == content


def test_every_field_of_the_configuration_is_held(erm, setting, folder):
    saved = torch.load(folder / setting.name / "erm-seed0.pt", weights_only=True)
    fields = {name: value for name, value in vars(setting.erm).items() if name not in experiments.LATER}
    assert saved["config"] == {"stage": "erm", "seed": 0, **fields}
    run_finetune(setting, 0, erm)
    saved = torch.load(folder / setting.name / "masktune-seed0.pt", weights_only=True)
    assert saved["config"] == {"stage": "finetune", "seed": 0, **vars(setting.finetune), "erm": fields}
    with pytest.raises(CheckpointError, match=r"\(precision: None in the file, 'bf16' wanted\)"):
        run_erm(replace(setting, erm=replace(setting.erm, precision="bf16")), 0)


def test_a_fine_tune_of_other_weights_is_stale(erm, setting, folder, capsys):
    run_finetune(setting, 0, erm)
    other = run_erm(setting, 1)
    capsys.readouterr()
    tuned = run_finetune(setting, 0, other)
    assert "masktune-seed0: stale" in capsys.readouterr().out
    assert same(run_finetune(setting, 0, other).model, tuned.model)
    assert "finished, loaded" in capsys.readouterr().out


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
    monkeypatch.setattr(experiments, "CHECKPOINTS", small_disk)
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", 1)
    stuffing = small_disk / "stuffing"
    real = experiments.train_epoch

    def fill(state, *arguments, **options):
        if state.epoch == 1:
            with suppress(OSError), stuffing.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        return real(state, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(experiments, "train_epoch", fill)
        with pytest.raises(CheckpointError, match=r"erm-seed0.*No space left on device"):
            run_erm(setting, 0)
    path = small_disk / setting.name / "erm-seed0.pt"
    assert torch.load(path, weights_only=True)["epoch"] == 1
    assert not list(path.parent.glob("*.tmp"))
    stuffing.unlink()
    assert run_erm(setting, 0).digest() == run.erm.digest()


def test_a_read_only_folder_is_refused_before_training_and_loads_what_is_finished(setting, trained, small_disk,
                                                                                  monkeypatch):
    monkeypatch.setattr(experiments, "CHECKPOINTS", small_disk)
    shutil.copytree(trained[1] / setting.name, small_disk / setting.name)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    monkeypatch.setattr(experiments, "train_epoch", None)  # any training would fail
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
    monkeypatch.setattr(experiments, "train_epoch", None)
    (folder / setting.name / "erm-seed0.pt").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"erm-seed0.pt is a folder"):
        run_erm(setting, 0)
    (folder / "file").write_text("")
    monkeypatch.setattr(experiments, "CHECKPOINTS", folder / "file")
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
    real = experiments.train_epoch

    def diverge(state, *arguments, **options):
        return real(state, *arguments, **{**options, "lr": lr if state.epoch == 1 else options["lr"]})

    monkeypatch.setattr(experiments, "train_epoch", diverge)
    with pytest.raises(FloatingPointError, match=r"in epoch 2, step \d+ of 43, LR 1e\+\d\d; lower the LR"):
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
