"""ElasticZO-INT8 as a whole: against the oracle of plain integers, frozen, resumed, without floats, in its memory."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import random
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ezo_kernels as ezo
from bench.memory import paper_tally
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
    head, queries, mode, strategy, head_grad, rounding, head_rounding, activations, width, head_width, fraction, rounds = (
        recipe
    )
    seed = 2**63 + 11
    shared = dict(
        r_max=40, p_zero=0.3, bits=width, head_bits=head_width, queries=queries, head_grad=head_grad, rounding=rounding,
        head_rounding=head_rounding, activation_rounding=activations, rounds=rounds,
    )  # fmt: skip
    model = tiny(HEADS[head])
    opt = ezo.ElasticZOInt8(
        model, seed=seed, mode=mode, strategy=strategy, fraction_bits=fraction, **shared
    )
    run = oracle_of(model, opt, seed, stacked=mode == "stacked", fraction=fraction, **shared)
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
@pytest.mark.xfail(strict=True, reason="a layer with one frozen parameter perturbs it with the z of site 0")
def test_half_a_frozen_layer_is_not_perturbed_there(leaf):
    how = dict(r_max=40, p_zero=0.3, bits=2)
    plain = Tiny()
    getattr(plain.fc1, leaf).requires_grad_(False)
    model = overwrite(ezo.convert_(plain, precision="int8"), TINY_EXPONENTS)
    opt = ezo.ElasticZOInt8(model, seed=5, **how)
    run = oracle_of(model, opt, 5, **how)
    x, y = tiny_batch()
    opt.train_step(x, y)
    run.train_step([row.flatten().tolist() for row in x.values], -5, y.tolist())
    assert opt.losses.tolist() == run.losses


def test_the_head_alone_is_the_oracles():
    """head="all": one group, nothing perturbed, NITI's backpropagation through all layers."""
    model = overwrite(ezo.convert_(ezo.models.MLP(7, 6, 5, 4), head="all", precision="int8"))
    opt = ezo.ElasticZOInt8(model, head_bits=4, seed=1)
    parameters = {
        name: oracle.Parameter(p.flatten().tolist(), -9 if "weight" in name else -8, tuple(p.shape), None, 2**32 - 2 - i)
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


@pytest.mark.parametrize(
    "head",
    [
        (),
        pytest.param(
            ("fc3",),
            marks=pytest.mark.xfail(
                strict=True, reason="the words that round the head's error are of query 0 in every sequential pass"
            ),
        ),
    ],
)
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
        own = {layer.strategy for layer in opt._layers}
        assert own == ({strategy} if strategy != "auto" else {"buffer", "twice"})
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])


@pytest.mark.xfail(strict=True, reason="the arena keeps the first optimiser's plan, and with it the layers' strategy")
def test_a_second_optimizer_has_its_own_strategy():
    model = lenet()
    for strategy in ("buffer", "twice"):
        opt = ezo.ElasticZOInt8(model, strategy=strategy)
        steps(opt, 1)
    assert {layer.strategy for layer in opt._layers} == {"twice"}


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
    opt = ezo.ElasticZOInt8(model, p_zero=0.0, r_max=127, bits=-8, head_bits=-8, rounding="nearest", head_rounding="nearest")
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


class Live(TorchDispatchMode):
    """Bytes of storages that were made inside and are alive: now, and at most."""

    def __init__(self, known=()) -> None:
        super().__init__()
        self.refs, self.known = {}, {t.untyped_storage()._cdata for t in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in leaves(out):
            storage = t.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self.known or key in self.refs or t.is_meta:
                continue

            def gone(_, key=key, size=size):
                self.now -= size
                del self.refs[key]

            self.refs[key] = weakref.ref(storage, gone)
            self.now += size
            self.peak = max(self.peak, self.now)
        return out


def test_live_counts_bytes():
    with Live() as live:
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
    with Live(known) as live:
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
    with Live(known) as live:
        opt.train_step(x, y)
    of_head = sum(p.numel() for p in opt.head)
    assert live.peak < 4 * of_head * (2 + 2 + 1) + 2 * 64 * 120 * (4 + 1) + 8192


def fp32_peak(rows: int) -> int:
    """Live bytes of a stacked fp32 step, and of its parameters."""
    model = ezo.convert_(ezo.models.LeNet5(), head=0)
    opt = ezo.ElasticZO(model)
    x, y = torch.zeros(rows, 1, 28, 28), torch.arange(rows) % 10
    opt.train_step(x, y)
    with Live([x, y, *model.parameters()]) as live:
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


@pytest.mark.xfail(strict=True, reason="a place is handed out by size and order, though what is in it still lives")
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
    assert same(state(model), state(plain)) and len(opt.arena.plans) == 3
    assert opt.memory()["planned_bytes"] == opt.memory()["measured_bytes"]


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
