"""Image files in a memory map: the pixels are those of `decode`, whatever was killed, damaged or changed before."""

import itertools
import json
import os
import re
import shutil
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tqdm import tqdm

from src.datasets import cache
from src.datasets.cache import cached
from src.datasets.view import View, decode
from tests.harness import context

OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
VIEW = View(12, 10, resize=14)
MOMENTS = (  # a process is killed before each of their calls
    (cache, "decode"), (cache, "write_whole"), (os, "truncate"), (os, "fsync"), (os, "replace"), (Path, "touch"),
    (Path, "unlink"))


def picture(path: Path, seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (23, 17)) -> Path:
    path.parent.mkdir(exist_ok=True)
    noise = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).convert(mode).save(path)
    return path


@pytest.fixture
def paths(tmp_path):
    """Five pictures, which are three chunks."""
    return [picture(tmp_path / f"{i % 2}" / f"{i}.png", i) for i in range(5)]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "cache" / "train.bin"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(cache, "CHUNK", 2)


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that were decoded, in order."""
    names = []

    def noted(path, view):
        names.append(path.name)
        return decode(path, view)

    monkeypatch.setattr(cache, "decode", noted)
    return names


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def one_by_one(paths: list[Path], view: View = VIEW) -> torch.Tensor:
    return torch.stack([decode(path, view) for path in paths])


def check(paths: list[Path], file: Path, view: View = VIEW) -> None:
    """The pixels are right, and nothing is left that does not belong there."""
    assert torch.equal(cached(paths, view, file, workers=1), one_by_one(paths, view))
    assert sorted(path.name for path in file.parent.iterdir()) == [
        f".{file.name}.lock", file.name, f"{file.name}.json"]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def journalled(file: Path) -> list[str]:
    journal = file.with_name(f".{file.name}.journal")
    return journal.read_text().splitlines() if journal.exists() else []


def interrupt(*_arguments: object) -> None:
    raise KeyboardInterrupt


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


def build_and_die(paths: list[Path], file: Path, moment: int) -> None:
    """Kill this process before call number `moment` of those in MOMENTS, counted from 0."""
    calls = iter(range(10 ** 6))

    def mortal(call):
        def counted(*arguments, **options):
            if next(calls) == moment:
                os._exit(9)
            return call(*arguments, **options)

        return counted

    for owner, name in MOMENTS:
        setattr(owner, name, mortal(getattr(owner, name)))
    cached(paths, VIEW, file, workers=1)
    os._exit(0)


def die_at_every_moment(paths: list[Path], file: Path) -> None:
    """Each time in a copy of the file's folder, named after the moment, until one survives."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    tqdm.set_lock(threading.RLock())  # its own would be a semaphore that a killed process leaves behind
    cache.CHUNK = 2
    for moment in itertools.count():
        copy = shutil.copytree(file.parent, file.parents[1] / f"killed {moment}") / file.name
        if not (child := os.fork()):
            build_and_die(paths, copy, moment)
        if os.waitpid(child, 0)[1] == 0:
            return


@pytest.mark.parametrize("before", ["nothing", "another view"])
def test_killed_at_every_moment(before, paths, file, tmp_path, decoded):
    file.parent.mkdir()
    if before == "another view":
        cached(paths, View(9, 9), file)
    process = context.Process(target=die_at_every_moment, args=(paths, file))
    process.start()
    process.join()
    assert process.exitcode == 0
    *killed, alive = (tmp_path / f"killed {i}" / file.name for i in range(len(list(tmp_path.glob("killed *")))))
    assert len(killed) > 14  # 5 images, 3 chunks, and what comes before and after
    met = set()
    for copy in killed:
        whole = len(journalled(copy))
        met.add((copy.exists(), whole))
        del decoded[:]
        check(paths, copy)
        assert decoded == [path.name for path in paths[2 * whole:]]
    assert met - {(True, 0)} == {*((False, whole) for whole in range(4)), (True, 3)}
    del decoded[:]
    check(paths, alive)
    assert not decoded


def test_torn_lines_and_chunks_that_did_not_reach_the_disk(paths, file, decoded, monkeypatch):
    def resumed() -> list[str]:
        del decoded[:]
        with monkeypatch.context() as patch:
            patch.setattr(cache, "write_whole", interrupt)
            with pytest.raises(KeyboardInterrupt):
                cached(paths, VIEW, file, workers=1)
        return [name[0] for name in decoded]

    assert resumed() == ["0", "1", "2", "3", "4"]
    assert resumed() == []
    flip(file.with_name(".train.bin.partial"), 2 * 360 + 5)  # in the second chunk
    assert resumed() == ["2", "3"]
    first, second, *_ = journalled(file)
    file.with_name(".train.bin.journal").write_text(f"{first}\n{second[:-10]}")
    assert resumed() == ["2", "3", "4"]
    assert resumed() == []  # though the second chunk's line follows the torn one
    check(paths, file)


@pytest.mark.parametrize(("damage", "said"), [
    (lambda file: flip(file, 1000), "damaged: its content does not match its sha256"),
    (lambda file: os.truncate(file, 1700), "damaged: 1,700 bytes, where 1,800 belong"),
    (lambda file: os.truncate(file, 3000), "damaged: 3,000 bytes, where 1,800 belong"),
    (lambda file: file.with_name("train.bin.json").unlink(), r"has no readable train\.bin\.json"),
    (lambda file: file.with_name("train.bin.json").write_text('{"chunks": 3}'), r"has no readable train\.bin\.json"),
    (lambda file: flip(file.with_name("train.bin.json"), -10), "damaged: its content|no readable|made from other"),
    (lambda file: file.unlink(), None)])
def test_a_damaged_file_is_built_anew(damage, said, paths, file, decoded, capsys):
    cached(paths, VIEW, file)
    damage(file)
    del decoded[:]
    check(paths, file)
    assert len(decoded) == 5
    printed = capsys.readouterr().out
    assert re.fullmatch(rf"{re.escape(str(file))} .*({said}).*; it is built anew\n", printed) if said else not printed


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


def test_a_full_disk(paths, file, decoded, monkeypatch):
    def free(bytes_: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=bytes_))

    free(1_000_000)
    with pytest.raises(OSError, match=r"train\.bin needs 1\.5 MB more on its disk, where 1\.0 MB are free; free some"):
        cached(paths, View(1000, 100), file)
    assert not decoded
    free(2_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_whole", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cached(paths, View(1000, 100), file)
    free(100_000)  # what is decoded already needs no more room
    check(paths, file, View(1000, 100))


def load_only(paths: list[Path], file: Path) -> None:
    cache.CHUNK, cache.decode = 2, interrupt
    cached(paths, VIEW, file)


def test_the_second_of_two_waits_and_decodes_nothing(paths, file, decoded, monkeypatch, capsys):
    building, go_on, decode_noted = threading.Event(), threading.Event(), cache.decode

    def slowly(path, view):
        building.set()
        assert go_on.wait(10)
        return decode_noted(path, view)

    monkeypatch.setattr(cache, "decode", slowly)
    images: list[torch.Tensor] = []
    first, second = (threading.Thread(target=lambda: images.append(cached(paths, VIEW, file))) for _ in range(2))
    other = context.Process(target=load_only, args=(paths, file))
    first.start()
    assert building.wait(10)
    second.start()
    other.start()
    other.join(0.5)
    assert second.is_alive()
    assert other.is_alive()
    go_on.set()
    for waiting in (first, second, other):
        waiting.join()
    assert other.exitcode == 0
    assert len(decoded) == 5
    assert len(images) == 2
    assert all(torch.equal(theirs, one_by_one(paths)) for theirs in images)
    assert f"{file}: another process is at work on it; waiting" in capsys.readouterr().out


def test_ctrl_c_stops_at_once(paths, file, decoded, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tqdm, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cached(paths * 40, VIEW, file, workers=1)
    assert len(decoded) < 100
    kept = len(journalled(file))
    del decoded[:]
    check(paths * 40, file)
    assert len(decoded) == 200 - 2 * kept


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
