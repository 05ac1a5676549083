"""Words, every noise, and perturbed copies: kernels against the CPU reference."""

from __future__ import annotations

import pytest
import torch

from ezo_kernels import ops
from ezo_kernels.ops import _noise_triton as N
from ezo_kernels.ops import _perturb_triton, _tiles
from ezo_kernels.ops._triton import jit, tl
from ezo_kernels.ops.noise import Noise, fold_key, key_tensor, materialize

SITE = 0xFEDCBA98


@jit
def _words(out_ptr, counter_ptr, ROUNDS: tl.constexpr, ASM: tl.constexpr):
    c0 = tl.load(counter_ptr).to(tl.uint32, bitcast=True)
    c1 = tl.load(counter_ptr + 1).to(tl.uint32, bitcast=True)
    c2 = tl.load(counter_ptr + 2).to(tl.uint32, bitcast=True)
    c3 = tl.load(counter_ptr + 3).to(tl.uint32, bitcast=True)
    k0, k1 = N.load_key(counter_ptr + 4)
    w0, w1, w2, w3 = N.philox(c0, c1, c2, c3, k0, k1, ROUNDS, ASM)
    tl.store(out_ptr, w0.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 1, w1.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 2, w2.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 3, w3.to(tl.int32, bitcast=True))


@pytest.mark.parametrize(
    ("rounds", "word", "expected"),
    [
        (10, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (7, 0, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (10, -1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ],
)
def test_philox_known_answers(rounds, word, expected):
    out = torch.empty(4, dtype=torch.int32)
    _words[(1,)](out, torch.full((6,), word, dtype=torch.int32), rounds, False)
    assert " ".join(f"{w & 0xFFFFFFFF:08x}" for w in out.tolist()) == expected


@pytest.mark.parametrize(("seed", "step", "zeros"), [(0, 0, 0), (-1, 5, 30), (1 << 40, (1 << 62) + 3, 600)])
def test_fold_key(seed, step, zeros):
    """And what is to be cleared, to its end and no further."""
    key, words = torch.zeros(2, dtype=torch.int32), torch.full((zeros + 4,), 7, dtype=torch.int32)
    fold_key(torch.tensor([seed]), torch.tensor([step]), key, words[:zeros] if zeros else None)
    assert torch.equal(key, key_tensor(seed & (1 << 64) - 1, step))
    assert words.tolist() == [0] * zeros + [7] * 4


@pytest.mark.parametrize(
    ("shape", "rounds"),
    [((37, 100), 7), ((3, 5), 7), ((1, 33), 10), ((20, 257), 10), ((20, 264), 7), ((7,), 7), ((), 7)],
)
def test_z(on_cpu, noise, shape, rounds):
    spec, limit = noise
    args = {"seed": 3, "step": 9, "site": SITE, "query": 70000, "noise": spec.name, "rounds": rounds}
    args["p_zero"] = spec.p_zero
    ours, theirs = materialize(shape, **args), on_cpu(materialize, shape, **args)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=limit)


@pytest.mark.parametrize("p_zero", [0.0, 0.4])
def test_sparse_int8(on_cpu, p_zero):
    args = {"seed": 3, "step": 9, "site": 1, "noise": "sparse_int8", "p_zero": p_zero, "r_max": 127}
    ours, theirs = materialize((21, 67), **args), on_cpu(materialize, (21, 67), **args)
    assert ours.dtype == torch.int8 and torch.equal(ours, theirs)


def test_gaussian_fast_is_the_gaussian_to_a_thousandth(on_cpu):
    args = {"seed": 3, "step": 9, "site": 1}
    fast = materialize((40, 100), noise="gaussian_fast", **args)
    torch.testing.assert_close(fast, on_cpu(materialize, (40, 100), noise="gaussian", **args), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (3, 20, 2, 2, 2), (6, 40, 1, 1)])
def test_z_of_a_convolution(on_cpu, noise, shape):
    spec, limit = noise
    args = {"seed": 3, "step": 9, "site": 5, "noise": spec.name, "p_zero": spec.p_zero, "layout": "conv"}
    torch.testing.assert_close(materialize(shape, **args), on_cpu(materialize, shape, **args), rtol=0, atol=limit)


@pytest.mark.parametrize("rows_columns", [(16, 32), (32, 128), (64, 256)])
def test_tile_leaves_z_alone(monkeypatch, on_cpu, noise, rows_columns):
    spec, limit = noise
    monkeypatch.setattr(_perturb_triton, "element_tile", lambda *_: _tiles.ElementTile(*rows_columns))
    args = {"seed": 3, "step": 9, "site": 5, "noise": spec.name, "p_zero": spec.p_zero}
    torch.testing.assert_close(
        materialize((40, 140), **args), on_cpu(materialize, (40, 140), **args), rtol=0, atol=limit
    )


def _weights():
    yield "contiguous", torch.randn(20, 36), "matrix"
    yield "transposed", torch.randn(36, 20).t(), "matrix"
    yield "sliced", torch.randn(20, 72)[::2, 1::3], "matrix"
    yield "expanded", torch.randn(1, 36).expand(20, 36), "matrix"
    yield "vector", torch.randn(50)[::2], "matrix"
    yield "scalar", torch.randn(()), "matrix"
    yield "five dimensions", torch.randn(3, 2, 4, 2, 5).permute(3, 1, 0, 2, 4), "matrix"
    yield "six dimensions", torch.randn(2, 3, 2, 4, 2, 5).permute(4, 0, 3, 1, 2, 5), "matrix"
    yield "conv", torch.randn(6, 5, 3, 3), "conv"
    yield "conv, channels last", torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last), "conv"
    yield "conv1d", torch.randn(6, 5, 3), "conv"


@pytest.mark.parametrize(("name", "w", "layout"), list(_weights()), ids=lambda v: v if isinstance(v, str) else "")
def test_perturb(on_cpu, key, name, w, layout):
    p = ops.Perturbation(key, torch.tensor([0.3]), Noise("clt4"), query=2, queries=2)
    ours = ops.perturb(w, p, site=SITE, layout=layout)
    assert torch.equal(ours, on_cpu(ops.perturb, w, p, site=SITE, layout=layout))


@pytest.mark.parametrize("signs", [(1,), (-1,), (0,)], ids=str)
def test_perturb_by_one_sign(on_cpu, key, signs):
    p = ops.Perturbation(key, torch.tensor([0.3]), Noise("clt4"), query=2, queries=2, signs=signs)
    w = torch.randn(6, 5, 3, 3)
    assert torch.equal(ops.perturb(w, p, site=SITE), on_cpu(ops.perturb, w, p, site=SITE))


def test_perturb_in_half(on_cpu, noise, key):
    spec, _ = noise
    p = ops.Perturbation(key, torch.tensor([0.3]), spec)
    w = torch.randn(30, 40, dtype=torch.float16)
    ours, theirs = ops.perturb(w, p, site=1), on_cpu(ops.perturb, w, p, site=1)
    torch.testing.assert_close(ours, theirs, rtol=2e-3 if spec.name in ("gaussian", "sparse") else 0, atol=0)


def test_eps_zero_gives_equal_copies(key):
    p = ops.Perturbation(key, torch.zeros(1), Noise())
    plus, minus = ops.perturb(torch.randn(20, 30), p, site=1)
    assert torch.equal(plus, minus)
