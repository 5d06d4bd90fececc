"""Your own images, from folders or any data set: read as they are meant, or refused with the reason."""

import os
import struct
import types
import unicodedata
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch.utils import data as torchs
from torch.utils.data import ConcatDataset, DataLoader, Subset

from src.datasets import decode
from src.datasets.images import load_dataset, load_folder

X = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
BYTES = (X * 255).round().byte()
SHOWN = Image.fromarray(BYTES.permute(1, 2, 0).numpy())


def picture(path, image=SHOWN, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        picture(tmp_path / "train" / name / "1.png")
    return tmp_path / "train"


def test_what_is_hidden_or_left_by_a_system_is_passed_over_and_nothing_is_read_twice(folder, monkeypatch):
    for path in (".ipynb_checkpoints", "cat/.ipynb_checkpoints", "__MACOSX", "lost+found", "#recycle", "$Recycle.Bin",
                 "@Recycle"):
        picture(folder / path / "1-checkpoint.png")
    for path in ("cat/._1.png", "cat/.DS_Store", *(f"cat/{i}.gif" for i in range(9)), "cat/Thumbs.db"):
        (folder / path).touch()
    picture(folder.parent / "more" / "1.png")
    for path in (folder / "dog" / "2.png", folder.parent / "more" / "2.png"):
        picture(path, Image.new("RGB", (30, 20), "red"))
    for name, to in (("cat", folder / "cat"), ("up", ".."), ("dogs", "../dog"), ("more", "../../more")):
        (folder / "cat" / name).symlink_to(to)  # the last alone leads to more cats
    monkeypatch.setenv("HOME", str(folder.parent))
    with pytest.warns(UserWarning, match="5 images; 10 other files"):
        data = load_folder("~/train", 8)
    assert (data.classes, data.labels.tolist()) == (("cat", "dog"), [0, 0, 0, 1, 1])
    assert (data.images.shape, data.images.dtype) == ((5, 3, 8, 8), torch.uint8)
    assert torch.equal(data.images[[0, 1, 3]], BYTES.expand(3, -1, -1, -1))
    assert (data.images[[2, 4]] == torch.tensor([255, 0, 0]).view(3, 1, 1)).all()
    assert torch.equal(load_folder("~/train", 8, cache="~/cache/pixels").images, data.images)
    assert (folder.parent / "cache" / "pixels").exists()
    assert load_folder(folder, (6, 12)).images.shape == (5, 3, 6, 12)


@pytest.mark.parametrize(("spoil", "error", "word"), [
    (lambda root: picture(root.parent / "val" / "cat" / "1.png") or root.parent, ValueError, "parts of a set: train"),
    (lambda root: root / "elsewhere", FileNotFoundError, "elsewhere is missing"),
    (lambda root: root / "cat", FileNotFoundError, "cat is missing, or has no folders of images"),
    (lambda root: (root / "dog" / "2.jpg").write_bytes(b"text") and root, ValueError, r"2\.jpg is not a readable"),
    (lambda root: (root / "fox").mkdir() or root, FileNotFoundError, r"fox: expected images of class fox .*no files"),
    (lambda root: (root / "dog" / "1.png").rename(root / "dog" / "1.heic") and root, FileNotFoundError,
     r"dog .*\.heic"),
    (lambda root: os.mkfifo(root / "dog" / "2.jpg") or root, FileNotFoundError, r"2\.jpg is no file"),
    (lambda root: (root / "dog" / "2.jpg").symlink_to("nowhere") or root, FileNotFoundError, r"2\.jpg is no file"),
    (lambda root: picture(root / "fox" / "1.png") or root, ValueError, "cat, dog, each once, got cat, dog, fox")])
def test_folders_that_are_no_classes(spoil, error, word, folder):
    root = spoil(folder)
    with pytest.raises(error, match=word):
        load_folder(root, 8, classes=("cat", "dog") if "each once" in word else None)


def test_classes_are_matched_by_name_or_by_number_for_want_of_names(folder, tmp_path):
    picture(tmp_path / "test" / "dog" / "1.png")
    for classes in (("cat", "dog"), {"dog": 1, "cat": numpy.int64(0)}, {1: "dog", 0: "cat"}, {"1": "dog", "0": "cat"}):
        test = load_folder(tmp_path / "test", 8, classes=classes)
        assert (test.classes, test.labels.tolist()) == (("cat", "dog"), [1])
    assert load_folder(tmp_path / "test", 8).with_classes(("cat", "dog")).labels.tolist() == [1]
    for name in ("0", "1", "2", "10"):
        picture(tmp_path / "numbers" / name / "1.png")
    with pytest.warns(UserWarning, match="in the order of strings: 0, 1, 10, 2"):
        numbers = load_folder(tmp_path / "numbers", 8).classes
    assert load_folder(tmp_path / "numbers", 8, classes=("0", "1", "2", "10")).labels.tolist() == [0, 1, 3, 2]
    nameless = load_dataset(torchs.TensorDataset(BYTES.expand(4, -1, -1, -1), torch.arange(4)))
    assert nameless.with_classes(numbers).labels.tolist() == [0, 1, 2, 3]
    assert nameless.with_classes(numbers).classes == numbers == ("0", "1", "10", "2")
    for wrong, classes, word in ((test, ("cat", "fox"), "dog once among .*fox"), (nameless, ("a",), "0, 1, 2.* once")):
        with pytest.raises(ValueError, match=word):
            wrong.with_classes(classes)
    for classes, word in ((("cat", "dog", "dog"), "each once"), ({"cat": 1, "dog": 2}, "numbered 0, 1")):
        with pytest.raises(ValueError, match=word):
            load_folder(folder, 8, classes=classes)


def test_names_that_are_no_text_or_a_formula(tmp_path):
    names = sorted(map(os.fsdecode, (b"for\xeat", b"A$$AP", b"new\nline", "狗".encode())))
    for name in names:
        picture(tmp_path / "train" / name / f"{name}.png")
    for _ in range(2):
        assert load_folder(tmp_path / "train", 8, cache=tmp_path / names[-1]).classes == tuple(names)


CORNERS = torch.tensor([[0, 80], [160, 255]], dtype=torch.uint8).repeat_interleave(8, 0).repeat_interleave(12, 1)


@pytest.mark.parametrize(("orientation", "seen"), [
    (1, CORNERS), (2, CORNERS.flip(1)), (3, CORNERS.flip(0, 1)), (4, CORNERS.flip(0)), (5, CORNERS.T),
    (6, CORNERS.T.flip(1)), (7, CORNERS.T.flip(0, 1)), (8, CORNERS.T.flip(0))])
def test_a_picture_is_shown_as_the_camera_was_held(orientation, seen, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(tmp_path / "a" / "1.jpg", Image.fromarray(CORNERS.numpy()), exif=exif, quality=100)
    data = load_folder(tmp_path, tuple(seen.shape))
    assert (data.images[0, 0].int() - seen.int()).abs().max() <= 2  # JPEG


@pytest.mark.parametrize(("mode", "ending"), [("RGBA", "png"), ("LA", "png"), ("LA", "tif"), ("PA", "tif")])
def test_what_is_transparent_shows_white(mode, ending, tmp_path):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))  # a red that nobody was meant to see
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    picture(tmp_path / "a" / f"1.{ending}", image.convert(mode))
    assert load_folder(tmp_path, 8).images.float().mean((0, 1, 2)).tolist() == [0] * 4 + [255] * 4


@pytest.mark.parametrize(("name", "mode", "options"), [
    ("progressive.jpg", "RGB", {"progressive": True}), ("grey.jpg", "L", {}), ("cmyk.jpg", "CMYK", {}),
    ("one bit.png", "1", {}), ("größe 1, ü.gif.png", "P", {}), ("写真.webp", "RGB", {"lossless": True}),
    ("UPPER.JPEG", "RGB", {"format": "JPEG"}), ("big.tif", "RGB", {"compression": "tiff_lzw"})])
def test_files_of_many_kinds_and_names(name, mode, options, tmp_path):
    picture(tmp_path / "a" / name, SHOWN.convert(mode), **options)
    shown = load_folder(tmp_path, 8, cache=tmp_path / "pixels").images[0].permute(1, 2, 0).numpy()
    assert (shown == numpy.asarray(Image.open(tmp_path / "a" / name).convert("RGB"))).all()


class Items(torchs.Dataset):
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
    (X, numpy.array([1])), (BYTES, 0), (X.numpy(), 0), (X.permute(1, 2, 0).numpy(), 0), (numpy.array(SHOWN), 0),
    (SHOWN, 0)])
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


NAMES = ("cat", "dog", "fox")
NAMED = Items((X, 1), (X, 0), classes=NAMES)


@pytest.mark.parametrize(("data", "classes"), [
    (Subset(Subset(NAMED, [1, 0]), [1]), NAMES), (ConcatDataset([NAMED, Subset(NAMED, [1])]), NAMES),
    (Items((X, "dog"), classes={"dog": 1, "cat": 0}), ("cat", "dog")), (Items((X, 1), vocab=["a", "b"]), ("a", "b")),
    (Items((X, 1), features={"label": types.SimpleNamespace(names=NAMES)}), NAMES), (Items((X, 1)), ("0", "1"))])
def test_names_that_a_data_set_gives_itself(data, classes, recwarn):
    found = load_dataset(data)
    assert (found.classes, found.labels[0], found.numbered) == (classes, 1, classes == ("0", "1"))
    assert not recwarn.list


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMAL = (X - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_normalised_floats_are_undone_and_pictures_fitted():
    assert torch.equal(load_dataset([(NORMAL, 0)], mean=MEAN, std=STD).images[0], BYTES)
    data = load_dataset([(Image.new("L", (30, 50), 7), 0), (Image.new("CMYK", (80, 20)), 1)], side=(16, 8))
    assert data.images.shape == (2, 3, 16, 8)
    assert (data.images[0] == 7).all()


class Stream(torchs.IterableDataset, Items):
    def __iter__(self):
        yield X, 0


@pytest.mark.parametrize(("data", "options", "word"), [
    ([], {}, "index"), (Stream((X, 0)), {}, "list"), (((X, 0) for _ in range(2)), {}, "list"),
    (types.SimpleNamespace(dataset=NAMED, __len__=len, __getitem__=len), {}, "dls.train_ds"),
    (Items(train_ds=NAMED), {}, "dls.train_ds"), (DataLoader(NAMED), {}, "of a DataLoader its .dataset"),
    ({"train": [(X, 0)]}, {}, "one of its values.* got a dict"),
    ("photos", {}, "load_folder"), (Path("photos"), {}, "load_folder"), ([X], {}, "item 0 .*got a Tensor"),
    (ConcatDataset([NAMED, Items((X, 0), classes=["fox", "cat"])]), {}, "same classes"),
    ([(X, 0, 1, 2)], {}, "image="), ([(X, 1, torch.tensor([1, 0]))], {}, r"got Tensor tensor\(\[1, 0\]\)"),
    ([{"img": X, "label": 0}], {}, "expected image among img, label"), ([(X, 0), (X, 1, 2)], {}, "in all of them"),
    ([(X, i % 2, i) for i in range(12)], {}, "group="), ([(X, 0.9)], {}, "got float 0.9"),
    ([(X, float("nan"))], {}, "got float nan"), ([(X, torch.eye(2)[0])], {}, "argmax"), ([(X, "cat")], {}, "classes="),
    ([(X, [1, 1])], {}, "multi-hot"), ([(X, -1), (X, 1)], {}, r"0\.\.1, .*got -1\.\.1"),
    ([(X, 5)], {"classes": ("a", "b")}, r"0\.\.1, .*got 5\.\.5"), ([(X * 255, 0)], {}, r"2\d\d\]; divide .* by 255"),
    ([(NORMAL, 0)], {}, "mean="), ([(NORMAL, 0)], {"mean": (0.5,) * 3, "std": (0.5,) * 3}, "right mean="),
    ([(NORMAL, 0)], {"std": STD}, "mean None"), ([(torch.zeros(9, 9), 0)], {}, r"got \(9, 9\)"),
    ([(numpy.zeros((5, 5), numpy.uint16), 0)], {}, "65535.*got torch.uint16"), ([("a.jpg", 0)], {}, "got a str"),
    ([(X, 0), (torch.rand(3, 9, 8), 0)], {}, r"item 1 .*\(3, 8, 8\), .*got \(3, 9, 8\); side="),
    ([(numpy.zeros((5, 5, 2)), 0)], {}, r"got \(5, 5, 2\)"), ([(Image.new("F", (20, 20)), 0)], {}, "mode F"),
    ([(Image.new("I;16", (20, 20), 30000), 0)], {}, "65535.*mode I;16")])
def test_what_cannot_be_read_is_named(data, options, word):
    with pytest.raises((TypeError, ValueError), match=word):
        load_dataset(data, **options)


def test_an_image_that_changes_is_told():
    with pytest.warns(UserWarning, match="without augmentation"):
        load_dataset([(torch.rand, 0)], image=lambda item: item[0](3, 8, 8))


def test_a_folder_that_cannot_be_listed_is_told(folder, monkeypatch):
    picture(folder / "cat" / "more" / "2.png")
    scan = os.scandir

    def refused(path):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError, match="more"):
        load_folder(folder, 8)


def test_a_class_name_in_another_normal_form_is_the_same(tmp_path):
    picture(tmp_path / unicodedata.normalize("NFD", "café") / "1.png")
    picture(tmp_path / "tea" / "1.png")
    assert load_folder(tmp_path, 8, classes=("tea", unicodedata.normalize("NFC", "café"))).labels.tolist() == [1, 0]


@pytest.mark.parametrize("size", [(1, 4000), (3000, 1), (6000, 6)])
def test_a_spacer_takes_no_memory(size):
    height, width = load_dataset([(Image.new("RGB", size, "red"), 0)], side=(32, 48)).images.shape[2:]
    assert (height, width) == (32, 48)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "resize", lambda image, side, antialias: made.append(side * max(image.shape) / min(
            image.shape[1:])) or torch.zeros(3, 99, 99))
        made = []
        load_dataset([(Image.new("RGB", size, "red"), 0)], side=(32, 48))
    assert max(made) <= 17 * 48


def test_a_malformed_tag_beside_the_orientation_stops_nothing(tmp_path):
    """The width, of TIFF's tags, as text: Pillow can read the tags, but not write them again."""
    tags = struct.pack("<HHI4s", 0x0100, 2, 4, b"abc") + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + struct.pack("<I", 0)
    picture(tmp_path / "a" / "1.jpg", Image.new("RGB", (40, 30), "red"), exif=exif)
    assert load_dataset([(Image.open(tmp_path / "a" / "1.jpg"), 0)]).images.shape == (1, 3, 40, 30)
    assert load_folder(tmp_path, 8).images.shape == (1, 3, 8, 8)


def test_any_failure_of_a_decoder_names_the_file(folder, monkeypatch):
    monkeypatch.setattr(decode, "fit", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=r"1\.png is not a readable image \(ZeroDivisionError"):
        load_folder(folder, 8)
