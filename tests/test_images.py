"""Images from any data set: read as they are meant, or refused with the reason."""

import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler

from src.datasets.decode import View, fit
from src.datasets.images import load_dataset
from tests.conftest import REPOSITORY

X = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))


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
