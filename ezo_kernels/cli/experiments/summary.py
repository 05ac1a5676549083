"""Mean and spread over seeds, as a table for the file and as lines of text."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from .trial import Finished


@dataclass(frozen=True)
class Column:
    """A number of the printed table: its name in results, its heading, what it is multiplied by, and its digits."""

    name: str
    heading: str
    scale: float = 1.0
    digits: int = 2


def mean_spread(values: list[float]) -> dict:
    """Mean, sample standard deviation (None of a single value) and number of values."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "spread": spread, "n": len(values)}


def summarise(finished: list[Finished]) -> list[dict]:
    """A row for every (data, arm, x), in the order of the trials: mean and spread of every number over the seeds.

    The spread is the sample standard deviation, None of a single seed. ``n`` counts the seeds that have the number.
    """
    rows: dict[tuple, list[Finished]] = {}
    for one in finished:
        rows.setdefault((one.trial.recipe.data, one.trial.arm, one.trial.x), []).append(one)
    table = []
    for (data, arm, x), ones in rows.items():
        names = dict.fromkeys(name for one in ones for name in one.values)
        found = {name: [one.values[name] for one in ones if name in one.values] for name in names}
        table.append(
            {
                "data": data,
                "arm": arm,
                "x": x,
                "seeds": [one.trial.recipe.seed for one in ones],
                "metrics": {name: mean_spread(values) for name, values in found.items()},
            }
        )
    return table


def number(value: float, digits: int) -> str:
    """With so many digits behind the point, or in powers of ten where nobody would count them: what has diverged."""
    return f"{value:,.{digits}f}" if abs(value) < 1e9 else f"{value:.1e}"


def text(table: list[dict], columns: tuple[Column, ...]) -> str:
    """The table in Markdown: mean ± spread; empty where an arm has no such number. Columns that nobody has are left out."""
    columns = tuple(c for c in columns if any(c.name in row["metrics"] for row in table))
    with_x = any(row["x"] is not None for row in table)

    def cell(row: dict, column: Column) -> str:
        found = row["metrics"].get(column.name)
        if found is None:
            return ""
        mean = number(found["mean"] * column.scale, column.digits)
        if found["spread"] is None:
            return mean
        return f"{mean} ± {number(found['spread'] * column.scale, column.digits)}"

    head = ["data", "arm", *(["x"] if with_x else []), "seeds", *(c.heading for c in columns)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in table:
        x = [f"{row['x']:g}" if row["x"] is not None else ""] if with_x else []
        cells = [row["data"], row["arm"], *x, str(len(row["seeds"])), *(cell(row, c) for c in columns)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
