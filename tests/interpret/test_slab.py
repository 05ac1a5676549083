"""Slabs made by the kernel and multiplied by torch's own functions, against the CPU operator; fp32 and fp16."""

from __future__ import annotations

import pytest
import torch
from test_conv2d import EPS, compare, normal, pass_of
from test_linear import SIGNS, check, make

from ezo_kernels import ops
from ezo_kernels.ops import _conv2d_slab, _slab, _tiles
from ezo_kernels.ops.noise import Noise


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """Slabs of at most 32 rows, and calls of torch's functions: a test that ran another strategy must fail."""
    count, of, of_conv = [], _slab.batched, _conv2d_slab.convolve
    monkeypatch.setattr(_tiles, "SLAB_BYTES", 1)
    clear = (_tiles.slab_plan.cache_clear, _tiles.conv_slab_plan.cache_clear)
    [cache_clear() for cache_clear in clear]
    monkeypatch.setattr(_slab, "batched", lambda *a: (count.append(1), of(*a)))
    monkeypatch.setattr(_conv2d_slab, "convolve", lambda *a: (count.append(1), of_conv(*a)))
    yield count
    [cache_clear() for cache_clear in clear]
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
    check(on_cpu, x, w, None if shared else b, p, shared=shared, strategy="slab")


@pytest.mark.parametrize("signs", SIGNS[:3], ids=str)
def test_half_with_a_rounded_z(on_cpu, key, signs):
    p = ops.Perturbation(key, torch.tensor([0.05]), Noise("clt4"), signs=signs)
    x, w, b = make(20, 66, 48, torch.float16, groups=p.groups)
    check(on_cpu, x, w, b, p, strategy="slab", z_dtype="float16")


def test_strides(on_cpu, key):
    p = ops.Perturbation(key, torch.tensor([0.4]), Noise("hadamard"))
    check(on_cpu, torch.randn(20, 8).t(), torch.randn(20, 70).t(), torch.randn(140)[::2], p, strategy="slab")


# ---- convolutions


def of_slabs(*args, **options):
    return ops.perturbed_conv2d(*args, site=0xFFFFFFF0, bias_site=3, strategy="slab", **options)


@pytest.mark.parametrize("channels", [3, 16])
def test_noises_of_a_convolution(on_cpu, key, noise, channels, poisoned_empty):
    """16 channels side by side: the form that moves 16 bytes at a time."""
    p = pass_of(key, noise[0])
    x, w, b = normal(4, channels, 4, 4), normal(5, channels, 3, 2), normal(5)
    compare(on_cpu, of_slabs, x, w, b, p, padding=1)
    last = torch.channels_last
    compare(on_cpu, of_slabs, x.to(memory_format=last), w.to(memory_format=last), b, p, padding=1)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("queries", "signs"), [(2, (1, -1)), (2, (1,)), (1, (-1,)), (2, (0,))])
def test_groups_of_a_pass_of_a_convolution(key, on_cpu, poisoned_empty, queries, signs, shared):
    p = pass_of(key, "uniform", query=300, queries=queries, signs=signs)
    x, w, b = normal(3 if shared else 3 * p.groups, 2, 5, 4), normal(4, 2, 2, 3), normal(4)
    compare(on_cpu, of_slabs, x, w, b, p, shared=shared)


@pytest.mark.parametrize(("most", "rows"), [(1, 2), (1 << 25, 2), (5000, 66)])
@pytest.mark.parametrize("groups", [1, 2])
def test_rows_of_a_slab_are_those_of_the_weight(key, on_cpu, monkeypatch, most, rows, groups):
    """One output a slab, one slab, and some: the kernel starts at a slab's first output."""
    monkeypatch.setattr(_tiles, "SLAB_BYTES", most)
    x, w, b = normal(2, 4 * groups, 3, 3, dtype=torch.float16), normal(rows, 4, 2, 2, dtype=torch.float16), None
    compare(on_cpu, of_slabs, x, w, b, pass_of(key, "clt4"), groups=groups)


@pytest.mark.parametrize(
    ("dtype", "rows", "columns", "offset"),
    [(torch.float16, 5, 72, 0), (torch.float32, 20, 264, 0), (torch.float16, 5, 64, 8), (torch.float32, 5, 64, 4)],
)
def test_sixteen_bytes_at_a_time_or_not(key, noise, on_cpu, launched, dtype, rows, columns, offset):
    """Copies by either form of the kernel are the reference's, to the last column, and nothing beyond them is written."""
    launched.append(1)
    signs = ops.Perturbation(key, torch.tensor([EPS]), noise[0])
    w = normal(rows, columns + offset, dtype=dtype)[:, offset:]
    ours, theirs = ops.perturb(w, signs, site=3), on_cpu(ops.perturb, w, signs, site=3)
    torch.testing.assert_close(
        ours, theirs, rtol=0, atol=0.0 if noise[1] == 0 else 4e-3 if dtype == torch.float16 else 4e-6
    )
