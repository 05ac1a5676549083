"""ElasticZO-INT8 as a whole: against the oracle of plain integers, frozen, however it runs, resumed, without floats."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.ops import Int8Tensor
from tests import int8_oracle as oracle
from tests.int8_models import (
    LENET_HEADS,
    TINY_EXPONENTS,
    TINY_LAYERS,
    Residual,
    Tiny,
    ints,
    lenet,
    lenet_batch,
    overwrite,
    same,
    state,
    steps,
    tiny,
    tiny_batch,
)

GOLDEN = Path(__file__).with_name("golden_int8.json")
HEADS = [(), ("fc2",), ("fc1", "fc2")]


# ---- the oracle


def oracle_of(model: nn.Module, opt, seed: int, **how) -> oracle.Run:
    """The same network and recipe in Python integers; a site is the place of a parameter's name among the sorted names."""
    trunk = {s.names[0] for s in model._ezo.manifest}
    names = [n for n, _ in model.named_parameters()]
    of_head = [n for n in names if n not in trunk]
    exponents = dict(model.named_buffers())
    parameters = {}
    for name, p in model.named_parameters():
        site = sorted(names).index(name)
        rounding_site = site if name in trunk else 2**32 - 2 - of_head.index(name)
        parameters[name] = oracle.Parameter(
            p.flatten().tolist(), int(exponents[name + "_exponent"]), tuple(p.shape), site if name in trunk else None,
            rounding_site, conv=p.dim() == 4,
        )  # fmt: skip
    return oracle.Run(TINY_LAYERS, parameters, (2, 6, 6), seed, **how)


def step_as_the_oracle(opt, run, i: int) -> None:
    """The i-th batch for both: losses, g and every weight, bit for bit."""
    x, y = tiny_batch(i)
    total = opt.train_step(x, y)
    run.train_step([row.flatten().tolist() for row in x.values], -5, y.tolist())
    assert opt.losses.tolist() == run.losses and total.item() == sum(run.losses), f"losses of step {i}"
    assert opt.g.tolist() == run.g, f"g of step {i}"
    for name, p in opt.model.named_parameters():
        assert p.flatten().tolist() == run.parameters[name].values, f"{name} after step {i}"


#: head, queries, mode, strategy, head_grad, rounding, head_rounding, activation_rounding, bits, head_bits, F, rounds
COMBINATIONS = [
    (0, 1, "stacked", "buffer", "mean", "stochastic", "stochastic", "nearest", 1, 1, 8, 7),
    (0, 2, "sequential", "twice", "mean", "pseudo", "stochastic", "nearest", 2, 1, 0, 7),
    (1, 1, "stacked", "auto", "mean", "stochastic", "stochastic", "nearest", -1, 3, 8, 7),
    (1, 2, "stacked", "twice", "plus", "stochastic", "pseudo", "pseudo", 7, 2, 5, 10),
    (1, 1, "sequential", "buffer", "minus", "nearest", "stochastic", "nearest", 1, 5, 8, 7),
    (2, 2, "stacked", "buffer", "mean", "stochastic", "stochastic", "nearest", 1, 4, 8, 7),
    (2, 1, "stacked", "auto", "plus", "pseudo", "pseudo", "nearest", 1, 3, 8, 7),
    (2, 2, "sequential", "auto", "mean", "stochastic", "stochastic", "nearest", -8, 4, 1, 7),
    (2, 1, "stacked", "twice", "minus", "stochastic", "nearest", "pseudo", 1, -2, 8, 7),
]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("recipe", COMBINATIONS, ids=lambda r: "-".join(map(str, r)))
def test_steps_are_the_oracles(recipe):
    """Weights, losses and g bit for bit, three steps long, and that they move at all."""
    (
        head,
        queries,
        mode,
        strategy,
        head_grad,
        rounding,
        head_rounding,
        activations,
        width,
        head_width,
        fraction,
        rounds,
    ) = recipe
    seed = 2**63 + 11
    shared = dict(
        r_max=40, p_zero=0.3, bits=width, head_bits=head_width, queries=queries, head_grad=head_grad, rounding=rounding,
        head_rounding=head_rounding, activation_rounding=activations, rounds=rounds,
    )  # fmt: skip
    model = tiny(HEADS[head])
    opt = ezo.ElasticZOInt8(model, seed=seed, mode=mode, strategy=strategy, fraction_bits=fraction, **shared)
    run = oracle_of(model, opt, seed, fraction=fraction, **shared)
    before = state(model)
    for i in range(3):
        step_as_the_oracle(opt, run, i)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) >= (4 if width > -8 and head_width > 0 else 2), moved


def test_a_frozen_parameter_is_neither_perturbed_nor_updated():
    """A whole layer of the trunk; the oracle takes it as one without a site."""
    how = dict(r_max=40, p_zero=0.3, bits=2)
    plain = Tiny()
    plain.fc1.requires_grad_(False)
    model = overwrite(ezo.convert_(plain, precision="int8"), TINY_EXPONENTS)
    frozen = model.fc1.weight.clone(), model.fc1.bias.clone()
    opt = ezo.ElasticZOInt8(model, seed=5, **how)
    run = oracle_of(model, opt, 5, **how)
    for i in range(2):
        step_as_the_oracle(opt, run, i)
    assert torch.equal(model.fc1.weight, frozen[0]) and torch.equal(model.fc1.bias, frozen[1])


def test_the_head_alone_is_the_oracles():
    """head="all": one group, nothing perturbed, NITI's backpropagation through all layers."""
    model = overwrite(ezo.convert_(ezo.models.MLP(7, 6, 5, 4), head="all", precision="int8"))
    opt = ezo.ElasticZOInt8(model, head_bits=4, seed=1)
    parameters = {
        name: oracle.Parameter(
            p.flatten().tolist(), -9 if "weight" in name else -8, tuple(p.shape), None, 2**32 - 2 - i
        )
        for i, (name, p) in enumerate(model.named_parameters())
    }
    layers = [("linear", "fc1"), "relu", ("linear", "fc2"), "relu", ("linear", "fc3")]
    run = oracle.Run(layers, parameters, (), 1, head_bits=4)
    for i in range(3):
        x = Int8Tensor(ints((6, 7), i), torch.tensor([-4], dtype=torch.int32))
        opt.train_step(x, torch.arange(6) % 4)
        run.train_step(x.values.tolist(), -4, [r % 4 for r in range(6)])
        assert opt.losses.tolist() == run.losses
        assert all(p.flatten().tolist() == run.parameters[name].values for name, p in model.named_parameters())
    assert opt.g.tolist() == [0]


@pytest.mark.usefixtures("poisoned_empty")
def test_squared_error_steps_are_the_oracles():
    how = dict(r_max=40, p_zero=0.3, bits=2, queries=2)
    model = tiny()
    opt = ezo.ElasticZOInt8(model, seed=9, loss="squared_error", **how)
    run = oracle_of(model, opt, 9, **how)
    x, _ = tiny_batch()
    rows = [row.flatten().tolist() for row in x.values]
    target = Int8Tensor(ints((3, 4), 77), torch.tensor([-3], dtype=torch.int32))
    run.key = oracle.fold(9, 0)
    want = []
    for query, sign in ((0, 1), (0, -1), (1, 1), (1, -1)):
        y, s, _ = run.forward(rows, -5, query, sign)
        want.append(oracle.squared_error(y, s, target.values.tolist(), -3))
    opt.train_step(x, target)
    assert opt.losses.tolist() == want
    assert opt.g.tolist() == [(a > b) - (a < b) for a, b in zip(want[::2], want[1::2], strict=True)]


def test_a_residual_forward_is_the_oracles():
    """Outside of a step: sum, averages and convolutions of the weights as they are."""
    model = overwrite(ezo.convert_(Residual(), precision="int8"))
    x = Int8Tensor(ints((2, 2, 6, 6), 3, -128), torch.tensor([-5], dtype=torch.int32))
    y = model(x)
    rows, padded = [row.flatten().tolist() for row in x.values], dict(padding=(1, 1))
    w, b = model.stem.weight, model.stem.bias.tolist()
    acc, size = oracle.conv2d(rows, (2, 6, 6), w.flatten().tolist(), w.shape, oracle.aligned_bias(b, -8, -14), **padded)
    a, s_a = oracle.requantise(acc, -14)
    a = oracle.relu(a)
    w = model.conv.weight
    acc, size = oracle.conv2d(a, size, w.flatten().tolist(), w.shape, [0] * 4, **padded)
    c, s_c = oracle.requantise(acc, s_a - 9)
    both, s = oracle.add(a, s_a, c, s_c)
    pooled = [
        [[oracle.average([row[(k * 6 + 2 * p + i) * 6 + 2 * q + j] for i in (0, 1) for j in (0, 1)])
          for p in range(3) for q in range(3)] for k in range(4)]
        for row in oracle.relu(both)
    ]  # fmt: skip
    means = [[oracle.average(plane) for plane in planes] for planes in pooled]
    fc = model.fc
    acc = oracle.linear(means, fc.weight.tolist(), oracle.aligned_bias(fc.bias.tolist(), -8, s - 9))
    want, s = oracle.requantise(acc, s - 9)
    assert y.values.tolist() == want and y.exponent.tolist() == [s]


# ---- frozen for good


def digest(head, steps_: int = 200) -> str:
    """Of all weights and exponents of LeNet-5 after some steps."""
    model = lenet(head)
    opt = ezo.ElasticZOInt8(model, p_zero=0.9, bits=2, head_bits=2, seed=7)
    batches = [lenet_batch(8, i) for i in range(5)]
    for i in range(steps_):
        opt.train_step(*batches[i % 5])
    found = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        found.update(name.encode() + t.numpy().tobytes())
    return found.hexdigest()


def golden() -> dict:
    opt = ezo.ElasticZOInt8(tiny())
    cases = {",".join(head) or "none": digest(head) for head in LENET_HEADS}
    return {"numerics_version": opt.numerics_version, "rng_version": opt.rng_version, "cases": cases}


@pytest.mark.parametrize("head", LENET_HEADS, ids=str)
def test_200_steps_of_lenet_are_frozen(head):
    kept, opt = json.loads(GOLDEN.read_text()), ezo.ElasticZOInt8(tiny())
    assert (kept["numerics_version"], kept["rng_version"]) == (opt.numerics_version, opt.rng_version)
    assert digest(head) == kept["cases"][",".join(head) or "none"], (
        f"a run of {kept['numerics_version']} has other bits than before. They may change only with INT8_VERSION: "
        "change that, say in docs/numerics.md what differs, then run `python -m tests.test_int8_step`"
    )


# ---- what a run depends on


@pytest.mark.parametrize("head", LENET_HEADS, ids=str)
def test_stacked_equals_sequential_bitwise(head):
    runs = []
    for mode in ("stacked", "sequential"):
        model = lenet(head)
        opt = ezo.ElasticZOInt8(model, queries=2, mode=mode, head_bits=3)
        steps(opt, 3)
        runs.append({**state(model), "losses": opt.losses, "g": opt.g})
    assert same(*runs)


def test_strategies_agree_bitwise():
    runs = []
    for strategy in ("buffer", "twice", "auto"):
        model = lenet(("fc2", "fc3"))
        opt = ezo.ElasticZOInt8(model, strategy=strategy)
        steps(opt, 3)
        runs.append({**state(model), "losses": opt.losses})
        assert set(opt._strategies.values()) == {"buffer" if strategy == "buffer" else "twice"}
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])


def test_a_second_optimizer_has_its_own_strategy():
    model = lenet()
    for strategy in ("buffer", "twice"):
        opt = ezo.ElasticZOInt8(model, strategy=strategy)
        steps(opt, 1)
    assert set(opt._strategies.values()) == {"twice"}


def test_a_direction_of_zeros_gives_equal_losses_and_moves_nothing():
    """p_zero = 65535 / 65536: where all of z is zero, both signs compute the same."""
    p_zero = 65535 / 65536
    model = tiny()
    opt = ezo.ElasticZOInt8(model, queries=3, p_zero=p_zero, r_max=127, bits=7, seed=2)
    x, y = tiny_batch()
    quiet = moved = 0
    for step in range(300):
        zeros = [
            not any(
                ezo.ops.materialize(
                    s.shape, seed=2, step=step, site=s.site, query=q, noise="sparse_int8", layout=s.layout,
                    p_zero=p_zero, r_max=127,
                ).any()
                for s in model._ezo.manifest
            )
            for q in range(3)
        ]  # fmt: skip
        before = state(model)
        opt.train_step(x, y)
        for q, zero in enumerate(zeros):
            quiet += zero
            if zero:
                assert opt.losses[2 * q] == opt.losses[2 * q + 1] and opt.g[q] == 0
        if all(zeros):
            assert same(before, state(model))
        else:
            moved += not same(before, state(model))
    assert quiet > 800 and moved


def test_a_g_of_zero_leaves_every_bit_alone():
    """One class: the loss is the same whatever the weights."""
    model = overwrite(ezo.convert_(nn.Sequential(nn.Linear(4, 1)), precision="int8"))
    before, opt = state(model), ezo.ElasticZOInt8(model, p_zero=0.0, bits=7)
    opt.train_step(ints((3, 4), 0), torch.zeros(3, dtype=torch.int64))
    assert opt.g.tolist() == [0] and opt.step_count.item() == 1 and same(before, state(model))


def test_same_seed_same_run_and_other_seed_other_run():
    def run(seed):
        model = lenet(("fc3",))
        losses = steps(ezo.ElasticZOInt8(model, seed=seed), 4)
        return losses, state(model)

    one, again, other = run(3), run(3), run(4)
    assert one[0] == again[0] and same(one[1], again[1])
    assert one[0] != other[0] and not same(one[1], other[1])


def test_forward_never_writes_a_weight():
    model = lenet(("fc3",))
    before, versions = state(model), {n: p._version for n, p in model.named_parameters()}
    seen = {}
    model.fc3.register_forward_hook(lambda m, x, y: seen.update({n: p._version for n, p in model.named_parameters()}))
    opt = ezo.ElasticZOInt8(
        model, p_zero=0.0, r_max=127, bits=-8, head_bits=-8, rounding="nearest", head_rounding="nearest"
    )
    steps(opt, 1)
    assert seen == versions and same(before, state(model))


def test_weights_stay_off_minus_128():
    """Big steps into the rails: everything is clamped to [-127, 127]."""
    model = lenet(("fc3",))
    steps(ezo.ElasticZOInt8(model, r_max=127, p_zero=0.0, bits=7, head_bits=7), 6)
    values = torch.cat([p.flatten() for p in model.parameters()])
    assert values.min() == -127 and values.max() == 127


def main() -> int:
    """Write golden_int8.json, unless that would change it under its version."""
    new = golden()
    if GOLDEN.exists() and GOLDEN.stat().st_size:
        old = json.loads(GOLDEN.read_text())
        if old["numerics_version"] == new["numerics_version"] and old != new:
            print(f"{GOLDEN.name} is frozen under {old['numerics_version']!r}: bits may change only with that string")
            return 1
    GOLDEN.write_text(json.dumps(new, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
