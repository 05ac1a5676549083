"""What the library has to reach on an H200, what it aims at, and what the files of ``python -m bench gpu`` say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

#: suite -> records of its measured cases
Results = dict[str, list[dict]]
FAST = ("clt4", "gaussian_fast")
CHEAP = (*FAST, "rademacher")
EVERY = ("hadamard", "clt4", "gaussian", "rademacher", "gaussian_fast")


def least(cases: Iterable[dict], **wanted) -> float | None:
    """The shortest time among the cases that are so; a wanted tuple allows each of its values."""
    times = [
        c["us"]
        for c in cases
        if all(c.get(k) in v if isinstance(v, tuple) else c.get(k) == v for k, v in wanted.items())
    ]
    return min(times, default=None)


def over(a: float | None, b: float | None) -> list[float]:
    """a / b, or nothing where one was not measured."""
    return [a / b] if a and b else []


PLAIN = ("two plain", "one plain")
FEW, MANY = (1, 16, 64), (512, 2048, 8192)


def linear(rows: tuple[int, ...], noises: tuple[str, ...], **chosen) -> Callable[[Results], list[float]]:
    """Efficiencies of the paired linear layer, 4096 and 8192 wide, the strategy that auto takes unless one is named."""
    chosen = chosen or {"strategy": "auto"}

    def measured(results: Results) -> list[float]:
        ours = results.get("linear", [])
        plain = [*ours, *(c for c in results.get("compiled", []) if c.get("op") == "linear")]
        found = []
        for n in (4096, 8192):
            for r in rows:
                shape = dict(n=n, k=n, rows=r, dtype="bfloat16")
                for noise in noises:
                    found += over(
                        least(plain, case=PLAIN, **shape), least(ours, case="fused", noise=noise, **shape, **chosen)
                    )
        return found

    return measured


def conv(strategy: str) -> Callable[[Results], list[float]]:
    """Efficiencies of the paired convolution by a strategy."""

    def measured(results: Results) -> list[float]:
        cases, found = results.get("conv2d", []), []
        shapes = {(c["c"], c["o"], c["size"]) for c in cases if c["dtype"] == "bfloat16"}
        for c, o, size in sorted(shapes):
            shape = dict(c=c, o=o, size=size, dtype="bfloat16")
            ours = least(cases, case="fused", strategy=strategy, **shape)
            found += over(least(cases, case=PLAIN, **shape), ours)
        return found

    return measured


def cosines(strategy: str) -> Callable[[Results], list[float]]:
    """Of the derivative that layers by this strategy measure, in bf16 at eps 1e-3 (:mod:`bench.derivative`)."""

    def measured(results: Results) -> list[float]:
        cases = [*results.get("linear", []), *results.get("conv2d", [])]
        wanted = {"strategy": strategy, "dtype": "bfloat16"}
        return [c["cosine"] for c in cases if "cosine" in c and all(c.get(k) == v for k, v in wanted.items())]

    return measured


def integers(results: Results) -> list[float]:
    """Against two int8 products of torch (linear), or the same operator without noise (conv)."""
    cases, found = results.get("int8", []), []
    for op, plain in (("linear", "int_mm"), ("conv2d", "plain")):
        own = [c for c in cases if c.get("op") == op]
        for rows, n, k, size in sorted({(c["rows"], c["n"], c["k"], c.get("size", 0)) for c in own}):
            shape = dict(rows=rows, n=n, k=k) | ({"size": size} if size else {})
            found += over(least(own, case=plain, **shape), least(own, case=("buffer", "twice"), **shape))
    return found


def update(dtype: str, noises: tuple[str, ...]) -> Callable[[Results], list[float]]:
    def measured(results: Results) -> list[float]:
        cases = results.get("update", [])
        copy = least(cases, case="copy", dtype=dtype)
        return [v for n in noises for v in over(copy, least(cases, case="update", dtype=dtype, noise=n, queries=1))]

    return measured


def values(noise: str) -> Callable[[Results], list[float]]:
    def measured(results: Results) -> list[float]:
        own = [c for c in results.get("noise", []) if c.get("noise") == noise and c.get("rounds", 7) == 7]
        return [max(1e6 * c["values"] / c["us"] for c in own)] if own else []

    return measured


def step(**wanted) -> Callable[[Results], float | None]:
    """Time of a captured LeNet-5 step, the fastest noise."""
    return lambda results: least(results.get("step", []), **{"case": "captured", "head": "pure ZO", **wanted})


def step_against(suite: str, **wanted) -> Callable[[Results], list[float]]:
    """The time of such a case of another suite over that of our captured step."""
    return lambda results: over(least(results.get(suite, []), **wanted), step()(results))


def int8_step(results: Results) -> list[float]:
    """The captured fp32 step over the captured int8 one, pure ZO."""
    cases = [c for c in results.get("int8", []) if c.get("head") == "pure ZO"]
    return over(least(cases, case="captured fp32"), least(cases, case="captured int8"))


def head_step(results: Results) -> list[float]:
    """The captured step with one trained layer over that of full ZO."""
    return over(step(head="fc3")(results), step()(results))


def lm(sequences: int, against: str) -> Callable[[Results], list[float]]:
    """The time of the plain forwards, or of the case ``against``, over that of a step of the decoder."""

    def measured(results: Results) -> list[float]:
        cases = [c for c in results.get("lm", []) if c.get("sequences") == sequences]
        plain = [*cases, *(c for c in results.get("compiled", []) if c.get("sequences") == sequences)]
        ours = least(cases, case=("captured", "paired"))
        return over(least(plain, case=PLAIN if against == "plain" else against), ours)

    return measured


def noise_of_backward(results: Results) -> list[float]:
    """The time of z of all weights over that of one backward, 8 sequences: a BP step less a plain forward."""
    cases = results.get("lm", [])
    step, plain = least(cases, case="backprop", sequences=8), least(cases, case="two plain", sequences=8)
    return over(least(cases, case="noise of all weights"), step - plain / 2) if step and plain else []


def memory(results: Results) -> list[float]:
    """Peak bytes of a sequential step above those of one plain forward of the same batch, as a share of its total."""
    found = []
    for n in (1, 8):
        cases = [c for c in results.get("lm", []) if c.get("sequences") == n]
        peak = {c["case"]: c["peak_bytes_above_operands"] for c in cases}
        if {"two plain", "sequential"} <= set(peak):
            total = 2 * cases[0]["parameters"] + peak["two plain"]
            found.append(100 * max(0, peak["sequential"] - peak["two plain"]) / total)
    return found


@dataclass(frozen=True)
class Target:
    """A row: the work, what it must reach and the aim, and a function of the results that gives a figure a shape and noise.

    ``lower`` is better for times and memory; the worst figure is what counts.
    """

    work: str
    must: float | None
    aim: float | None
    measured: Callable[[Results], list[float]]
    lower: bool = False


TARGETS = (
    Target("linear, 1 to 64 rows a sign, rademacher and hadamard", 1.6, 1.9, linear(FEW, ("rademacher", "hadamard"))),
    Target("linear, 1 to 64 rows, clt4 and gaussian_fast", 1.3, 1.7, linear(FEW, FAST)),
    Target("linear, 1 to 64 rows, gaussian", 0.70, 1.0, linear(FEW, ("gaussian",))),
    Target("linear, 512 rows, hadamard, clt4, gaussian_fast", 0.70, 0.90, linear((512,), ("hadamard", *FAST))),
    Target("linear, 2048 rows, every noise", 0.80, 0.92, linear((2048,), EVERY)),
    Target("linear, 8192 rows, every noise", 0.92, 0.97, linear((8192,), EVERY)),
    Target("linear, 512 to 8192 rows, hadamard, no workspace", 0.70, 0.92, linear(MANY, ("hadamard",), strategy="fused")),
    Target("conv2d, 64 to 256 channels, 32x32 and 56x56, batch 128", 0.93, 0.98, conv("auto")),
    Target("the same, no workspace", None, None, conv("fused")),
    Target("int8 linear and conv, sparse_int8", 0.75, 0.90, integers),
    Target("cosine of the measured derivative, eps 1e-3: by auto", 0.99, 0.995, cosines("auto")),
    Target("the same, fused", 0.99, 0.995, cosines("fused")),
    Target("the same, two products", 0.99, 0.995, cosines("two_products")),
    Target("the same, slab", 0.99, 0.995, cosines("slab")),
    Target("update, share of copy: fp32", 0.85, 0.92, update("float32", (*CHEAP, "gaussian"))),
    Target("update, share of copy: bf16, gaussian_fast, clt4, rademacher", 0.85, 0.92, update("bfloat16", CHEAP)),
    Target("update, share of copy: bf16, gaussian", 0.60, 0.75, update("bfloat16", ("gaussian",))),
    Target("exact gaussians made in a kernel, a second", 0.8e12, 1.2e12, values("gaussian")),
    Target("clt4 made in a kernel, a second", 2e12, 2.8e12, values("clt4")),
    Target("LeNet-5 step, batch 32, captured, microseconds", 80, 30, lambda r: [t for t in (step()(r),) if t], lower=True),
    Target("LeNet-5 step against our eager MeZO", 20, 50, step_against("step", case=("randn", "materialised"), head="pure ZO")),
    Target("LeNet-5 step against MeZO in a graph", 2, 4, step_against("step", case="MeZO in a graph")),
    Target("LeNet-5 step against torchzero", 20, 50, step_against("peers", case="torchzero")),
    Target("LeNet-5 int8 step against fp32, both captured", 1.0, 1.4, int8_step),
    Target("ElasticZO, one trained layer, against full ZO: time", 1.05, 1.0, head_step, lower=True),
    Target("decoder, 1 x 1024: step efficiency", 0.65, 0.80, lm(1, "plain")),
    Target("decoder, 8 x 1024: step efficiency", 0.88, 0.95, lm(8, "plain")),
    Target("decoder, 1 x 1024: step against eager MeZO", 2.5, 3, lm(1, "MeZO")),
    Target("decoder, 8 x 1024: step against eager MeZO", 1.2, 1.3, lm(8, "MeZO")),
    Target("decoder, 8 x 1024: step against BP with SGD", None, None, lm(8, "backprop")),
    Target("decoder, 8 x 1024: time of z over that of a backward", None, None, noise_of_backward, lower=True),
    Target("decoder, sequential: peak memory above plain inference, %", 2, 0.5, memory, lower=True),
)  # fmt: skip


def number(value: float | None) -> str:
    if value is None:
        return "reported"
    return f"{value:.1e}" if value >= 1e6 else f"{value:.3g}"


def cell(target: Target, results: Results) -> str:
    """The worst figure and, of several, the best; met or missed."""
    found = target.measured(results)
    if not found:
        return "not measured"
    worst, best = (max(found), min(found)) if target.lower else (min(found), max(found))
    text = number(worst) if len(found) == 1 else f"{number(worst)} to {number(best)} ({len(found)})"
    if target.must is None:
        return text
    met = worst <= target.must if target.lower else worst >= target.must
    return f"{text}: {'reached' if met else 'missed'}"
