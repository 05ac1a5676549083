"""The tables of README.md and docs/performance.md and the latter's plots, made from the files in bench/results.

python -m bench report            writes the tables between their markers, and draws the plots into docs/
python -m bench report --check    exit status 1 if a table is not what the files say
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from pathlib import Path

from bench import plots, targets
from ezo_kernels.cli.experiments.catalogue import EXPERIMENTS
from ezo_kernels.cli.experiments.summary import text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true")


def _read(name: str) -> dict | None:
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
        record = _read(f"frozen_trunk_{data}.json")
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
    train = _read("train_mnist.json")
    if train:
        seconds = train["step_ms"] * train["steps"] / 1000
        lines += [
            "",
            f"`make train`: {100 * train['test_accuracy']:.2f}% of MNIST's test set after {train['epochs']} epochs, "
            f"{train['step_ms']:.1f} ms a step, {seconds:.0f} s in steps, on one CPU thread.",
        ]
    return "\n".join(lines)


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
        record = _read(f"int8_{data}.json")
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


def memory() -> str:
    """Bytes of a step of LeNet-5."""
    record = _read("memory.json")
    if not record:
        return "`python -m bench memory` has not been run."
    lines = [
        "| LeNet-5, pure ZO, stacked | batch | int8 planned | int8 measured | int8 all at once | fp32 measured "
        "| fp32 / int8 | paper's tally, ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        lines.append(
            f"| strategy {row['strategy']} | {row['batch']} | {row['planned_bytes']:,} | {row['measured_bytes']:,} | "
            f"{row['all_at_once_bytes']:,} | {row['fp32_bytes']:,} | {row['ratio']:.2f} | {row['tally_ratio']:.3f} |"
        )
    return "\n".join(lines)


#: rows of README's table of the experiment ``memory``: an arm, its name here, and what "over full ZO" is over
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
    record = _read("experiments/memory.json")
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


def baseline() -> str:
    """``ezo experiment baseline`` as far as it was run: errors, beside full ZO's in the same numbers and the frozen trunk's."""
    record = _read("experiments/baseline.json")
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
        zeroth = recipe["method"] == "elastic" and recipe["head"] != "all"
        forwards = recipe["epochs"] * (recipe["queries"] * (1 + recipe["antithetic"]) if zeroth else 1)
        errors = [
            f"{100 * m['mean']:.2f}" + (f" ± {100 * m['spread']:.2f}" if m["spread"] is not None else "")
            for m in (row["metrics"]["validation_error"], row["metrics"]["test_error"])
        ]
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


def experiment(file: str, name: str) -> str:
    """The table of an experiment as its last run printed it, and what follows.

    No times but those of the experiment that is of them: the others ran beside one another.
    """
    record = _read(f"experiments/{file}.json")
    if not record:
        return f"`ezo experiment {name}` has not been run in full."
    times = () if name == "time" else ("seconds", "step_ms")
    columns = tuple(c for c in EXPERIMENTS[name].columns if c.name not in times)
    recipes = [t["specification"]["recipe"] for t in record["trials"].values()]
    epochs = sorted({r["epochs"] for r in recipes})
    lasted = f"{epochs[0]}" if len(epochs) == 1 else f"{epochs[0]} to {epochs[-1]}"
    lasted = [] if name == "time" else [f"Epochs: {lasted}."]
    return "\n\n".join([text(record["table"], columns), *lasted, *record["notes"]])


def gpu_records() -> list[dict]:
    """What ``python -m bench gpu`` has written, a record a suite."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu_*.json"))]


def goals() -> str:
    """What the library has to reach, beside what was measured."""
    records = gpu_records()
    results = {record["suite"]: record["cases"] for record in records}
    lines = ["| H200, bf16 unless stated | must reach | aim | measured |", "|---|---|---|---|"]
    for row in targets.TARGETS:
        sign = "at most " if row.lower else ""
        must = f"{sign if row.must else ''}{targets.number(row.must)}"
        lines.append(f"| {row.work} | {must} | {targets.number(row.aim)} | {targets.cell(row, results)} |")
    names = sorted({record["environment"]["gpu"] for record in records})
    if names:
        lines += [
            "",
            f"Measured on {', '.join(names)}; of several shapes and noises the worst to the best, and how many.",
        ]
    if red := sorted(record["suite"] for record in records if record.get("tests") == "not green"):
        lines += [
            "",
            f"The GPU tests were not green before {', '.join(red)}; each case was compared with its reference.",
        ]
    lines += [f"\n![{name}]({name})" for name in plots.PLOTS if (ROOT / "docs" / name).exists()]
    return "\n".join(lines)


def speed() -> str:
    """The CPU's ratios and, where there are files of one, a GPU's figures."""
    lines = ["| CPU, one thread | microseconds | over the baseline's time |", "|---|---|---|"]
    record = _read("cpu.json")
    for title, cases in (record or {}).items():
        if title != "environment":
            for name, case in cases.items():
                lines.append(f"| {title}: {name} | {case['first_us']:.0f} | {case['ratio']:.2f} |")
    gpus = gpu_records()
    if not any(record["cases"] for record in gpus):
        lines += ["", "No figure of a GPU: none has been measured."]
    for record in gpus:
        here, rows = record["environment"], record["cases"]
        if rows:
            lines += ["", f"| {here['gpu']}: {record['suite']} | us | by |", "|---|---|---|"]
            lines += [f"| {case['id'].split('::')[-1]} | {case['us']:.1f} | {case['by']} |" for case in rows]
        if record["status"] != "finished":
            lines += ["", f"{record['suite']}: {record['status']}, {len(record['not_run'])} cases not run."]
    return "\n".join(lines)


def static() -> str:
    """sm_90, one row a kernel and noise of the representative variants."""
    record = _read("static.json")
    if not record:
        return "`python -m bench static` has not been run."
    lines = [
        "| variant, sm_90 | registers | spill, local bytes | shared bytes | matrix instructions | instructions a z |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        if str(row["arch"]) in ("90", "sm_90") and row.get("representative", True):
            matrix = ", ".join(f"{n} {k}" for k, n in row["matrix_instructions"].items()) or "none"
            per_z = row.get("instructions_per_z")
            lines.append(
                f"| {row['variant']} | {row['registers']} | {row['spill_bytes']}, {row['local_bytes']} | "
                f"{row['shared_bytes']} | {matrix} | {f'{per_z:.1f}' if per_z else ''} |"
            )
    return "\n".join(lines)


def ladder() -> str:
    """Instructions a value of every rung, counted, and values a second where a GPU has measured them."""
    record = _read("ladder.json")
    if not record:
        return "`python -m bench ladder` has not been run."
    archs = sorted({row["arch"] for row in record["rows"]})
    rates = {
        case["rung"]: case["values"] / case["us"] * 1e6
        for suite in gpu_records() if suite["suite"] == "ladder" for case in suite["cases"]
    }  # fmt: skip
    lines = [
        "| generator | what it changes | the contract's bits | "
        + " | ".join(f"sm_{arch}" for arch in archs) + " | registers, spilled bytes (sm_90) | values a second |",
        "|---" * (5 + len(archs)) + "|",
    ]  # fmt: skip
    for name in dict.fromkeys(row["rung"]["name"] for row in record["rows"]):
        own = {row["arch"]: row for row in record["rows"] if row["rung"]["name"] == name}
        rung, at = own[archs[0]]["rung"], own.get(90)
        lines.append(
            f"| {name} | {rung['reason']} | {'yes' if rung['contract'] else 'no'} | "
            + " | ".join(f"{own[arch]['instructions_per_z']:.1f}" for arch in archs)
            + f" | {at['registers']}, {at['spill_bytes']} | {f'{rates[name]:.2e}' if name in rates else 'not measured'} |"
        )
    return "\n".join(lines)


TABLES = {
    "README.md": {"results": training, "baseline": baseline, "integers": integers, "bytes": memory_experiment},
    "docs/performance.md": {"goals": goals, "speed": speed, "memory": memory, "ladder": ladder, "static": static},
    "docs/experiments.md": {
        file: functools.partial(experiment, file, file.partition("_")[0])
        for file in (
            "partition_mnist",
            "partition_pointnet",
            "pointcloud",
            "importance",
            "epsilon",
            "batch",
            "finetune",
            "sign",
            "noise",
            "regression",
            "time",
        )  # fmt: skip
    },
}


def between(page: str, name: str, table: str) -> str:
    """``page`` with ``table`` between its markers ``<!-- name -->`` and ``<!-- /name -->``."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if page.count(start) != 1 or page.count(end) != 1:
        raise ValueError(f"the markers {start} and {end} are not there once each")
    head, _, rest = page.partition(start)
    return f"{head}{start}\n{table}\n{end}{rest.partition(end)[2]}"


def run(args: argparse.Namespace) -> int:
    stale = []
    if not args.check:
        plots.draw({record["suite"]: record["cases"] for record in gpu_records()}, ROOT / "docs")
    for name, tables in TABLES.items():
        path = ROOT / name
        old = new = path.read_text()
        for marker, table in tables.items():
            new = between(new, marker, table())
        if new != old:
            stale.append(name)
            if not args.check:
                path.write_text(new)
    print(("stale: " if args.check else "written: ") + (", ".join(stale) or "nothing"))
    return int(args.check and bool(stale))
