"""ElasticZO-INT8 as a whole: against the oracle of plain integers, frozen, resumed, without floats, in its memory."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ezo_kernels as ezo
from bench.memory import LiveBytes, paper_tally
from ezo_kernels.data import quantize_images
from ezo_kernels.nn.arena import Arena, ArenaPlan, Interval
from ezo_kernels.ops import Int8Tensor, _int8_cpu, _library
from ezo_kernels.optim import IntegerSchedule
from tests import int8_oracle as oracle

GOLDEN = Path(__file__).with_name("golden_int8.json")
HEADS = [(), ("fc2",), ("fc1", "fc2")]


def ints(shape, seed: int, low: int = -127, high: int = 127) -> torch.Tensor:
    """int8 by a formula that no library's version can move."""
    n = torch.Size(shape).numel()
    values = [(((i + 1) * 2654435761 + seed * 40503) % 2**32 >> 7) % (high - low + 1) + low for i in range(n)]
    return torch.tensor(values, dtype=torch.int8).view(shape)


def overwrite(model: nn.Module, exponents: dict[str, int] | None = None) -> nn.Module:
    """Parameters of a converted model by a formula: nothing of them depends on floats."""
    for i, (name, p) in enumerate(sorted(model.named_parameters())):
        reach = 100 if name.endswith("weight") else 60
        p.data.copy_(ints(p.shape, i, -reach, reach))
    for name, buffer in model.named_buffers():
        if exponents and name in exponents:
            buffer.fill_(exponents[name])
        elif not exponents:
            buffer.fill_(-9 if name.startswith("weight", name.rfind(".") + 1) else -8)
    return model


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.fc1, self.fc2 = nn.Linear(12, 5), nn.Linear(5, 4)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv(x), 2)).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))


TINY_LAYERS = [("conv", "conv"), "pool", "relu", "flatten", ("linear", "fc1"), "relu", ("linear", "fc2")]
#: So that a bias is shifted to the left (conv: from -6 to about -13) and to the right (fc1).
TINY_EXPONENTS = {
    "conv.weight_exponent": -8, "conv.bias_exponent": -6, "fc1.weight_exponent": -9, "fc1.bias_exponent": -20,
    "fc2.weight_exponent": -7, "fc2.bias_exponent": -7,
}  # fmt: skip


def tiny(head=()) -> nn.Module:
    return overwrite(ezo.convert_(Tiny(), head=list(head), precision="int8"), TINY_EXPONENTS)


def tiny_batch(seed: int = 0, rows: int = 3):
    x = Int8Tensor(ints((rows, 2, 6, 6), 100 + seed, -128), torch.tensor([-5], dtype=torch.int32))
    return x, torch.arange(seed, seed + rows) % 4


def lenet(head=()) -> nn.Module:
    model = ezo.models.LeNet5(generator=torch.Generator().manual_seed(0))
    return overwrite(ezo.convert_(model, head=list(head), precision="int8"))


def lenet_batch(rows: int = 8, seed: int = 0):
    """Blobs in a place that tells the class, over noise: all by arithmetic."""
    y = (torch.arange(rows) * 7 + 3 * seed) % 10
    x = ints((rows, 1, 28, 28), seed, -20, 20)
    for row, label in zip(x, y.tolist(), strict=True):
        row[0, 2 * label : 2 * label + 6, 2 * label : 2 * label + 6] += 90
    return Int8Tensor(x, torch.tensor([-5], dtype=torch.int32)), y


LENET_HEADS = [(), ("fc3",), ("fc2", "fc3")]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def steps(opt, n: int, batch=lenet_batch, rows: int = 8, first: int = 0):
    return [opt.train_step(*batch(seed=i, rows=rows)).item() for i in range(first, first + n)]


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
        x, y = tiny_batch(i)
        total = opt.train_step(x, y)
        run.train_step([row.flatten().tolist() for row in x.values], -5, y.tolist())
        assert opt.losses.tolist() == run.losses and total.item() == sum(run.losses), f"losses of step {i}"
        assert opt.g.tolist() == run.g, f"g of step {i}"
        for name, p in model.named_parameters():
            assert p.flatten().tolist() == run.parameters[name].values, f"{name} after step {i}"
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
        x, y = tiny_batch(i)
        opt.train_step(x, y)
        run.train_step([row.flatten().tolist() for row in x.values], -5, y.tolist())
        assert opt.losses.tolist() == run.losses
        assert all(p.flatten().tolist() == run.parameters[name].values for name, p in model.named_parameters())
    assert torch.equal(model.fc1.weight, frozen[0]) and torch.equal(model.fc1.bias, frozen[1])


@pytest.mark.parametrize("leaf", ["bias", "weight"])
def test_half_a_frozen_layer_is_refused_by_name(leaf):
    plain = Tiny()
    getattr(plain.fc1, leaf).requires_grad_(False)
    with pytest.raises(NotImplementedError, match="fc1 .Linear. is frozen in half"):
        ezo.convert_(plain, precision="int8")
    assert type(plain.fc1) is nn.Linear and plain.fc1.weight.dtype == torch.float32
    ezo.convert_(plain, head=["fc1", "fc2"], precision="int8")  # in the head each parameter is on its own


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


# ---- saving, copying, schedules


@pytest.mark.parametrize("head", LENET_HEADS, ids=str)
def test_resume_equals_the_uninterrupted_run(head, tmp_path):
    how = dict(queries=2, seed=2**64 - 1, p_zero=0.5)
    model = lenet(head)
    opt = ezo.ElasticZOInt8(model, **how)
    opt.param_groups[0]["bits"] = 2
    steps(opt, 3)
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "checkpoint")
    losses = steps(opt, 3, first=3)
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    fresh = lenet(head)
    fresh.conv1.weight.data.zero_()
    fresh.load_state_dict(saved["model"])
    other = ezo.ElasticZOInt8(fresh, **{**how, "seed": 0})
    other.load_state_dict(saved["opt"])
    assert steps(other, 3, first=3) == losses
    assert same(state(fresh), state(model)) and other.step_count.item() == 6


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("stepped", [False, True])
def test_copies_of_a_converted_model_are_models(copied, stepped):
    model = tiny(("fc2",))
    if stepped:
        ezo.ElasticZOInt8(model).train_step(*tiny_batch())
    other = copied(model)
    assert same(state(model), state(other))
    before = state(other)
    ezo.ElasticZOInt8(model, bits=4, head_bits=4).train_step(*tiny_batch(1))
    assert same(state(other), before), "they share memory"
    ezo.ElasticZOInt8(other, bits=4, head_bits=4).train_step(*tiny_batch(1))
    assert same(state(model), state(other)) and not same(state(other), before)


CHANGES = {"bits": 3, "r_max": 50, "p_zero": 0.25, "head_bits": 4}


def test_a_schedule_changes_what_it_says_when_it_says():
    def run(by_hand):
        model = tiny(("fc2",))
        opt = ezo.ElasticZOInt8(model)
        schedule = IntegerSchedule(opt, {0: {"bits": 2}, 2: CHANGES} if not by_hand else {})
        for i in range(4):
            if by_hand and i in (0, 2):
                trunk = {"bits": 2} if i == 0 else {k: CHANGES[k] for k in ("bits", "r_max", "p_zero")}
                opt.param_groups[0].update(trunk)
                opt.param_groups[1]["bits"] = 1 if i == 0 else 4
            opt.train_step(*tiny_batch(i))
            schedule.step()
        return state(model), opt

    (ours, opt), (by_hand, _) = run(False), run(True)
    assert same(ours, by_hand)
    assert {k: opt.param_groups[0][k] for k in ("bits", "r_max", "p_zero")} == {"bits": 3, "r_max": 50, "p_zero": 0.25}
    assert opt.param_groups[1]["bits"] == 4
    assert opt._shift.item() == 3 and opt._head_bits.item() == 4


def test_a_schedule_goes_on_from_its_state():
    opt = ezo.ElasticZOInt8(tiny(("fc2",)))
    schedule = IntegerSchedule(opt, {2: CHANGES})
    saved = {"last_step": 2}
    assert opt.param_groups[0]["bits"] == 1
    schedule.load_state_dict(saved)
    assert opt.param_groups[0]["bits"] == 3 and schedule.state_dict() == saved


@pytest.mark.parametrize(
    "milestones",
    [{1: {"bits": 8}}, {1: {"head_bits": -9}}, {1: {"r_max": 0}}, {1: {"r_max": 128}}, {1: {"p_zero": 1.0}},
     {1: {"lr": 1}}, {-1: {"bits": 1}}, {1.5: {"bits": 1}}, {1: {"bits": 1.5}}, {0: {"bits": 2}, 5: {"p_zero": -0.1}}],
    ids=str,
)  # fmt: skip
def test_a_schedule_refuses_bad_values_before_anything_changes(milestones):
    opt = ezo.ElasticZOInt8(tiny(("fc2",)))
    before = [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]
    with pytest.raises((TypeError, ValueError)):
        IntegerSchedule(opt, milestones)
    assert before == [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]


# ---- no float, and its memory


def leaves(tree):
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


class NoFloats(TorchDispatchMode):
    """Fails at the first floating-point tensor that an operator reads or writes, inside our operators too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(str(func))
        out = func(*args, **(kwargs or {}))
        for t in leaves((args, kwargs, out)):
            assert not t.is_floating_point() and not t.is_complex(), f"{func} on {t.dtype} {tuple(t.shape)}"
        return out


@pytest.fixture
def inside(monkeypatch):
    """A mode that is on within the CPU implementations as well, where the dispatcher has turned it off."""

    def enter(mode):
        for (name, key), implementation in list(_library.implementations.items()):

            def run(*args, _run=implementation, **kwargs):
                with mode:
                    return _run(*args, **kwargs)

            if name.startswith("int8") and key == "CPU":
                monkeypatch.setitem(_library.implementations, (name, key), run)
        return mode

    return enter


@pytest.mark.parametrize("head", LENET_HEADS, ids=str)
@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_no_floating_point_number_in_a_step(head, mode, inside):
    opt = ezo.ElasticZOInt8(lenet(head), mode=mode)
    steps(opt, 1)
    x, y = lenet_batch(8, 1)
    with inside(NoFloats()) as watched:
        opt.train_step(x, y)
    assert {"ezo.int8_linear.default", "ezo.int8_update_.default", "aten.empty.memory_format"} <= watched.seen


def test_no_numba_kernel_takes_a_float():
    steps(ezo.ElasticZOInt8(lenet(("fc3",)), loss="cross_entropy"), 1)
    compiled = {n: f for n, f in vars(_int8_cpu).items() if getattr(f, "nopython_signatures", None)}
    assert len(compiled) > 8
    for name, f in compiled.items():
        assert "float" not in str(f.nopython_signatures), name


def test_live_counts_bytes():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b.view(10, 100) * 2
        del b, c
    assert (live.now, live.peak) == (0, 8000)


def test_a_trunk_step_allocates_little_outside_its_arena():
    model = lenet()
    opt = ezo.ElasticZOInt8(model)
    x, y = lenet_batch(64)
    opt.train_step(x, y)
    known = [opt.arena.buffer, x.values, x.exponent, y, *model.parameters(), *model.buffers()]
    with LiveBytes(known) as live:
        opt.train_step(x, y)
    assert live.peak < 2048, "intermediates are the arena's"


@pytest.mark.parametrize("head", [("fc3",), ("fc2", "fc3")], ids=str)
def test_a_head_allocates_its_errors_and_gradients_outside_the_arena(head):
    """int32 gradients of each group and their sum, and errors of a few rows: nothing of the trunk's size."""
    model = lenet(head)
    opt = ezo.ElasticZOInt8(model)
    x, y = lenet_batch(64)
    opt.train_step(x, y)
    known = [opt.arena.buffer, x.values, x.exponent, y, *model.parameters(), *model.buffers()]
    with LiveBytes(known) as live:
        opt.train_step(x, y)
    of_head = sum(p.numel() for p in opt.head)
    assert live.peak < 4 * of_head * (2 + 2 + 1) + 2 * 64 * 120 * (4 + 1) + 8192


def fp32_peak(rows: int) -> int:
    """Live bytes of a stacked fp32 step, and of its parameters."""
    model = ezo.convert_(ezo.models.LeNet5(), head=0)
    opt = ezo.ElasticZO(model)
    x, y = torch.zeros(rows, 1, 28, 28), torch.arange(rows) % 10
    opt.train_step(x, y)
    with LiveBytes([x, y, *model.parameters()]) as live:
        opt.train_step(x, y)
    return live.peak + 4 * sum(p.numel() for p in model.parameters())


def test_memory_is_as_planned_and_below_fp32s():
    opt = ezo.ElasticZOInt8(lenet())
    x, y = lenet_batch(256)
    for _ in range(2):
        opt.train_step(x, y)
    found = opt.memory()
    assert found["planned_bytes"] == found["measured_bytes"] <= found["all_at_once_bytes"]
    assert found["live_bytes"] <= found["planned_bytes"] == opt.arena.buffer.numel()
    assert found["parameter_bytes"] == 107_786
    assert 1.8 * (found["planned_bytes"] + found["parameter_bytes"]) <= fp32_peak(256)


def test_auto_needs_no_more_memory_than_either_strategy():
    planned = {}
    for strategy in ("buffer", "twice", "auto"):
        opt = ezo.ElasticZOInt8(lenet(), strategy=strategy)
        steps(opt, 1, rows=32)
        planned[strategy] = opt.memory()["planned_bytes"]
    assert planned["auto"] <= min(planned["buffer"], planned["twice"]) and planned["twice"] < planned["buffer"]


def test_memory_before_a_step_is_refused():
    with pytest.raises(ValueError, match="no step"):
        ezo.ElasticZOInt8(tiny()).memory()


@pytest.mark.parametrize(("rows", "ratio"), [(32, 1.598), (256, 1.458)])
def test_the_papers_tally(rows, ratio):
    """P = 107,786, A = 18,058 and A32 = 8,054 from the model's shapes, and the paper's two ratios."""
    fp32, int8 = paper_tally(ezo.models.LeNet5(), torch.zeros(1, 1, 28, 28), rows)
    assert (fp32, int8) == (4 * (107_786 + rows * 18_058), 107_786 + rows * 18_058 + 4 * rows * 8_054)
    assert round(fp32 / int8, 3) == ratio


def test_arena_plans_never_overlap():
    rng = random.Random(0)
    for _ in range(300):
        intervals = []
        for _ in range(rng.randrange(1, 25)):
            start = rng.randrange(40)
            end = None if rng.random() < 0.1 else start + rng.randrange(1, 15)
            intervals.append(Interval(rng.choice([0, 1, 63, 64, 65, 1000, rng.randrange(5000)]), start, end))
        plan = ArenaPlan.of(intervals)
        assert plan.live_bytes <= plan.planned_bytes <= plan.all_at_once_bytes
        for n, a in enumerate(intervals):
            assert a.offset % 64 == 0 and a.offset + a.size <= plan.planned_bytes
            for b in intervals[:n]:
                together = a.start < b.end and b.start < a.end and a.size and b.size
                assert not together or a.offset + a.size <= b.offset or b.offset + b.size <= a.offset


def test_whose_accumulators_live_at_the_peak():
    plan = ArenaPlan.of(
        [Interval(640, 1, 4, "a"), Interval(640, 2, 3, "b"), Interval(640, 4, 9, "c"), Interval(64, 5, 6)]
    )
    assert plan.live_bytes == 1280 and plan.at_the_peak() == {"a", "b"}


def test_arena_plan_of_nothing():
    plan = ArenaPlan.of([])
    assert (plan.planned_bytes, plan.live_bytes, plan.all_at_once_bytes) == (0, 0, 0)


def test_the_arena_hands_out_what_was_recorded_and_counts_what_was_not():
    arena = Arena()

    def run(sizes):
        kept = []
        for size in sizes:
            t, block = arena.allocate((size,), torch.int8)
            kept = [(t, block), *kept[:1]]

    with arena.recording() as found:
        run([100, 200, 300])
    assert found[0].live_bytes == found[0].planned_bytes == 128 + 256 + 320
    with arena.running(found[0], torch.device("cpu")):
        run([100, 200, 300])
    assert arena.measured_bytes == found[0].planned_bytes
    with arena.running(found[0], torch.device("cpu")):
        run([100, 200, 999])
    assert arena.measured_bytes == found[0].planned_bytes + 1024
    with pytest.raises(RuntimeError, match="no pass"):
        arena.allocate((1,), torch.int8)


class Changing(nn.Module):
    """Keeps an intermediate longer from its second step on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.late = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64), False

    def forward(self, x):
        h = self.a(x)
        kept = h if self.late else None
        y = self.b(h)
        del h
        y = self.c(y)
        return y if kept is None else y + kept


def test_a_forward_that_changes_stays_correct():
    x, y = Int8Tensor(ints((8, 64), 3), torch.tensor([-5], dtype=torch.int32)), torch.arange(8)
    found = []
    for warm in (False, True):
        model = overwrite(ezo.convert_(Changing(), precision="int8"))
        opt = ezo.ElasticZOInt8(model, bits=-8, rounding="nearest")
        if warm:
            opt.train_step(x, y)
            opt._step.zero_()
        model.late = True
        opt.train_step(x, y)
        found.append(opt.losses.tolist())
    assert found[0] == found[1]


def test_an_input_of_another_size_gets_a_plan_of_its_own():
    model, plain = lenet(("fc3",)), lenet(("fc3",))
    opt = ezo.ElasticZOInt8(model)
    for i, rows in enumerate((8, 3, 16, 8)):
        opt.train_step(*lenet_batch(rows, i))
        alone = ezo.ElasticZOInt8(plain)
        alone._step.fill_(i)
        alone.train_step(*lenet_batch(rows, i))
    assert same(state(model), state(plain)) and len(opt._plans) == 3
    assert opt.memory()["planned_bytes"] == opt.memory()["measured_bytes"]


# ---- other models


class Residual(nn.Module):
    """A path beside a convolution, both kinds of average, modules and functions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.pool, self.last = nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = self.pool(F.relu(x + self.conv(x)))
        return self.fc(torch.flatten(self.last(x), 1))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("head", [0, ["fc"]], ids=str)
def test_a_residual_network_trains_alike_however_it_runs(head):
    runs = []
    for strategy, mode in (("buffer", "stacked"), ("twice", "stacked"), ("auto", "sequential")):
        model = overwrite(ezo.convert_(Residual(), head=head, precision="int8"))
        opt = ezo.ElasticZOInt8(model, queries=2, strategy=strategy, mode=mode, bits=3)
        for i in range(3):
            x = Int8Tensor(ints((4, 2, 6, 6), i), torch.tensor([-5], dtype=torch.int32))
            opt.train_step(x, torch.arange(4) % 3)
        runs.append({**state(model), "losses": opt.losses})
        assert opt.memory()["planned_bytes"] == opt.memory()["measured_bytes"]
    assert all(same(runs[0], other) for other in runs[1:])
    assert len(set(runs[0]["losses"].tolist())) > 1


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


def test_sequential_of_modules_trains_and_its_loss_falls():
    """Two classes told by one pixel: nothing but plain modules, an integer for the head."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Identity(), nn.Linear(8, 2))
    overwrite(ezo.convert_(model, head=1, precision="int8"))
    for exponent in model.buffers():
        exponent.fill_(-6)
    y = torch.arange(32) % 2
    values = ints((32, 2, 2), 1, -10, 10)
    values[:, 0, 0] += torch.where(y == 1, 80, -80).to(torch.int8)
    opt = ezo.ElasticZOInt8(model, head_bits=3)
    seen = []
    for _ in range(60):
        opt.train_step(Int8Tensor(values, torch.tensor([-5], dtype=torch.int32)), y)
        seen.append(opt.mean_loss.item())
    assert sum(seen[-5:]) < 0.3 * sum(seen[:5])


def test_filter_fn_leaves_layers_alone():
    model = ezo.convert_(Tiny(), head=["fc2"], precision="int8", filter_fn=lambda m, name: name != "fc1")
    overwrite(model, TINY_EXPONENTS)
    before, opt = state(model), ezo.ElasticZOInt8(model, r_max=40, p_zero=0.0, bits=7, head_bits=7)
    assert [s.names[0] for s in model._ezo.manifest] == ["conv.bias", "conv.weight"]
    steps(opt, 2, tiny_batch, 3)
    changed = {k for k, v in state(model).items() if not torch.equal(v, before[k])}
    assert changed == {"conv.weight", "conv.bias", "fc2.weight", "fc2.bias"}


def test_state_dict_holds_integers_and_their_exponents():
    found = tiny(("fc2",)).state_dict()
    names = {f"{m}.{leaf}" for m in ("conv", "fc1", "fc2") for leaf in ("weight", "bias")}
    assert set(found) == names | {n + "_exponent" for n in names}
    assert all(found[n].dtype == torch.int8 for n in names)
    assert all(t.dtype == torch.int32 and t.shape == (1,) for n, t in found.items() if n.endswith("exponent"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_unconvert_gives_exact_floats_in_the_original_classes(dtype):
    if dtype == torch.float64:
        with pytest.raises(NotImplementedError, match="conv"):
            ezo.convert_(Tiny().to(dtype), precision="int8")
        return
    plain = Tiny().to(dtype)
    plain.fc2.bias.requires_grad_(False)
    parameters = dict(plain.named_parameters())
    model = ezo.convert_(plain, head=["fc2"], precision="int8")
    want = {n: p.double() * 2.0 ** model.get_buffer(n + "_exponent").item() for n, p in model.named_parameters()}
    ezo.unconvert_(model)
    assert type(model.conv) is nn.Conv2d and type(model.fc1) is type(model.fc2) is nn.Linear
    assert set(model.state_dict()) == set(want) and not dict(model.named_buffers())
    for name, p in model.named_parameters():
        assert p is parameters[name] and p.dtype == dtype and torch.equal(p.double(), want[name])
        assert p.requires_grad == (name != "fc2.bias")
    assert model(torch.zeros(1, 2, 6, 6, dtype=dtype)).dtype == dtype
    ezo.convert_(model, head=["fc2"], precision="int8")
    assert all(torch.equal(p.double() * 2.0 ** model.get_buffer(n + "_exponent").item(), want[n])
               for n, p in model.named_parameters())  # fmt: skip


def test_conversion_rounds_to_the_least_exponent():
    """Halves away from zero, 127 at most, -7 for zeros; a bias of zeros takes its weight's exponent."""
    model = nn.Sequential(nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -0.5, 0.0234375, -0.0234375]]))
        model[0].bias.zero_()
    ezo.convert_(model, precision="int8")
    assert model[0].weight.tolist() == [[64, -32, 2, -2]] and model[0].weight_exponent.tolist() == [-6]
    assert model[0].bias.tolist() == [0] and model[0].bias_exponent.tolist() == [-6]


def test_a_lone_layer_is_a_model():
    assert ezo.convert_(nn.Linear(4, 1), precision="int8").weight.dtype == torch.int8


def test_methods_that_the_conversion_allows_are_there():
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return x.add(self.a(x))

    model = ezo.convert_(Added(), precision="int8")
    ezo.ElasticZOInt8(model).train_step(ints((3, 4), 0), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("precision", ["int8", "float"])
def test_a_second_conversion_is_refused(precision):
    model = tiny()
    before = state(model)
    with pytest.raises(ValueError, match="already"):
        ezo.convert_(model, precision=precision)
    with pytest.raises(ValueError, match="already"):
        ezo.convert_(nn.Sequential(model.fc1, nn.Linear(5, 2)), precision=precision)
    assert same(before, state(model))


def test_quantize_images_is_plain_integers():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    for name, offset in (("mnist", 33), ("fashion_mnist", 73), ("digits", 57)):
        x = quantize_images(images, name)
        want = [(1 if p >= offset else -1) * ((abs(p - offset) + 1) // 2) for p in range(256)]
        assert x.values.flatten().tolist() == want and x.exponent.tolist() == [-5] and x.shape == (1, 1, 16, 16)


def test_layers_run_outside_a_step_with_the_weights_as_they_are():
    model = lenet(("fc3",))
    x, _ = lenet_batch(4)
    before = model(x)
    steps(ezo.ElasticZOInt8(model, bits=-8, head_bits=-8, rounding="nearest", head_rounding="nearest"), 1)
    after = model(x)
    assert torch.equal(before.values, after.values) and torch.equal(before.exponent, after.exponent)


def test_closure_steps_are_train_steps():
    """The same g and weights, the loss called by the user, once a group."""
    ours, theirs = tiny(), tiny()
    a, b = ezo.ElasticZOInt8(ours, queries=2, bits=4), ezo.ElasticZOInt8(theirs, queries=2, bits=4)
    for i in range(3):
        x, y = tiny_batch(i)
        a.train_step(x, y)
        b.step(lambda x=x, y=y: ezo.ops.int8_cross_entropy(theirs(x), y))
        assert torch.equal(a.losses, b.losses) and torch.equal(a.g, b.g)
    assert same(state(ours), state(theirs))


def test_a_float_loss_decides_the_sign_alone():
    model, other = tiny(), tiny()
    x, y = tiny_batch()
    opt = ezo.ElasticZOInt8(model, loss="float_cross_entropy", bits=4)
    opt.train_step(x, y)
    assert opt.losses.is_floating_point() and opt.g.dtype == torch.int32
    again = ezo.ElasticZOInt8(other, loss="float_cross_entropy", bits=4)
    again.train_step(x, y, loss_fn=lambda logits, y: -F.cross_entropy(logits, y))
    assert torch.equal(opt.g, -again.g) and opt.g.item()
    moves = [
        {n: p.int() - q for (n, p), q in zip(m.named_parameters(), tiny().parameters(), strict=True)}
        for m in (model, other)
    ]
    assert all(torch.equal(moves[0][n], -moves[1][n]) for n in moves[0])


# ---- refusals


class Stray(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(4, 2), nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.fc(x) * self.scale


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return F.gelu(self.fc(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(x))


def with_nan() -> nn.Module:
    model = Tiny()
    model.fc1.weight.data[0, 0] = float("nan")
    return model


UNFIT = {
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), 0, r"1 \(BatchNorm1d\).*fold"),
    "batch norm 2d": (lambda: nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)), 0, r"1 \(BatchNorm2d\).*fold"),
    "sigmoid": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()), 0, r"1 \(Sigmoid\).*ReLU"),
    "gelu": (Functional, 0, "gelu"),
    "stray": (Stray, 0, r"the model \(Stray\)"),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), 0, r"1 \(Dropout\).*rate"),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(1, 1, 1)), 0, r"0 \(Conv1d\).*Conv2d"),
    "tied": (Tied, 0, r"'one.weight' and 'two.weight'"),
    "conv in the head": (Tiny, 3, r"conv \(Conv2d\).*cut"),
    "nan": (with_nan, 0, r"fc1 \(Linear\).*not finite"),
    "terms": (lambda: nn.Sequential(nn.Linear(99_337, 1)), 0, r"0 \(Linear\).*99337.*99336"),
    "reflect": (lambda: nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")), 0, "0 .*'reflect'"),
    "even same": (lambda: nn.Sequential(nn.Conv2d(1, 1, 2, padding="same")), 0, "0 .*'same'"),
    "embedding": (lambda: nn.Sequential(nn.Embedding(3, 4)), 0, r"0 \(Embedding\)"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_model_without_an_integer_form_is_refused_by_name(case):
    make, head, match = UNFIT[case]
    model = make()
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    classes = [type(m) for m in model.modules()]
    with pytest.raises(NotImplementedError, match=match):
        ezo.convert_(model, head=head, precision="int8")
    assert [type(m) for m in model.modules()] == classes and [p.requires_grad for p in model.parameters()] == flags
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k, v in model.state_dict().items())


def test_all_problems_are_listed_at_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.BatchNorm1d(4))
    with pytest.raises(NotImplementedError, match=r"(?s)1 \(Sigmoid\).*2 \(BatchNorm1d\)"):
        ezo.convert_(model, precision="int8")


def test_the_longest_sum_is_accepted():
    model = ezo.convert_(nn.Sequential(nn.Linear(99_336, 1)), precision="int8")
    opt = ezo.ElasticZOInt8(model)
    opt.train_step(torch.full((1, 99_336), -128, dtype=torch.int8), torch.zeros(1, dtype=torch.int64))


def test_a_dropout_of_rate_zero_is_no_obstacle():
    """The advice for another rate is to set it to zero."""
    model = ezo.convert_(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0), nn.Linear(4, 2)), precision="int8")
    ezo.ElasticZOInt8(model).train_step(ints((3, 4), 0), torch.zeros(3, dtype=torch.int64))


BAD_ARGUMENTS = [
    (dict(r_max=0), ValueError, "0"), (dict(r_max=128), ValueError, "128"),
    (dict(p_zero=1.0), ValueError, "1.0"), (dict(p_zero=-0.1), ValueError, "-0.1"),
    (dict(bits=-9), ValueError, "^bits.*-9"), (dict(bits=8), ValueError, "^bits.*8"), (dict(bits=1.5), TypeError, "^bits"),
    (dict(bits=True), TypeError, "^bits"), (dict(head_bits=-9), ValueError, "^head_bits.*-9"),
    (dict(head_bits=8), ValueError, "^head_bits.*8"), (dict(head_bits=1.5), TypeError, "^head_bits"),
    (dict(queries=0), ValueError, "queries.*0"), (dict(queries=-1), ValueError, "queries.*-1"),
    (dict(queries=1.0), TypeError, "queries"), (dict(seed=-1), ValueError, "seed"), (dict(seed=2**64), ValueError, "seed"),
    (dict(loss="mse"), ValueError, "loss.*'mse'"), (dict(mode="both"), ValueError, "mode.*'both'"),
    (dict(strategy="thrice"), ValueError, "strategy.*'thrice'"), (dict(rounding="down"), ValueError, "rounding.*'down'"),
    (dict(head_rounding="down"), ValueError, "rounding.*'down'"),
    (dict(activation_rounding="stochastic"), ValueError, "activation_rounding.*'stochastic'"),
    (dict(head_grad="both"), ValueError, "head_grad.*'both'"), (dict(fraction_bits=9), ValueError, "fraction_bits"),
    (dict(fraction_bits=-1), ValueError, "fraction_bits"), (dict(rounds=8), ValueError, "rounds"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "error", "match"), BAD_ARGUMENTS, ids=lambda v: str(v) if isinstance(v, dict) else ""
)
def test_arguments_out_of_range_are_refused_by_name(arguments, error, match):
    with pytest.raises(error, match=match):
        ezo.ElasticZOInt8(TINY, **arguments)


TINY = tiny(("fc2",))


def test_an_r_max_that_is_no_integer_is_refused():
    with pytest.raises(TypeError, match="r_max"):
        ezo.ElasticZOInt8(TINY, r_max=1.5)


def test_models_that_are_not_converted_so_are_refused():
    with pytest.raises(ValueError, match="not converted"):
        ezo.ElasticZOInt8(Tiny())
    with pytest.raises(ValueError, match="precision='int8'"):
        ezo.ElasticZOInt8(ezo.convert_(Tiny()))
    with pytest.raises(ValueError, match="precision.*'int4'"):
        ezo.convert_(Tiny(), precision="int4")
    frozen = Tiny().requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        ezo.ElasticZOInt8(ezo.convert_(frozen, precision="int8"))


def bad_inputs():
    x, y = tiny_batch()
    one = torch.tensor([-5], dtype=torch.int32)
    return {
        "float x": ((x.dequantize(), y), TypeError, "float32"),
        "numbers": (([1, 2], y), TypeError, "list"),
        "empty": ((Int8Tensor(x.values[:0], one), y[:0]), ValueError, r"\(0, 2, 6, 6\)"),
        "two groups": ((Int8Tensor(x.values[:2], one.repeat(2)), y[:1]), ValueError, "one group"),
        "channels": ((Int8Tensor(x.values[:, :1], one), y), ValueError, "1"),
        "three dimensions": ((Int8Tensor(x.values[0], one), y), ValueError, "3"),
        "float labels": ((x, y.float()), TypeError, "float32"),
        "int32 labels": ((x, y.int()), TypeError, "int32"),
        "a label too large": ((x, y + 2), ValueError, r"\[0, 4\).*4"),
        "a label below zero": ((x, y - 1), ValueError, r"\[0, 4\).*-1"),
        "labels too few": ((x, y[:2]), ValueError, r"\(2,\)"),
        "one-hot labels": ((x, y[:, None]), ValueError, r"\(3, 1\)"),
        "float loss": ((x, y, F.cross_entropy), ValueError, "float_cross_entropy"),
    }


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later"])
@pytest.mark.parametrize("mode", ["stacked", "sequential"])
@pytest.mark.parametrize("case", bad_inputs())
def test_a_step_that_is_refused_changes_nothing(case, mode, first):
    """Weights and counters are as before, and the next good step is as if it had not been."""
    arguments, error, match = bad_inputs()[case]
    model, other = tiny(("fc2",)), tiny(("fc2",))
    opts = [ezo.ElasticZOInt8(m, mode=mode, bits=3, head_bits=3) for m in (model, other)]
    if not first:
        for opt in opts:
            opt.train_step(*tiny_batch())
    before, counted = state(model), opts[0].step_count.item()
    with pytest.raises(error, match=match):
        opts[0].train_step(*arguments)
    assert same(before, state(model)) and opts[0].step_count.item() == counted
    for opt in opts:
        opt.train_step(*tiny_batch(1))
    assert same(state(model), state(other)) and not same(state(model), before)
    assert torch.equal(opts[0].losses, opts[1].losses)


def test_the_float_input_of_a_layer_is_refused_by_its_class():
    model = tiny()
    for layer, x in ((model.conv, torch.zeros(1, 2, 6, 6)), (model.fc1, torch.zeros(1, 12))):
        with pytest.raises(TypeError, match=f"{type(layer).__name__}.*float32.*quantize"):
            layer(x)


def test_a_closure_that_gives_no_loss_changes_nothing():
    model = tiny()
    opt, before = ezo.ElasticZOInt8(model), state(model)
    for bad in (lambda: 1.0, lambda: torch.zeros(2)):
        with pytest.raises(ValueError, match="one element"):
            opt.step(bad)
    with pytest.raises(ValueError, match="closure"):
        opt.step()
    with pytest.raises(ValueError, match="not visited.*conv.weight"):
        opt.step(lambda: torch.zeros(1))
    assert same(before, state(model)) and opt.step_count.item() == 0
    with pytest.raises(ValueError, match="train_step"):
        ezo.ElasticZOInt8(tiny(("fc2",))).step(lambda: torch.zeros(1))


class Skipping(Tiny):
    """Calls not all of its layers until it is told to."""

    def __init__(self, skipped: str) -> None:
        super().__init__()
        self.skipped = skipped
        self.extra, self.tail = nn.Linear(12, 12), nn.Linear(4, 4)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv(x), 2)).flatten(1)
        if self.skipped != "extra":
            x = self.extra(x)
        x = self.fc2(F.relu(self.fc1(x)))
        return x if self.skipped == "tail" else self.tail(x)


@pytest.mark.parametrize("skipped", ["extra", "tail"])
def test_a_layer_that_the_forward_does_not_call_is_named(skipped):
    """In the trunk and in the head."""
    models = [overwrite(ezo.convert_(Skipping(s), head=["fc2", "tail"], precision="int8")) for s in (skipped, "")]
    before = state(models[0])
    opts = [ezo.ElasticZOInt8(m, bits=3, head_bits=3) for m in models]
    with pytest.raises(ValueError, match=f"'{skipped}.bias', '{skipped}.weight'|'{skipped}.weight', '{skipped}.bias'"):
        opts[0].train_step(*tiny_batch())
    assert same(before, state(models[0])) and opts[0].step_count.item() == 0
    models[0].skipped = ""
    for opt in opts:
        opt.train_step(*tiny_batch())
    assert same(state(models[0]), state(models[1]))


class Leaving(Tiny):
    """With control flow, so that no trace warns of it at the conversion."""

    def forward(self, x):
        y = super().forward(x)
        return y.dequantize() if len(x) else y


def test_a_model_that_returns_a_float_is_refused():
    model = ezo.convert_(Leaving(), precision="int8")
    opt, before = ezo.ElasticZOInt8(model), state(model)
    with pytest.raises(TypeError, match="Int8Tensor, got Tensor"):
        opt.train_step(*tiny_batch())
    assert same(before, state(model)) and opt.step_count.item() == 0


def test_more_rows_than_a_gradient_of_the_head_can_sum_are_refused():
    model = overwrite(ezo.convert_(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), head=["1"], precision="int8"))
    opt, before = ezo.ElasticZOInt8(model), state(model)
    with pytest.raises(ValueError, match="1.weight: its gradient sums 99338 products over 2 groups.*99336"):
        opt.train_step(torch.zeros(49_669, 1, dtype=torch.int8), torch.zeros(49_669, dtype=torch.int64))
    assert same(before, state(model))
    opt.train_step(torch.zeros(49_668, 1, dtype=torch.int8), torch.zeros(49_668, dtype=torch.int64))


def test_more_terms_than_a_gradient_of_the_head_can_sum_are_refused():
    """[B, T, K]: the gradient sums B T groups products."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(30_000, 2)

        def forward(self, x):
            return self.c(self.b(self.a(x)).flatten(1))

    model = overwrite(ezo.convert_(Tokens(), head=["b", "c"], precision="int8"))
    with pytest.raises(ValueError, match="b.weight.*120000 products"):
        ezo.ElasticZOInt8(model).train_step(
            torch.ones(2, 30_000, 1, dtype=torch.int8), torch.zeros(2, dtype=torch.int64)
        )


BAD_STATES = {
    "numerics": (lambda s: s.update(numerics_version="ezo-int8-0"), "numerics_version.*ezo-int8-0"),
    "noise": (lambda s: s.update(rng_version="ezo-1/philox4x32-10"), "rng_version"),
    "recipe": (lambda s: s.update(queries=2), "queries"),
    "loss": (lambda s: s.update(loss="squared_error"), "loss"),
    "fraction": (lambda s: s.update(fraction_bits=0), "fraction_bits"),
    "head_grad": (lambda s: s.update(head_grad="plus"), "head_grad"),
    "rounding": (lambda s: s.update(rounding=["pseudo", "stochastic"]), "rounding"),
    "head": (lambda s: s.update(head=[]), "head"),
    "model": (lambda s: s["manifest"][0][2].append(1), "manifest"),
    "a stranger's": (lambda s: s.clear(), "lacks"),
    "groups": (lambda s: s["param_groups"].pop(), None),
    "bits": (lambda s: s["param_groups"][0].update(bits=99), "99"),
    "activations": (lambda s: s["rounding"].__setitem__(2, "pseudo"), "rounding"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_state_of_another_run_is_refused_and_changes_nothing(case):
    spoil, match = BAD_STATES[case]
    opt = ezo.ElasticZOInt8(tiny(("fc2",)))
    saved = copy.deepcopy(opt.state_dict())
    saved["step"] += 5
    spoil(saved)
    with pytest.raises(ValueError, match=match):
        opt.load_state_dict(saved)
    assert opt.step_count.item() == 0 and opt.param_groups[0]["bits"] == 1


def test_a_third_param_group_is_refused():
    with pytest.raises(NotImplementedError, match="convert_"):
        ezo.ElasticZOInt8(tiny()).add_param_group({"params": []})


def test_a_failed_forward_does_not_wedge_the_model():
    """The pass and the arena are closed again when a layer raises, in a trial as in a pass."""
    model = lenet()
    opt = ezo.ElasticZOInt8(model)
    hook = model.fc2.register_forward_pre_hook(lambda m, x: (_ for _ in ()).throw(KeyError("mine")))
    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            steps(opt, 1)
    hook.remove()
    other = ezo.ElasticZOInt8(lenet())
    assert steps(opt, 2) == steps(other, 2) and same(state(model), state(other.model))


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
