"""The same pixels, whatever was killed or damaged before, where the disk is full, and with others at work on them."""

import itertools
import os
import re
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

from src.datasets import cache
from src.datasets.cache import cached
from src.datasets.view import View
from tests.cache.pictures import VIEW, check, flip, interrupt, journalled, one_by_one
from tests.harness import context

MOMENTS = (  # a process is killed before each of their calls
    (cache, "decode"), (cache, "write_whole"), (os, "truncate"), (os, "fsync"), (os, "replace"), (Path, "touch"),
    (Path, "unlink"))


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
