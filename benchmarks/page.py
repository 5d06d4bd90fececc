"""Bring benchmarks/README.md in line with results/: `python -m benchmarks.page`, and at the end of every benchmark."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.memory import in_own_process
from src.device import made_with
from src.files import write_whole
from src.report import tables

PAGE, RESULTS = Path(__file__).with_name("README.md"), Path(__file__).parents[1] / "results"
TABLES = {"speed": tables.benchmark, "scale": tables.scale, "photographs": tables.costs}


def section(name: str) -> str:
    """The table of one benchmark, and what produced it."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    facts = [result["made_with"]]
    if name == "speed":
        peaks = ", ".join(f"{whose} {peak['host']:,.0f}" for whose, peak in result["peak_memory_mb"].items())
        facts += [f"medians of {result['repeats']} runs", f"peak host memory over the data set, MB: {peaks}",
                  f"convolutions' share of our training step: {result['convolution_share']:.0%}"]
    return "; ".join(facts) + "\n\n" + TABLES[name](result)


def measure_cases(module: str, doc: str, cases: list, measure: Callable[..., dict]) -> None:
    """The command line of a benchmark of several cases, each in a process of its own; its rows go into results/."""
    name = module.rpartition(".")[2]
    parser = argparse.ArgumentParser(description=doc.split(":")[0])
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json")
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(measure(*cases[arguments.case])))
        return
    rows = []
    for case in range(len(cases)):
        rows.append(in_own_process(module, "--case", str(case)))
        print(rows[-1], flush=True)
    result = {"made_with": made_with(), "rows": rows}
    write_whole(arguments.output, (json.dumps(result, indent=1) + "\n").encode())
    print(TABLES[name](result))
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
