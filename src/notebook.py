"""Execute README.ipynb: `python -m src.notebook TARGET`, or `--publish` for in place."""

import argparse
import base64
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm import tqdm

from .experiments.recipes import MNIST
from .experiments.stages import choose_settings
from .experiments.study import shipped
from .files import write_whole
from .report import tables

NOTEBOOK = Path("README.ipynb")
LANDING_PAGE = Path("README.md")
PICTURES = {  # by the tag of the cell that draws them
    "epoch.gif": "animation", "epoch.png": "animation", "marks.jpeg": "marks", "birds.jpeg": "birds"}
TABLE = re.compile(r"(?<=<!-- results -->\n).*?(?=\n<!-- /results -->)", re.DOTALL)


def execute(notebook: nbformat.NotebookNode) -> None:
    """Execute a notebook in place, top to bottom, in the current folder; an error in a cell is raised.

    The user's own settings of IPython and matplotlib stay out of it: they may draw SVG, or no figure at all.
    """
    client = NotebookClient(notebook, timeout=None, kernel_name="python3", coalesce_streams=True, record_timing=False)
    cells = tqdm(total=len(notebook.cells), desc="cells", disable=not sys.stderr.isatty())
    client.on_cell_executed = lambda **_: cells.update()
    with tempfile.TemporaryDirectory() as profile:
        client.execute(env={**os.environ, "IPYTHONDIR": profile, "MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    for cell in notebook.cells:  # a bar that was cleared leaves blanks behind
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("text", "-").strip()]


def tagged(notebook: nbformat.NotebookNode, tag: str, mimetype: str) -> str:
    """Return the output of the cell with a tag, in one of its forms."""
    cell, = (cell for cell in notebook.cells if tag in cell.metadata.get("tags", []))
    return next(output.data[mimetype] for output in cell.outputs if mimetype in output.get("data", {}))


def landing_table() -> str:
    """The main table, as README.md has it."""
    return tables.results(shipped("results")).to_markdown(index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="?", type=Path, help="where the executed notebook goes")
    parser.add_argument("--publish", action="store_true", help="in place, with the table and figure of README.md")
    arguments = parser.parse_args()
    if (arguments.target is None) != arguments.publish:
        parser.error("give either a target or --publish")
    if arguments.publish and choose_settings() is not MNIST:
        parser.error("the published notebook shows MNIST")
    sys.stdout.reconfigure(errors="replace")  # of a terminal that is not UTF-8
    target = NOTEBOOK if arguments.publish else arguments.target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=target.parent):  # a folder that cannot be written to is found now
        notebook = nbformat.read(NOTEBOOK, as_version=4)
    try:
        execute(notebook)
    except CellExecutionError as error:
        if not arguments.publish:
            write_whole(target, nbformat.writes(notebook).encode())  # with the error in its place
        sys.exit(f"{error}\nnot executed to its end" + ("" if arguments.publish else f": {target}"))
    pictures = {name: tagged(notebook, tag, f"image/{name.split('.')[1]}") for name, tag in PICTURES.items()}
    notebook.cells[0]["attachments"] = {"epoch.gif": {"image/gif": pictures["epoch.gif"]}}  # the first screen shows it
    write_whole(target, nbformat.writes(notebook).encode())
    if arguments.publish:
        for name, picture in pictures.items():
            write_whole(Path("assets", name), base64.b64decode(picture))
        page = LANDING_PAGE.read_text()
        write_whole(LANDING_PAGE, TABLE.sub(lambda _: landing_table(), page).encode())
    print(f"executed: {target}")


if __name__ == "__main__":
    main()
