"""Interrupt anything, lose nothing: whatever stops a run, running it again ends bit for bit as if nothing had."""

import os
import random
import re
import signal
import time

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


@pytest.fixture
def killed_at_random(tmp_path, straight):
    """Kill runs at random moments, a number of times, each finished one being compared and begun anew; then finish."""

    expected, seconds = straight

    def kill(times: int) -> None:
        moments, killed, round_ = random.Random(times), 0, 0
        while True:
            folder = tmp_path / str(round_)
            folder.mkdir(exist_ok=True)
            process = harness.start(folder)
            if killed < times:
                process.join(moments.uniform(0, seconds / 2))
                process.kill()
            process.join()
            if process.exitcode == 0:
                assert harness.results(folder) == expected
                round_ += 1
                if killed == times:
                    break
            else:
                assert process.exitcode == -signal.SIGKILL, (folder / "errors").read_text()
                killed += 1
        said = "".join((tmp_path / str(k) / "log").read_text() for k in range(round_))
        assert re.search(r"continues after \d epochs and [1-9]\d* steps", said)  # some kills hit an epoch's middle
        print(f"{killed} kills survived of {times} tried, {round_} runs compared bit for bit")

    return kill


def test_killed_at_random_moments(killed_at_random):
    killed_at_random(20)


@pytest.mark.long
def test_killed_at_random_moments_200_times(killed_at_random):
    killed_at_random(200)


@pytest.mark.parametrize("fault", harness.FAULTS)
def test_killed_inside_a_write(fault, tmp_path, straight):
    """At the first write of all, and at a later one that replaces a file; no half file is ever met."""
    for write in (0, 5):
        process = harness.start(tmp_path, fault, write)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    process = harness.start(tmp_path)
    process.join()
    assert process.exitcode == 0, (tmp_path / "errors").read_text()
    assert harness.results(tmp_path) == straight[0]
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(("number", "exitcode"), [(signal.SIGINT, 1), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_ctrl_c_and_sigterm_lose_no_step(number, exitcode, tmp_path, straight):
    moments = random.Random(int(number))
    for _ in range(4):
        process = harness.start(tmp_path)
        process.join(moments.uniform(0.02, straight[1] / 3))
        if process.is_alive():
            os.kill(process.pid, number)
        process.join()
        assert process.exitcode in (exitcode, -number, 0)  # -number: it came between two stages
    process = harness.start(tmp_path)
    process.join()
    assert process.exitcode == 0
    assert harness.results(tmp_path) == straight[0]
    said = (tmp_path / "log").read_text()
    left = re.findall(r"(\S+): interrupted (after \d epochs and \d+ steps)", said)
    assert left
    for stage, place in left:
        after = said[said.index(f"{stage}: interrupted {place}"):]
        assert f"{stage}: continues {place}" in after or f"{stage}: finished" in after


def test_two_processes_at_one_stage(tmp_path, straight):
    first, second = harness.start(tmp_path), harness.start(tmp_path)
    first.join()
    second.join()
    assert first.exitcode == second.exitcode == 0, (tmp_path / "errors").read_text()
    assert harness.results(tmp_path) == straight[0]
    assert "another process is at work on it; waiting" in (tmp_path / "log").read_text()


def test_a_killed_process_frees_its_stage(tmp_path, straight):
    first = harness.start(tmp_path)
    time.sleep(0.2)
    second = harness.start(tmp_path)
    first.kill()
    second.join()
    assert second.exitcode == 0
    assert harness.results(tmp_path) == straight[0]
