"""The notebook as a reader meets it: honest outputs, numbers that agree, and a run from nothing on the digits."""

import base64
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from nbconvert import HTMLExporter

from src.experiments.rows import saved
from src.notebook import PICTURES, TABLE, landing_table, tagged
from tests.conftest import REPOSITORY

FENCE = re.compile(r"```.*?```", re.DOTALL)


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(REPOSITORY / "README.ipynb", as_version=4)


@pytest.fixture(scope="module")
def texts(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


@pytest.fixture(scope="module")
def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_published_outputs_are_those_of_one_run(notebook, code):
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 8
    assert "widgets" not in notebook.metadata
    said = "".join(str(output.get("text", "")) for output in outputs)
    assert not re.search(r"/home/|/root/|/work/|/tmp/|Warning|equal[^\n]*False", said)
    assert len(re.findall(r"equal[^\n]*: True", said)) == 3  # the method, written out, is the package's
    assert "malicious: (982 fours + 892 fives)" in said  # published on MNIST
    for name, tag in PICTURES.items():
        picture = tagged(notebook, tag, f"image/{name.split('.')[1]}")
        assert base64.b64decode(picture) == (REPOSITORY / "assets" / name).read_bytes()
    assert notebook.cells[0].attachments["epoch.gif"]["image/gif"] == tagged(notebook, "animation", "image/gif")
    assert (REPOSITORY / "assets" / "epoch.gif").stat().st_size < 1e6
    pictures = [output for output in outputs if {"image/png", "image/jpeg"} & output.get("data", {}).keys()]
    described = [output for output in pictures if any("alt" in one for one in output.metadata.values())]
    assert len(described) == len(pictures) - 1  # all but the moving one, which the first screen describes


def test_it_is_short(notebook, texts, code):
    """What a reader can hold in the head."""
    assert (REPOSITORY / "README.ipynb").stat().st_size < 4e6
    assert len(notebook.cells) <= 71
    assert sum(len(text.split()) for text in texts) <= 5800
    assert max(cell.source.count("\n") + 1 for cell in code) <= 16
    assert not re.search(r"^\s*class ", "\n".join(cell.source for cell in code), re.MULTILINE)


def test_links_resolve(notebook, texts):
    """Headings of the notebook, and files of the repository."""
    titles = re.findall(r"^#+ (.*)", "\n".join(FENCE.sub("", text) for text in texts), re.MULTILINE)
    assert all(re.fullmatch(r"[\w -]+", title) for title in titles)  # JupyterLab's anchors and nbconvert's are the same
    headings = {"#" + title.replace(" ", "-") for title in titles}
    html, _ = HTMLExporter().from_notebook_node(notebook)
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(re.findall(r'id="([^"]+)"', html))
    page = (REPOSITORY / "README.md").read_text()
    targets = [target for text in (*texts, page, (REPOSITORY / "benchmarks" / "README.md").read_text())
               for target in re.findall(r"\]\(([^)]*)\)", FENCE.sub("", text))]
    assert len(targets) > 40
    for target in targets:
        if target.startswith("#"):
            assert target in headings
        elif not target.startswith(("http", "attachment:")):
            assert (REPOSITORY / target).exists(), target


def test_landing_page_has_the_numbers_of_the_notebook(notebook, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    page = (REPOSITORY / "README.md").read_text()
    assert page.count("\n") <= 110
    assert TABLE.search(page)[0] == landing_table()
    shown = re.sub(r"<[^>]*>", "", tagged(notebook, "results-table", "text/html"))
    for cell in re.findall(r"[\d.]+\s±\s[\d.]+", landing_table()):
        assert cell in shown


def test_alone_it_says_what_to_do(code, tmp_path, monkeypatch):
    """Opened where no repository is around it; and from a folder inside one, to which it changes."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="clone it, run `make lab` there"):
        exec(code[0].source, {})
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.chdir(REPOSITORY / "src" / "report")
    exec(code[0].source, {})
    assert os.getcwd() == sys.path[0] == str(REPOSITORY)


def test_the_notebook_runs_from_nothing_on_the_digits_though_it_is_killed(tmp_path):
    """Shortened, in a copy without checkpoints, by the README's command; first killed in its first setting."""
    for name in ("src", "results", "assets"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    shutil.copy(REPOSITORY / "README.ipynb", tmp_path)
    recipes = tmp_path / "src" / "experiments" / "recipes.py"
    recipes.write_text(recipes.read_text().replace("seeds=(0, 1), orders=(0, 1)", "seeds=(0,), orders=(0,)").replace(
        "epochs=10,", "epochs=3,"))
    command = dict(args=[sys.executable, "-m", "src.notebook", "executed/README.ipynb"], cwd=tmp_path, text=True,
                   env={**os.environ, "MASKTUNE_DATASET": "digits", "OMP_NUM_THREADS": "1"},  # beside other tests
                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(**command) as first:
        while not (tmp_path / "checkpoints" / "digits-random" / "erm-seed0.pt").exists():
            time.sleep(0.1)
            assert first.poll() is None
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
    assert "digits-none/masktune-seed0: starts" in done.stdout
