"""Waterbirds' layout from cut-outs and scenes of one's own."""

import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from src.datasets import View, load, open_files
from src.datasets.compose import compose, plan
from tests.conftest import REPOSITORY

WREN = "wr\udcean"  # no UTF-8
GREEN, BLUE, RED = (0, 160, 0), (0, 0, 200), (220, 0, 0)


@pytest.fixture
def material(tmp_path):
    """Red bars of four kinds with their masks, green and blue scenes, and the list of classes."""
    image, mask = Image.new("RGB", (40, 30), "grey"), Image.new("L", (40, 30))
    image.paste(RED, (10, 5, 30, 15))
    mask.paste(255, (10, 5, 30, 15))
    for kind in ("gull", WREN, "duck", "kiwi"):
        for i in range(10):
            for folder, made, ending in (("objects", image, "jpg"), ("masks", mask, "png")):
                path = tmp_path / folder / kind / f"{i:02d}.{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                made.save(path, quality=95)
    for scene, colour in (("forest", GREEN), ("sea", BLUE)):
        (tmp_path / scene).mkdir()
        for i in range(40):
            Image.new("RGB", (64, 48), colour).save(tmp_path / scene / f"{i}.png")
    listed(f"{WREN},0,train\ngull,1,train\nduck,1,test\nkiwi,0,2\n")(tmp_path)
    return tmp_path


def listed(rows, columns="folder,label,split"):
    return lambda root: (root / "classes.csv").write_bytes(os.fsencode(f"{columns}\n{rows}"))


def planned(material, **changes):
    arguments = dict(objects=material / "objects", masks=material / "masks", classes=material / "classes.csv",
                     scenes={name: material / name for name in ("forest", "sea")}, correlation=0.9, seed=0)
    return plan(**arguments | changes)


def test_objects_stand_on_scenes_that_go_with_the_label(material):
    plans = planned(material)
    compose(material / "waterbirds_rebuilt", plans, side=32, seed=0)
    data = load("Waterbirds, rebuilt", root=material, view=View(32, 32))
    places = data.groups % 2
    for image, mask, place in zip(data.images.float(), data.known[:], places, strict=True):
        assert 0.5 * 0.55 ** 2 * 0.8 < mask.float().mean() < 0.5 * 0.85 ** 2 * 1.2  # twice as wide as high
        assert (image[:, mask].mean(1) - torch.tensor(RED)).abs().max() < 60  # its edge is blurred
        around = image[:, ~mask].mean(1)
        assert around[1 + place] > 3 * around[2 - place]  # green on land, blue on water
    assert 16 <= (places == data.labels).sum() < 20
    test = open_files("Waterbirds, rebuilt", "test", material)
    assert (len(data), len(test)) == (20, 20)
    assert plans["place_filename"].is_unique
    compose(material / "2" / "waterbirds_rebuilt", planned(material), side=32, seed=0)
    again = load("Waterbirds, rebuilt", root=material / "2", view=View(32, 32))
    assert torch.equal(again.images, data.images)
    before = sorted(material.rglob("*"))
    with pytest.raises(FileExistsError, match="left as it is"):
        compose(material / "objects", plans, side=32, seed=0)
    assert sorted(material.rglob("*")) == before


@pytest.mark.parametrize(("spoil", "word"), [
    (lambda root: (root / "masks" / "gull" / "03.png").unlink(), r"03\.png is missing"),
    (lambda root: Image.new("L", (7, 7), 255).save(root / "masks" / "gull" / "03.png"), r"03\.png to mark some pixels"),
    (lambda root: Image.new("L", (40, 30)).save(root / "masks" / "gull" / "03.png"), r"03\.png to mark .*got none"),
    (lambda root: Image.new("RGB", (9, 9)).save(root / "objects" / "gull" / "03.png"), "one image of each name"),
    (lambda root: [path.unlink() for path in (root / "forest").glob("*[1-9].png")], r"more scenes in .*forest"),
    (listed("", "folder,label"), "split"), (listed("gull,2,train\n"), "got '2' for gull"),
    (listed("gull,0,\n"), "split of .*got '' for gull"), (listed("emu,1,val\n"), "emu, got none")])
def test_material_that_is_not_whole_is_named(spoil, word, material):
    spoil(material)
    with pytest.raises((FileNotFoundError, ValueError), match=word):
        compose(material / "out", planned(material), side=32, seed=0)


def test_the_command(material):
    listed(f"gull,1,train\n{WREN},0,val\nduck,1,2\n")(material)
    for path in (material / "objects" / WREN).glob("0[2-9].jpg"):
        path.unlink()
    arguments = [sys.executable, "-m", "src.datasets.compose", material / "out", "--objects", material / "objects",
                 "--masks", material / "masks", "--classes", material / "classes.csv", "--side", "32", "--scenes"]
    for names, code, said in (("", ""), 2, "expected --scenes NAME=DIR"), (("f=", "s="), 0, "train: [0, 0, "):
        scenes = [f"{name}{material / folder}" for name, folder in zip(names, ("forest", "sea"), strict=True)]
        done = subprocess.run([*map(str, arguments), *scenes], cwd=REPOSITORY, text=True, capture_output=True,
                              check=False)
        assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stderr
