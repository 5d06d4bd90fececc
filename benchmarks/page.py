"""Bring benchmarks/README.md in line with results/: `python -m benchmarks.page`, and at the end of every benchmark."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas

from benchmarks.memory import in_own_process
from src.device import made_with
from src.files import write_whole

PAGE, RESULTS = Path(__file__).with_name("README.md"), Path(__file__).parents[1] / "results"


def speed(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Medians in seconds, images per second, and what shows that the results agree."""
    rows = rows.assign(faster=rows["usual_s"] / rows["ours_s"])
    table = rows.groupby(["task", "images", "check"], sort=False)[
        ["usual_s", "ours_s", "faster", "usual_value", "ours_value"]].median().reset_index()
    return pandas.DataFrame({
        "task": table["task"], "images": table["images"].map("{:,}".format), "usual, s": table["usual_s"].round(2),
        "ours, s": table["ours_s"].round(2), "times faster": table["faster"].round(1),
        "ours, images/s": (table["images"] / table["ours_s"]).map("{:,.0f}".format),
        "usual, ours": [f"{one.check}: {one.usual_value:.4f}, {one.ours_value:.4f}" for one in table.itertuples()]})


def memory(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Peak memory over the data set."""
    return pandas.DataFrame({"pipeline": rows["side"], "host, MB": rows["host_mb"].round(),
                             "device, MB": rows["device_mb"].round()}).dropna(axis=1)


def scale(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Time and memory against the number and the size of images: the constants should stay the same down the rows."""
    table = rows[["model", "images", "side"]].assign(images=rows["images"].map("{:,}".format))
    for task in ("masks", "epoch"):
        table[f"{task}, ms/image"] = (1e3 * rows[f"{task}_s"] / rows["images"]).round(2)
        table[f"{task}, ns/pixel"] = (1e9 * rows[f"{task}_s"] / rows["images"] / rows["side"] ** 2).round()
    table["images, MB"], table["more than the warm-up, MB"] = rows["images_mb"].round(), rows["peak_mb"].round()
    return table


def photographs(rows: pandas.DataFrame) -> pandas.DataFrame:
    """What photographs cost: ms an image (images per second) of training and masks; peak memory beyond the program."""
    cost = {task: [f"{ms:.1f} ({1000 / ms:.0f})" for ms in rows[f"{task}_ms"]] for task in ("train", "masks")}
    return rows[["model", "side", "precision", "layout"]].assign(**{
        "training, ms (images/s)": cost["train"], "masks, ms (images/s)": cost["masks"],
        "peak, MB": rows["device_mb"].fillna(rows["peak_mb"]).round()})


def door(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Seconds of `masktune()` and of its parts."""
    return rows.drop(columns="made_with").round(1).assign(images=rows["images"].map("{:,}".format))


def layouts(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Of how many outputs it was told right whether and how they are maps of the image."""
    rows = rows.sort_values(["library", "model"])
    return rows[["library", "model", "side"]].assign(**{
        "maps": rows["maps"], "read rightly": rows["read"], "refused": rows["refused"], "misread": rows["misread"],
        "decoys": rows["decoys"], "taken for maps": rows["decoys_misread"]})


TABLES = {one.__name__: one for one in (speed, memory, scale, photographs, door, layouts)}


def section(name: str) -> str:
    """The table of one benchmark, and what produced it."""
    rows = pandas.read_csv(RESULTS / f"{name}.csv")
    facts = [rows["made_with"].iloc[0]]
    if name == "speed":
        facts += [f"medians of {rows['repeat'].nunique()} runs",
                  f"convolutions' share of our training step: {rows['convolution_share'].iloc[0]:.0%}"]
    return "; ".join(facts) + "\n\n" + TABLES[name](rows).to_markdown(index=False, disable_numparse=True)


def measure_cases(module: str, doc: str, cases: list, measure: Callable[..., dict]) -> None:
    """The command line of a benchmark of several cases, each in a process of its own; its rows go into results/."""
    parser = argparse.ArgumentParser(description=doc.split(":")[0])
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(measure(*cases[arguments.case])))
        return
    rows = []
    for case in range(len(cases)):
        rows.append(in_own_process(module, "--case", str(case)))
        print(rows[-1], flush=True)
    name = module.rpartition(".")[2]
    pandas.DataFrame(rows).assign(made_with=made_with()).to_csv(RESULTS / f"{name}.csv", index=False)
    publish()


def publish() -> None:
    """Write all tables between their marks."""
    page = PAGE.read_text()
    for name in TABLES:
        table = section(name)
        page = re.sub(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", lambda _, table=table: f"{table}\n", page,
                      flags=re.DOTALL)
    write_whole(PAGE, page.encode())


if __name__ == "__main__":
    publish()
