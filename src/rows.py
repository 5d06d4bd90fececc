"""Results as long rows: one dict for each condition, with what was measured and what produced it, in a JSON file."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from .device import made_with
from .files import locked, write_whole

Row = dict[str, object]


def measured(path: Path, conditions: Iterable[Row], measure: Callable[[list[Row]], Iterable[Row]]) -> list[Row]:
    """Return one row for each condition: from the file where it is there, else measured now and added to the file.

    measure: takes the conditions that are missing; yields a row for each, in any order, as `row` makes them. Each is
    written at once, so an interrupted study goes on with the rows that are missing.
    """
    conditions = list(conditions)
    if _missing(saved(path), conditions):
        with locked(path):
            rows = saved(path)  # another process may have measured until now
            for new in measure(_missing(rows, conditions)):
                rows.append(new)
                write_whole(path, ("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n").encode())
    rows = saved(path)
    return [matching(rows, condition) for condition in conditions]


def row(condition: Row, values: Row) -> Row:
    """The row of a condition: what was measured, and what produced it."""
    return {**condition, **values, "made_with": made_with()}


def saved(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file."""
    return json.loads(path.read_text()) if path.exists() else []


def matching(rows: Iterable[Row], condition: Row) -> Row | None:
    """The row of a condition; None if it is not measured yet."""
    return next((row for row in rows if condition.items() <= row.items()), None)


def pivot(rows: Iterable[Row], by: tuple[str, ...], value: str) -> dict[tuple, list]:
    """The values of one column, grouped by others, in the order in which they come: {(group, ...): [value, ...]}.

    Rows without the column are left out.
    """
    table: dict[tuple, list] = {}
    for one in rows:
        if value in one:
            table.setdefault(tuple(one[key] for key in by), []).append(one[value])
    return table


def _missing(rows: list[Row], conditions: list[Row]) -> list[Row]:
    return [condition for condition in conditions if matching(rows, condition) is None]
