"""docs/method.md: the files it names exist, its equations hold, its numbers are those of the files."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import ezo_kernels as ezo
from ezo_kernels.cli.experiments.recipes import HEADS
from ezo_kernels.optim import diagnostics as D
from ezo_kernels.planning.tally import paper_tally

ROOT = Path(__file__).parents[1]
METHOD = (ROOT / "docs/method.md").read_text(encoding="utf-8")
RESULTS = ROOT / "bench/results"


def row(start: str) -> str:
    """The row of the claims' table that starts so."""
    (found,) = [line for line in METHOD.splitlines() if line.startswith(f"| {start}")]
    return found


def test_every_file_named_exists():
    named = set(re.findall(r"`([\w./]+\.(?:py|md|json))(?:::(\w+))?`", METHOD))
    assert len(named) > 30
    for name, test in named:
        assert (ROOT / name).exists(), name
        assert not test or f"def {test}(" in (ROOT / name).read_text(encoding="utf-8"), test
    assert "docs/method.md" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_no_claim_without_its_file():
    table = METHOD.split("| claim | from |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) == 12
    for line in table:
        last = line.strip("| ").split(" | ")[-1]
        assert last == "missing" or re.findall(r"`([\w./]+)`", last), line


def test_names_of_the_code_exist():
    for name in ("update_", "perturb"):
        assert hasattr(ezo.ops, name)
    from ezo_kernels.ops.int8_head import int8_head_update_  # noqa: F401
    from ezo_kernels.ops.int8_update import int8_update_  # noqa: F401
    from ezo_kernels.optim.baselines import BackpropSGD  # noqa: F401

    assert {"plateau", "not_finite", "saturated_weights", "exponent_drift", "activation_memory"} == {
        k for k in re.findall(r"^\| `(\w+)`", METHOD.split("## Diagnostics")[1], re.MULTILINE)
    }
    said = METHOD.split("## Diagnostics")[1]
    assert f"last {D.PATIENCE} " in said and f"mean loss {D.BETTER:.0%} below" in said and D.PROMISED == 0.1
    assert f"more than {D.EPS_LARGE:.0%}" in said and "32 units" in said and D.EPS_SMALL == 32 * 2.0**-23
    assert f"more than {D.NOT_FINITE:.0%} of the steps" in said and f"more than {D.AT_RAILS:.0%} of a tensor" in said
    assert f"and {D.LEAST_AT_RAILS} at least" in said and f"moved by {D.DRIFT}" in said and D.MEMORY == 0.5


# ---- equations, on a polynomial of three weights whose derivatives are known


def cubic(w):
    x, y, z = w
    return x**3 + 2 * x * y**2 - x * y * z + z**3 + 3 * y


def gradient(w):
    x, y, z = w
    return np.array([3 * x**2 + 2 * y**2 - y * z, 4 * x * y - x * z + 3, -x * y + 3 * z**2])


LAPLACIAN_GRADIENT = np.array([6.0 + 4.0, 0.0, 6.0])  # Lap L = 6 x + 4 x + 6 z
THIRD = np.array([6.0, 0.0, 6.0])


def directions(noise):
    """(z, probability) that integrate a polynomial of degree 8 exactly."""
    if noise == "rademacher":
        return [(np.array(z), 1 / 8) for z in itertools.product((-1.0, 1.0), repeat=3)]
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)
    weights = weights / weights.sum()
    triples = itertools.product(range(6), repeat=3)
    return [(nodes[list(t)], weights[list(t)].prod()) for t in triples]


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_the_expectation_and_its_bias(noise):
    w, eps = np.array([0.7, -1.2, 0.4]), 0.3
    mean = sum(p * z * (cubic(w + eps * z) - cubic(w - eps * z)) / (2 * eps) for z, p in directions(noise))
    bias = eps**2 / 2 * LAPLACIAN_GRADIENT - (0 if noise == "gaussian" else eps**2 / 3 * THIRD)
    np.testing.assert_allclose(mean, gradient(w) + bias, atol=1e-12)  # a cubic has no further terms


@pytest.mark.parametrize("noise, kurtosis", [("gaussian", 3), ("rademacher", 1)])
def test_the_second_moment(noise, kurtosis):
    a = np.array([0.5, -2.0, 1.5])
    second = sum(p * (z @ a) ** 2 * (z @ z) for z, p in directions(noise))
    assert second == pytest.approx((3 + kurtosis - 1) * (a @ a))


# ---- numbers


def test_numbers_of_the_memory_rows():
    overhead = []
    for batch in (32, 256):
        tally = paper_tally(ezo.models.LeNet5(), torch.zeros(batch, 1, 28, 28))
        overhead += [100 * (tally[n] / tally[0] - 1) for n in (1, 2)]
        assert f"tally {tally[-1] / tally[0]:.2f}" in row('"2.22 times')
    fc3, two, fc3_large, two_large = overhead
    said = f"fc3: {fc3:.3f}% (batch 32), {fc3_large:.3f}% (batch 256); fc2 and fc3: {two:.2f}%, {two_large:.2f}%"
    assert said in row("memory overhead")
    rows = {(r["batch"], r["strategy"]): r for r in json.loads((RESULTS / "memory.json").read_text())["rows"]}
    twice, buffer = ([rows[b, s]["ratio"] for b in (256, 32)] for s in ("auto", "buffer"))
    claim = row("int8 takes")
    assert "tally {:.2f} and {:.2f}".format(*(rows[b, "auto"]["tally_ratio"] for b in (256, 32))) in claim
    assert "{:.2f} and {:.2f} (no acc".format(*twice) in claim and "{:.2f} and {:.2f} (with".format(*buffer) in claim


def test_numbers_of_the_measured_bytes():
    table = json.loads((RESULTS / "experiments/memory.json").read_text())["table"]
    bytes_of = {r["arm"]: r["metrics"]["step_bytes"]["mean"] for r in table}
    heads = "last layer by BP (ZO-Feat-Cls2)", "last two layers by BP (ZO-Feat-Cls1)"
    found = {}
    for precision in ("fp32", "int8"):
        for batch in (32, 256):
            base = bytes_of[f"batch {batch}: full ZO, {precision}, sequential"]
            own = [bytes_of[f"batch {batch}: ElasticZO, {head}, {precision}, sequential"] for head in heads]
            found[precision, batch] = "{:.2f}% and {:.2f}%".format(*(100 * (b / base - 1) for b in own))
    said = f"fp32: {found['fp32', 32]} (batch 32), {found['fp32', 256]} (batch 256); "
    assert f"{said}int8: {found['int8', 32]}, {found['int8', 256]}," in row("memory overhead")
    ratios = [
        bytes_of[f"batch {b}: full BP, fp32"] / bytes_of[f"batch {b}: ElasticZO, {heads[0]}, fp32, sequential"]
        for b in (32, 256)
    ]
    assert "one by one: {:.2f} and {:.2f} ".format(*ratios) in row('"2.22 times')


def test_numbers_of_the_time_rows():
    cpu = json.loads((RESULTS / "cpu.json").read_text())
    ratios = [r["ratio"] for r in cpu["LeNet-5 int8 step against fp32"].values()]
    assert f"{min(ratios):.2f} to {max(ratios):.2f} times" in row("int8 trains")
    steps = cpu["LeNet-5 step against eager MeZO"]
    hybrid, pure = (steps[k]["first_us"] / 1000 for k in ("head fc2+fc3", "pure ZO"))
    assert f"hybrid {hybrid:.1f} ms a step, pure ZO {pure:.1f} ms" in row('"1.38 times')
    table = json.loads((RESULTS / "experiments/time.json").read_text())["table"]
    share = {r["arm"]: 100 * r["metrics"]["share_forward"]["mean"] for r in table}
    for said, head in (("full ZO", "0"), ("with fc3 by BP", "fc3"), ("with fc2 and fc3", "fc2,fc3")):
        own = [share[f"{HEADS[head]}, {precision}"] for precision in ("fp32", "int8")]
        assert "{} {:.0f} and {:.0f}%".format(said, *own) in row("the two forwards")


def test_numbers_of_the_baseline():
    table = json.loads((RESULTS / "experiments/baseline.json").read_text())["table"]
    right = {(r["data"], r["arm"]): 100 * (1 - r["metrics"]["test_error"]["mean"]) for r in table}
    claim, data = row("ElasticZO is"), ("mnist", "fashion_mnist")
    pure = [right[d, "full ZO, fp32"] for d in data]
    assert "pure ZO {:.2f} and {:.2f} (128 forwards".format(*pure) in claim
    assert f"{pure[0]:.2f} ± " in row("89.78 and") and f"{pure[1]:.2f} ± " in row("89.78 and")
    table = json.loads((RESULTS / "experiments/nodes.json").read_text())["table"]
    nodes = {r["data"]: r["metrics"]["test_error"] for r in table if r["arm"] == "full ZO, perturbed outputs"}
    both = ["{:.2f} ± {:.2f}".format(100 * (1 - nodes[d]["mean"]), 100 * nodes[d]["spread"]) for d in data]
    assert " and ".join(both) in row("89.78 and")
    for said, head in (("fc3 by BP", "fc3"), ("fc2 and fc3 by BP", "fc2,fc3")):
        own = [right[d, f"{HEADS[head]}, fp32"] for d in data]
        gains = [a - b for a, b in zip(own, pure, strict=True)]
        assert "{} {:.2f} and {:.2f}, {:+.2f} and {:+.2f}".format(said, *own, *gains) in claim


def test_numbers_of_the_accuracy_rows():
    runs, agreement = {}, {"0": [], "2": [], "8": []}
    for data in ("mnist", "fashion_mnist"):
        for r in json.loads((RESULTS / f"int8_{data}.json").read_text())["runs"]:
            if r["seed"] == 0 and r["batch"] == 32:
                runs[data, r["kind"], r["arm"], r["epochs"]] = 100 * (1 - r["test_error"])
            for bits, values in agreement.items():
                values += [100 * r["agreement"][bits]] if "agreement" in r and r["arm"] != "dense" else []
            if r["arm"] == "dense":
                dense = 100 * r["agreement"]["0"]
    (epochs,) = (at for *what, at in runs if what == ["mnist", "int8", "pure"])
    pure, fashion = runs["mnist", "int8", "pure", epochs], runs["fashion_mnist", "int8", "pure", 60]
    two, fc3 = (runs["mnist", "int8", arm, 10] for arm in ("fc2,fc3", "fc3"))
    long = runs["fashion_mnist", "int8", "fc2,fc3", 60]
    claim = row("ElasticZO is")
    assert f"MNIST {pure:.2f} ({epochs} epochs, pure ZO) against {two:.2f} " in claim and f"{two - pure:+.2f};" in claim
    assert f"{fashion:.2f} (60 epochs) against {long:.2f} (60 epochs), +{long - fashion:.2f};" in claim
    assert f"MNIST {fc3:.2f}, {fc3 - pure:+.2f}." in claim
    assert f"{pure:.2f} ({epochs} epochs" in row("88.92") and f"{fashion:.2f} (60 epochs), seed 0" in row("88.92")
    bp = [runs[data, "bp", "fc2,fc3", 10] for data in ("mnist", "fashion_mnist")]
    assert "MNIST {:.2f}, Fashion-MNIST {:.2f}".format(*bp) in row('"89.78')
    lost = [
        runs[data, "fp32", arm, at] - runs[data, "int8", arm, at]
        for data, arm, at in (
            ("mnist", "fc2,fc3", 10), ("mnist", "fc3", 10), ("fashion_mnist", "fc2,fc3", 60), ("fashion_mnist", "fc3", 10)
        )
    ]  # fmt: skip
    assert "MNIST {:.2f} (fc2, fc3) and {:.2f} (fc3), Fashion-MNIST {:.2f} and {:.2f};".format(*lost) in row(
        "int8 loses"
    )
    spans = {bits: (min(values), max(values)) for bits, values in agreement.items()}
    claim = row("integer and float sign")
    assert "F = 0: {:.0f} to {:.0f}% over".format(*spans["0"]) in claim
    assert dense >= 95 and f"{dense:.1f}% where half of all weights are perturbed" in claim
    assert "F = 2: {:.0f} to {:.0f}%;".format(*spans["2"]) in claim and spans["8"][0] > 99.8
