"""Images of any kind and from anywhere: read as they are meant, or refused with the reason."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler

from src.datasets.decode import View, fit
from src.datasets.images import load_dataset, load_folder, save_folder
from tests.conftest import REPOSITORY
from tests.miniature import make_folder

X = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))


def picture(path, size=(9, 9), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 10, 10)).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        picture(tmp_path / "train" / name / "1.png")
    return tmp_path / "train"


# folders


def test_a_folder_is_decoded_once_into_bytes(tmp_path):
    make_folder(tmp_path / "train", n=20, stamped={"cross": 0.0, "disc": 1.0})
    train = load_folder(tmp_path / "train", side=64)
    assert torch.equal(load_folder(tmp_path / "train", side=64, cache=tmp_path / "cache").images, train.images)
    assert (train.images.shape, train.images.dtype) == ((40, 3, 64, 64), torch.uint8)
    assert train.classes == ("cross", "disc")
    assert train.labels.tolist() == [0] * 20 + [1] * 20
    with Image.open(tmp_path / "train" / "disc" / "00003.jpg") as image:
        assert torch.equal(train.images[23], fit(image, View(64, 64)))
    stamp = train.images[:, :, 58, 55].float()  # inside the bar: yellow
    assert (stamp[20:, 0] > 200).all()
    assert (stamp[20:, 2] < 90).all()
    assert not ((stamp[:20, 0] > 200) & (stamp[:20, 2] < 90)).any()


def test_hidden_things_are_passed_over(folder):
    picture(folder / ".ipynb_checkpoints" / "1-checkpoint.png")
    picture(folder / "cat" / ".ipynb_checkpoints" / "1-checkpoint.png")
    picture(folder / "cat" / "._1.png")
    picture(folder / "__MACOSX" / "1.png")
    (folder / ".git").mkdir()
    data = load_folder(folder, 8)
    assert (data.classes, data.labels.tolist()) == (("cat", "dog"), [0, 1])


def test_other_endings_are_counted(folder):
    for i in range(9):
        picture(folder / "cat" / f"{i}.gif")
    picture(folder / "dog" / "x.jfif", format="JPEG")
    (folder / "dog" / "README").write_text("dogs")
    with pytest.warns(UserWarning, match=r"2 images; 11 other files \(9 \.gif, 1 (\.jfif|no ending), 1 .*passed over"):
        assert len(load_folder(folder, 8)) == 2


def test_folders_that_are_no_classes(folder, tmp_path):
    picture(tmp_path / "val" / "cat" / "1.png")
    with pytest.raises(ValueError, match="got train, val, which look like the parts of a data set; name one of"):
        load_folder(tmp_path, 8)
    with pytest.raises(FileNotFoundError, match=r"expected a folder with one folder for each class, got .* is missing"):
        load_folder(tmp_path / "elsewhere", 8)
    with pytest.raises(FileNotFoundError, match=r"expected one folder for each class in .*cat, got none"):
        load_folder(folder / "cat", 8)
    (folder / "emu").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected images in .*emu, got none"):
        load_folder(folder, 8)
    (folder / "emu" / "2.jpg").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"2\.jpg is not a readable image"):
        load_folder(folder, 8)


def test_folders_that_are_numbers_are_in_the_order_of_strings(tmp_path):
    for name in ("0", "1", "2", "10"):
        picture(tmp_path / name / "1.png")
    with pytest.warns(UserWarning, match="in the order of strings: 0, 1, 10, 2, ...; so the label of 10 is 2"):
        assert load_folder(tmp_path, 8).classes == ("0", "1", "10", "2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_folder(tmp_path, 8, classes=("0", "1", "2", "10")).labels.tolist() == [0, 1, 3, 2]


def test_classes_are_matched_by_name(folder, tmp_path):
    picture(tmp_path / "test" / "dog" / "1.png")
    test = load_folder(tmp_path / "test", 8, classes=("cat", "dog"))
    assert (test.classes, test.labels.tolist()) == (("cat", "dog"), [1])
    alone = load_folder(tmp_path / "test", 8)
    assert (alone.classes, alone.labels.tolist()) == (("dog",), [0])
    assert alone.with_classes(("cat", "dog")).labels.tolist() == [1]
    with pytest.raises(ValueError, match="expected classes among cat, fox, got dog"):
        alone.with_classes(("cat", "fox"))
    with pytest.raises(ValueError, match="to have the classes cat, fox, got cat, dog"):
        load_folder(folder, 8, classes=("cat", "fox"))
    with pytest.raises(ValueError, match="each may be there but once"):
        load_folder(folder, 8, classes=("cat", "dog", "dog"))


def test_a_view_that_is_not_square(folder):
    assert load_folder(folder, (6, 12)).images.shape == (2, 3, 6, 12)
    with pytest.raises(ValueError, match=r"expected side to be a number of pixels or \(height, width\), got 0"):
        load_folder(folder, 0)


def test_home_is_a_place(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder)
    assert len(load_folder("~/train", 8, cache="~/cache/pixels")) == 2
    assert (folder.parent / "cache" / "pixels").exists()
    assert not (folder / "~").exists()


def test_what_is_saved_is_what_is_loaded(tmp_path):
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    save_folder(tmp_path / "out", images, torch.tensor([1, 0, 0, 1]), ("a", "b"))
    data = load_folder(tmp_path / "out", 8)
    assert torch.equal(data.images, images[[1, 2, 0, 3]])
    with pytest.raises(FileExistsError, match="free or empty, got something in its place, which is left as it is"):
        save_folder(tmp_path / "out", images, torch.tensor([0, 1, 1, 0]), ("a", "b"))
    assert len(load_folder(tmp_path / "out", 8)) == 4


@pytest.mark.parametrize(("labels", "classes", "message"), [
    ([0, 1, -1], ("a", "b"), r"in 0..1 for each image, got 3 labels in -1..1"),
    ([0, 1, 2], ("a", "b"), r"in 0..1 for each image, got 3 labels in 0..2"), ([0, 1], ("a", "b"), "for 3 im"),
    ([0, 1, 1], ("yes/no", "b"), "got 'yes/no'"), ([0, 1, 1], ("../up", "b"), "got '../up'"),
    ([0, 1, 1], ("a", ".b"), "got '.b'"), ([0, 1, 1], ("a", ""), "got ''"), ([0, 1, 1], ("a", "A"), "not in case")])
def test_nothing_is_saved_that_would_come_back_otherwise(labels, classes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_folder(tmp_path / "out", torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.tensor(labels), classes)
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize(("mode", "ending"), [("RGBA", "png"), ("LA", "png"), ("LA", "tif"), ("P", "png")])
def test_what_is_transparent_shows_white(mode, ending, tmp_path):
    (tmp_path / "a").mkdir()
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))  # a red that nobody was meant to see
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    options = {}
    if mode == "P":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE)
        options = {"transparency": image.getpixel((7, 7))}
    (image if mode == "P" else image.convert(mode)).save(tmp_path / "a" / f"1.{ending}", **options)
    shown = load_folder(tmp_path, 8).images[0]
    assert (shown[:, :, :4] == 0).all()
    assert (shown[:, :, 4:] == 255).all()


@pytest.mark.parametrize(("name", "mode", "options"), [
    ("progressive.jpg", "RGB", {"progressive": True}), ("grey.jpg", "L", {}), ("cmyk.jpg", "CMYK", {}),
    ("one bit.png", "1", {}), ("größe 1, ü.png", "RGB", {}), ("写真.webp", "RGB", {"lossless": True}),
    ("UPPER.JPEG", "RGB", {"format": "JPEG"}), ("big.tif", "RGB", {"compression": "tiff_lzw"})])
def test_files_of_many_kinds_and_names(name, mode, options, tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (9, 9), "white").convert(mode).save(tmp_path / "a" / name, **options)
    Image.new("RGB", (1, 1), "white").save(tmp_path / "a" / "smallest.png")
    assert (load_folder(tmp_path, 8, cache=tmp_path / "pixels").images >= 254).all()


# data sets of torch and others


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
    ((X * 255).round().byte(), 0), (X.numpy(), 0), (X.permute(1, 2, 0).numpy(), 0),
    ((X.permute(1, 2, 0) * 255).round().byte().numpy(), 0),
    (Image.fromarray((X.permute(1, 2, 0) * 255).round().byte().numpy()), 0)])
def test_pictures_and_labels_as_they_are_met(item):
    data = load_dataset(Items(item))
    assert torch.equal(data.images[0], (X * 255).round().byte())
    assert data.labels.tolist() in ([0], [1])
    assert data.groups is None


def test_groups_keys_and_names():
    assert load_dataset([(X, 0, 2), (X, 1, 0)]).groups.tolist() == [2, 0]
    wilds = load_dataset([(X, torch.tensor(1), torch.tensor([3, 1, 0]))], group=lambda item: item[2][0])
    assert (wilds.labels.tolist(), wilds.groups.tolist()) == ([1], [3])
    numbered = load_dataset([(7, X, 1, 0)], image=1, label=2, group=3)
    assert (numbered.labels.tolist(), numbered.groups.tolist()) == ([1], [0])
    hugging = load_dataset([{"img": X, "fine": 1, "place": 1}], image="img", label="fine", group="place")
    assert (hugging.labels.tolist(), hugging.groups.tolist()) == ([1], [1])
    assert load_dataset([(X, "dog")], classes=("cat", "dog")).labels.tolist() == [1]
    named = Items((X, 1), (X, 0), classes=["cat", "dog", "fox"])
    assert load_dataset(named).classes == load_dataset(Subset(named, [1])).classes == ("cat", "dog", "fox")
    assert load_dataset(Items((X, 1))).classes == ("0", "1")


def test_a_loader_gives_its_data_set():
    items = Items(*[(X, i % 2) for i in range(6)])
    assert len(load_dataset(DataLoader(items, batch_size=4, shuffle=True, drop_last=True))) == 6
    with pytest.raises(ValueError, match=r"one whose sampler draws 2 of 6 items; pass a torch\.utils\.data\.Subset"):
        load_dataset(DataLoader(items, sampler=SubsetRandomSampler([0, 3])))


def test_normalised_floats_are_undone():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normal = (X - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.equal(load_dataset([(normal, 0)], mean=mean, std=std).images[0], (X * 255).round().byte())
    with pytest.raises(ValueError, match=r"got values in \[-\d\.\d+, .*pass mean= and std= to have it undone"):
        load_dataset([(normal, 0)])
    with pytest.raises(ValueError, match=r"expected mean and std to undo the normalisation, got values in \["):
        load_dataset([(normal, 0)], mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(TypeError, match="expected mean and std together"):
        load_dataset([(normal, 0)], mean=mean)


class Stream(IterableDataset):
    def __iter__(self):
        yield X, 0


@pytest.mark.parametrize(("data", "message"), [
    ([], "with items, got an empty one"), (Stream(), r"by number, got a Stream; .*pass list\(...\)"),
    (((X, 0) for _ in range(2)), r"by number, got a generator; .*pass list\(...\)"),
    ({"train": [(X, 0)]}, "expected one data set, got a dict with train; pass one of them"),
    ([(X, 0, 1, 2)], r"item 0 .*got 4 entries; say where they are with image="),
    ([(X, 1, torch.tensor([1, 0]))], r"item 0 .*third entry, the group, got Tensor \(2,\); pass group="),
    ([{"img": X, "label": 0}], r"item 0 .*expected 'image' among img, label; say where"), ([X], "got a Tensor"),
    ([(X, 0), (X, 1, 2)], "a group in all of them or in none"),
    ([(X, 0.9), (X, 0.1)], r"item 0 .*expected a whole number as label or group, got float 0.9"),
    ([(X, torch.eye(2)[0])], r"item 0 .*got Tensor \(2,\); of soft or one-hot labels take argmax"),
    ([(X, "cat")], r"item 0 .*got str 'cat'.*pass classes= with labels that are names"),
    ([(X, -1), (X, 1)], r"expected labels in 0\.\.1, since there are 2 classes \(0, 1\), got -1\.\.1"),
    ([(X * 2, 0)], r"item 0 .*expected an image in \[0, 1\], got values in \[\d"),
    ([(X * 255, 0)], r"item 0 .*got values in .*2\d\d\]"), ([(torch.zeros(9, 9), 0)], r"item 0 .*got \(9, 9\)"),
    ([(torch.zeros(3, 9, 9).long(), 0)], "item 0 .*got torch.int64"), ([("a.jpg", 0)], "item 0 .*got a str"),
    ([(numpy.zeros((3, 5, 3)), 0)], r"item 0 .*array \(H, W, 3\) or \(3, H, W\), got \(3, 5, 3\)"),
    ([(X, 0), (torch.rand(3, 9, 8), 0)], r"item 1 .*an image of 8 x 8 pixels, as the first, got 9 x 8; pass side=")])
def test_what_cannot_be_read_is_named(data, message):
    with pytest.raises((TypeError, ValueError), match=message):
        load_dataset(data)


def test_classes_that_do_not_hold_the_labels():
    with pytest.raises(ValueError, match=r"in 0..1, since there are 2 classes \(a, b\), got 0..5"):
        load_dataset([(X, i) for i in range(6)], classes=("a", "b"))


@pytest.mark.parametrize(("image", "message"), [
    (Image.new("I;16", (20, 20), 30000), "expected 8 bits a channel, got pixels of mode I;16"),
    (Image.new("F", (20, 20)), "expected 8 bits a channel, got pixels of mode F"),
    (Image.new("L", (5000, 2)), "expected no side over 100 times the other, got 2 x 5000 pixels")])
def test_pictures_that_would_come_out_wrong_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        fit(image, View(16, 16))


def test_pictures_of_several_sizes_and_modes():
    data = load_dataset([(Image.new("L", (30, 50), 7), 0), (Image.new("CMYK", (80, 20)), 1)], side=(16, 8))
    assert data.images.shape == (2, 3, 16, 8)
    assert (data.images[0] == 7).all()


class Crops(Items):
    def __getitem__(self, i: int):
        return torch.rand(3, 8, 8), 0


def test_a_data_set_that_augments_is_noticed():
    with pytest.warns(UserWarning, match="item 0 of the data set is another image when it is read again"):
        load_dataset(Crops(0, 1))


def test_a_cache_of_a_data_set(tmp_path, capsys):
    items = [(torch.rand(3, 8, 8), i % 2, i % 3) for i in range(70)]
    plain = load_dataset(items)
    reads = []

    class Counted(Items):
        def __getitem__(self, i: int):
            reads.append(i)
            return super().__getitem__(i)

    for _ in range(2):
        kept = load_dataset(Counted(*items), cache=tmp_path / "cache" / "mine")
        assert torch.equal(kept.images, plain.images)
        assert torch.equal(kept.labels, plain.labels)
        assert torch.equal(kept.groups, plain.groups)
    assert len(reads) == 70 + 2 * 5  # the second time it reads three probes, and item 0 twice
    load_dataset(Counted(*items[:-1]), cache=tmp_path / "cache" / "mine")
    assert "was made from other images" in capsys.readouterr().out
    (tmp_path / "model.pt").write_bytes(b"weights")
    with pytest.raises(FileExistsError, match="something else, which is left as it is"):
        load_dataset(items, cache=tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == b"weights"


MEMORY = """
import re
from pathlib import Path
import torch
from src.datasets.images import load_dataset

class Pictures:
    def __len__(self):
        return 2000

    def __getitem__(self, i):
        return torch.full((3, 224, 224), i % 256, dtype=torch.uint8), i % 2

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

before = peak()
data = load_dataset(Pictures())
print((peak() - before) / data.images.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak of a process")
def test_images_are_held_once():
    """Room for all is made before the first is read; in a process of its own, whose peak is its own."""
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=REPOSITORY, text=True, capture_output=True, check=True)
    assert 0.8 < float(done.stdout) < 1.3
