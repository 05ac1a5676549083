"""Figures of a summary table: bars of named arms, or curves over x, with the spread over seeds."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

from ..._files import replacing
from .summary import Column
from .trial import Finished

#: a validation error of so many times that of the initial weights has diverged
DIVERGED = 10.0


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
    told = set()
    for row in rows:
        at = row["x"], row["metrics"][column.name]["mean"] * column.scale
        if row["metrics"].get("elbow", {}).get("mean") == 1:
            axes.plot(*at, "k*", markersize=14, label=None if "elbow" in told else "elbow")
            told.add("elbow")
        if row["metrics"].get("chosen", {}).get("mean", 0) > 0:
            axes.plot(*at, "ks", markersize=12, fillstyle="none", label=None if "choice" in told else "choose_cut")
            told.add("choice")
    if all(row["x"] > 0 for row in rows):
        axes.set_xscale("log")
    axes.set(xlabel=x_label, ylabel=column.heading)
    axes.legend(fontsize="small")


def write(path: Path, table: list[dict], columns: tuple[Column, ...], title: str, x_label: str = "") -> None:
    """A row of panels a data set, a panel a column: curves of the rows that have an x, else bars."""
    # The figure by itself, without pyplot: no window system, no global state.
    from matplotlib.figure import Figure

    # One that has diverged would leave nothing to be seen of the others; the table has it.
    diverged = sum(bool(row["metrics"].get("diverged", {}).get("mean")) for row in table)
    table = [row for row in table if not row["metrics"].get("diverged", {}).get("mean")]
    title += f" (left out: {diverged} that diverged)" if diverged else ""
    names = list(dict.fromkeys(row["data"] for row in table))
    panels = [c for c in columns if any(c.name in row["metrics"] for row in table)]
    if not panels:  # all have diverged, and the title is all there is to say
        figure = Figure(figsize=(7, 1), layout="constrained")
        figure.suptitle(title)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")
        return
    height = max(3.5, 0.35 * max(sum(row["data"] == name and row["x"] is None for row in table) for name in names))
    # Long names of bars take room beside the first panel.
    names_of_bars = max((len(row["arm"]) for row in table if row["x"] is None), default=0)
    size = 5.5 * len(panels) + 0.08 * names_of_bars, height * len(names)
    figure = Figure(figsize=size, layout="constrained")
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


def trajectories_of(done: list[Finished]) -> list[tuple[str, str, list[dict]]]:
    """(data, arm, readings) of the trials of the first seed that have a trajectory."""
    return [
        (one.trial.recipe.data, one.trial.arm, one.result["trajectory"])
        for one in done
        if "trajectory" in one.result and one.trial.recipe.seed == done[0].trial.recipe.seed
    ]


def write_trajectories(path: Path, paths: list[tuple[str, str, list[dict]]], title: str) -> None:
    """A row of panels a data set against the step: validation error, growth of weights, weights at the rails, exponents.

    Of several layers the one that has most of it, at each step.
    """
    from matplotlib.figure import Figure

    def growth(reading, first):
        return max(w / first["weights"][n] for n, w in reading["weights"].items())

    def rails(reading, first):
        return 100 * max(reading["at_rails"].values()) if reading["at_rails"] else None

    def drift(reading, first):
        known = [e - first["exponents"][n] for n, e in reading["exponents"].items() if e is not None]
        return max(known, key=abs) if known else None

    panels = (
        ("validation squared error", lambda reading, first: reading["validation_mse"], True),
        ("growth of a layer's weights", growth, True),
        ("weights at +-127, %", rails, False),
        ("drift of an exponent, bits", drift, False),
    )
    names = list(dict.fromkeys(data for data, _, _ in paths))
    figure = Figure(figsize=(5.0 * len(panels), 5.5 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), len(panels), squeeze=False)
    styles = ("-", "--", ":", "-.")
    for line, name in zip(grid, names, strict=True):
        own = [(arm, readings) for data, arm, readings in paths if data == name]
        for axes, (label, of, log) in zip(line, panels, strict=True):
            for i, (arm, readings) in enumerate(own):
                # What has diverged ends where it did: beyond, the others would be one line.
                most = DIVERGED * readings[0]["validation_mse"]
                sane = itertools.takewhile(lambda r, most=most: (r["validation_mse"] or math.inf) <= most, readings)
                points = [(r["step"], of(r, readings[0])) for r in sane]
                points = [(step, value) for step, value in points if value is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), styles[i // 10 % 4], color=f"C{i % 10}", label=arm)
            if log:
                axes.set_yscale("log")
            axes.set(xlabel="step", ylabel=label)
            axes.set_title(name)
        line[0].legend(fontsize="x-small")
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
