"""Cats vs Dogs in both layouts, at a miniature size: its splits, its two broken photographs, Deep Gamblers' index."""

import pytest
import torch
from PIL import Image

from src.datasets import missing, small
from src.datasets.decode import View
from src.datasets.small import small_pictures
from tests.miniature import expected, held_out

VIEW = View(32, 32)
NUMBERS = {"cat": (*range(9), 666), "dog": (*range(9), 11_702)}  # with those that are broken in Microsoft's zip


@pytest.fixture
def animals(tmp_path, monkeypatch):
    """The same twenty pictures, plain and each of its own grey, as Kaggle and as Microsoft have them."""
    monkeypatch.setitem(small.PUBLISHED, "CatsVsDogs", 20)
    roots = tmp_path / "kaggle", tmp_path / "microsoft"
    for animal, numbers in NUMBERS.items():
        for number in numbers:
            picture = Image.new("RGB", (48, 40), (grey(animal, number),) * 3)
            for path in (roots[0] / f"cats_vs_dogs/train/{animal}.{number}.jpg",
                         roots[1] / f"cats_vs_dogs/PetImages/{animal.title()}/{number}.jpg"):
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
    (roots[1] / "cats_vs_dogs/PetImages/Cat/Thumbs.db").touch()
    return roots


def grey(animal: str, number: int) -> int:
    return 10 * NUMBERS[animal].index(number) + 100 * (animal == "dog") + 20


def names(data) -> list[tuple[str, int]]:
    """Which pictures of `animals` these are, by their pixels."""
    known = {grey(animal, number): (animal, number) for animal, numbers in NUMBERS.items() for number in numbers}
    for image in data.images:
        assert image.unique().numel() == 1
    return [known[int(image[0, 0, 0])] for image in data.images]


def everyone() -> list[tuple[str, int]]:
    return [(animal, number) for animal, numbers in NUMBERS.items() for number in numbers]


@pytest.mark.filterwarnings("ignore:CatsVsDogs")
def test_cats_vs_dogs(animals):
    splits = {split: small_pictures("CatsVsDogs", split, View(16, 16), animals[0]) for split in small.SPLITS}
    test = [everyone()[i] for i in held_out(20)]
    train = [name for name in everyone() if name not in test]
    assert names(splits["test"]) == test
    assert names(splits["val"]) == [train[i] for i in expected(16, "val")]
    assert names(splits["train"]) == [train[i] for i in expected(16, "train")]
    assert [len(data) for data in splits.values()] == [13, 3, 4]
    for split, data in splits.items():
        assert data.images.shape[1:] == (3, 16, 16)
        assert data.labels.tolist() == [("cat", "dog").index(animal) for animal, _ in names(data)]
        assert data.labels.dtype == torch.int64
        assert data.classes == ("cat", "dog")
        assert names(small_pictures("CatsVsDogs", split, View(16, 16), animals[0])) == names(data)
        assert names(small_pictures("CatsVsDogs", split, View(16, 16), animals[1])) == names(data)
    assert missing("CatsVsDogs", animals[0]) is missing("CatsVsDogs", animals[1]) is None


@pytest.mark.filterwarnings("ignore:CatsVsDogs")
@pytest.mark.parametrize("damage", ["empty", "no image", "deleted"])
def test_the_two_broken_photographs(animals, damage, capsys):
    cat, dog = (animals[1] / "cats_vs_dogs" / name for name in small.BROKEN)
    for path in (cat, dog):
        path.unlink()
        if damage != "deleted":
            path.write_bytes(b"" if damage == "empty" else b"no image")
    for split in small.SPLITS:
        whole = names(small_pictures("CatsVsDogs", split, VIEW, animals[0]))
        assert capsys.readouterr().out == ""
        wanted = [name for name in whole if name not in (("cat", 666), ("dog", 11_702))]
        assert names(small_pictures("CatsVsDogs", split, VIEW, animals[1])) == wanted
        printed = [line for line in capsys.readouterr().out.splitlines() if "it is known to be broken" in line]
        assert len(printed) == len(whole) - len(wanted)
        assert all(f".jpg is left out of {split}" in line for line in printed)
    assert missing("CatsVsDogs", animals[1]) is None


@pytest.mark.filterwarnings("ignore:CatsVsDogs")
def test_any_other_broken_photograph_is_an_error(animals):
    animal, number = next(everyone()[i] for i in held_out(20) if everyone()[i][1] < 9)
    path = animals[1] / f"cats_vs_dogs/PetImages/{animal.title()}/{number}.jpg"
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"{path} is not a readable image"):
        small_pictures("CatsVsDogs", "test", VIEW, animals[1])
    split = next(split for split in small.SPLITS
                 if ("cat", 666) in names(small_pictures("CatsVsDogs", split, VIEW, animals[0])))
    (animals[0] / "cats_vs_dogs/train/cat.666.jpg").write_bytes(b"")  # broken in Microsoft's zip only
    with pytest.raises(ValueError, match=r"train/cat\.666\.jpg is not a readable image"):
        small_pictures("CatsVsDogs", split, VIEW, animals[0])


@pytest.mark.filterwarnings("ignore:CatsVsDogs")
@pytest.mark.parametrize("layout", [0, 1])
def test_the_test_set_of_deep_gamblers(animals, layout):
    folder = animals[layout] / "cats_vs_dogs"
    (folder / "cat_idx.txt").write_text("0.jpg\n666.jpg\n5.jpg\n")
    with pytest.raises(FileNotFoundError, match=r"dog_idx.txt is missing, while the other index is there"):
        small_pictures("CatsVsDogs", "test", VIEW, animals[layout])
    (folder / "dog_idx.txt").write_text("11702.jpg\n3.jpg\n")
    test = [("cat", 0), ("cat", 5), ("cat", 666), ("dog", 3), ("dog", 11_702)]
    train = [name for name in everyone() if name not in test]
    assert names(small_pictures("CatsVsDogs", "test", VIEW, animals[layout])) == test
    for split in ("train", "val"):
        data = small_pictures("CatsVsDogs", split, VIEW, animals[layout])
        assert names(data) == [train[i] for i in expected(15, split)]
    (folder / "dog_idx.txt").write_text("3.jpg\n77.jpg\n")
    with pytest.raises(FileNotFoundError, match=r"1 of the 5 images in .*dog_idx.txt are missing, such as dog 77"):
        small_pictures("CatsVsDogs", "train", VIEW, animals[layout])
    (folder / "dog_idx.txt").write_text("3.jpg\ndog.4.jpg\n")
    with pytest.raises(ValueError, match=r"dog_idx.txt: expected names such as 0.jpg, got 'dog.4.jpg'"):
        small_pictures("CatsVsDogs", "train", VIEW, animals[layout])


def test_cats_vs_dogs_of_another_size_says_so(animals, monkeypatch, recwarn):
    with pytest.warns(UserWarning, match=r"has 20 images, 4 of them to test; published: 25,000 and 5,000"):
        small_pictures("CatsVsDogs", "test", VIEW, animals[0])
    (animals[0] / "cats_vs_dogs/train/dog.0.jpg").unlink()
    assert "/cats_vs_dogs: 1 of 20 images are missing; unpack there train" in missing("CatsVsDogs", animals[0])
    for path in (animals[0] / "cats_vs_dogs/train").glob("dog.*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="cats, dogs or both are missing"):
        small_pictures("CatsVsDogs", "test", VIEW, animals[0])
    monkeypatch.setattr(small, "_cats_and_dogs", lambda _: {(i % 2, i // 2): animals[1] for i in range(25_000)})
    monkeypatch.setitem(small.PUBLISHED, "CatsVsDogs", 25_000)
    monkeypatch.setattr(small, "cached", lambda paths, *_: torch.zeros(len(paths), 3, 1, 1))
    recwarn.clear()
    sizes = [len(small_pictures("CatsVsDogs", split, VIEW, animals[0])) for split in small.SPLITS]
    assert sizes == [16_000, 4_000, 5_000]
    assert not recwarn.list
