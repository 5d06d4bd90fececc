"""The notebook as a reader meets it: honest outputs, numbers that agree, and a run from nothing on the digits."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import nbformat
import pytest

from src.notebook import TABLE, tagged
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(REPOSITORY / "README.ipynb", as_version=4)


def test_published_outputs_are_those_of_one_run(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 8
    assert "widgets" not in notebook.metadata
    said = json.dumps([output.get("text", "") for output in outputs])
    assert not re.search(r"/home/|/root/|/work/|/tmp/|Warning", said)
    assert "digits instead" not in said  # published on MNIST


def test_half_of_the_cells_are_text_and_code_is_short(notebook):
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert 2 * len(code) <= len(notebook.cells)
    assert max(source.count("\n") + 1 for source in code) <= 14
    assert not any(re.match(r"\s*class ", line) for source in code for line in source.split("\n"))


def test_landing_page_has_the_numbers_of_the_notebook(notebook):
    page = (REPOSITORY / "README.md").read_text()
    assert page.count("\n") <= 60
    assert TABLE.search(page)[0] == tagged(notebook, "results-table", "text/markdown")
    assert (REPOSITORY / "assets" / "results.png").exists()


def test_numbers_of_the_text_are_those_that_the_run_wrote(notebook):
    """The few numbers that the text states as ours must stand in an output, too."""
    outputs = " ".join(str(output.get("text", "")) + output.get("data", {}).get("text/markdown", "")
                       for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)
    for number in ("18.74%", "58.43%", "600 of 60,000, 1.00%", "46,900", "47,369"):
        assert number in outputs


def test_the_notebook_runs_from_nothing_on_the_digits_though_it_is_killed(tmp_path):
    """In a copy without data and checkpoints, as the README's command does it; first killed in its first setting."""
    for name in ("src", "results", "README.ipynb"):
        source = REPOSITORY / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    command = dict(args=[sys.executable, "-m", "src.notebook", "executed/README.ipynb"], cwd=tmp_path, text=True,
                   env={**os.environ, "MASKTUNE_DATASET": "digits", "OMP_NUM_THREADS": "1"},  # beside other tests
                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(**command) as first:
        for line in first.stdout:
            if "erm-seed1: 5 of 10 epochs" in line:
                break
        first.send_signal(signal.SIGTERM)
        first.communicate()
    assert first.returncode != 0
    assert not (tmp_path / "executed").exists()
    done = subprocess.run(**command, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    executed = nbformat.read(tmp_path / "executed" / "README.ipynb", as_version=4)
    table = tagged(executed, "results-table", "text/markdown").split("\n")
    accuracies = {method: [list(map(float, re.findall(r"\| ([\d.]+) ±", line)[:2])) for line in table if method in line]
                  for method in ("ERM", "MaskTune")}
    assert len(accuracies["ERM"]) == len(accuracies["MaskTune"]) == 3
    for erm, tuned in zip(accuracies["ERM"], accuracies["MaskTune"], strict=True):
        assert tuned[0] > erm[0] + 10  # raw
        assert tuned[1] > erm[1] + 10  # malicious
    assert re.search(r"digits-random/erm-seed\d: continues after \d+ epochs", done.stdout)  # progress on the terminal
    assert "digits-digit/masktune-seed1: starts" in done.stdout
    assert "Results" in done.stdout
