"""Tables of LeNet-5's training runs: errors and bytes, for README.md and docs/results.md (:mod:`.report`)."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def read(name: str) -> dict | None:
    """A file of bench/results, or None where it was not made."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def _spread(values: list[float]) -> str:
    """Mean, and half the range, of percentages."""
    mean = 100 * statistics.mean(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ± {50 * (max(values) - min(values)):.2f}"


def training() -> str:
    """ElasticZO against the frozen trunk."""
    lines = [
        "| LeNet-5, CPU | trained by BP | queries | scales | steps | seeds | test error, % | frozen trunk, % | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for data in ("mnist", "fashion_mnist"):
        record = read(f"frozen_trunk_{data}.json")
        cells: dict[tuple, list] = {}
        for run in record["runs"] if record else []:
            cells.setdefault(tuple(run["head"]), []).append(run)
        for head, runs in cells.items():
            ours = [r["elastic"]["test_error"] for r in runs]
            frozen = [r["frozen"]["test_error"] for r in runs]
            ratio = statistics.mean(a / b for a, b in zip(ours, frozen, strict=True))
            first = runs[0]["elastic"]
            recipe = first["recipe"]
            signs = "" if recipe.get("antithetic", True) else ", one sign each"
            scales = ", ".join(f"{name} {scale:g}" for name, scale in recipe.get("scales", {}).items())
            lines.append(
                f"| {data} | {', '.join(head)} | {recipe['queries']}{signs} | {scales} | {first['steps']:,} | {len(runs)} | "
                f"{_spread(ours)} | {_spread(frozen)} | {ratio:.2f} |"
            )
    return "\n".join(lines)


def quick_start() -> str:
    """What ``make train`` printed at its end."""
    train = read("train_mnist.json")
    if not train:
        return "`make train` has not been run."
    seconds = train["step_ms"] * train["steps"] / 1000
    return (
        f"`make train`: {100 * train['test_accuracy']:.2f}% of MNIST's test set after {train['epochs']} epochs, "
        f"{train['step_ms']:.1f} ms a step, {seconds:.0f} s in steps, on one CPU thread."
    )


#: arms of bench/int8_training.py without a head, and what the table calls them
HEADLESS = {"pure": "none", "dense": "none; half of all weights perturbed"}


def integers() -> str:
    """ElasticZO-INT8 beside its fp32 twin, backpropagation and the frozen trunk."""
    lines = [
        "| LeNet-5, CPU | trained by BP | batch | epochs | seeds | int8, % | fp32, % | frozen trunk, % | all by BP, % "
        "| sign, paper's rule | sign, ours |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for data in ("mnist", "fashion_mnist"):
        record = read(f"int8_{data}.json")
        runs = record["runs"] if record else []
        cells = sorted(
            {(r["arm"], r["batch"], r["epochs"]) for r in runs if r["kind"] == "int8"},
            key=lambda c: (c[0] not in HEADLESS, c[0] != "pure", c),
        )

        def errors(kind: str, arm: str, batch: int, epochs: int, runs=runs) -> str:
            arm = "fc2,fc3" if kind == "bp" else arm  # backpropagation has no arms
            for at in sorted({r["epochs"] for r in runs}, key=lambda e: (e != epochs, e)):
                found = [
                    r["test_error"]
                    for r in runs
                    if (r["kind"], r["arm"], r["batch"], r["epochs"]) == (kind, arm, batch, at)
                ]
                if found:
                    return _spread(found) + ("" if at == epochs else f" ({at} epochs)")
            return ""

        for arm, batch, epochs in cells:
            own = [r for r in runs if (r["kind"], r["arm"], r["batch"], r["epochs"]) == ("int8", arm, batch, epochs)]
            signs = [f"{100 * statistics.mean(r['agreement'][bits] for r in own):.1f}%" for bits in ("0", "8")]
            head = HEADLESS.get(arm, arm.replace(",", ", "))
            lines.append(
                f"| {data} | {head} | {batch} | {epochs} | {len(own)} | {errors('int8', arm, batch, epochs)} | "
                f"{errors('fp32', arm, batch, epochs)} | {errors('frozen', arm, batch, epochs)} | "
                f"{errors('bp', arm, batch, epochs)} | {' | '.join(signs)} |"
            )
    return "\n".join(lines)


#: rows of the table of the experiment ``memory``: an arm, its name here, and what "over full ZO" is over
_MEMORY_ARMS = [
    (f"{arm}, {precision}, {mode}", f"{name}, {precision}, {mode}", f"full ZO, {precision}, {mode}")
    for precision, mode in (("fp32", "sequential"), ("fp32", "stacked"), ("int8", "sequential"))
    for arm, name in (
        ("full ZO", "full ZO"),
        ("ElasticZO, last layer by BP (ZO-Feat-Cls2)", "ElasticZO, fc3 by BP"),
        ("ElasticZO, last two layers by BP (ZO-Feat-Cls1)", "ElasticZO, fc2 and fc3 by BP"),
    )
] + [
    ("frozen trunk, head fc2,fc3, fp32", "frozen trunk, fc2 and fc3 by BP, fp32", "full ZO, fp32, sequential"),
    ("full BP, fp32", "full BP, fp32", "full ZO, fp32, sequential"),
]


def memory_experiment() -> str:
    """``ezo experiment memory`` as it was run: measured, planned, by the allocator and by the paper's tally."""
    record = read("experiments/memory.json")
    if not record:
        return "`ezo experiment memory` has not been run."
    rows = {row["arm"]: row["metrics"] for row in record["table"]}
    lines = [
        "| LeNet-5 | batch | a step, MB | planned / measured | over full ZO | by the tally | full BP over it | by the tally "
        "| by the allocator |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for batch in (32, 256):
        found = {arm: rows[f"batch {batch}: {arm}"] for arm, _, _ in _MEMORY_ARMS}
        for arm, name, base in _MEMORY_ARMS:

            def over(metric: str, of: dict, by: dict) -> str:
                return f"{of[metric]['mean'] / by[metric]['mean']:.4f}" if metric in of and metric in by else ""

            own, full, bp = found[arm], found[base], found["full BP, fp32"]
            cells = [
                f"{own['step_bytes']['mean'] / 1e6:.3f}",
                f"{own['planned_over_measured']['mean']:.4f}",
                over("step_bytes", own, full),
                over("paper_bytes", own, full),
                over("step_bytes", bp, own),
                over("paper_bytes", bp, own),
                over("allocated_bytes", bp, own),
            ]
            lines.append(f"| {name} | {batch} | {' | '.join(cells)} |")
    trial = next(iter(record["trials"].values()))
    where, seeds = trial["environment"], record["table"][0]["seeds"]
    spread = max(m["step_bytes"]["spread"] or 0 for m in rows.values())
    lines += [
        "",
        f"`ezo experiment memory` on {trial['specification']['recipe']['data']}, {where['device_name']}, torch "
        f"{where['torch']}, {len(seeds)} seeds: bytes differ by {spread:.0f} between them.",
    ]
    return "\n".join(lines)


def _error(metric: dict) -> str:
    """Mean and sample standard deviation, in percent."""
    return f"{100 * metric['mean']:.2f}" + (f" ± {100 * metric['spread']:.2f}" if metric["spread"] is not None else "")


def _by_zeroth_order(recipe: dict) -> bool:
    return recipe["method"] == "elastic" and recipe["head"] != "all"


def _forwards(record: dict, arm: str) -> int:
    """Forward passes an image of a run of the experiment ``baseline``."""
    recipe = next(t["specification"]["recipe"] for t in record["trials"].values() if t["arm"] == arm)
    return recipe["epochs"] * (recipe["queries"] * (1 + recipe["antithetic"]) if _by_zeroth_order(recipe) else 1)


def baseline() -> str:
    """``ezo experiment baseline`` as far as it was run: errors, beside full ZO's in the same numbers and the frozen trunk's."""
    record = read("experiments/baseline.json")
    if not record:
        return "`ezo experiment baseline` has not been run."
    recipes = {
        (t["specification"]["recipe"]["data"], t["arm"]): t["specification"]["recipe"]
        for t in record["trials"].values()
    }
    rows = {(row["data"], row["arm"]): row for row in record["table"]}
    lines = [
        "| data | LeNet-5 | forwards an image | queries, a sign each | seeds | validation error, % | test error, % "
        "| over full ZO | over the frozen trunk | bytes of a step, MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def over(row: dict, base: dict | None) -> str:
        if base is None or base is row or base["seeds"] != row["seeds"]:
            return ""
        return f"{row['metrics']['test_error']['mean'] / base['metrics']['test_error']['mean']:.2f}"

    for (data, arm), row in rows.items():
        recipe = recipes[data, arm]
        zeroth, forwards = _by_zeroth_order(recipe), _forwards(record, arm)
        errors = [_error(row["metrics"][name]) for name in ("validation_error", "test_error")]
        kind = arm[arm.index("int8") :] if "int8" in arm else "fp32"
        full, frozen = (
            rows.get((data, f"full ZO, {kind}")),
            rows.get((data, f"frozen trunk, head {recipe['head']}, {kind}")),
        )
        signs = (
            ""
            if not zeroth
            else f"{recipe['queries']}"
            if not recipe["antithetic"]
            else f"{recipe['queries']}, both signs"
        )
        lines.append(
            f"| {data} | {arm} | {forwards} | {signs} | {len(row['seeds'])} | {' | '.join(errors)} | {over(row, full)} | "
            f"{over(row, frozen)} | {row['metrics']['step_bytes']['mean'] / 1e6:.2f} |"
        )
    return "\n".join(lines)


#: of the arms of ``ezo experiment baseline`` those of the README; with the float loss integers are no better
_SHORT = (
    "full ZO, fp32",
    "ElasticZO, last layer by BP (ZO-Feat-Cls2), fp32",
    "ElasticZO, last two layers by BP (ZO-Feat-Cls1), fp32",
    "frozen trunk, head fc3, fp32",
    "frozen trunk, head fc2,fc3, fp32",
    "full BP, fp32",
    "full ZO, int8, integer only",
    "ElasticZO, last layer by BP (ZO-Feat-Cls2), int8, integer only",
    "ElasticZO, last two layers by BP (ZO-Feat-Cls1), int8, integer only",
)


def _with_outputs() -> list[str]:
    """:data:`_SHORT`, behind the arms of ElasticZO in floats the same with perturbed outputs, of ``ezo experiment nodes``."""
    out = []
    for arm in _SHORT:
        out.append(arm)
        if arm.endswith("fp32") and "ZO" in arm:
            out.append(arm.replace("fp32", "perturbed outputs"))
    return out


def nodes() -> str:
    """Perturbed outputs beside perturbed weights: test errors, and their ratios to full ZO's and the frozen trunk's."""
    record = read("experiments/nodes.json")
    if not record:
        return "`ezo experiment nodes` has not been run."
    rows = {(row["data"], row["arm"]): row for row in record["table"]}
    recipes = {t["arm"]: t["specification"]["recipe"] for t in record["trials"].values()}
    lines = [
        "| data | LeNet-5 | seeds | validation error, % | test error, % | over perturbed weights | over full ZO, weights "
        "| over full ZO, outputs | over the frozen trunk | bytes of a step, MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (data, arm), row in rows.items():
        ending = ", perturbed outputs"
        if not arm.endswith(ending):
            continue
        name, mean = arm.removesuffix(ending), row["metrics"]["test_error"]["mean"]
        bases = (
            f"{name}, perturbed weights", "full ZO, perturbed weights", f"full ZO{ending}",
            f"frozen trunk, head {recipes[arm]['head']}",
        )  # fmt: skip
        ratios = []
        for base in bases:
            other = rows.get((data, base))
            same = other is None or other is row or other["seeds"] != row["seeds"]
            ratios.append("" if same else f"{mean / other['metrics']['test_error']['mean']:.2f}")
        errors = [_error(row["metrics"][metric]) for metric in ("validation_error", "test_error")]
        megabytes = row["metrics"]["step_bytes"]["mean"] / 1e6
        lines.append(f"| {data} | {name} | {len(row['seeds'])} | {' | '.join([*errors, *ratios])} | {megabytes:.2f} |")
    return "\n".join(lines)


def baseline_in_short() -> str:
    """A row an arm of :func:`baseline`, both data sets beside each other."""
    record = read("experiments/baseline.json")
    if not record:
        return "`ezo experiment baseline` has not been run."
    rows = {(row["data"], row["arm"]): row for row in record["table"]}
    lines = [
        "| LeNet-5 | forwards an image | seeds | MNIST, % | Fashion-MNIST, % | bytes of a step, MB |",
        "|---|---|---|---|---|---|",
    ]
    records = {arm: record for arm in _SHORT}
    if nodes := read("experiments/nodes.json"):
        rows |= {(row["data"], row["arm"]): row for row in nodes["table"]}
        records = {arm: record if arm in records else nodes for arm in _with_outputs()}
    for arm, record in records.items():
        if any((data, arm) not in rows for data in ("mnist", "fashion_mnist")):
            continue
        own = [rows[data, arm] for data in ("mnist", "fashion_mnist")]
        seeds = {len(row["seeds"]) for row in own}
        megabytes = own[0]["metrics"]["step_bytes"]["mean"] / 1e6
        lines.append(
            f"| {arm} | {_forwards(record, arm)} | {', '.join(map(str, seeds))} | "
            f"{' | '.join(_error(row['metrics']['test_error']) for row in own)} | {megabytes:.2f} |"
        )
    return "\n".join(lines)
