"""The plots of docs/performance.md, drawn from the results of ``python -m bench gpu``; none is drawn without its file."""

from __future__ import annotations

from pathlib import Path

from bench.targets import EVERY, PLAIN, Results, least


def efficiency(axes, results: Results) -> bool:
    """Efficiency of the paired linear layer over rows a sign, a line a noise; False if there is nothing to draw."""
    cases = [c for c in results.get("linear", []) if c.get("n") == 4096 and c.get("dtype") == "bfloat16"]
    drawn = False
    for noise in EVERY:
        points = []
        for rows in sorted({c["rows"] for c in cases}):
            plain = least(cases, case=PLAIN, rows=rows)
            ours = least(cases, case="fused", rows=rows, noise=noise)
            if plain and ours:
                points.append((rows, plain / ours))
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=noise)
            drawn = True
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="rows a sign", ylabel="2 t(plain) / t(pair)", title="linear 4096 x 4096, bf16")
    if drawn:
        axes.legend()
    return drawn


def steps(axes, results: Results) -> bool:
    """Time of a LeNet-5 step, a bar a way; False if there is nothing to draw."""
    cases = [c for c in results.get("step", []) if c.get("head") in (None, "pure ZO")] + results.get("peers", [])
    bars = {case: least(cases, case=case) for case in sorted({c["case"] for c in cases})}
    ordered = sorted(bars.items(), key=lambda bar: bar[1])
    axes.barh([name for name, _ in ordered], [us for _, us in ordered])
    axes.set(xscale="log", xlabel="microseconds", title="LeNet-5, batch 32")
    return bool(ordered)


PLOTS = {"linear.svg": efficiency, "step.svg": steps}


def draw(results: Results, folder: Path) -> list[str]:
    """Write the plots that there are results for into ``folder``; their names."""
    if not results:
        return []
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ezo"  # the same figures give the same file
    from matplotlib import pyplot

    written = []
    for name, plot in PLOTS.items():
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        if plot(axes, results):
            figure.savefig(folder / name, metadata={"Date": None})
            written.append(name)
        pyplot.close(figure)
    return written
