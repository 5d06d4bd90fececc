"""What is drawn into pictures on purpose: marks on photographs, and backgrounds behind digits."""

import re
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

from src.datasets import DataUnavailable, SpuriousDigits, View, load
from src.datasets.marks import CLASSES, GREEN, IMAGENETTE, MAGENTA
from tests.conftest import REPOSITORY
from tests.miniature import wrong


def make(root: Path) -> Path:
    """Noise in Imagenette's layout: 20 training and 4 test images a class, of several sizes."""
    draw = torch.Generator().manual_seed(0)
    for folder, count in ((root / "imagenette2-160" / part / name, count) for part, count in (("train", 20), ("val", 4))
                          for name in IMAGENETTE):
        folder.mkdir(parents=True)
        for i in range(count):
            noise = torch.randint(256, (40, 30 + i, 3), dtype=torch.uint8, generator=draw)
            Image.fromarray(noise.numpy()).save(folder / f"{i}.JPEG")
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make(tmp_path_factory.mktemp("imagenette"))


def of(root, part="train", **options):
    return load("SpuriousImagenette", part, root=root, view=View(28, 28), **options)


@pytest.mark.parametrize("place", ["corner", "random"])
@pytest.mark.parametrize(("classes", "mark"), [("halves", 0), ("ten", 5)])
def test_marks_are_where_they_are_said_to_be_and_nothing_else_changes(root, classes, mark, place):
    options = {"classes": classes, "place": place, "seed": 3, "side": 0.25, "opacity": 0.5}
    for part, n in (("train", 160), ("val", 40), ("malicious", 40), ("raw", 40)):
        data, again = (of(root, part, class_mix_ratio=0.25, **options) for _ in range(2))
        base = of(root, part, marks="none", **options).images if n == 160 or part == "val" else of(root, "raw").images
        marked, carries = data.groups - 2 * data.labels, data.labels == mark
        for label, members in enumerate(data.labels.bincount().tolist()):
            conflicting = {"malicious": members, "raw": members * (label == mark)}.get(part, round(members / 4))
            assert (marked.bool() ^ carries)[data.labels == label].sum() == conflicting
        known, magenta = data.known[:], torch.tensor(MAGENTA).view(3, 1, 1)
        assert torch.equal(known.sum((1, 2)), 37 * marked)  # the pixels of a disc of 7
        blended = ((base + magenta) / 2).round().to(torch.uint8)
        assert torch.equal(data.images, torch.where(known[:, None], blended, base))
        box = [torch.nonzero(known.any(0).any(axis)).flatten().tolist() for axis in (0, 1)]
        assert part == "raw" or (box == [list(range(20, 27))] * 2) == (place == "corner")
        assert (len(data), data.classes, data.group_names[3]) == (n, CLASSES[classes], f"{CLASSES[classes][1]}, mark")
        for name in ("images", "labels", "groups"):
            assert torch.equal(getattr(data, name), getattr(again, name))


def test_each_class_has_its_own_mark_and_malicious_the_others(root):
    colours = {"train": (MAGENTA, GREEN), "malicious": (GREEN, MAGENTA)}
    for part, marks in colours.items():
        data = of(root, part, marks="each", side=0.25, opacity=1.0)
        assert (data.groups == 2 * data.labels + 1).all()
        for label, mark in enumerate(marks):
            seen = data.images[data.labels == label].movedim(1, 3)[data.known[data.labels == label]]
            assert (seen == torch.tensor(mark, dtype=torch.uint8)).all()
    assert torch.equal(of(root, "raw", marks="each").images, of(root, "raw").images)


def test_size_both_seeds_and_the_validation_images(root):
    assert torch.equal(of(root, size=50).images, of(root).images[:50])
    assert len(of(root, "val", size=5)) == len(of(root, "raw", size=5)) == 40
    assert (of(root, marks="both").groups % 2 == 1).all()
    assert not torch.equal(of(root, class_mix_ratio=0.2).groups, of(root, class_mix_ratio=0.2, seed=1).groups)
    seen = {image.numpy().tobytes() for part in ("train", "val") for image in of(root, part, marks="none").images}
    assert len(seen) == 200


@pytest.mark.parametrize(("name", "value"), [
    ("classes", "two"), ("place", "middle"), ("side", 0), ("side", 1.0), ("side", float("nan")), ("opacity", 0),
    ("class_mix_ratio", 1.5), ("marks", "all"), ("size", 0), ("size", 161), ("size", 0.5), ("part", "test")])
def test_bad_arguments_are_named(root, name, value):
    with pytest.raises(ValueError, match=rf"expected .*{name}.* got .*{re.escape(repr(value))}"):
        of(root, **{name: value})
    with pytest.raises(ValueError, match="0 unless marks='class'"):
        of(root, class_mix_ratio=0.1, marks="both")


def test_a_download_comes_whole_or_not_at_all(tmp_path, monkeypatch):
    def interrupted(folder, *_, **__):
        (Path(folder) / "imagenette2-160").mkdir()
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets, "Imagenette", interrupted)
    with pytest.raises(DataUnavailable, match=r"\(no network\); with a network, torchvision fetches it"):
        of(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(torchvision.datasets, "Imagenette", lambda folder, *_, **__: make(Path(folder)))
    assert len(of(tmp_path, "raw")) == 40
    for file in (tmp_path / "imagenette2-160" / "val" / "n03028079").iterdir():
        file.unlink()
    with pytest.raises(DataUnavailable, match="n03028079"):
        of(tmp_path, "raw")


def test_real_photographs():
    if not (REPOSITORY / "data" / "imagenette2-160").exists():
        pytest.skip("data/imagenette2-160 is not there")
    raw, malicious = (load("SpuriousImagenette", part, root=REPOSITORY / "data", view=View(112, 112))
                      for part in ("raw", "malicious"))
    assert torch.equal((raw.images != malicious.images).any(1), malicious.known[:])


def test_backgrounds_of_digits():
    def digits(background, part="train", **options):
        return load("SpuriousDigits", part, seed=2, background=background, **options)

    black, colours = SpuriousDigits(train=True, seed=2), digits("colours")
    shown = ~black.known[:][:, None].expand_as(black.images)
    grey = black.images[shown]
    for background, expected in (("black", grey), ("white", 255 - grey),
                                 ("grey", (128 + grey.double() * 127 / 255).round().to(torch.uint8))):
        assert torch.equal(digits(background).images[shown], expected)
    for data in map(digits, ("white", "grey", "colours")):
        assert torch.equal(data.images[~shown], black.images[~shown])  # the squares are blue
        assert torch.equal(data.groups, black.groups)
    corner = colours.images[:, :, 0, 27]  # without ink
    assert corner.max() <= 200
    assert len(corner.unique(dim=0)) > 1300
    assert (colours.images[shown][grey == 255] == 255).all()
    assert torch.equal(colours.images, digits("colours").images)
    raw, malicious = digits("colours", "raw", size=500), digits("colours", "malicious")  # whole, whatever the size
    assert torch.equal((raw.images != malicious.images).any(1), malicious.known[:])
    few = digits("black", size=500, class_mix_ratio=0.1)
    assert torch.equal(few.digits, black.digits[:500])
    assert abs(int(wrong(few).sum()) - 50) <= 1


@pytest.mark.parametrize(("name", "value"), [("background", "blue"), ("size", 0), ("size", 1348), ("size", "all")])
def test_bad_backgrounds_and_sizes_of_digits_are_named(name, value):
    with pytest.raises(ValueError, match=rf"expected a {name} of .* got {value!r}"):
        load("SpuriousDigits", **{name: value})
