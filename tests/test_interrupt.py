"""Interrupt anything, lose an epoch at most: whatever stops a run, running it again ends as if nothing had."""

import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests import harness


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The results of a run that nothing interrupts, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("straight")
    process, begun = harness.start(folder), time.monotonic()
    process.join()
    assert process.exitcode == 0, (folder / "errors").read_text()
    return harness.results(folder), time.monotonic() - begun


def finish(folder: Path, expected: dict[str, str], process: BaseProcess | None = None) -> str:
    """Let a process, or a new one, run to its end: its results are the expected ones. What all of them said."""
    process = process or harness.start(folder)
    process.join()
    assert process.exitcode == 0, (folder / "errors").read_text()
    assert harness.results(folder) == expected
    return (folder / "log").read_text()


@pytest.mark.parametrize("times", [12, pytest.param(200, marks=pytest.mark.long)])
def test_killed_at_random_moments(times, tmp_path, straight):
    """So many times, wherever that is; each run that comes to its end is compared, and another begun."""
    moments, killed, runs = random.Random(times), 0, 0
    while killed < times:
        folder = tmp_path / str(runs)
        folder.mkdir(exist_ok=True)
        process = harness.start(folder)
        process.join(moments.uniform(0, straight[1] / 2))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (folder / "errors").read_text()
        killed += process.exitcode != 0
        if process.exitcode == 0 or killed == times:
            finish(folder, straight[0])
            runs += 1
    print(f"killed {killed} times of {times}, {runs} runs compared bit for bit")


@pytest.mark.parametrize("fault", harness.FAULTS)
def test_killed_inside_a_write(fault, tmp_path, straight):
    """At the first write of all, and at a later one that replaces a file; no half file is ever met."""
    for write in (0, 1):
        process = harness.start(tmp_path, fault, write)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    finish(tmp_path, straight[0])
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_processes_at_one_stage_and_a_killed_one_frees_it(tmp_path, straight):
    """Nothing is trained twice; the third goes on where the first was killed."""
    first, second, third = (harness.start(tmp_path) for _ in range(3))
    time.sleep(0.2)
    first.kill()
    finish(tmp_path, straight[0], second)
    said = finish(tmp_path, straight[0], third)
    assert "another process is at work on it; waiting" in said
    assert said.count("masktune-seed0: starts") == 1
