"""``ezo profile``: where the time of a step goes, by torch.profiler, on a CPU or a GPU."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import outputs, system
from .recipe import Recipe
from .run import Run, data_for, loss_of
from .train import get_data

#: steps before anything is measured: they compile, load and allocate
WARM_UP = 5
#: in-place operators that do not read what they write
_WRITE_ONLY = ("aten::copy_", "aten::fill_", "aten::zero_")


@dataclass(frozen=True)
class Row:
    """One operator or kernel, a step on average.

    Attributes:
        name: of the operator, or of the kernel as compiled.
        us: microseconds in it alone: on the device where there is one, else on the CPU.
        calls: how often it ran.
        bytes: of its operands and results, each once (twice where it is written in place); None for kernels and for operators
            that only call others. What caches save and what tiles read again is not in it.
        roof: bytes a second over the measured copy bandwidth, or None.
    """

    name: str
    us: float
    calls: float
    bytes: int | None
    roof: float | None


class OperandBytes(TorchDispatchMode):
    """Adds up, by operator, the bytes of the tensors that it was given and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.total: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        schema = func._schema
        written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
        views = any(r.alias_info is not None for r in schema.returns) and not any(written)
        if not views:
            seen = {}
            for t in pytree.tree_leaves((args, kwargs, out)):
                if torch.is_tensor(t):
                    seen[t.data_ptr(), t.numel()] = _bytes(t)
            twice = 0
            if schema.name.endswith("_") and schema.name not in _WRITE_ONLY:
                mine = [v for v, w in zip(args, written, strict=False) if w]
                twice = sum(_bytes(t) for t in pytree.tree_leaves(mine) if torch.is_tensor(t))
            self.total[schema.name] += sum(seen.values()) + twice
        return out


def _bytes(t: torch.Tensor) -> int:
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())  # an expanded tensor is read once


def copy_bandwidth(path: Path, device: str) -> float:
    """Bytes a second of a copy, as ``python -m bench roofline --lines FILE`` or ``python -m bench gpu`` measured it.

    Raises:
        ValueError: a file without that figure for this kind of device, or with one that is no bandwidth.
    """
    try:
        text = path.read_text(encoding="utf-8")
        try:
            whole = json.loads(text)
            records = whole.get("cases", [whole])
        except json.JSONDecodeError:
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        found = [r["a_second"] for r in records if r.get("case") == "copy" and r.get("device") == device]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"--roofline {path}: not a file of python -m bench roofline ({error})") from None
    if not found:
        raise ValueError(f"--roofline {path}: it has no copy bandwidth measured on {device}")
    rate = found[-1]
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise ValueError(f"--roofline {path}: its copy bandwidth is {rate!r}, bytes a second above 0 expected")
    return float(rate)


def endless(run: Run) -> Iterator[tuple]:
    """Batches of the run, an epoch after the other."""
    for epoch in itertools.count():
        yield from run.batches.epoch(epoch)


def take_step(run: Run, x, y) -> None:
    if run.recipe.integer:
        run.optimizer.train_step(x, y)
    else:
        run.optimizer.train_step(x, y, loss_fn=loss_of(run.recipe))


def measure(run: Run, steps: int, bandwidth: float | None = None) -> tuple[dict, object]:
    """Times of ``steps`` steps, by operator and by kernel.

    Returns:
        ``{"step_us", "step_us_profiled", "operators", "kernels"}`` (lists of :class:`Row`, most time first) and the profiler,
        which can write its trace.
    """
    cuda = run.device.type == "cuda"
    batches = endless(run)
    run.model.train()

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize(run.device)

    def timed() -> float:
        x, y = next(batches)
        wait()
        start = time.perf_counter()
        take_step(run, x, y)
        wait()
        return 1e6 * (time.perf_counter() - start)

    for _ in range(WARM_UP):
        take_step(run, *next(batches))
    alone = statistics.median([timed() for _ in range(steps)])
    ready = list(itertools.islice(batches, steps))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        start = time.perf_counter()
        for x, y in ready:
            take_step(run, x, y)
        wait()
        profiled = 1e6 * (time.perf_counter() - start) / steps
    with OperandBytes() as counter:
        take_step(run, *next(batches))
    events = profiler.key_averages()
    on_host = [e for e in events if e.device_type == DeviceType.CPU]
    time_of = (lambda e: e.self_device_time_total) if cuda else (lambda e: e.self_cpu_time_total)
    found = {"step_us": alone, "step_us_profiled": profiled}
    found["operators"] = _rows(on_host, time_of, steps, counter.total, bandwidth)
    # The span of an optimizer's step is shown on the device, too, and is no kernel.
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    found["kernels"] = _rows(kernels, lambda e: e.self_device_time_total, steps, {}, None)
    return found, profiler


def _rows(events, time_of, steps: int, sizes, bandwidth: float | None) -> list[Row]:
    rows = []
    for e in events:
        us = time_of(e) / steps
        if us <= 0 or e.key.startswith("ProfilerStep"):
            continue
        size = sizes.get(e.key)
        roof = None if bandwidth is None or not size else 1e6 * size / us / bandwidth
        rows.append(Row(e.key, us, e.count / steps, size, roof))
    return sorted(rows, key=lambda row: -row.us)


def table(rows: list[Row], top: int, title: str) -> str:
    """Text of the first ``top`` rows; the rest in one line."""
    whole = sum(row.us for row in rows) or 1.0
    head = ("us a step", "share", "calls", "us a call", "KiB", "GB/s", "of roof", title)
    lines = [
        f"{head[0]:>10} {head[1]:>6} {head[2]:>7} {head[3]:>10} {head[4]:>10} {head[5]:>7} {head[6]:>8}  {head[7]}"
    ]
    for row in rows[:top]:
        size = f"{row.bytes / 1024:.1f}" if row.bytes else "-"
        rate = f"{row.bytes / row.us / 1000:.2f}" if row.bytes else "-"
        roof = f"{100 * row.roof:.0f}%" if row.roof is not None else "-"
        lines.append(
            f"{row.us:10.1f} {100 * row.us / whole:5.1f}% {row.calls:7.1f} {row.us / row.calls:10.2f} {size:>10} {rate:>7} "
            f"{roof:>8}  {row.name}"
        )
    rest = rows[top:]
    if rest:
        us = sum(row.us for row in rest)
        lines.append(
            f"{us:10.1f} {100 * us / whole:5.1f}% {sum(row.calls for row in rest):7.1f}{'':40}({len(rest)} more)"
        )
    return "\n".join(lines)


def profile(args: argparse.Namespace) -> int:
    """``ezo profile``: print the tables; with --out write ``profile.json`` and ``trace.json`` (chrome://tracing, Perfetto)."""
    for name in ("steps", "top", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}: at least 1 is needed")
    torch.set_num_threads(args.threads)
    given = {field.name: getattr(args, field.name) for field in fields(Recipe) if hasattr(args, field.name)}
    recipe = Recipe(**given)
    recipe.check_given(given)
    device = system.pick_device(args.device)
    bandwidth = copy_bandwidth(args.roofline, device.type) if args.roofline else None
    data, recipe = get_data(recipe, args.data_dir, args.offline)
    run = Run(recipe, data_for(recipe, data), device)
    if args.out is not None:
        # Last of what may be refused: it makes a folder.
        outputs.make_folder("--out", args.out)
        for file in (args.out / "profile.json", args.out / "trace.json"):
            outputs.check_writable("--out", file)
            outputs.check_apart(roofline=args.roofline, out=file)
    found, profiler = measure(run, args.steps, bandwidth)
    noise = "sparse_int8" if recipe.integer else recipe.noise
    print(
        f"{recipe.model}, {recipe.method}, head {recipe.head}, {recipe.precision}, batch {recipe.batch}, "
        f"queries {recipe.queries}, noise {noise}"
    )
    print(f"{device.type}: {system.device_name(device)}, torch {torch.__version__}")
    print(
        f"{found['step_us']:.0f} us a step (median of {args.steps}), {found['step_us_profiled']:.0f} with the profiler\n"
    )
    print(table(found["operators"], args.top, "operator, itself"))
    if found["kernels"]:
        print("\n" + table(found["kernels"], args.top, "kernel"))
    print("\nKiB: operands and results of a step's calls, each once; GB/s: these over the time.")
    if args.out is not None:
        record = {
            "recipe": recipe.as_dict(),
            "data": data.name,
            "device": device.type,
            "device_name": system.device_name(device),
            "versions": system.versions(),
            "steps": args.steps,
            "copy_bytes_a_second": bandwidth,
            **{k: [asdict(row) for row in v] if isinstance(v, list) else v for k, v in found.items()},
        }
        outputs.write_json(args.out / "profile.json", record)
        profiler.export_chrome_trace(str(args.out / "trace.json"))
    return 0
