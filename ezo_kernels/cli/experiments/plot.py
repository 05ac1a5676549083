"""Figures of a summary table: bars of named arms, or curves over x, with the spread over seeds."""

from __future__ import annotations

from pathlib import Path

from ...data.files import replacing
from .summary import Column


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def _bars(axes, rows: list[dict], column: Column, named: bool) -> None:
    names = [row["arm"] for row in rows]
    found = [row["metrics"][column.name] for row in rows]
    axes.barh(
        names,
        [f["mean"] * column.scale for f in found],
        xerr=[(f["spread"] or 0.0) * column.scale for f in found],
        capsize=3,
    )
    axes.invert_yaxis()
    axes.tick_params(labelleft=named)
    axes.set_xlabel(column.heading)


def _curves(axes, rows: list[dict], column: Column, x_label: str) -> None:
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["x"])
        found = [row["metrics"][column.name] for row in own]
        axes.errorbar(
            [row["x"] for row in own],
            [f["mean"] * column.scale for f in found],
            yerr=[(f["spread"] or 0.0) * column.scale for f in found],
            marker="o",
            capsize=3,
            label=arm,
        )
    for row in rows:
        if row["metrics"].get("elbow", {}).get("mean") == 1:
            axes.plot(row["x"], row["metrics"][column.name]["mean"] * column.scale, "k*", markersize=14, label="elbow")
    if all(row["x"] > 0 for row in rows):
        axes.set_xscale("log")
    axes.set(xlabel=x_label, ylabel=column.heading)
    axes.legend(fontsize="small")


def write(path: Path, table: list[dict], columns: tuple[Column, ...], title: str, x_label: str = "") -> None:
    """A row of panels a data set, a panel a column: curves of the rows that have an x, else bars."""
    # The figure by itself, without pyplot: no window system, no global state.
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["data"] for row in table))
    panels = [c for c in columns if any(c.name in row["metrics"] for row in table)]
    height = max(3.5, 0.35 * max(sum(row["data"] == name and row["x"] is None for row in table) for name in names))
    figure = Figure(figsize=(5.5 * len(panels), height * len(names)), layout="constrained")
    grid = figure.subplots(len(names), len(panels), squeeze=False)
    for line, name in zip(grid, names, strict=True):
        own = [row for row in table if row["data"] == name]
        curved = any(row["x"] is not None for row in own)
        for i, (axes, column) in enumerate(zip(line, panels, strict=True)):
            rows = [row for row in own if column.name in row["metrics"]]
            if curved:
                _curves(axes, rows, column, x_label)
            else:
                _bars(axes, rows, column, i == 0 or len(rows) < len(own))
            axes.set_title(name)
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
