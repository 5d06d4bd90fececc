"""Waterbirds' layout from cut-outs and scenes of one's own."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

from src.datasets import View, Waterbirds
from src.datasets.compose import compose, plan
from src.datasets.decode import decode
from tests.conftest import REPOSITORY

GREEN, BLUE, RED = (0, 160, 0), (0, 0, 200), (220, 0, 0)


@pytest.fixture
def material(tmp_path):
    """Red bars of two kinds with their masks, green and blue scenes, and the list of classes."""
    for kind, count in (("gull", 20), ("wren", 20)):
        for i in range(count):
            image, mask = Image.new("RGB", (40, 30), "grey"), Image.new("L", (40, 30))
            image.paste(RED, (10, 5, 30, 15))
            mask.paste(255, (10, 5, 30, 15))
            for folder, made, ending in (("objects", image, "jpg"), ("masks", mask, "png")):
                path = tmp_path / folder / kind / f"{i:02d}.{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                made.save(path, **({"quality": 95} if ending == "jpg" else {}))
    for scene, colour in (("forest", GREEN), ("sea", BLUE)):
        (tmp_path / scene).mkdir()
        for i in range(40):
            Image.new("RGB", (64, 48), colour).save(tmp_path / scene / f"{i}.png")
    (tmp_path / "classes.csv").write_text("folder,label\nwren,0\ngull,1\n")
    return tmp_path


def planned(material, **changes):
    arguments = dict(objects=material / "objects", masks=material / "masks", classes=material / "classes.csv",
                     scenes={name: material / name for name in ("forest", "sea")}, correlation=0.9, seed=0)
    return plan(**arguments | changes)


def test_objects_stand_on_scenes_that_go_with_the_label(material):
    plans = planned(material)
    compose(material / "out", plans, side=32, seed=0)
    sizes, usual = {}, 0
    for split in ("train", "val", "test"):
        data = Waterbirds(material / "out", split, published=False)
        sizes[split] = len(data)
        for path, label, place in zip(data.paths, data.labels, data.attributes, strict=True):
            image = decode(path, View(32, 32)).float()
            mask = torch.tensor(list(Image.open(material / "out" / "masks" / path.parent.name / f"{path.stem}.png")
                                     .get_flattened_data())).view(32, 32) > 0
            assert 0.5 * 0.55 ** 2 * 0.8 < mask.float().mean() < 0.5 * 0.85 ** 2 * 1.2  # twice as wide as high
            assert (image[:, mask].mean(1) - torch.tensor(RED)).abs().max() < 60  # its edge is blurred
            around = image[:, ~mask].mean(1)
            assert around[1 + place] > 3 * around[2 - place]  # green on land, blue on water
            assert (label == 1) == (path.parent.name == "gull")
            usual += split == "train" and label == place
    assert sizes == {"train": 24, "val": 4, "test": 12}
    assert 18 <= usual < 24
    scenes = [one.scene for one in plans]
    assert len(set(scenes)) == len(scenes)


def test_a_call_that_is_run_again_goes_on(material):
    plans = planned(material)
    compose(material / "whole", plans, side=32, seed=0)
    compose(material / "cut", plans, side=32, seed=0)
    (material / "cut" / "metadata.csv").unlink()
    for one in plans[5:]:
        (material / "cut" / f"{one.name}.jpg").unlink()
    kept = material / "cut" / f"{plans[0].name}.jpg"
    time = kept.stat().st_mtime_ns
    compose(material / "cut", planned(material), side=32, seed=0)
    assert kept.stat().st_mtime_ns == time
    for one in plans:
        path = f"{one.name}.jpg"
        assert (material / "cut" / path).read_bytes() == (material / "whole" / path).read_bytes()
    assert (material / "cut" / "metadata.csv").read_text() == (material / "whole" / "metadata.csv").read_text()
    for other in (lambda: compose(material / "cut", plans, side=64, seed=0),
                  lambda: compose(material / "objects", plans, side=32, seed=0)):
        with pytest.raises(FileExistsError, match="something else, which is left as it is"):
            other()
    assert not (material / "objects" / "metadata.csv").exists()


def test_what_does_not_fit_is_named_at_the_door(material):
    for path in list((material / "forest").iterdir())[3:]:
        path.unlink()
    with pytest.raises(ValueError, match=r"too few: \d+ more forest scenes for .*are needed"):
        planned(material)


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda root: (root / "masks" / "gull" / "03.png").unlink(), r"a mask for each object, .*03\.png is missing"),
    (lambda root: (root / "objects" / "wren" / "07.jpg").unlink(), r"an image for each mask, got none .*07\.png"),
    (lambda root: (root / "classes.csv").write_text("folder,label\nwren,2\n"), "line 2: expected a folder, a label 0"),
    (lambda root: (root / "classes.csv").write_text("folder,label\nwren,0\n"), "folders of both labels"),
    (lambda root: (root / "classes.csv").write_text("folder,label\nwren,0\nemu,1\n"), "got none called emu")])
def test_material_that_is_not_whole_is_named(spoil, message, material):
    spoil(material)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        planned(material)


def test_a_mask_of_another_size_and_the_command(material):
    arguments = [sys.executable, "-m", "src.datasets.compose", material / "out", "--objects", material / "objects",
                 "--masks", material / "masks", "--classes", material / "classes.csv", "--side", "32", "--scenes",
                 f"forest={material / 'forest'}", f"sea={material / 'sea'}"]

    def run() -> subprocess.CompletedProcess:
        return subprocess.run([*map(str, arguments)], cwd=REPOSITORY, text=True, capture_output=True, check=False)

    done = run()
    assert done.returncode == 0, done.stderr
    assert "train: " in done.stdout
    assert " of label 0 on forest, " in done.stdout
    Image.new("L", (7, 7), 255).save(material / "masks" / "gull" / "03.png")
    (material / "out" / "gull" / "03.jpg").unlink()
    failed = run()
    assert failed.returncode == 2
    assert "03.png to mark some pixels of" in failed.stderr
