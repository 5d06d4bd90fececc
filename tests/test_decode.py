"""Pictures are decoded once into a file: what it holds, when it is made anew, and what it survives."""

import errno
import itertools
import mmap
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from src.datasets import decode as module
from src.datasets.decode import View, cached, decode
from tests.harness import context

VIEW = View(12, 10, resize=14)
OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (23, 17)) -> Path:
    path.parent.mkdir(exist_ok=True)
    noise = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(path)
    return path


@pytest.fixture
def paths(tmp_path):
    """Five pictures, which are three chunks."""
    return [picture(tmp_path / f"{i % 2}" / f"{i}.png", i) for i in range(5)]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "cache" / "train.bin"


@pytest.fixture(autouse=True)
def decoded(monkeypatch):
    """What was decoded; chunks are small."""
    calls = []
    monkeypatch.setattr(module, "CHUNK", 2)
    monkeypatch.setattr(module, "decode", lambda *call: calls.append(call) or decode(*call))
    return calls


def check(paths: list[Path], file: Path, view: View = VIEW) -> torch.Tensor:
    """The pixels are right, and nothing is left that does not belong there."""
    images = cached(paths, view, file)
    assert torch.equal(images, torch.stack([decode(path, view) for path in paths]))
    assert {path.name for path in file.parent.iterdir() if path.suffix != ".lock"} == {file.name, f"{file.name}.json"}
    return images


def read_only(*_arguments: object) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize("system", ["this", "Windows"])
def test_decoded_once_in_order(system, paths, file, decoded, monkeypatch):
    for name in ("MAP_PRIVATE", "MAP_SHARED", "PROT_READ", "PROT_WRITE") if system == "Windows" else ():
        monkeypatch.delattr(mmap, name)
    images = check(paths, file)
    images[0] = 0  # stays in memory
    check(paths, file)
    monkeypatch.setattr(module, "locked", read_only)  # where a finished file can still be read
    check(paths, file)
    assert len(decoded) == 5
    with pytest.raises(OSError, match=r"Read-only .* cache=, or as root, with links to the data"):
        cached(paths, View(9, 9), file)


def test_threads_share_the_work_and_leave_torch_as_it_was(paths, file, monkeypatch):
    both, seen, before = threading.Barrier(2), set(), torch.get_num_threads()

    def together(path, view):
        if path in paths[:2]:
            both.wait(10)  # breaks unless they are decoded at once
        seen.add(torch.get_num_threads())
        return decode(path, view)

    monkeypatch.setattr(module, "decode", together)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    torch.set_num_threads(3)
    cached(paths, VIEW, file)
    assert (seen, torch.get_num_threads()) == ({1}, 3)  # one each, or each would start as many again
    torch.set_num_threads(before)


@pytest.mark.skipif(not OVERCOMMIT.exists() or OVERCOMMIT.read_text() == "2\n", reason="the system promises no more")
def test_a_file_larger_than_memory_can_be_mapped(paths, file, monkeypatch):
    width = 4 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 3
    file.parent.mkdir()
    file.touch()
    os.truncate(file, 3 * width)  # a hole
    monkeypatch.setattr(module, "_is_whole", lambda *_: True)
    assert cached(paths[:1], View(1, width), file)[0, 2, 0, -1] == 0


@pytest.mark.parametrize("kind", ["text", "truncated", "bomb", "missing"])
def test_an_unreadable_image_is_named(kind, paths, file, monkeypatch):
    paths[2] = picture(paths[2].with_suffix(".jpg"), 2, size=(400, 300))
    content = paths[2].read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 400 * 300 // 3 if kind == "bomb" else None)
        paths[2].write_bytes({"text": b"a picture", "truncated": content[:-5000]}.get(kind, content))
        if kind == "missing":
            paths[2].unlink()
        with pytest.raises((ValueError, FileNotFoundError), match=r"/0/2\.jpg"):
            cached(paths, VIEW, file)
    assert not file.exists()
    picture(paths[2], 2)
    check(paths, file)


def test_a_change_builds_it_anew_and_leaves_maps_alone(paths, file, decoded, tmp_path):
    old = check(paths, file)
    before = old.clone()
    paths = [shutil.copytree(path.parent, tmp_path / "moved" / path.parent.name, dirs_exist_ok=True) / path.name
             for path in paths]  # with the times that the files have
    check(paths, file)
    assert len(decoded) == 5
    time = paths[3].stat().st_mtime_ns
    picture(paths[3], 30)
    os.utime(paths[3], ns=(time, time + 1))
    for others, view in ((paths, VIEW), (paths, View(12, 10)), (paths[::-1], View(12, 10)), (paths[:4], View(12, 10))):
        del decoded[:]
        check(others, file, view)
        assert len(decoded) == len(others)
    assert torch.equal(old, before)
    os.truncate(file, 100)
    check(paths[:4], file, View(12, 10))


@pytest.mark.parametrize("index", [None, '{"mine": 1}', "", "null", '["masktune pixels, 2"]', '{"format": 3}'])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_file_of_another_kind_is_refused_and_left_alone(kind, index, paths, file, decoded):
    mine = file / "inside" if kind == "folder" else file
    for path, text in ((mine, "mine"), (file.with_name("train.bin.json"), index)):
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            path.write_text(text)
    before = {path: path.is_file() and path.read_bytes() for path in file.parent.rglob("*")}
    with pytest.raises(FileExistsError, match=r"expected .*train\.bin to be free or a file of decoded pixels"):
        cached(paths, VIEW, file)
    assert {path: path.is_file() and path.read_bytes() for path in file.parent.rglob("*")} == before
    assert not decoded


def test_killed_at_every_moment(paths, file, tmp_path, monkeypatch):
    """Whatever call was the last, the next run gives the right pixels."""
    cached(paths, View(9, 9), file)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # so that moments are the same each time
    calls = ((module, "decode"), (module, "write_whole"), (module, "put_in_place"), (os, "fsync"), (os, "replace"),
             (Path, "unlink"))

    def build_and_die(copy: Path, moment: int) -> None:
        count = itertools.count()

        def mortal(call):
            return lambda *arguments, **options: os._exit(9) if next(count) == moment else call(*arguments, **options)

        for owner, name in calls:
            setattr(owner, name, mortal(getattr(owner, name)))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        cached(paths, VIEW, copy)
        os._exit(0)

    for moment in itertools.count():
        copy = shutil.copytree(file.parent, tmp_path / f"killed {moment}") / file.name
        if not (child := os.fork()):
            build_and_die(copy, moment)
        died = os.waitpid(child, 0)[1]
        check(paths, copy)
        if not died:
            break
    assert moment >= 9


def load_only(paths: list[Path], file: Path) -> None:
    module.decode = read_only
    cached(paths, VIEW, file)


def test_the_second_of_two_waits_and_decodes_nothing(paths, file, decoded, monkeypatch):
    building, go_on, decode_noted = threading.Event(), threading.Event(), module.decode
    monkeypatch.setattr(module, "decode", lambda *call: building.set() or (go_on.wait(200) and decode_noted(*call)))
    first = threading.Thread(target=cached, args=(paths, VIEW, file))
    second = context.Process(target=load_only, args=(paths, file))
    first.start()
    assert building.wait(10)
    second.start()
    second.join(0.5)
    assert second.is_alive()
    go_on.set()
    for waiting in (first, second):
        waiting.join()
    assert (second.exitcode, len(decoded)) == (0, 5)
    check(paths, file)


@pytest.mark.parametrize("side", [0, 7.5, (8, 0), "8"])
def test_a_side_that_is_none_is_named(side):
    with pytest.raises((TypeError, ValueError), match=r"expected a side in whole pixels|'str'"):
        View.of(side)
