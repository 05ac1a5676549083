"""Integers on a GPU: the bits of the CPU, in every operator and over whole runs. Marked ``gpu``."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

import ezo_kernels as ezo
from ezo_kernels import ops
from ezo_kernels.ops import Int8Tensor, IntegerPerturbation, Noise, _int8_conv2d_triton, _int8_matmul_triton
from ezo_kernels.ops.noise import key_tensor
from tests.int8_models import LENET_HEADS, ints, lenet, lenet_batch, same, state

pytestmark = pytest.mark.gpu


def tensor(*shape, groups: int = 1, seed: int = 0, device="cuda") -> Int8Tensor:
    exponent = torch.arange(groups, dtype=torch.int32) - 6
    return Int8Tensor(ints((groups * shape[0], *shape[1:]), seed, -128), exponent).to(device)


def pass_(device, signs=(1, -1), queries: int = 2, p_zero: float = 0.5, r_max: int = 15) -> IntegerPerturbation:
    return IntegerPerturbation(key_tensor(1, 2, device), Noise("sparse_int8", 7, p_zero, r_max), 3, queries, signs)


def one(value: int, device) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int32, device=device)


def equal(a: Int8Tensor, b: Int8Tensor) -> bool:
    return torch.equal(a.values.cpu(), b.values.cpu()) and torch.equal(a.exponent.cpu(), b.exponent.cpu())


@pytest.mark.parametrize("strategy", ["buffer", "twice"])
@pytest.mark.parametrize("signs", [(1, -1), (1,), (0,)], ids=str)
@pytest.mark.parametrize(
    ("rows", "n", "k"), [(1, 17, 5), (33, 130, 257), (200, 64, 512), (32, 120, 784), (16, 4096, 4096)]
)
def test_linear(rows, n, k, signs, strategy):
    made = []
    for device in ("cuda", "cpu"):
        p = pass_(device, signs)
        x = tensor(rows, k, groups=p.groups, device=device)
        w, b = ints((n, k), 1).to(device), ints((n,), 2).to(device)
        options = {"weight_exponent": one(-8, device), "bias_exponent": one(-9, device), "site": 3, "bias_site": 4}
        made.append(ops.int8_linear(x, w, b, p, strategy=strategy, **options))
    assert equal(*made)


@pytest.mark.parametrize("strategy", ["buffer", "twice"])
@pytest.mark.parametrize(
    ("c", "o", "groups", "kernel", "options"),
    [
        (1, 6, 1, (5, 5), {"padding": 2}),
        (6, 16, 1, (5, 5), {"padding": 2}),
        (64, 96, 1, (3, 3), {"stride": 2, "padding": 1}),
        (12, 12, 12, (3, 3), {"padding": 1}),
        (8, 20, 4, (3, 1), {"dilation": (2, 1)}),
    ],
)
@pytest.mark.parametrize("shared", [False, True])
def test_conv2d(c, o, groups, kernel, options, strategy, shared):
    made = []
    for device in ("cuda", "cpu"):
        p = pass_(device)
        x = tensor(5, c, 14, 13, groups=1 if shared else p.groups, device=device)
        w, b = ints((o, c // groups, *kernel), 1).to(device), ints((o,), 2).to(device)
        exponents = {"weight_exponent": one(-8, device), "bias_exponent": one(-3, device), "site": 3, "bias_site": 4}
        made.append(ops.int8_conv2d(x, w, b, p, strategy=strategy, groups=groups, **exponents, **options))
    assert equal(*made)


@pytest.mark.parametrize("strategy", ["buffer", "twice"])
@pytest.mark.parametrize("signs", [(1, -1), (-1,)], ids=str)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("rows", "n", "k"), [(300, 130, 257), (256, 1024, 512), (5, 9000, 4096)])
def test_linear_of_slabs(rows, n, k, shared, signs, strategy):
    """The last one has three slabs as a pair, and two as one sign."""
    made = []
    for device in ("cuda", "cpu"):
        p = pass_(device, signs)
        x = tensor(rows, k, groups=1 if shared else p.groups, device=device)
        w, b = ints((n, k), 1).to(device), ints((n,), 2).to(device)
        options = {"weight_exponent": one(-8, device), "bias_exponent": one(-9, device), "site": 3, "bias_site": 4}
        made.append(ops.int8_linear(x, w, b, p, strategy=strategy, weights="slab", **options))
    assert equal(*made)


@pytest.mark.parametrize("strategy", ["buffer", "twice"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("c", "o", "groups", "kernel"), [(64, 96, 1, (3, 3)), (8, 20, 4, (3, 1)), (48, 40, 1, (1, 1))])
def test_conv2d_of_slabs(c, o, groups, kernel, last, strategy):
    made = []
    for device in ("cuda", "cpu"):
        p = pass_(device)
        x, w = tensor(5, c, 14, 13, groups=p.groups, device=device), ints((o, c // groups, *kernel), 1).to(device)
        w = w.to(memory_format=torch.channels_last) if last else w
        exponents = {"weight_exponent": one(-8, device), "bias_exponent": one(-3, device), "site": 3, "bias_site": 4}
        how = {"strategy": strategy, "groups": groups, "weights": "slab", "padding": 1, **exponents}
        made.append(ops.int8_conv2d(x, w, ints((o,), 2).to(device), p, **how))
    assert equal(*made)


def test_pointwise_and_losses():
    key, labels = key_tensor(5, 6), torch.arange(40) % 10
    for device in ("cuda",):
        x, y = tensor(40, 10, groups=4), tensor(40, 10, groups=4, device="cpu")
        assert equal(ops.int8_relu(x), ops.int8_relu(y)) and equal(ops.int8_add(x, x), ops.int8_add(y, y))
        for bits in (0, 8):
            ours = ops.int8_cross_entropy(x, labels.to(device), fraction_bits=bits)
            assert torch.equal(ours.cpu(), ops.int8_cross_entropy(y, labels, fraction_bits=bits))
        ours = ops.int8_cross_entropy_gradient(x, labels.to(device), key.to(device))
        assert torch.equal(ours.cpu(), ops.int8_cross_entropy_gradient(y, labels, key))
        image, twin = tensor(3, 5, 9, 8, groups=2), tensor(3, 5, 9, 8, groups=2, device="cpu")
        for kind, size in (("max", 2), ("avg", 3)):
            assert equal(ops.int8_pool2d(image, kind, size, 2, 1), ops.int8_pool2d(twin, kind, size, 2, 1))
        wide = ints((70, 33), 7).to(torch.int32) * 70_001
        for rounding in ("nearest", "pseudo", "stochastic"):
            ours = ops.round_shift(wide.cuda(), 17, rounding, key=key.cuda(), site=9)
            assert torch.equal(ours.cpu(), ops.round_shift(wide, 17, rounding, key=key, site=9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_floats_are_exactly_the_cpus(dtype):
    x = Int8Tensor(ints((258, 3), 4, -128), torch.arange(-64, 65, dtype=torch.int32))
    assert torch.equal(x.to("cuda").dequantize(dtype).cpu(), x.dequantize(dtype))


@pytest.mark.parametrize("head", LENET_HEADS, ids=str)
def test_two_hundred_steps_are_the_cpus_bit_for_bit(head):
    states, losses = [], []
    for device in ("cuda", "cpu"):
        model = lenet(head).to(device)
        opt = ezo.ElasticZOInt8(model, r_max=15, p_zero=0.9, bits=1, head_bits=2, seed=4)
        signs = []
        for i in range(200):
            x, y = lenet_batch(8, i)
            opt.train_step(x.to(device), y.to(device))
            signs.append(opt.g.clone())
        states.append({k: v.cpu() for k, v in state(model).items()})
        losses.append(torch.stack(signs).cpu())
    assert torch.equal(*losses) and same(*states)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_tiles_leave_every_bit_alone(monkeypatch, size):
    def run():
        model = lenet(("fc3",)).cuda()
        opt = ezo.ElasticZOInt8(model, seed=4, bits=1)
        for i in range(3):
            x, y = lenet_batch(33, i)
            opt.train_step(x.to("cuda"), y.cuda())
        return state(model)

    before = run()
    linear, conv = _int8_matmul_triton.int8_tile, _int8_conv2d_triton.int8_conv_tiles
    monkeypatch.setattr(
        _int8_matmul_triton, "int8_tile", lambda *a: dataclasses.replace(linear(*a), bm=min(64, size), bn=size)
    )
    monkeypatch.setattr(
        _int8_conv2d_triton, "int8_conv_tiles", lambda *a: dataclasses.replace(conv(*a), bm=min(64, size))
    )
    assert same(before, run())


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_a_step_never_waits_for_the_device(mode):
    opt = ezo.ElasticZOInt8(lenet(("fc2", "fc3")).cuda(), queries=2, mode=mode)
    x, y = lenet_batch(33)
    x, y = x.to("cuda"), y.cuda()
    for _ in range(2):
        opt.train_step(x, y)
    before = torch.cuda.memory_stats()["num_device_alloc"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            opt.train_step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["num_device_alloc"] == before


def test_a_model_follows_the_cpu_after_moving():
    model = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))
    small = ezo.convert_(copy.deepcopy(model), head=["2"], precision="int8")
    x = ezo.quantize(torch.randn(6, 12))
    assert equal(small(x), copy.deepcopy(small).cuda()(x.to("cuda")))
