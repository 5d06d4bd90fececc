"""Image files in a memory map: the pixels are those of `decode`, and are built anew when the images change."""

import json
import os
import shutil
import threading
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from src.datasets import cache
from src.datasets.cache import cached
from src.datasets.view import View, decode
from tests.cache.pictures import VIEW, check, interrupt, one_by_one, picture

OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


def test_pixels_are_those_of_decode_and_are_decoded_once(paths, file, decoded, monkeypatch):
    images = cached(paths, VIEW, file)
    assert images.shape == (5, 3, 12, 10)
    assert images.dtype == torch.uint8
    assert sorted(decoded) == [path.name for path in paths]
    assert file.stat().st_size == images.numel()
    monkeypatch.setattr(cache, "locked", interrupt)  # a finished file may be in a read-only folder
    check(paths, file)
    assert len(decoded) == 5
    assert json.loads(file.with_name("train.bin.json").read_text())["view"] == {"height": 12, "width": 10, "resize": 14}


def test_one_image_and_the_real_size_of_chunks(paths, file, monkeypatch):
    monkeypatch.setattr(cache, "CHUNK", 32)
    check(paths[:1], file)
    check(paths * 20, file.parent / "a hundred" / "train.bin")


def test_writing_to_the_tensor_leaves_the_file_alone(paths, file):
    images, before = cached(paths, VIEW, file), file.read_bytes()
    images.zero_()
    assert file.read_bytes() == before
    assert not torch.equal(images, cached(paths, VIEW, file))


@pytest.mark.skipif(not OVERCOMMIT.exists() or OVERCOMMIT.read_text() == "2\n", reason="the system promises no more")
def test_a_file_larger_than_memory_can_be_mapped(paths, tmp_path):
    size = 4 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    file = tmp_path / "large"
    file.touch()
    os.truncate(file, size)  # a hole
    assert cache._Cache(paths[:1], View(1, size // 3), file, None).map()[0, 2, 0, -1] == 0


def test_modes_other_than_rgb(tmp_path, file):
    paths = [picture(tmp_path / f"{mode}.{kind}", 1, mode) for mode, kind in
             [("L", "png"), ("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("P", "gif"), ("RGBA", "png"), ("1", "png")]]
    images = cached(paths, View(17, 23), file)
    for path, image in zip(paths, images, strict=True):
        expected = torch.frombuffer(bytearray(Image.open(path).convert("RGB").tobytes()), dtype=torch.uint8)
        assert torch.equal(image, expected.view(17, 23, 3).permute(2, 0, 1)), path


@pytest.mark.parametrize("kind", ["text", "truncated", "empty", "bomb", "large"])
def test_an_unreadable_image_is_named_and_the_rest_is_kept(kind, paths, file, decoded, monkeypatch):
    cached(paths, View(9, 9), file)
    paths[2] = picture(paths[2].with_suffix(".jpg"), 2, size=(400, 300))
    content, limit = paths[2].read_bytes(), Image.MAX_IMAGE_PIXELS
    if kind in ("text", "truncated", "empty"):
        paths[2].write_bytes({"text": b"a picture", "truncated": content[:-5000], "empty": b""}[kind])
    else:  # Pillow refuses above twice its limit, and between the two only warns
        limit = 400 * 300 // 3 if kind == "bomb" else 400 * 300 - 1
    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=r"/0/2\.jpg is not a readable image \(.+\); replace or remove it"):
            cached(paths, VIEW, file, workers=1)
    assert not warned
    assert not file.exists()
    picture(paths[2], 2)
    del decoded[:]
    check(paths, file)
    assert decoded in (["2.jpg", "3.png", "4.png"], ["2.jpg", "3.png"])  # the last chunk may have been begun


def test_missing_images(paths, file, tmp_path):
    with pytest.raises(ValueError, match="no image files are given"):
        cached([], VIEW, file)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg"):
        cached([*paths, tmp_path / "nowhere.jpg"], VIEW, file)
    assert not file.parent.exists()


def test_a_change_builds_it_anew_and_leaves_maps_alone(paths, file, decoded, capsys):
    old, before = cached(paths, VIEW, file), one_by_one(paths)
    picture(paths[3], 30)
    changes = {"an image": (paths, VIEW), "a view": (paths, View(12, 10)), "the order": (paths[::-1], View(12, 10)),
               "fewer": (paths[:4], View(12, 10))}
    for what, (others, view) in changes.items():
        del decoded[:]
        check(others, file, view)
        assert len(decoded) == len(others), what
        assert capsys.readouterr().out == (
            f"{file} was made from other images or for another view; it is built anew\n"), what
    assert torch.equal(old, before)


def test_a_changed_file_is_a_change_and_a_move_is_none(tmp_path, file, decoded):
    paths = [picture(tmp_path / "here" / f"{i}.bmp", i) for i in range(2)]
    for path in paths:
        os.utime(path, ns=(0, 10 ** 18))  # as from an archive: all of one time, and these of one size
    cached(paths, VIEW, file)
    shutil.move(tmp_path / "here", tmp_path / "there")
    paths = [tmp_path / "there" / path.name for path in paths]
    del decoded[:]
    check(paths, file)
    assert not decoded
    check(paths[::-1], file)
    assert len(decoded) == 2
    os.utime(paths[0], ns=(0, 10 ** 18 + 1))
    check(paths[::-1], file)
    assert len(decoded) == 4
    picture(paths[0], 5, size=(30, 30))
    os.utime(paths[0], ns=(0, 10 ** 18 + 1))
    check(paths[::-1], file)
    assert len(decoded) == 6


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_share_the_work_and_leave_torch_as_it_was(paths, file, monkeypatch, restored_threads):
    both, seen = threading.Barrier(2), set()

    def together(path, view):
        if path in (paths[0], paths[2]):
            both.wait(10)  # breaks unless two chunks are decoded at once
        seen.add(torch.get_num_threads())
        return decode(path, view)

    monkeypatch.setattr(cache, "decode", together)
    torch.set_num_threads(3)
    cached(paths, VIEW, file, workers=2)
    assert seen == {1}  # or each would start as many again
    later = threading.Thread(target=lambda: seen.add(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == {1, 3}
    assert torch.get_num_threads() == 3
