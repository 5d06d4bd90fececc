"""Your own images, from folders or any data set: read as they are meant, or refused with the reason."""

from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler

from src.datasets.decode import View, fit
from src.datasets.images import load_dataset, load_folder
from tests.miniature import make_folder

X = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
BYTES = (X * 255).round().byte()


def picture(path, size=(9, 9), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 10, 10)).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        picture(tmp_path / "train" / name / "1.png")
    return tmp_path / "train"


# folders


def test_a_folder_is_decoded_once_into_bytes(tmp_path, monkeypatch):
    make_folder(tmp_path / "train", n=20, stamped={"cross": 0.0, "disc": 1.0})
    monkeypatch.setenv("HOME", str(tmp_path))
    train = load_folder("~/train", side=64)
    assert torch.equal(load_folder(tmp_path / "train", side=64, cache="~/cache").images, train.images)
    assert (tmp_path / "cache").exists()
    assert (train.images.shape, train.images.dtype) == ((40, 3, 64, 64), torch.uint8)
    assert load_folder(tmp_path / "train", (6, 12)).images.shape == (40, 3, 6, 12)
    assert (train.classes, train.labels.tolist()) == (("cross", "disc"), [0] * 20 + [1] * 20)
    with Image.open(tmp_path / "train" / "disc" / "00003.jpg") as image:
        assert torch.equal(train.images[23], fit(image, View(64, 64)))
    stamp = train.images[:, :, 58, 55].float()  # inside the bar: yellow
    assert (((stamp[:, 0] > 200) & (stamp[:, 2] < 90)) == (train.labels == 1)).all()


def test_what_is_hidden_or_left_by_a_system_is_passed_over_and_nothing_is_read_twice(folder):
    for path in (".ipynb_checkpoints", "cat/.ipynb_checkpoints", "__MACOSX", "lost+found", "#recycle"):
        picture(folder / path / "1-checkpoint.png")
    picture(folder / "cat" / "._1.png")
    (folder / "cat" / ".DS_Store").touch()
    (folder / "cat" / "cat").symlink_to(folder / "cat")  # as `ln -s` makes it when it is typed twice
    (folder / "cat" / "more").symlink_to(folder / "dog")
    data = load_folder(folder, 8)
    assert (data.classes, data.labels.tolist()) == (("cat", "dog"), [0, 0, 1])


def test_other_endings_are_counted(folder):
    for i in range(9):
        picture(folder / "cat" / f"{i}.gif")
    picture(folder / "dog" / "x.jfif", format="JPEG")
    with pytest.warns(UserWarning, match=r"2 images; 10 other files .*'\.gif': 9"):
        assert len(load_folder(folder, 8)) == 2


@pytest.mark.parametrize(("spoil", "error", "word"), [
    (lambda root: picture(root.parent / "val" / "cat" / "1.png") or root.parent, ValueError, "parts of a set: train"),
    (lambda root: root / "elsewhere", FileNotFoundError, "elsewhere is missing"),
    (lambda root: root / "cat", FileNotFoundError, "cat is missing, or has no folders of images"),
    (lambda root: (root / "dog" / "2.jpg").write_bytes(b"text") and root, ValueError, r"2\.jpg is not a readable"),
    (lambda root: picture(root / "fox" / "1.png") or root, ValueError, "cat, dog, each once, got cat, dog, fox")])
def test_folders_that_are_no_classes(spoil, error, word, folder):
    root = spoil(folder)
    with pytest.raises(error, match=word):
        load_folder(root, 8, classes=("cat", "dog") if "each once" in word else None)


def test_folders_that_are_numbers_are_in_the_order_of_strings(tmp_path):
    for name in ("0", "1", "2", "10"):
        picture(tmp_path / name / "1.png")
    with pytest.warns(UserWarning, match="in the order of strings: 0, 1, 10, 2"):
        assert load_folder(tmp_path, 8).classes == ("0", "1", "10", "2")
    assert load_folder(tmp_path, 8, classes=("0", "1", "2", "10")).labels.tolist() == [0, 1, 3, 2]


def test_classes_are_matched_by_name(folder, tmp_path):
    picture(tmp_path / "test" / "dog" / "1.png")
    for classes in (("cat", "dog"), {"dog": 1, "cat": 0}, {1: "dog", 0: "cat"}, {"1": "dog", "0": "cat"}):
        test = load_folder(tmp_path / "test", 8, classes=classes)
        assert (test.classes, test.labels.tolist()) == (("cat", "dog"), [1])
    alone = load_folder(tmp_path / "test", 8)
    assert (alone.classes, alone.labels.tolist()) == (("dog",), [0])
    assert alone.with_classes(("cat", "dog")).labels.tolist() == [1]
    with pytest.raises(ValueError, match="among cat, fox, got dog"):
        alone.with_classes(("cat", "fox"))
    with pytest.raises(ValueError, match="each once"):
        load_folder(folder, 8, classes=("cat", "dog", "dog"))
    with pytest.raises(ValueError, match="numbered 0, 1"):
        load_folder(folder, 8, classes={"cat": 1, "dog": 2})


# files as cameras and programs write them

CORNERS = torch.tensor([[0, 80], [160, 255]], dtype=torch.uint8).repeat_interleave(8, 0).repeat_interleave(12, 1)


@pytest.mark.parametrize(("orientation", "seen"), [
    (1, CORNERS), (2, CORNERS.flip(1)), (3, CORNERS.flip(0, 1)), (4, CORNERS.flip(0)), (5, CORNERS.T),
    (6, CORNERS.T.flip(1)), (7, CORNERS.T.flip(0, 1)), (8, CORNERS.T.flip(0))])
def test_a_picture_is_shown_as_the_camera_was_held(orientation, seen, tmp_path):
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(CORNERS.numpy()).save(tmp_path / "a" / "1.jpg", exif=exif, quality=100)
    data = load_folder(tmp_path, tuple(seen.shape))
    assert (data.images[0, 0].int() - seen.int()).abs().max() <= 2  # JPEG


@pytest.mark.parametrize(("mode", "ending"), [("RGBA", "png"), ("LA", "png"), ("LA", "tif"), ("PA", "tif")])
def test_what_is_transparent_shows_white(mode, ending, tmp_path):
    (tmp_path / "a").mkdir()
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))  # a red that nobody was meant to see
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    image.convert(mode).save(tmp_path / "a" / f"1.{ending}")
    shown = load_folder(tmp_path, 8).images[0]
    assert (shown[:, :, :4] == 0).all()
    assert (shown[:, :, 4:] == 255).all()


@pytest.mark.parametrize(("name", "mode", "options"), [
    ("progressive.jpg", "RGB", {"progressive": True}), ("grey.jpg", "L", {}), ("cmyk.jpg", "CMYK", {}),
    ("one bit.png", "1", {}), ("größe 1, ü.gif.png", "P", {}), ("写真.webp", "RGB", {"lossless": True}),
    ("UPPER.JPEG", "RGB", {"format": "JPEG"}), ("big.tif", "RGB", {"compression": "tiff_lzw"})])
def test_files_of_many_kinds_and_names(name, mode, options, tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(BYTES.permute(1, 2, 0).numpy()).convert(mode).save(tmp_path / "a" / name, **options)
    shown = load_folder(tmp_path, 8, cache=tmp_path / "pixels").images[0].permute(1, 2, 0).numpy()
    assert (shown == numpy.asarray(Image.open(tmp_path / "a" / name).convert("RGB"))).all()


# data sets


class Items(Dataset):
    """What is given, behind torch's interface."""

    def __init__(self, *items, **more) -> None:
        self.items = items
        vars(self).update(more)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int):
        return self.items[i]


@pytest.mark.parametrize("item", [
    (X, 0), [X, torch.tensor(0)], (X, numpy.int64(0)), (X, True), (X, torch.tensor([1.0])), {"image": X, "label": 0},
    (X, numpy.array([1])), (BYTES, 0), (X.numpy(), 0), (X.permute(1, 2, 0).numpy(), 0),
    (BYTES.permute(1, 2, 0).numpy(), 0), (Image.fromarray(BYTES.permute(1, 2, 0).numpy()), 0)])
def test_pictures_and_labels_as_they_are_met(item):
    data = load_dataset(Items(item))
    assert torch.equal(data.images[0], BYTES)
    assert data.labels.tolist() in ([0], [1])
    assert data.groups is None


@pytest.mark.parametrize(("items", "where", "label", "group"), [
    ([(X, 0, 2), (X, 1, 0)], {}, 0, 2), ([{"img": X, "fine": 1, "place": 1}], ("img", "fine", "place"), 1, 1),
    ([(X, torch.tensor(1), torch.tensor([3, 1, 0]))], (None, None, lambda item: item[2][0]), 1, 3),
    ([(7, X, 1, 0)], (1, 2, 3), 1, 0), ([(X, i % 2, i) for i in range(9)], (0, 1, None), 0, None),
    ([(X, i % 2, i) for i in range(9)], (None, None, 2), 0, 0)])
def test_groups_and_keys(items, where, label, group):
    data = load_dataset(items, **dict(zip(("image", "label", "group"), where, strict=False)))
    assert data.labels[0] == label
    assert data.groups is None if group is None else data.groups[0] == group


NAMED = Items((X, 1), (X, 0), classes=["cat", "dog", "fox"])


@pytest.mark.parametrize(("data", "classes"), [
    (NAMED, ("cat", "dog", "fox")), (Subset(Subset(NAMED, [1, 0]), [1]), ("cat", "dog", "fox")),
    (ConcatDataset([NAMED, Subset(NAMED, [1])]), ("cat", "dog", "fox")), (Items((X, 1)), ("0", "1")),
    (Items((X, 1), classes={"dog": 1, "cat": 0}), ("cat", "dog")), (Items((X, 1), vocab=["a", "b"]), ("a", "b")),
    (DataLoader(NAMED, batch_size=2, shuffle=True), ("cat", "dog", "fox"))])
def test_names_that_a_data_set_gives_itself(data, classes):
    assert load_dataset(data).classes == classes
    assert load_dataset([(X, "dog")], classes=("cat", "dog")).labels.tolist() == [1]


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMAL = (X - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_normalised_floats_are_undone_and_pictures_fitted():
    assert torch.equal(load_dataset([(NORMAL, 0)], mean=MEAN, std=STD).images[0], BYTES)
    data = load_dataset([(Image.new("L", (30, 50), 7), 0), (Image.new("CMYK", (80, 20)), 1)], side=(16, 8))
    assert data.images.shape == (2, 3, 16, 8)
    assert (data.images[0] == 7).all()


class Stream(IterableDataset):
    def __iter__(self):
        yield X, 0


@pytest.mark.parametrize(("data", "options", "word"), [
    ([], {}, "index"), (Stream(), {}, "list"), (((X, 0) for _ in range(2)), {}, "list"), ("photos", {}, "load_folder"),
    ({"train": [(X, 0)]}, {}, "got a dict"), (Path("photos"), {}, "load_folder"), ([X], {}, "item 0 .*got a Tensor"),
    (DataLoader([(X, 0)] * 6, sampler=SubsetRandomSampler([0, 3])), {}, "draws 2; pass a Subset"),
    (ConcatDataset([NAMED, Items((X, 0), classes=["fox", "cat"])]), {}, "same classes"),
    ([(X, 0, 1, 2)], {}, "image="), ([(X, 1, torch.tensor([1, 0]))], {}, r"got Tensor tensor\(\[1, 0\]\)"),
    ([{"img": X, "label": 0}], {}, "expected image among img, label"), ([(X, 0), (X, 1, 2)], {}, "in all of them"),
    ([(X, i % 2, i) for i in range(12)], {}, "group="), ([(X, 0.9)], {}, "got float 0.9"),
    ([(X, float("nan"))], {}, "got float nan"), ([(X, torch.eye(2)[0])], {}, "argmax"), ([(X, "cat")], {}, "classes="),
    ([(X, -1), (X, 1)], {}, r"0\.\.1, .*got -1\.\.1"), ([(X, 5)], {"classes": ("a", "b")}, r"0\.\.1, .*got 5\.\.5"),
    ([(X * 2, 0)], {}, r"in \[0, 1\], got \["), ([(X * 255, 0)], {}, r"got .*2\d\d\]"), ([(NORMAL, 0)], {}, "mean="),
    ([(NORMAL, 0)], {"mean": (0.5,) * 3, "std": (0.5,) * 3}, "right mean="), ([(NORMAL, 0)], {"std": STD}, "mean None"),
    ([(torch.zeros(9, 9), 0)], {}, r"got \(9, 9\)"), ([(X.long(), 0)], {}, "got torch.int64"),
    ([("a.jpg", 0)], {}, "got a str"), ([(numpy.zeros((5, 5, 2)), 0)], {}, r"got \(5, 5, 2\)"),
    ([(X, 0), (torch.rand(3, 9, 8), 0)], {}, "item 1 .*8 x 8 pixels, as the first, got 9 x 8; pass side="),
    ([(Image.new("I;16", (20, 20), 30000), 0)], {}, "mode I;16"), ([(Image.new("F", (20, 20)), 0)], {}, "mode F")])
def test_what_cannot_be_read_is_named(data, options, word):
    with pytest.raises((TypeError, ValueError), match=word):
        load_dataset(data, **options)


def test_a_data_set_that_augments_is_noticed():
    with pytest.warns(UserWarning, match="without augmentation"):
        load_dataset([(torch.rand, 0)], image=lambda item: item[0](3, 8, 8))
