"""The benchmarks of photographs, in their exact layouts at a miniature size; real metadata where they are available."""

import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from src.datasets import CelebA, ImageNet9, View, Waterbirds, load, missing, open_files
from src.metrics import adjusted_average
from tests.conftest import REPOSITORY
from tests.miniature import write_csv

FIXED = REPOSITORY.parent / "shared" / "waterbirds" / "waterbirds_fixed.csv.zip"
ROWS = [  # img_filename, y, split, place
    ("001.A/one.jpg", 0, 0, 0), ("001.A/two.jpg", 0, 0, 1), ("002.B/three.jpg", 1, 0, 1), ("002.B/four.jpg", 1, 1, 0),
    ("002.B/five.jpg", 1, 2, 1)]
FACES = [("000001.jpg", -1, 1, 0), ("000002.jpg", 1, -1, 0), ("000003.jpg", 1, 1, 1)]  # image, blond, male, partition


def picture(path: Path, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (90, 70), 60 if mode == "L" else None).save(path)


@pytest.fixture
def waterbirds(tmp_path):
    for name, *_ in ROWS:
        picture(tmp_path / name)
    write_csv(tmp_path / "metadata.csv", [("img_id", "img_filename", "y", "split", "place", "place_filename"),
                                          *((i, *row, "/o/ocean/0.jpg") for i, row in enumerate(ROWS))])
    return tmp_path


@pytest.mark.filterwarnings("ignore:Waterbirds")
def test_waterbirds(waterbirds):
    train = Waterbirds(waterbirds)
    assert train.labels.tolist() == [0, 0, 1]
    assert train.attributes.tolist() == [0, 1, 1]
    assert train.groups.tolist() == [0, 1, 3]
    assert train.group_names == ("landbird, land", "landbird, water", "waterbird, land", "waterbird, water")
    assert train.counts() == [1, 1, 0, 1]
    images = train.load(View(32, 32, resize=40), waterbirds / "cache" / "train")
    assert images.images.shape == (3, 3, 32, 32)
    assert torch.equal(images.groups, train.groups)
    assert len(Waterbirds(waterbirds, "val")) == len(Waterbirds(waterbirds, "test")) == 1


def test_waterbirds_with_other_counts_says_so(waterbirds):
    with pytest.warns(UserWarning, match=r"have \[1, 1, 0, 1\] images; published: \[3498, 184, 56, 1057\] or \[3550,"):
        Waterbirds(waterbirds)


@pytest.mark.filterwarnings("ignore:Waterbirds")
def test_waterbirds_with_something_missing(waterbirds):
    with pytest.raises(ValueError, match=r"expected split to be one of \('train', 'val', 'test'\), got 'dev'"):
        Waterbirds(waterbirds, "dev")
    with pytest.raises(FileNotFoundError, match=r"elsewhere/metadata.csv is missing; from nlp.stanford.edu"):
        Waterbirds(waterbirds / "elsewhere")
    (waterbirds / ROWS[1][0]).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"two\.jpg is not a readable image"):
        Waterbirds(waterbirds).load(View(32, 32), waterbirds / "cache" / "train")
    (waterbirds / ROWS[1][0]).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images are missing, such as .*two\.jpg; from nlp.*0\.5 GB"):
        Waterbirds(waterbirds)
    write_csv(waterbirds / "metadata.csv", [("img_filename", "y", "split"), ("a.jpg", 0, 0)])
    with pytest.raises(ValueError, match="to have the columns place, got img_filename, y, split"):
        Waterbirds(waterbirds)
    write_csv(waterbirds / "metadata.csv", [("img_filename", "y", "split", "place"), ("a.jpg", 2, 0, 0)])
    with pytest.raises(ValueError, match=r"metadata.csv, line 2: expected y to be 0 or 1, got '2'"):
        Waterbirds(waterbirds)


def test_a_set_of_ones_own_in_the_layout_of_waterbirds(waterbirds, tmp_path_factory, recwarn):
    root = tmp_path_factory.mktemp("data")
    (root / "waterbirds_rebuilt").symlink_to(waterbirds)
    assert open_files("Waterbirds, rebuilt", root=root).groups.tolist() == [0, 1, 3]
    assert load("Waterbirds, rebuilt", "val", root=root, view=View(16, 16)).images.shape == (1, 3, 16, 16)
    assert not recwarn  # its groups have no published sizes
    assert "waterbirds_rebuilt" in missing("Waterbirds, rebuilt", root / "elsewhere")


METADATA = "img_id,img_filename,y,split,place\n1,a.jpg,0,0,0\n2,b.jpg,1,0,1\n3,a.jpg,1,1,1\n"


@pytest.mark.filterwarnings("ignore:Waterbirds")
@pytest.mark.parametrize("change", [
    lambda text: text, lambda text: "\ufeff" + text, lambda text: text + "\n", lambda text: text + " , , , , \n",
    lambda text: text.replace("\n", "\r\n"), lambda text: text.replace(",0,0,0", ",0.0,train,0.0"),
    lambda text: text.replace(",1,0,1", ", 1, 0, 1"), lambda text: text.replace("1,1,1", "1,valid,1")])
def test_metadata_as_they_come_from_other_tools(change, tmp_path):
    (tmp_path / "metadata.csv").write_text(change(METADATA), encoding="utf-8", newline="")
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / name)
    assert [Waterbirds(tmp_path, split).groups.tolist() for split in ("train", "val")] == [[0, 3], [3]]


@pytest.mark.parametrize(("old", "new", "message"), [
    ("3,a.jpg,1,1,1", "3,a.jpg,1,0,1", r"rows of the split val in .*, got 3 of train, 0 of val, 0 of test"),
    ("2,b.jpg,1,0,1", "2,b.jpg,1,3,1", r"line 3: expected split to be 0, 1, 2 or one of .*, got '3'"),
    ("3,a.jpg,1,1,1", "3,a.jpg,1,1", r"line 4: expected 5 values, got 4"),
    ("3,a.jpg,1,1,1", "3,a.jpg,bird,1,1", r"line 4: expected y to be 0 or 1, got 'bird'")])
def test_metadata_that_say_nothing_clear_are_named(old, new, message, tmp_path):
    (tmp_path / "metadata.csv").write_text(METADATA.replace(old, new))
    with pytest.raises(ValueError, match=message):
        Waterbirds(tmp_path, "val")


@pytest.mark.filterwarnings("ignore:CelebA")
@pytest.mark.parametrize(("kind", "attributes", "partition"), [
    ("csv", "image_id,Blond_Hair,Male\n1.jpg,-1,1\n", "image_id,partition\n1.jpg,train\n"),
    ("csv", "\ufeffimage_id,Blond_Hair,Male\n1.jpg,-1,1\n", "\ufeffimage_id,partition\n1.jpg,0\n"),
    ("txt", "\ufeff1\nBlond_Hair Male\n1.jpg -1 1\n", "1.jpg 0\n"),
    ("txt", "1\nBlond_Hair Male\n1.jpg -1 1\n\n", "1.jpg 0\n\n"), ("txt", "Blond_Hair Male\n1.jpg -1 1\n", "1.jpg 0\n"),
    ("txt", "image_id Blond_Hair Male\n1.jpg -1 1\n", "1.jpg 0\n")])
def test_lists_of_celeba_as_they_are_met(kind, attributes, partition, tmp_path):
    (tmp_path / f"list_attr_celeba.{kind}").write_text(attributes, encoding="utf-8")
    (tmp_path / f"list_eval_partition.{kind}").write_text(partition, encoding="utf-8")
    picture(tmp_path / "img_align_celeba" / "1.jpg")
    assert CelebA(tmp_path).groups.tolist() == [1]


def test_the_corrected_metadata_of_waterbirds(tmp_path, monkeypatch, recwarn):
    if not FIXED.exists():
        pytest.skip(f"the corrected metadata are not in {FIXED.parent.name}/")
    with zipfile.ZipFile(FIXED) as archive:
        name, = archive.namelist()
        archive.extract(name, tmp_path)
    monkeypatch.setattr(Path, "exists", lambda path: path.suffix == ".jpg" or path.is_file())  # no photographs here
    counts = {split: Waterbirds(tmp_path, split, tmp_path / name).counts() for split in ("train", "val", "test")}
    assert counts == {"train": [3550, 187, 52, 961], "val": [470, 472, 122, 124], "test": [2255, 2264, 581, 583]}
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore:CelebA")
@pytest.mark.parametrize("layout", ["official", "kaggle"])
def test_celeba(layout, tmp_path):
    folder = tmp_path / "img_align_celeba" / ("img_align_celeba" if layout == "kaggle" else "")
    for name, *_ in FACES:
        picture(folder / name)
    if layout == "kaggle":
        write_csv(tmp_path / "list_attr_celeba.csv", [("image_id", "Bald", "Blond_Hair", "Male"),
                                                      *((name, -1, blond, male) for name, blond, male, _ in FACES)])
        write_csv(tmp_path / "list_eval_partition.csv", [("image_id", "partition"),
                                                         *((name, part) for name, _, _, part in FACES)])
    else:
        lines = [f"{name} {-1:2d} {blond:2d} {male:2d}" for name, blond, male, _ in FACES]
        (tmp_path / "list_attr_celeba.txt").write_text("\n".join(["3", "Bald Blond_Hair Male ", *lines]))
        (tmp_path / "list_eval_partition.txt").write_text("\n".join(f"{name} {part}" for name, _, _, part in FACES))
    train = CelebA(tmp_path)
    assert [path.name for path in train.paths] == ["000001.jpg", "000002.jpg"]
    assert train.labels.tolist() == [0, 1]
    assert train.attributes.tolist() == [1, 0]
    assert train.groups.tolist() == [1, 2]
    assert CelebA(tmp_path, "val").load(View(16, 16), tmp_path / "cache").images.shape == (1, 3, 16, 16)
    (folder / "000001.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"CelebA: 1 of 2 images are missing"):
        CelebA(tmp_path)


def test_celeba_that_is_missing_or_cut_short(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"list_eval_partition.txt is missing; from mmlab"):
        CelebA(tmp_path)
    (tmp_path / "list_eval_partition.txt").write_text("000001.jpg 0\n000002.jpg")
    with pytest.raises(ValueError, match=r"expected a line with image_id, partition, got '000002.jpg'"):
        CelebA(tmp_path)


def test_imagenet9(tmp_path):
    names = [f"{i:02d}_thing{i}" for i in range(9)]
    for name in names:
        picture(tmp_path / "in9l" / "train" / name / "a.JPEG", "L")
        picture(tmp_path / "bg_challenge" / "mixed_rand" / "val" / name / "b.JPEG")
    train = ImageNet9(tmp_path)
    assert train.labels.tolist() == list(range(9))
    assert torch.equal(train.groups, train.labels)
    assert train.classes[3] == "thing3"
    assert train.load(View(16, 16), tmp_path / "cache").images.shape == (9, 3, 16, 16)
    with pytest.warns(UserWarning, match=r"has 9 images; published: 4,050"):
        assert len(ImageNet9(tmp_path, "mixed_rand")) == 9
    with pytest.raises(FileNotFoundError, match=r"bg_challenge/original/val is missing; in9l.tar.gz"):
        ImageNet9(tmp_path, "original")
    with pytest.raises(ValueError, match="got 'mixed'"):
        ImageNet9(tmp_path, "mixed")
    (tmp_path / "in9l" / "train" / names[0] / "a.JPEG").unlink()
    (tmp_path / "in9l" / "train" / names[0]).rmdir()
    with pytest.raises(ValueError, match="got 8: "):
        ImageNet9(tmp_path)


def test_adjusted_average_weights_by_training_shares():
    groups = torch.tensor([0] * 7 + [1] * 2 + [3])
    assert adjusted_average({0: 1.0, 1: 0.5, 2: 0.0, 3: 0.2}, groups) == pytest.approx(0.7 + 0.1 + 0.02)
