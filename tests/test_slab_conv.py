"""Slabs of convolutions: the plan, what is computed, one sign against the pair, cuDNN's calls, and too little memory."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import ezo_kernels as ezo
from ezo_kernels import ops
from ezo_kernels.ops import _conv2d_slab, _tiles
from ezo_kernels.ops._tiles import SLAB_BYTES, conv_slab_plan
from tests.little_memory import LittleMemory
from tests.materialised import Pass, conv, randn
from tests.tolerance import assert_bitwise_equal, assert_within_torch_error

pytestmark = pytest.mark.usefixtures("poisoned_empty")
SITE = {"site": 5, "bias_site": 6}
LAST = torch.channels_last
SHAPES = [  # channels, outputs, size, kernel, conv groups, options
    (1, 6, (9, 8), (5, 5), 1, {"padding": 2}),
    (5, 70, (6, 7), (3, 2), 1, {"padding": (2, 1), "dilation": (2, 1), "stride": (1, 2)}),
    (6, 9, (3, 4), (3, 3), 3, {"padding": 1}),
    (12, 12, (4, 5), (3, 3), 12, {"padding": 1}),
]
IDS = ["lenet", "many outputs", "groups", "depthwise"]


@pytest.fixture(params=[SLAB_BYTES, 2048, 1], ids=["one slab", "some", "one output a slab"])
def narrow(request, monkeypatch):
    """Slabs of so many bytes, so that small layers have many."""
    monkeypatch.setattr(_tiles, "SLAB_BYTES", request.param)
    conv_slab_plan.cache_clear()
    yield
    conv_slab_plan.cache_clear()


def conv_of(x, w, b, p, strategy="slab", **options):
    return ops.perturbed_conv2d(x, w, b, p, strategy=strategy, **SITE, **options)


def layer(channels, outputs, size, kernel, groups, options, rows=3, dtype=torch.float32, w_dtype=None):
    x = randn(rows, channels, *size, dtype=dtype)
    w = randn(outputs, channels // groups, *kernel, seed=1, dtype=w_dtype or dtype)
    return x, w, randn(outputs, seed=2, dtype=w_dtype or dtype), {"groups": groups, **options}


@pytest.mark.parametrize(("outputs", "groups"), [(1, 1), (33, 1), (1000, 1), (1024, 4), (512, 512), (6, 3)])
@pytest.mark.parametrize("columns", [0, 9, 576, 9216, 1 << 20])
@pytest.mark.parametrize("most", [None, 1, 40])
def test_plan_covers_every_output_once(outputs, groups, columns, most):
    plan, at, own = conv_slab_plan(outputs, columns, groups, 2, most), 0, outputs // groups
    for first, rows, count in plan.slabs:
        assert first == at and 1 <= rows <= plan.rows
        whole = first % own == 0 and rows == count * own
        assert whole or (count == 1 and first // own == (first + rows - 1) // own), "a slab straddles conv groups"
        at += rows
    assert at == outputs
    assert most is None or plan.rows <= most
    assert most or plan.bytes_of(2) <= SLAB_BYTES
    assert plan.bytes_of(1) * 2 == plan.bytes_of(2)
    split = groups * (4 * own * columns > SLAB_BYTES)
    assert most or len(plan.slabs) <= 8 * outputs * columns // SLAB_BYTES + split + 2


@pytest.mark.parametrize("noise", ["gaussian", "clt4", "uniform", "hadamard", "rademacher", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_the_contract(narrow, noise, dtype):
    """One pixel of one channel shows W + sign eps z, every bit, whatever slab an output lies in; x = 0 shows the bias."""
    p = Pass(noise=noise, params={"p_zero": 0.5} if noise == "sparse" else {}, queries=2, query=7, eps=0.3).p
    w, b = randn(70, 9, 2, 3, seed=1, dtype=dtype), randn(70, seed=2, dtype=dtype)
    x = torch.zeros(54, 9, 2, 3, dtype=dtype)
    x.view(54, 54).fill_diagonal_(1)
    y = conv_of(x, w, None, p, shared=True)  # image i has a one at channel, row and column of weight i
    assert_bitwise_equal(y.view(4, 54, 70).mT.reshape(4, *w.shape), ops.perturb(w, p, site=5))
    y = conv_of(torch.zeros_like(x[:3]), w, b, p, shared=True)
    assert_bitwise_equal(y.view(4, 3, 70)[:, 0], ops.perturb(b, p, site=6))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("dtype", "w_dtype"), [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("geometry", SHAPES, ids=IDS)
def test_products(narrow, geometry, dtype, w_dtype, shared):
    own = Pass(noise="clt4", queries=2, eps=0.3)
    x, w, b, how = layer(*geometry, rows=3 if shared else 12, dtype=dtype, w_dtype=w_dtype)
    for of_x, of_b in ((x, b), (x.contiguous(memory_format=LAST), None)):
        y = conv_of(of_x, w, of_b, own.p, shared=shared, **how)
        same, truth = (conv(of_x, w, of_b, own, **SITE, shared=shared, exact=exact, **how) for exact in (False, True))
        assert_within_torch_error(y, same, truth)
        assert y.stride() == conv_of(of_x, w, of_b, own.p, "fused", shared=shared, **how).stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", [torch.contiguous_format, LAST], ids=["first", "last"])
@pytest.mark.parametrize("geometry", SHAPES, ids=IDS)
def test_groups_run_alike(narrow, geometry, memory, dtype):
    """eps = 0 gives the plain layer; a sign alone and a query alone give the bits that they have in a whole pass."""
    half, w, b, how = layer(*geometry, dtype=dtype)
    half, four = (t.contiguous(memory_format=memory) for t in (half, half.repeat(4, 1, 1, 1)))
    for bias in (b, None):
        plain = conv_of(half, w, bias, Pass(signs=(0,)).p, **how)
        for part in conv_of(four, w, bias, Pass(queries=2, eps=0.0).p, **how).chunk(4):
            assert_bitwise_equal(part, plain)
        whole = conv_of(four, w, bias, Pass(queries=2).p, **how)
        assert_bitwise_equal(whole, conv_of(half, w, bias, Pass(queries=2).p, shared=True, **how))
        alone = [conv_of(half, w, bias, Pass(query=q, signs=(s,)).p, **how) for q in (0, 1) for s in (1, -1)]
        assert_bitwise_equal(whole, torch.cat(alone))


def test_one_slab_has_the_bits_of_fused():
    """Where one slab holds the weight a CPU makes the same call."""
    x, w, b, how = layer(*SHAPES[1], rows=8)
    p = Pass(queries=2).p
    assert_bitwise_equal(conv_of(x, w, b, p, **how), conv_of(x, w, b, p, "fused", **how))


def test_strides_of_x_and_of_the_weight(narrow):
    p = Pass(noise="clt4").p
    w, x = randn(40, 6, 3, 2, seed=1), randn(8, 6, 5, 4)
    want = conv_of(x, w, w[:, 0, 0, 0].contiguous(), p)
    gaps = torch.zeros(8, 12, 10, 4)[:, ::2, ::2]
    assert_bitwise_equal(conv_of(gaps.copy_(x), w.mT.contiguous().mT, w[:, 0, 0, 0], p), want)
    assert_bitwise_equal(conv_of(x, w.contiguous(memory_format=LAST), w[:, 0, 0, 0], p), want)


def test_one_dimension():
    p, x, w, b = Pass().p, randn(4, 3, 11), randn(5, 3, 4, seed=1), randn(5, seed=2)
    y, same = (
        ops.perturbed_conv1d(x, w, b, p, stride=2, padding=3, strategy=s, **SITE) for s in ("slab", "fused")
    )  # fmt: skip
    assert_bitwise_equal(y, same)


def test_no_rows():
    assert conv_of(torch.empty(0, 5, 4, 4), randn(6, 5, 3, 3), randn(6), Pass().p).shape == (0, 6, 2, 2)


# ---- cuDNN: the calls that a GPU gets, taken here by an implementation on the CPU


@pytest.fixture
def cudnn(monkeypatch):
    """cuDNN's operator on a CPU, and what it was called with."""
    calls = []

    def run(x, w, padding, stride, dilation, groups, benchmark, deterministic, allow_tf32, *, out):
        calls.append((x, w, out, benchmark, deterministic, allow_tf32))
        return out.copy_(F.conv2d(x, w, None, stride, padding, dilation, groups))

    library = torch.library.Library("aten", "IMPL")
    library.impl("cudnn_convolution.out", run, "CPU")
    monkeypatch.setattr(_conv2d_slab, "takes_cudnn", lambda *args: True)
    yield calls
    library._destroy()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("memory", [torch.contiguous_format, LAST], ids=["first", "last"])
@pytest.mark.parametrize("geometry", SHAPES, ids=IDS)
def test_cudnn_writes_what_torch_would(narrow, cudnn, geometry, memory, shared):
    own = Pass(noise="clt4", queries=2, eps=0.3)
    x, w, b, how = layer(*geometry, rows=3 if shared else 12)
    x = x.contiguous(memory_format=memory)
    y = conv_of(x, w, b, own.p, shared=shared, **how)
    same, truth = (conv(x, w, b, own, **SITE, shared=shared, exact=exact, **how) for exact in (False, True))
    assert_within_torch_error(y, same, truth)
    assert cudnn and all(call[3:] == (False, True, False) for call in cudnn)
    memory = torch.contiguous_format if x.is_contiguous() else LAST  # one channel: both
    for of_x, of_w, out, *_ in cudnn:
        assert all(t.is_contiguous(memory_format=memory) for t in (of_x, of_w, out)), "cuDNN would make a copy"
        assert all(t.data_ptr() % 64 == 0 for t in (of_x, of_w, out)), "groups may differ in alignment"


def test_cudnn_writes_outputs_in_place(cudnn):
    x, w, b, how = layer(16, 32, (8, 8), (3, 3), 1, {"padding": 1}, rows=8)
    y = conv_of(x, w, b, Pass().p, **how)
    assert [call[2].data_ptr() for call in cudnn] == [half.data_ptr() for half in y.chunk(2)]
    assert len({call[1].data_ptr() for call in cudnn}) == 2 and {call[0].data_ptr() for call in cudnn} == {
        half.data_ptr() for half in x.chunk(2)
    }


@pytest.mark.parametrize("signs", [(1, -1), (1,)])
@pytest.mark.parametrize("shared", [False, True])
def test_cudnn_is_given_aligned_groups_whatever_x(cudnn, signs, shared):
    """Images of 45 elements in memory that begins at an odd one."""
    p = Pass(signs=signs).p
    n = 1 if shared else p.groups
    raw = torch.cat([torch.zeros(1), randn(n * 45)])[1:].view(n, 5, 3, 3)
    y = conv_of(raw, w := randn(3, 5, 2, 2, seed=1), None, p, shared=shared)
    assert all(t.data_ptr() % 64 == 0 for call in cudnn for t in call[:3]) and len(cudnn) == p.groups
    assert_bitwise_equal(y, conv_of(raw.clone(), w, None, p, shared=shared))


# ---- memory, refusals, training


def test_too_little_memory_takes_smaller_slabs(monkeypatch):
    x, w, p = randn(4, 8, 5, 5), randn(300, 8, 3, 3, seed=1), Pass().p
    want = conv_of(x, w, None, p)
    memory = LittleMemory(monkeypatch, 2 * 80 * 72)
    said = r"perturbed_conv2d: no memory for a slab of \d+ bytes \(300 outputs\): 150 outputs are tried"
    with pytest.warns(RuntimeWarning, match=said):
        y = conv_of(x, w, None, p)
    assert memory.asked == [2 * -(-rows * 72 // 16) * 16 for rows in (300, 150, 75)]
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-4)
    memory.most = 0
    with pytest.raises(torch.OutOfMemoryError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        conv_of(x, w, None, p)


def test_refusals():
    x, w, p = torch.ones(4, 3, 5, 5), torch.ones(5, 3, 3, 3), Pass().p
    with pytest.raises(ValueError, match="strategy must be one of auto, fused"):
        conv_of(x, w, None, p, "fast")
    with pytest.raises(NotImplementedError, match="linear layers alone"):
        conv_of(x, w, None, p, "two_products")


def lenet(**options):
    return ezo.convert_(ezo.models.LeNet5(generator=torch.Generator().manual_seed(0)), head=["fc3"], **options)


def test_a_converted_model_trains_alike(monkeypatch):
    made, of = [], _conv2d_slab.multiply
    monkeypatch.setattr(_conv2d_slab, "multiply", lambda *args: (made.append(1), of(*args)))
    x, y = randn(4, 1, 28, 28), torch.zeros(4, dtype=torch.long)
    losses = {}
    for strategy in ("fused", "slab", "two_products"):
        for mode in ("stacked", "sequential"):
            made.clear()
            opt = ezo.ElasticZO(lenet(strategy=strategy), eps=0.1, seed=3, mode=mode)
            opt.train_step(x, y)
            losses[strategy, mode] = opt.losses.clone()
            assert bool(made) == (strategy == "slab"), "beside two products convolutions choose by themselves"
    assert torch.equal(losses["slab", "stacked"], losses["slab", "sequential"])
    for strategy in ("slab", "two_products"):
        torch.testing.assert_close(losses["fused", "stacked"], losses[strategy, "stacked"], rtol=1e-5, atol=1e-6)


def test_autocast():
    x, w, b, how = layer(*SHAPES[0], rows=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv_of(x, w, b, Pass().p, **how)
    assert_bitwise_equal(y, conv_of(x.bfloat16(), w, b, Pass().p, **how))


def test_fakes():
    x, w, b, how = layer(*SHAPES[0], rows=4)
    p = Pass().p
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t) for t in (x, w, b, p.key, p.eps)]
        y = conv_of(*fake[:3], ops.Perturbation(*fake[3:]), **how)
    assert y.shape == (4, 6, 9, 8)
