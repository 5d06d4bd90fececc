"""The package: what `pip install .` installs, and which of its files may import which."""

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

from tests.conftest import REPOSITORY

SRC = REPOSITORY / "src"
FILES = sorted(SRC.rglob("*.py"))
REPAIR = """
import sys
import torch
from torch import nn
from masktune import masktune
from masktune.datasets import Images

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
data = Images(torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8), torch.arange(8) % 2, ("even", "odd"))
repaired, report = masktune(model, data, layer="0", lr=0.1, batch_size=4)
assert 0 < report.hidden < 1 and "average" in str(report)
assert not torch.equal(repaired[0].weight, model[0].weight)
assert not {"matplotlib", "sklearn", "pytorch_grad_cam"} & sys.modules.keys()  # those are extras
import masktune.experiments.study, masktune.report.figures  # which reads its style file
assert "src" not in sys.modules and not [name for name in sys.modules if name.startswith("src.")]
print(sys.modules["masktune"].__file__)
"""


def python(folder: Path, *arguments: str, **variables: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env={**os.environ, **variables}, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with nothing but the package, built without a network from a copy: a build leaves files behind."""
    root = tmp_path_factory.mktemp("package")
    shutil.copytree(SRC, root / "copy" / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, root / "copy")
    python(root / "copy", "-m", "pip", "wheel", ".", "--no-index", "--no-deps", "--no-build-isolation", "-w", "..")
    wheel, = root.glob("masktune-1.0.0-*.whl")
    python(root, "-m", "pip", "install", str(wheel), "--no-index", "--no-deps", "--target", "installed")
    return root / "installed"


def test_the_package_is_installed_whole_and_works_from_any_folder(installed, tmp_path):
    assert {path.name for path in installed.iterdir()} == {"masktune", "masktune-1.0.0.dist-info"}
    ours, theirs = ({path.relative_to(root) for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc"}
                    for root in (SRC, installed / "masktune"))
    assert ours == theirs
    where = python(tmp_path, "-c", REPAIR, PYTHONPATH=str(installed))
    assert where.strip() == str(installed / "masktune" / "__init__.py")
    assert not list(tmp_path.iterdir())


def test_the_example_of_the_landing_page_runs_as_it_stands(installed, tmp_path):
    """On generated images, one class with a mark; the model has learned nothing, of which a warning tells."""
    example = re.search(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)[1]
    draw = torch.Generator().manual_seed(0)
    for part, name, i in itertools.product(("train", "test"), ("cat", "dog"), range(4)):
        image = torch.randint(0, 255, (64, 64, 3), dtype=torch.uint8, generator=draw)
        image[48:, 48:] = 255 * (name == "cat")
        (tmp_path / "photos" / part / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(tmp_path / "photos" / part / name / f"{i}.jpg")
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=2).state_dict(), tmp_path / "model.pt")
    said = python(tmp_path, "-W", "ignore", "-c", example, PYTHONPATH=str(installed), OMP_NUM_THREADS="1")
    before, after = said.split("computed by")[:2]
    assert re.search(r"train +average +\d+\.\d%\n", before)  # the preview has nothing to compare with
    assert re.search(r"test +average +\d+\.\d% +\d+\.\d%\n +test +cat ", after)


def imported(path: Path) -> set[Path]:
    """The files of the package that one imports; `src/__init__.py` does not count, which each import runs."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for below in (base, *(base / alias.name for alias in node.names)):
                found |= {below.with_suffix(".py"), below / "__init__.py"}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):  # by a name that differs once the package is installed?
            names = (getattr(node, "module", None) or alias.name for alias in node.names)
            assert not {name.split(".")[0] for name in names} & {"src", "masktune", "tests", "benchmarks"}
    return {one for one in found if one.is_file()} - {SRC / "__init__.py"}


ALLOWED = {"datasets": {"datasets", "checks", "files", "masks", "seeding"}, "report": {
    "report", "datasets", "evidence", "files", "inference", "masking", "masks"}}
FORBIDDEN = {"experiments": {"report"}, "repair": {"experiments"}, "notebook": set()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_dependencies_point_one_way(path):
    """data <- method <- experiments <- notebook; reports read rows and import no experiment."""
    reaches = {one.relative_to(SRC).with_suffix("").parts[0] for one in imported(path)}
    part = path.relative_to(SRC).with_suffix("").parts[0]
    assert reaches <= ALLOWED.get(part, reaches)
    assert part in ALLOWED or not reaches & FORBIDDEN.get(part, {"experiments", "report"})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_what_is_drawn_from_a_generator_names_its_device(path):
    """Else torch.set_default_device("cuda") breaks it: the generators are the CPU's."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and "generator" in (named := {one.arg for one in node.keywords}):
            assert "device" in named, node.lineno
