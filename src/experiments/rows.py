"""Results as a table: one row for each condition, with what was measured and what produced it, in a CSV file."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas

from ..device import made_with
from ..files import locked, write_whole
from .workers import side_by_side

Row = dict[str, object]


def measured(path: Path, conditions: list[Row], measure: Callable[[Row], Row],
             first: Callable[[list[Row]], None] = lambda missing: None, **workers: int) -> pandas.DataFrame:
    """Return one row for each condition: from the file where it is there, else measured now and added to the file.

    Each row is written at once, so an interrupted study goes on with the rows that are missing; `first` is called once
    with their conditions, such as to train what they share. workers: `processes` and `threads` of `side_by_side`.
    """
    if _missing(saved(path), conditions):
        with locked(path):
            rows = saved(path)  # another process may have measured until now
            missing = _missing(rows, conditions)
            first(missing)
            for row in side_by_side(partial(_row, measure), missing, f"{path.stem}: conditions", **workers):
                rows = pandas.DataFrame([*rows.to_dict("records"), row])
                rows.insert(len(rows.columns) - 1, "made_with", rows.pop("made_with"))
                write_whole(path, rows.to_csv(index=False).encode())
    return matching(saved(path), conditions)


def saved(path: Path) -> pandas.DataFrame:
    """The rows of a file; none where there is no file."""
    if not path.exists():
        return pandas.DataFrame()
    try:
        rows = pandas.read_csv(path, dtype={"erm": str})
        damaged = rows["made_with"].isna().any()
    except (ValueError, KeyError):  # pandas' own errors are ValueErrors
        damaged = True
    if damaged:
        raise ValueError(f"{path} is no table of results: empty, cut short, or with the marks of a merge; restore it "
                         "with git, or move it away to measure its rows again")
    return rows


def matching(rows: pandas.DataFrame, conditions: list[Row]) -> pandas.DataFrame:
    """The rows of conditions, in their order; a condition that is not measured has no `made_with`."""
    wanted = pandas.DataFrame(conditions)
    if rows.empty or not set(wanted.columns) <= set(rows.columns):
        return wanted.assign(made_with=None)
    return wanted.merge(rows, how="left", on=list(wanted.columns))


def _missing(rows: pandas.DataFrame, conditions: list[Row]) -> list[Row]:
    lacking = matching(rows, conditions)["made_with"].isna()
    return [condition for condition, lacks in zip(conditions, lacking, strict=True) if lacks]


def _row(measure: Callable[[Row], Row], condition: Row) -> Row:
    return {**condition, **measure(condition), "made_with": made_with()}
