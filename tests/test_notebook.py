"""The notebook as a reader meets it: honest outputs, numbers that agree, and a run from nothing on the digits."""

import base64
import os
import re
import shutil
import signal
import subprocess
import sys
from urllib.parse import unquote

import nbformat
import pytest

from src.experiments.rows import saved
from src.notebook import TABLE, landing_table, tagged
from src.report import figures
from tests.conftest import REPOSITORY

FENCE = re.compile(r"```.*?```", re.DOTALL)


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(REPOSITORY / "README.ipynb", as_version=4)


@pytest.fixture(scope="module")
def texts(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def test_published_outputs_are_those_of_one_run(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 8
    assert "widgets" not in notebook.metadata
    said = "".join(str(output.get("text", "")) for output in outputs)
    assert not re.search(r"/home/|/root/|/work/|/tmp/|Warning|equal[^\n]*False", said)
    assert len(re.findall(r"equal[^\n]*: True", said)) == 3  # the method, written out, is the package's
    assert "digits instead" not in said  # published on MNIST


def test_it_is_short(notebook, texts):
    """What a reader can hold in the head; tables with more columns than a page has are unreadable."""
    assert (REPOSITORY / "README.ipynb").stat().st_size < 4e6
    assert len(notebook.cells) <= 60
    assert sum(len(text.split()) for text in texts) <= 4000
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert max(source.count("\n") + 1 for source in code) <= 14
    assert not any(re.match(r"\s*class ", line) for source in code for line in source.split("\n"))
    for text in texts:
        for line in re.findall(r"^\|.*\|$", text, re.MULTILINE):
            assert line.count("|") - 1 <= 7, line
    shown = "".join(output.data.get("text/html", "") for cell in notebook.cells
                    for output in cell.get("outputs", ()) if "data" in output)
    for head in re.findall(r"<thead>.*?</thead>", shown, re.DOTALL):
        assert len(re.findall(r"<th>.+?</th>", head)) <= 7, head


def test_the_first_screen_is_text_and_one_picture(notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    picture = first.attachments["results.png"]["image/png"]
    assert picture == tagged(notebook, "results-figure", "image/png")
    assert base64.b64decode(picture) == (REPOSITORY / "assets" / "results.png").read_bytes()


def test_links_resolve(texts):
    """Headings of the notebook, and files of the repository."""
    titles = re.findall(r"^#+ (.*)", "\n".join(FENCE.sub("", text) for text in texts), re.MULTILINE)
    headings = {"#" + title.replace(" ", "-") for title in titles}
    page = (REPOSITORY / "README.md").read_text()
    targets = [target for text in (*texts, page, (REPOSITORY / "benchmarks" / "README.md").read_text())
               for target in re.findall(r"\]\(([^)]*)\)", FENCE.sub("", text))]
    assert len(targets) > 40
    for target in targets:
        if target.startswith("#"):
            assert unquote(target) in headings
        elif not target.startswith(("http", "attachment:")):
            assert (REPOSITORY / target).exists(), target


def test_a_colour_means_one_thing():
    assert figures.COLOURS == {
        "ERM": "#7f7f7f", "RandMask": "#e69f00", "MaskTune": "#0072b2", "plain epoch": "#56b4e9", "DFR": "#000000",
        "oracle: background hidden": "#882255", "oracle: bird hidden": "#999933",
        "1 % conflicting, random": "#009e73", "1 % conflicting, by digit": "#d55e00", "none conflicting": "#cc79a7"}
    assert figures.HATCHES == {"raw": "", "malicious": "///"}


def test_landing_page_has_the_numbers_of_the_notebook(notebook, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    page = (REPOSITORY / "README.md").read_text()
    assert page.count("\n") <= 80
    assert TABLE.search(page)[0] == landing_table()
    shown = re.sub(r"<[^>]*>", "", tagged(notebook, "results-table", "text/html"))
    for cell in re.findall(r"[\d.]+ ± [\d.]+", landing_table()):
        assert cell in shown


def test_alone_it_says_what_to_do(notebook, tmp_path, monkeypatch):
    """Opened where no repository is around it; and from a folder inside one, to which it changes."""
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="clone it, run `make lab` there"):
        exec(first, {})
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.chdir(REPOSITORY / "src" / "report")
    exec(first, {})
    assert os.getcwd() == str(REPOSITORY)
    assert sys.path[0] == str(REPOSITORY)


def test_the_notebook_runs_from_nothing_on_the_digits_though_it_is_killed(tmp_path):
    """In a copy without data and checkpoints, as the README's command does it; first killed in its first setting."""
    for name in ("src", "results", "README.ipynb"):
        source = REPOSITORY / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    command = dict(args=[sys.executable, "-m", "src.notebook", "executed/README.ipynb"], cwd=tmp_path, text=True,
                   env={**os.environ, "MASKTUNE_DATASET": "digits", "OMP_NUM_THREADS": "1"},  # beside other tests
                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(**command) as first:
        begun = ""
        for line in first.stdout:
            begun += line
            if "erm-seed1: 5 of 10 epochs" in line:
                break
        first.send_signal(signal.SIGTERM)
        first.communicate()
    assert first.returncode != 0
    done = subprocess.run(**command, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for setting in ("random", "digit", "none"):
        rows = saved(tmp_path / "results" / f"digits-{setting}.csv").groupby("method")[["raw", "malicious"]].mean()
        assert (rows.loc["masktune"] > rows.loc["erm"] + 0.1).all()
    executed = nbformat.read(tmp_path / "executed" / "README.ipynb", as_version=4)
    assert "MaskTune" in tagged(executed, "results-table", "text/html")
    assert re.search(r"digits-random/erm-seed\d: continues after \d+ epochs", done.stdout)  # progress on the terminal
    assert "digits-digit/masktune-seed1: starts" in done.stdout
    assert "1 of 1 runs are to be trained" in begun  # one setting first, not all
    assert "All training sets" in done.stdout
