"""Slabs made by the kernel and multiplied by torch's batched matmul, against the CPU operator; fp32 and fp16."""

from __future__ import annotations

import pytest
import torch
from test_linear import SIGNS, check, make

from ezo_kernels import ops
from ezo_kernels.ops import _slab, _tiles
from ezo_kernels.ops.noise import Noise


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """Slabs of at most 32 rows, and calls of the batched matmul: a test that ran another one must fail."""
    count, of = [], _slab.batched
    monkeypatch.setattr(_tiles, "SLAB_BYTES", 1)
    _tiles.slab_plan.cache_clear()
    monkeypatch.setattr(_slab, "batched", lambda *a: (count.append(1), of(*a)))
    yield count
    _tiles.slab_plan.cache_clear()
    assert count


@pytest.mark.parametrize("shared", [False, True])
def test_noises(on_cpu, key, noise, shared):
    p = ops.Perturbation(key, torch.tensor([0.4]), noise[0], query=3)
    check(on_cpu, *make(5, 67, 70, groups=1 if shared else p.groups), p, shared=shared, strategy="slab")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("signs", SIGNS[:3], ids=str)
def test_queries(on_cpu, key, signs, shared):
    p = ops.Perturbation(key, torch.tensor([0.4]), Noise("clt4"), query=9, queries=3, signs=signs)
    x, w, b = make(18, 71, 40, groups=1 if shared else p.groups)
    check(on_cpu, x, w, b, p, shared=shared, strategy="slab")
    check(on_cpu, x, w, None, p, shared=shared, strategy="slab")


@pytest.mark.parametrize("signs", SIGNS[:3], ids=str)
def test_half_with_a_rounded_z(on_cpu, key, signs):
    p = ops.Perturbation(key, torch.tensor([0.05]), Noise("clt4"), signs=signs)
    x, w, b = make(20, 66, 48, torch.float16, groups=p.groups)
    check(on_cpu, x, w, b, p, strategy="slab", z_dtype="float16")


def test_strides(on_cpu, key):
    p = ops.Perturbation(key, torch.tensor([0.4]), Noise("hadamard"))
    check(on_cpu, torch.randn(20, 8).t(), torch.randn(20, 70).t(), torch.randn(140)[::2], p, strategy="slab")
