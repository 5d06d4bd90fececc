"""Bring benchmarks/README.md in line with results/: `python -m benchmarks.page`, and at the end of every benchmark."""

import json
import re
from pathlib import Path

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
