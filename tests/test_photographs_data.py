"""The benchmarks of photographs, in their exact layouts at a miniature size; real metadata where they are available."""

import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from src.datasets import CelebA, View, Waterbirds, load, open_files
from tests.conftest import REPOSITORY
from tests.miniature import make_waterbirds

FIXED = REPOSITORY.parent / "shared" / "waterbirds" / "waterbirds_fixed.csv.zip"
METADATA = "img_id,img_filename,y,split,place\n1,a/1.jpg,0,0,0\n2,b/2.jpg,1,0,1\n3,a/3.jpg,1,1,1\n"
FEW = {"train": (1, 1, 0, 1), "val": (0, 0, 1, 0), "test": (0, 0, 0, 1)}
pytestmark = pytest.mark.filterwarnings("ignore:.*Results will not compare")


def picture(path: Path, image: Image.Image | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (90, 70))).save(path)


@pytest.fixture
def birds(tmp_path):
    """A folder in the layout of Waterbirds."""
    for name in ("a/1.jpg", "b/2.jpg", "a/3.jpg"):
        picture(tmp_path / "waterbirds_rebuilt" / name)
    (tmp_path / "waterbirds_rebuilt" / "metadata.csv").write_text(METADATA)
    return tmp_path / "waterbirds_rebuilt"


def test_waterbirds(tmp_path):
    make_waterbirds(tmp_path, FEW)
    with pytest.warns(UserWarning, match=r"\[1, 1, 0, 1\] images .*published: \[3498, 184, 56, 1057\] or \[3550,"):
        files = open_files("Waterbirds", root=tmp_path)
    assert (files.labels.tolist(), files.groups.tolist(), files.counts()) == ([0, 0, 1], [0, 1, 3], [1, 1, 0, 1])
    data = load("Waterbirds", root=tmp_path, view=View(32, 32, resize=40), cache=tmp_path / "pixels")
    assert not (tmp_path / "cache").exists()
    assert (data.images.shape, data.known) == ((3, 3, 32, 32), None)
    assert torch.equal(data.groups, files.groups)
    assert data.group_names == ("landbird, land", "landbird, water", "waterbird, land", "waterbird, water")
    assert len(open_files("Waterbirds", "val", tmp_path)) == len(open_files("Waterbirds", "test", tmp_path)) == 1


def test_a_set_of_ones_own_with_known_pixels(birds, recwarn):
    assert load("Waterbirds, rebuilt", root=birds.parent, view=View(16, 16)).known is None
    for i, name in enumerate(("a/1.png", "b/2.png")):
        mask = Image.new("1", (16, 16))
        mask.paste(1, (0, 0, 4 + i, 16))
        picture(birds / "masks" / name, mask)
    known = load("Waterbirds, rebuilt", root=birds.parent, view=View(16, 16)).known[:]
    assert torch.equal(known, torch.arange(16)[None, None] < torch.tensor([4, 5])[:, None, None].expand(2, 16, 1))
    assert load("Waterbirds, rebuilt", "val", root=birds.parent, view=View(16, 16)).known is None
    assert not recwarn.list  # its groups have no published sizes


@pytest.mark.parametrize("coding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("change", [
    lambda text: "\ufeff" + text + " , , , , \n\n", lambda text: text.replace("\n", "\r\n"),
    lambda text: text.replace(",0,0,0", ",0.0,train,0.0"), lambda text: text.replace(",1,0,1", ", 1, 0, 1"),
    lambda text: text.replace("1,1,1", "1,VAL,1 "), lambda text: text.replace("a/", "a\\"),
    lambda text: text.replace("y,", " y ,")])
def test_metadata_as_they_come_from_other_tools(change, coding, birds):
    (birds / "metadata.csv").write_text(change(METADATA), encoding=coding, newline="")
    assert [Waterbirds(birds, split).groups.tolist() for split in ("train", "val")] == [[0, 3], [3]]


@pytest.mark.parametrize(("old", "new", "error", "word"), [
    ("3,a/3.jpg,1,1,1", "3,a/3.jpg,1,0,1", ValueError, r"rows of the split 'val' in .*metadata\.csv"),
    ("2,b/2.jpg,1,0,1", "2,b/2.jpg,1,3,1", ValueError, r"expected split of 0, train, .*, got '3' for b/2\.jpg"),
    ("3,a/3.jpg,1,1,1", "3,a/3.jpg,1,1", ValueError, r"expected place of 0, 1, got '' for a/3\.jpg"),
    ("3,a/3.jpg,1,1,1", "3,a/3.jpg,bird,1,1", ValueError, "got 'bird'"), ("y,s", "why,s", ValueError, "columns y, "),
    ("3,a/3.jpg,1,1,1", "3,a/3.jpg,2,1,1", ValueError, "got '2' for"), (METADATA, "", ValueError, "metadata.csv: "),
    ("3,a/3.jpg,1,1,1", "3,a/3.jpg,1,1,1,9", ValueError, "metadata.csv: .*line 4"),
    ("a/3.jpg", "b/2.jpg", ValueError, r"each img_filename once, got 'b/2\.jpg' twice"),
    ("a/3.jpg", "a/4.jpg", FileNotFoundError, r"1 of 1 images are missing, such as .*4\.jpg")])
def test_metadata_that_say_nothing_clear_are_named(old, new, error, word, birds):
    (birds / "metadata.csv").write_text(METADATA.replace(old, new))
    with pytest.raises(error, match=word):
        Waterbirds(birds, "val")


def test_the_corrected_metadata_of_waterbirds(tmp_path, monkeypatch, recwarn):
    if not FIXED.exists():
        pytest.skip(f"the corrected metadata are not in {FIXED.parent.name}/")
    with zipfile.ZipFile(FIXED) as archive:
        name, = archive.namelist()
        archive.extract(name, tmp_path)
    monkeypatch.setattr(Path, "is_file", lambda path: path.suffix == ".jpg")  # no photographs here
    counts = {split: Waterbirds(tmp_path, split, name).counts() for split in ("train", "val", "test")}
    assert counts == {"train": [3550, 187, 52, 961], "val": [470, 472, 122, 124], "test": [2255, 2264, 581, 583]}
    assert not recwarn.list


@pytest.mark.parametrize(("kind", "attributes", "partition", "word"), [
    ("csv", "\ufeffimage_id,Bald,Blond_Hair,Male\n1.jpg,1,-1,1\n", "\ufeffimage_id,partition\n1.jpg,train\n", None),
    ("txt", "\ufeff1\nBald Blond_Hair Male \n1.jpg  1 -1  1\n\n", "1.jpg 0\n\n", None),
    ("txt", "1\nBald Blond_Hair Male\n1.jpg 1 -1 1\n", "1.jpg", "expected partition .* got '' for 1.jpg"),
    ("txt", "1\nBald Blond_Hair Male\n1.jpg 1 -1\n", "1.jpg 0", "columns image_id, got Bald"),
    ("txt", "1\nBald Blond_Hair\n1.jpg 1 -1\n", "1.jpg 0", "columns Male"),
    ("txt", "Bald Blond_Hair Male\n1.jpg 1 -1 1\n", "1.jpg 0", "columns image_id, Blond_Hair"),
    ("csv", "image_id,Blond_Hair,Male\n1.jpg,-1,1\n1.jpg,1,1\n", "image_id,partition\n1.jpg,0\n", "image_id once")])
def test_lists_of_celeba_as_they_are_met(kind, attributes, partition, word, tmp_path):
    (tmp_path / f"list_attr_celeba.{kind}").write_text(attributes, encoding="utf-8")
    (tmp_path / f"list_eval_partition.{kind}").write_text(partition, encoding="utf-8")
    picture(tmp_path / "img_align_celeba" / "1.jpg")
    if word is None:
        assert CelebA(tmp_path).groups.tolist() == [1]
    else:
        with pytest.raises(ValueError, match=word):
            CelebA(tmp_path)
