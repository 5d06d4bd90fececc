from dataclasses import replace

import pytest
import torch

from src import checkpoint, experiments
from src.checkpoint import CheckpointError, digest
from src.experiments import run_erm, run_finetune
from tests.conftest import same


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", 1)
    return tmp_path


@pytest.fixture
def erm(folder, setting):
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

    def interrupted(*arguments, epoch, **options):
        epochs.append(epoch)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return real(*arguments, epoch=epoch, **options)

    monkeypatch.setattr(experiments, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_erm(setting, 0)
    state = run_erm(setting, 0)
    assert "continues after epoch 2" in capsys.readouterr().out
    assert epochs == [0, 1, 2, 2]
    assert same(state.model, run.erm.model)
    assert state.digest() == run.erm.digest()
    assert state.history == run.erm.history


def test_iterations_resume_with_their_masks(erm, setting, folder, monkeypatch):
    """Two iterations with accumulating masks, interrupted between them, end as if never interrupted."""
    twice = replace(setting.finetune, iterations=2, accumulate=True)
    straight = run_finetune(setting, 0, erm, twice)
    (folder / setting.name / "masktune-seed0.pt").unlink()
    real, calls = experiments.masktune, []

    def interrupted(*arguments, **options):
        calls.append(options["hidden"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(experiments, "masktune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_finetune(setting, 0, erm, twice)
    resumed = run_finetune(setting, 0, erm, twice)
    assert [hidden is None for hidden in calls] == [True, False, False]
    assert same(resumed.model, straight.model)
    assert torch.equal(resumed.masks, straight.masks)
    assert straight.history["hidden"][1] > straight.history["hidden"][0]


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
    assert saved["config"] == {"stage": "erm", "seed": 0, **vars(setting.erm)}
    run_finetune(setting, 0, erm)
    saved = torch.load(folder / setting.name / "masktune-seed0.pt", weights_only=True)
    assert saved["config"] == {"stage": "finetune", "seed": 0, **vars(setting.finetune), "erm": vars(setting.erm)}


def test_a_fine_tune_of_other_weights_is_stale(erm, setting, folder, capsys):
    run_finetune(setting, 0, erm)
    other = run_erm(setting, 1)
    capsys.readouterr()
    tuned = run_finetune(setting, 0, other)
    assert "masktune-seed0: stale" in capsys.readouterr().out
    assert same(run_finetune(setting, 0, other).model, tuned.model)
    assert "finished, loaded" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:len(content) // 2], lambda content: b"not a checkpoint",
    lambda content: content[:50_000] + bytes([content[50_000] ^ 1]) + content[50_001:]])
def test_a_damaged_file_is_refused_and_left_alone(erm, setting, folder, damage):
    path = folder / setting.name / "erm-seed0.pt"
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="erm-seed0"):
        run_erm(setting, 0)
    assert path.read_bytes() == damaged


def test_exchanged_weights_are_noticed(erm, setting, folder):
    path = folder / setting.name / "erm-seed0.pt"
    saved = torch.load(path, weights_only=True)
    saved["model"]["linear.3.bias"] += 1e-3
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match="checksum"):
        run_erm(setting, 0)


def test_a_failed_write_keeps_the_old_file_and_no_litter(erm, setting, folder, monkeypatch):
    path = folder / setting.name / "erm-seed0.pt"
    content = path.read_bytes()
    monkeypatch.setattr(checkpoint.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint._write(path, {"any": 1})
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_digest_sees_values_names_and_shapes_but_not_strides():
    weight = torch.rand(2, 3, 4, 4)
    assert digest({"w": weight}) == digest({"w": weight.to(memory_format=torch.channels_last)})
    assert len({digest(content) for content in (
        {"w": weight}, {"v": weight}, {"w": weight.view(3, 2, 4, 4)}, {"w": weight + 1}, {"w": weight.double()},
        [weight], {"w": [1, 2]}, {"w": [1, 2.0]}, {"w": [[1], 2]})}) == 9
