"""Slabs of perturbed weights: the plan, what is computed, one sign against the pair, and too little memory."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ezo_kernels as ezo
from ezo_kernels import ops
from ezo_kernels.ops import _slab, _tiles
from ezo_kernels.ops._strategy import choose
from ezo_kernels.ops._tiles import SLAB_BYTES, slab_bytes, slab_plan
from tests.little_memory import LittleMemory
from tests.materialised import Pass, randn
from tests.tolerance import assert_bitwise_equal, assert_within_torch_error

pytestmark = pytest.mark.usefixtures("poisoned_empty")
SITE = {"site": 5, "bias_site": 6}


@pytest.fixture
def narrow(monkeypatch):
    """Slabs of at most 32 rows, so that small layers have many."""
    monkeypatch.setattr(_tiles, "SLAB_BYTES", 1)
    slab_plan.cache_clear()
    yield
    slab_plan.cache_clear()


def linear_of(x, w, b, p, strategy="slab", **options):
    return ops.perturbed_linear(x, w, b, p, strategy=strategy, **SITE, **options)


@pytest.mark.parametrize("n", [1, 2, 3, 31, 33, 64, 65, 1000, 4096, 5120, 8192, 50257, 128256])
@pytest.mark.parametrize("k", [0, 1, 768, 4096, 1 << 20])
def test_plan_covers_every_output_once(n, k):
    plan = slab_plan(n, k, 2)
    at = 0
    for first, rows, count in plan:
        assert first == at and rows >= 1 and count in (1, 2) and (count == 2 or (rows == 1 and first == n - 1))
        at += rows * count
    assert at == n
    assert slab_bytes(plan, k, 2) <= SLAB_BYTES or max(rows for _, rows, _ in plan) <= 32
    assert len(plan) <= n * k * 2 // SLAB_BYTES + 8 or k == 1 << 20


def test_workspace_is_reported():
    for n, k in ((4096, 4096), (8192, 8192), (8192, 1024)):
        chosen = choose(4096, (n, k), torch.bfloat16, torch.bfloat16, "clt4", arch=90)
        assert chosen.name == "slab"
        assert chosen.workspace_bytes == _slab.allocate(torch.empty(1, dtype=torch.bfloat16), n, k)[1].numel() * 2
    assert choose(4096, (120, 784), torch.bfloat16, torch.bfloat16, "clt4", arch=90).name == "fused"


NOISES = ["gaussian", "clt4", "uniform", "hadamard", "rademacher", "sparse"]


def pass_of(noise="gaussian", **options):
    return Pass(noise=noise, params={"p_zero": 0.5} if noise == "sparse" else {}, **options)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("n", [1, 33, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_the_contract(narrow, noise, n, dtype):
    """Rows of the identity show W + sign eps z, every bit, whatever slab a row lies in; x = 0 shows the bias."""
    p = pass_of(noise, queries=2, query=7, eps=0.3).p
    w, b = randn(n, 70, seed=1, dtype=dtype), randn(n, seed=2, dtype=dtype)
    y = linear_of(torch.eye(70, dtype=dtype), w, None, p, shared=True)
    assert_bitwise_equal(y.view(4, 70, n).transpose(1, 2), ops.perturb(w, p, site=5))
    y = linear_of(torch.zeros(3, 70, dtype=dtype), w, b, p, shared=True)
    assert_bitwise_equal(y.view(4, 3, n)[:, 0], ops.perturb(b, p, site=6))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "w_dtype"), [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)]
)
def test_products(narrow, dtype, w_dtype, bias, shared):
    own = pass_of("clt4", queries=2, eps=0.3)
    x, w = randn(*((6, 3, 70) if shared else (24, 3, 70)), dtype=dtype), randn(130, 70, seed=1, dtype=w_dtype)
    b = randn(130, seed=2, dtype=w_dtype) if bias else None
    y, same = (linear_of(x, w, b, own.p, strategy, shared=shared) for strategy in ("slab", "fused"))
    parts = [x] * 4 if shared else x.chunk(4)
    weights, biases = own.weights(w, 5, exact=True), own.weights(b, 6, exact=True)
    of = torch.nn.functional.linear
    truth = torch.cat([of(part.double(), *wb) for part, *wb in zip(parts, weights, biases, strict=True)])
    assert_within_torch_error(y, same, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 33])
@pytest.mark.parametrize(("n", "k"), [(1, 5), (31, 47), (130, 70), (100, 256)])
def test_groups_run_alike(narrow, n, k, rows, dtype):
    """eps = 0 gives equal groups; a sign alone and a query alone give the bits that they have in a whole pass."""
    w, b = randn(n, k, seed=1, dtype=dtype), randn(n, seed=2, dtype=dtype)
    half = randn(rows, k, dtype=dtype)
    for bias in (b, None):
        parts = linear_of(half.repeat(4, 1), w, bias, pass_of(queries=2, eps=0.0).p).chunk(4)
        assert all(torch.equal(parts[0], part) for part in parts)
        whole = linear_of(half.repeat(4, 1), w, bias, pass_of(queries=2).p)
        assert_bitwise_equal(whole, linear_of(half, w, bias, pass_of(queries=2).p, shared=True))
        alone = [linear_of(half, w, bias, pass_of(query=q, signs=(s,)).p) for q in (0, 1) for s in (1, -1)]
        assert_bitwise_equal(whole, torch.cat(alone))
        assert_bitwise_equal(whole[: 2 * rows], linear_of(half.repeat(2, 1), w, bias, pass_of().p))


def test_strides_of_x_and_of_the_weight(narrow):
    p = pass_of("clt4").p
    w, x = randn(100, 40, seed=1), randn(8, 3, 40)
    want = linear_of(x, w, w[:, 0].contiguous(), p)
    wide, deep = torch.zeros(8, 3, 47)[..., 3:43], torch.zeros(40, 3, 8).permute(2, 1, 0)
    for of in (wide, deep):
        assert_bitwise_equal(linear_of(of.copy_(x), w.t().contiguous().t(), w[:, 0], p), want)


def test_no_inputs_and_no_rows():
    p, b = pass_of().p, randn(6)
    assert linear_of(torch.empty(0, 5), randn(6, 5), b, p).shape == (0, 6)
    y = linear_of(torch.zeros(4, 0), torch.empty(6, 0), b, p)
    assert_bitwise_equal(y.view(2, 2, 6)[:, 1], ops.perturb(b, p, site=6))


def test_too_little_memory_takes_smaller_slabs(monkeypatch):
    x, w, p = randn(10, 70), randn(700, 70, seed=1), pass_of().p
    want = linear_of(x, w, None, p)
    memory = LittleMemory(monkeypatch, 2 * 40 * 70 + 64)
    with pytest.warns(
        RuntimeWarning, match=r"no memory for a slab of \d+ bytes \(320 outputs\): 128 outputs are tried"
    ):
        y = linear_of(x, w, None, p)
    asked = memory.asked
    assert len(asked) == 3 and sorted(asked, reverse=True) == asked and asked[-1] <= memory.most
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-4)
    memory.most = 0
    with pytest.raises(torch.OutOfMemoryError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linear_of(x, w, None, p)


def test_refusals():
    x, w, p = torch.ones(4, 5), torch.ones(5, 6), pass_of().p
    with pytest.raises(NotImplementedError, match=r"strategy 'slab': the weight is stored \[K, N\]"):
        linear_of(x, w, None, p, transposed=True)
    shape, f32 = (64, 64), torch.float32
    with pytest.raises(NotImplementedError, match="stored.*; its product is torch's, which is ieee now, not tf32"):
        choose(9, shape, f32, f32, "clt4", arch=90, precision="tf32", transposed=True, asked="slab")
    assert choose(9, shape, f32, f32, "clt4", arch=90, signs=(0,), asked="slab").name == "fused"
    bf16 = torch.bfloat16
    for options in ({"transposed": True}, {"regular": False}):
        assert choose(1 << 20, (4096, 4096), bf16, bf16, "clt4", arch=90, **options).name == "fused"


def test_a_converted_model_trains_alike(monkeypatch):
    made, of = [], _slab.multiply
    monkeypatch.setattr(_slab, "multiply", lambda *args: (made.append(1), of(*args)))
    x, y = randn(8, 6), torch.zeros(8, dtype=torch.long)
    losses = {}
    for strategy in ("fused", "slab"):
        for mode in ("stacked", "sequential"):
            torch.manual_seed(0)
            layers = [torch.nn.Linear(6, 50), torch.nn.Linear(50, 3)]
            model = ezo.convert_(torch.nn.Sequential(*layers), head=0, strategy=strategy)
            opt = ezo.ElasticZO(model, eps=0.1, seed=3, mode=mode)
            opt.train_step(x, y)
            losses[strategy, mode] = opt.losses.clone()
            assert bool(made) == (strategy == "slab")
    assert torch.equal(losses["slab", "stacked"], losses["slab", "sequential"])
    torch.testing.assert_close(losses["fused", "stacked"], losses["slab", "stacked"], rtol=1e-5, atol=1e-6)


def test_fakes_and_the_registration():
    p = pass_of().p
    x, w, b = randn(8, 5), randn(6, 5), randn(6)
    out = torch.empty(8, 6)
    args = (x, w, b, p.key, p.eps, 5, 6, False, False, "", "slab", "float32", False, *p.schema_args(), out)
    torch.library.opcheck(torch.ops.ezo.linear.default, args, test_utils=("test_schema", "test_faketensor"))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t) for t in (x, w, b, p.key, p.eps)]
        y = linear_of(*fake[:3], ops.Perturbation(*fake[3:]))
    assert y.shape == (8, 6)
