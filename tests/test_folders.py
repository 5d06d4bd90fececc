"""Images from folders: of any layout, endings and kinds of files; and what is saved is what is loaded."""

import warnings

import pytest
import torch
from PIL import Image

from src.datasets.decode import View, fit
from src.datasets.images import load_folder, save_folder
from tests.miniature import make_folder


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
