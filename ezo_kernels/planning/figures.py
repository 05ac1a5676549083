"""Plots of plans and choices."""

from __future__ import annotations

from pathlib import Path


def new_figure(width: float, height: float):
    """A matplotlib Figure that no window and no pyplot state knows of.

    Raises:
        ModuleNotFoundError: no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("a plot needs matplotlib: pip install 'ezo-kernels[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def saved(figure, path: str | Path | None):
    """The figure, written to ``path`` if there is one."""
    if path is not None:
        figure.savefig(path)
    return figure


def memory_figure(plan, path: str | Path | None):
    """Bytes against the cut, a line a way to train, of a :class:`ezo_kernels.planning.MemoryPlan`."""
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    ways = list(dict.fromkeys(way for cut in plan.cuts for way in cut.bytes))
    for way in ways:
        cuts = [cut for cut in plan.cuts if way in cut.bytes]
        axes.plot(
            [c.layers for c in cuts], [c.bytes[way].total / 2**20 for c in cuts], marker="o", label=", ".join(way)
        )
    axes.plot(
        [c.layers for c in plan.cuts], [c.tally / 2**20 for c in plan.cuts], linestyle=":", label="all at once (paper)"
    )
    for name, parts in plan.backprop.items():
        axes.axhline(parts.total / 2**20, color="grey", linewidth=0.8, linestyle="--" if name == "sgd" else "-.")
        axes.annotate(f"torch, {name}", (plan.cuts[0].layers, parts.total / 2**20), fontsize=8, va="bottom")
    axes.set_xlabel("weight layers in the head")
    axes.set_ylabel("MiB at the peak of a step")
    axes.set_title(f"batch {plan.rows}, queries {plan.queries}")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return saved(figure, path)


def choice_figure(choice, path: str | Path | None):
    """Gain, memory and time against the cut of a :class:`ezo_kernels.planning.CutChoice`, budgets and the chosen one marked."""
    figure = new_figure(6.4, 6.4)
    gain, memory, seconds = figure.subplots(3, 1, sharex=True)
    layers = [row.layers for row in choice.rows]
    gain.plot(layers, [row.gain for row in choice.rows], marker="o")
    gain.set_ylabel("predicted gain a step")
    memory.plot(layers, [row.bytes / 2**20 for row in choice.rows], marker="o")
    memory.set_ylabel("MiB")
    timed = [row for row in choice.rows if row.seconds is not None]
    seconds.plot([row.layers for row in timed], [1e3 * row.seconds for row in timed], marker="o")
    seconds.set_ylabel("ms a step")
    seconds.set_xlabel("weight layers in the head")
    if choice.memory_budget is not None:
        memory.axhline(choice.memory_budget / 2**20, color="red", linestyle="--", linewidth=0.8)
    if choice.time_budget is not None:
        seconds.axhline(1e3 * choice.time_budget, color="red", linestyle="--", linewidth=0.8)
    for axes in (gain, memory, seconds):
        axes.axvspan(choice.layers - 0.2, choice.layers + 0.2, color="tab:green", alpha=0.2)
        axes.set_ylim(bottom=0)
    gain.set_title(f"chosen: {choice.layers} weight layers in the head")
    return saved(figure, path)
