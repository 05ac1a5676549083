"""Integer kernels against the CPU reference: losses, gradients and updates."""

from __future__ import annotations

import pytest
import torch
from test_int8 import SITE, compare, exponent, ints, tensor

from ezo_kernels.ops import (
    int8_head,
    int8_linear,
    int8_loss,
    int8_matmul,
    int8_update,
)
from ezo_kernels.ops._int8_update_triton import update_table
from ezo_kernels.ops.int8_pass import IntegerPerturbation
from ezo_kernels.ops.int8_tensor import Int8Tensor
from ezo_kernels.ops.noise import Noise

# ------------------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("fraction", range(9))
def test_cross_entropy(on_cpu, fraction):
    exponents = [-64, -30, -20, -12, -7, -5, -3, 0, 3, 10, 64]
    for classes in (2, 10) if fraction in (0, 8) else (10,):
        x = tensor(3 * len(exponents), classes, low=-128, exponents=exponents, seed=fraction)
        compare(
            on_cpu,
            int8_loss.int8_cross_entropy,
            x,
            ints(3, low=0, high=classes, dtype=torch.int64),
            fraction_bits=fraction,
        )


@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (5, 2500), (130, 7)])
def test_cross_entropy_shapes(on_cpu, rows, classes):
    x = tensor(2 * rows, classes, low=-128, exponents=[-4, -5])
    labels = ints(rows, low=0, high=classes, dtype=torch.int64)
    compare(on_cpu, int8_loss.int8_cross_entropy, x, labels)
    same_logits = Int8Tensor(torch.full((2 * rows, classes), -128, dtype=torch.int8), x.exponent)
    compare(on_cpu, int8_loss.int8_cross_entropy, same_logits, labels)


@pytest.mark.parametrize("gradient", [False, True])
def test_squared_error(on_cpu, gradient):
    exponents = [-64, -9, -8, -7, 0, 1, 13, 14, 40]
    y = tensor(3 * len(exponents), 5, 81, low=-128, exponents=exponents)
    for of_target in (-7, 0):
        target = tensor(3, 5, 81, low=-128, seed=1, exponents=[of_target])
        compare(on_cpu, int8_loss.int8_squared_error, y, target, gradient=gradient)


@pytest.mark.parametrize(("rows", "classes"), [(33, 10), (1, 1), (3, 1300)])
def test_gradient(on_cpu, key, rows, classes):
    """Both branches, and what is beyond the second's limit of -24."""
    exponents = [-64, -25, -24, -16, -8, -7, -6, -1, 0, 1, 40] if classes == 10 else [-8, -5]
    x = tensor(rows * len(exponents), classes, low=-128, exponents=exponents)
    labels = ints(rows, low=0, high=classes, dtype=torch.int64)
    compare(on_cpu, int8_loss.int8_cross_entropy_gradient, x, labels, key, rounds=7)
    extreme = torch.full_like(x.values, -128)
    extreme[:, 0] = 127
    compare(on_cpu, int8_loss.int8_cross_entropy_gradient, Int8Tensor(extreme, x.exponent), labels, key, rounds=10)


# ------------------------------------------------------------------------------------------------------------ updates


def plan(params, sites, layouts):
    table = update_table(params, sites, layouts)
    of = int8_update.Int8UpdatePlan
    return of(tuple(sites), tuple(layouts), tuple(map(of._address, params)), table)


PARAMS = [
    ("matrix", (20, 272)), ("matrix", (5,)), ("matrix", (33, 7)), ("matrix", ()), ("matrix", (0, 4)), ("conv", (6, 5, 3, 3)),
    ("conv", (6, 1, 5, 5)), ("conv", (3, 9, 1, 1)), ("matrix", (2, 3, 4)), ("conv", (4, 130, 2)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rounding", "r_max", "bits", "p_zero"),
    [
        ("nearest", 1, 1, 0.99), ("nearest", 15, 1, 0.5), ("pseudo", 15, 3, 0.5), ("pseudo", 127, -8, 0.0),
        ("stochastic", 15, -8, 0.0), ("stochastic", 15, 1, 0.5), ("stochastic", 127, 7, 0.0), ("stochastic", 1, 0, 0.99),
    ],
)  # fmt: skip
def test_update(on_cpu, key, rounding, r_max, bits, p_zero):
    noise = Noise("sparse_int8", p_zero=p_zero, r_max=r_max)
    shift = exponent(int8_update.update_shift(bits, r_max))
    layouts = [layout for layout, _ in PARAMS]
    sites = [SITE + i for i in range(len(PARAMS))]
    ours = [ints(*shape, seed=i, low=-128) for i, (_, shape) in enumerate(PARAMS)]
    theirs = [w.clone() for w in ours]
    g = torch.tensor([1, 0, -1, 1], dtype=torch.int32)
    options = {"sites": sites, "layouts": layouts, "noise": noise, "query": 4, "rounding": rounding}
    steps = torch.tensor([8]), torch.tensor([8])
    int8_update.int8_update_(ours, key, g, shift, plan=plan(ours, sites, layouts), step=steps[0], **options)
    on_cpu(int8_update.int8_update_, theirs, key, g, shift, step=steps[1], **options)
    for a, b in zip([*ours, *steps], [*theirs, torch.tensor([9]), torch.tensor([9])], strict=True):
        assert torch.equal(a, b)


def test_update_of_zero_leaves_every_bit_alone(on_cpu, key):
    """But for the step, which counts."""
    for shift in (0, 31):
        w, g = torch.full((9, 32), -128, dtype=torch.int8), torch.zeros(3, dtype=torch.int32)
        before, step = w.clone(), torch.tensor([8])
        int8_update.int8_update_([w], key, g, exponent(shift), sites=[1], plan=plan([w], [1], ["matrix"]), step=step)
        assert torch.equal(w, before) and step.item() == 9
        on_cpu(int8_update.int8_update_, [w], key, g, exponent(shift), sites=[1], step=step)
        assert torch.equal(w, before) and step.item() == 10
        g[1] = 1
        int8_update.int8_update_([w], key, g, exponent(shift), sites=[1], plan=plan([w], [1], ["matrix"]))
        on_cpu(int8_update.int8_update_, [before], key, g, exponent(shift), sites=[1])
        assert torch.equal(w, before)


def test_the_forward_and_the_update_make_the_same_z(key):
    """w = 0 times one-hot x is z itself; the update by it, unshifted, leaves -z."""
    noise = Noise("sparse_int8", p_zero=0.33, r_max=63)
    p = IntegerPerturbation(key, noise, 6, 1, (1,))
    x = Int8Tensor(torch.eye(70, dtype=torch.int8), exponent(0))
    y = int8_linear(x, torch.zeros(33, 70, dtype=torch.int8), None, p, weight_exponent=exponent(0), site=SITE)
    w = torch.zeros(33, 70, dtype=torch.int8)
    one = torch.ones(1, dtype=torch.int32)
    int8_update.int8_update_(
        [w], key, one, exponent(0), sites=[SITE], noise=noise, query=6, plan=plan([w], [SITE], ["matrix"])
    )
    assert y.exponent.item() == 0 and y.values.any() and torch.equal(-w, y.values.t())


@pytest.mark.parametrize("spread", [0, 3, 31, 33, 100])
def test_sum_groups(on_cpu, spread):
    acc = ints(3, 7, 200, low=-(1 << 28), high=1 << 28, dtype=torch.int32)
    exponents = torch.tensor([-5 - spread, -5, -5 - spread // 2], dtype=torch.int32)
    compare(on_cpu, int8_head.sum_groups, acc, exponents)
    if spread:
        acc[0] = -(1 << 31)
        compare(on_cpu, int8_head.sum_groups, acc, exponents)


@pytest.mark.parametrize("gates", [1, 3])
def test_requantize_behind_a_gate(on_cpu, gates):
    acc, gate = ints(3 * 9, 50, low=-70000, high=70000, dtype=torch.int32), ints(gates * 9, 50, seed=1, low=-2, high=3)
    peak, exponents = acc.view(3, -1).abs().amax(1), torch.tensor([-3, 2, 0], dtype=torch.int32)
    how = (acc, peak, exponents, exponent(-7), "nearest")
    compare(on_cpu, int8_matmul.requantize, *how, gate)
    ours, plain = int8_matmul.requantize(*how, gate), int8_matmul.requantize(*how)
    shut = gate.view(gates, -1) <= 0
    assert torch.equal(ours.values, plain.values.view(3, -1).masked_fill(shut, 0).view_as(acc))
    assert torch.equal(ours.exponent, plain.exponent)


def head_of(shapes, groups, errors: int, seed: int):
    """Parameters and their gradients of each group: those of vectors as errors of so many rows, if any."""
    params, gradients = [], []
    for i, shape in enumerate(shapes):
        params.append(ints(*shape, seed=seed + i, low=-128))
        scale = 5 * 10**i
        if errors and len(shape) == 1:
            values = ints(groups, errors, *shape, seed=seed + 10 + i)
        else:
            values = ints(groups, *shape, seed=seed + 10 + i, low=-scale, high=scale + 1, dtype=torch.int32)
        exponents = torch.arange(groups, dtype=torch.int32) % 3 - 9
        strided = (-2 * exponents).repeat_interleave(2)[::2]  # as those of every other group are
        other = (None, torch.tensor([4], dtype=torch.int32), strided)[(i + 2) % 3]
        gradients.append(int8_head.HeadGradient(values, exponents, other))
    return params, gradients


@pytest.mark.parametrize(
    ("rounding", "ok", "remains"),
    [
        ("nearest", None, False), ("pseudo", True, False), ("stochastic", True, False), ("stochastic", None, True),
        ("nearest", True, True), ("pseudo", False, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("shapes", "most"),
    [([(9,)], 4), ([(5, 37), (5,), (70, 200), (70,)], 4), ([(3, 4), (3,)], 1), ([(2, 3, 4), (0,)], 4)],
)
def test_the_step_of_a_head(monkeypatch, on_cpu, key, shapes, most, remains, ok, rounding):
    """In one launch, or as many as a large head has: the bits of the reference, which makes one parameter after another."""
    monkeypatch.setattr(int8_head, "MOST_TENSORS", most)
    for errors, groups, bits in ((0, 1, 7), (40, 2, 1), (5, 3, -2)):
        (params, gradients), (others, _) = head_of(shapes, groups, errors, 0), head_of(shapes, groups, errors, 0)
        rests = [[ints(*shape, seed=7, low=-128) for shape in shapes] for _ in "ab"] if remains else [[], []]
        how = {"key": key, "sites": [SITE - i for i in range(len(shapes))], "rounding": rounding}
        how["ok"] = None if ok is None else torch.tensor(ok)
        int8_head.int8_head_step_(params, gradients, exponent(bits), **how, remainders=rests[0])
        on_cpu(int8_head.int8_head_step_, others, gradients, exponent(bits), **how, remainders=rests[1])
        for a, b in zip((*params, *rests[0]), (*others, *rests[1]), strict=True):
            assert torch.equal(a, b)
        start, _ = head_of(shapes, groups, errors, 0)
        assert (bits < 7 or remains) or ok is False or not all(map(torch.equal, params, start))
        assert ok is not False or all(map(torch.equal, params, start))


def test_the_step_of_a_head_is_that_of_each_parameter(key):
    params, gradients = head_of([(5, 37), (5,)], 2, 6, 0)
    others, rests = [w.clone() for w in params], [ints(*w.shape, seed=3) for w in params]
    others_rests = [rest.clone() for rest in rests]
    int8_head.int8_head_step_(
        params, gradients, exponent(2), key=key, sites=[8, 9], rounding="stochastic", remainders=rests
    )
    for w, rest, grad, site in zip(others, others_rests, gradients, (8, 9), strict=True):
        total, peak = int8_head.sum_groups(*grad.summed()[:2])
        how = {"key": key, "site": site, "rounding": "stochastic", "remainder": rest}
        int8_head.int8_head_update_(w, total, peak, exponent(2), **how)
    for a, b in zip((*params, *rests), (*others, *others_rests), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rounding", ["nearest", "pseudo", "stochastic"])
@pytest.mark.parametrize("bits", [-8, -1, 0, 1, 7])
def test_head_update(on_cpu, key, rounding, bits):
    for shape, largest in (((9,), 3), ((5, 37), 200), ((20, 300), (1 << 31) - 1), ((2, 3, 4), 1), ((3, 5), 0)):
        w = ints(*shape, low=-128)
        other = w.clone()
        grad = ints(*shape, seed=1, low=-largest, high=largest + 1, dtype=torch.int32)
        peak = grad.abs().max().reshape(1)
        options = {"key": key, "site": SITE, "rounding": rounding, "rounds": 7}
        int8_head.int8_head_update_(w, grad, peak, exponent(bits), **options)
        on_cpu(int8_head.int8_head_update_, other, grad, peak, exponent(bits), **options)
        assert torch.equal(w, other)
        before = ints(*shape, seed=2, low=-128)
        rests = before.clone(), before.clone()
        int8_head.int8_head_update_(w, grad, peak, exponent(bits), **options, remainder=rests[0])
        on_cpu(int8_head.int8_head_update_, other, grad, peak, exponent(bits), **options, remainder=rests[1])
        assert torch.equal(w, other) and torch.equal(*rests) and (largest == 200) <= (not torch.equal(before, rests[0]))
