"""The tables of README.md and of docs/, and the plots of docs/performance.md, from the files in bench/results and docstrings.

python -m bench report            writes the tables between their markers, and draws the plots into docs/
python -m bench report --check    exit status 1 if a table is not what the files say
"""

from __future__ import annotations

import argparse
import functools
import json

from bench import api, plots, targets, trained
from bench.trained import RESULTS, ROOT, read
from ezo_kernels.cli.experiments.catalogue import EXPERIMENTS
from ezo_kernels.cli.experiments.summary import text


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true")


def memory() -> str:
    """Bytes of a step of LeNet-5."""
    record = read("memory.json")
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


def experiment(file: str, name: str) -> str:
    """The table of an experiment as its last run printed it, and what follows.

    No times but those of the experiment that is of them: the others ran beside one another.
    """
    record = read(f"experiments/{file}.json")
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
    record = read("cpu.json")
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
    record = read("static.json")
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
    record = read("ladder.json")
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
    "README.md": {"train": trained.quick_start, "baseline": trained.baseline_in_short},
    "docs/results.md": {
        "baseline": trained.baseline,
        "results": trained.training,
        "integers": trained.integers,
        "bytes": trained.memory_experiment,
    },
    "docs/api.md": {"api": api.index},
    "docs/recipes.md": {"nodes": trained.nodes},
    "docs/performance.md": {"goals": goals, "speed": speed, "memory": memory, "ladder": ladder, "static": static},
    "docs/experiments.md": {
        file: functools.partial(experiment, file, file.partition("_")[0])
        for file in (
            "partition_mnist",
            "partition_pointnet",
            "pointcloud",
            "importance",
            "nodes",
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
