"""Perturbed linear, convolution, embedding and copies against materialised noise and torch's own functions."""

from __future__ import annotations

import pytest
import torch

from ezo_kernels import ops
from tests import materialised as ref
from tests.materialised import NOISES, Pass, randn
from tests.tolerance import assert_bitwise_equal, assert_within_torch_error, bits

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PASSES = [(1, (1, -1)), (2, (1, -1)), (3, (1, -1)), (1, (1,)), (2, (-1,)), (1, (0,)), (3, (0,))]
SITE, BIAS = 0xFEDC_BA98, 17


def check_linear(p: Pass, x, w, b, **how):
    """Run it, hold it to the error rule, and see that nothing was written."""
    inputs = [t for t in (x, w, b) if t is not None]
    before, versions = [bits(t).clone() for t in inputs], [t._version for t in inputs]
    y = ops.perturbed_linear(x, w, b, p.p, site=SITE, bias_site=BIAS, **how)
    same, truth = (ref.linear(x, w, b, p, site=SITE, bias_site=BIAS, exact=exact, **how) for exact in (False, True))
    assert_within_torch_error(y.cpu(), same, truth)
    for t, kept, version in zip(inputs, before, versions, strict=True):
        assert torch.equal(bits(t), kept) and t._version == version
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("noise", "params"), NOISES)
def test_linear_noises_and_dtypes(noise, params, dtype, device):
    p = Pass(device, noise=noise, params=params)
    x, w, b = (randn(*s, seed=i, dtype=dtype, device=device) for i, s in enumerate([(14, 37), (29, 37), (29,)]))
    check_linear(p, x, w, b)
    check_linear(p, x[:7], w.float(), b.float(), shared=True)  # fp32 weights go with x of any dtype


@pytest.mark.parametrize(("queries", "signs"), PASSES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_passes(queries, signs, shared, transposed, device):
    p = Pass(device, queries=queries, signs=signs, query=4)
    groups = queries * len(signs)
    x = randn(3 * (1 if shared else groups), 2, 33, device=device)
    w = randn(*((33, 10) if transposed else (10, 33)), seed=1, device=device)
    for b in (randn(10, seed=2, device=device), None):
        y = check_linear(p, x, w, b, shared=shared, transposed=transposed)
        assert y.shape == (3 * groups, 2, 10)


@pytest.mark.parametrize("rows", [1, 2, 33, 130])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (10, 1), (1, 300), (65, 129), (120, 784)])
def test_linear_shapes(rows, n, k, device):
    x, w, b = (randn(*s, seed=i, device=device) for i, s in enumerate([(2 * rows, k), (n, k), (n,)]))
    check_linear(Pass(device), x, w, b)


def test_linear_strides_do_not_matter(device):
    p = Pass(device)
    x, w, b = (randn(*s, seed=i, device=device) for i, s in enumerate([(8, 6, 20), (15, 20), (15,)]))
    want = check_linear(p, x, w, b)
    wide = randn(16, 6, 41, seed=9, device=device)
    wide[::2, :, 1::2] = x
    for other in (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        wide[::2, :, 1::2],
        x.permute(2, 0, 1).clone().permute(1, 2, 0),
    ):
        check_linear(p, other, w, b)
    double_b = torch.stack([b, b], 1)[:, 0]
    for other in (w.t().contiguous().t(), torch.stack([w, w], 2)[:, :, 1], torch.cat([w, w], 1)[:, :20]):
        y = check_linear(p, x, other, double_b)
        assert_within_torch_error(y.cpu(), want.cpu(), want.cpu().double())


def test_linear_of_one_vector(device):
    x, w, b = (randn(*s, seed=i, device=device) for i, s in enumerate([(20,), (15, 20), (15,)]))
    for sign in (1, -1, 0):
        p = Pass(device, signs=(sign,))
        y = ops.perturbed_linear(x, w, b, p.p, site=SITE, bias_site=BIAS)
        want = ref.linear(x[None], w, b, p, site=SITE, bias_site=BIAS)[0]
        assert y.shape == (15,)
        assert_within_torch_error(y.cpu(), want, ref.linear(x[None], w, b, p, site=SITE, bias_site=BIAS, exact=True)[0])


CONVS = [
    dict(c=1, o=6, kernel=(5, 5), size=(12, 12), padding=2),
    dict(c=6, o=16, kernel=(5, 5), size=(9, 11)),
    dict(c=3, o=8, kernel=(3, 2), size=(11, 7), stride=(2, 3), padding=(1, 0)),
    dict(c=8, o=12, kernel=(3, 3), size=(10, 9), groups=4, dilation=2, padding=2),
    dict(c=10, o=10, kernel=(3, 3), size=(6, 6), groups=10, padding=1),  # depthwise
    dict(c=5, o=10, kernel=(3, 3), size=(6, 6), groups=5, stride=2, dilation=(1, 2), padding=(0, 3)),
    dict(c=37, o=9, kernel=(1, 1), size=(4, 5)),
    dict(c=8, o=6, kernel=(1, 1), size=(4, 5), stride=2),
    dict(c=8, o=6, kernel=(1, 1), size=(4, 5), padding=1),
    dict(c=8, o=6, kernel=(1, 1), size=(4, 5), groups=2),
    dict(c=2, o=3, kernel=(4, 7), size=(4, 7)),
]


def check_conv(p: Pass, x, w, b, **how):
    run = ops.perturbed_conv2d if x.dim() == 4 else ops.perturbed_conv1d
    inputs = [t for t in (x, w, b) if t is not None]
    before, versions = [bits(t).clone() for t in inputs], [t._version for t in inputs]
    y = run(x, w, b, p.p, site=SITE, bias_site=BIAS, **how)
    same, truth = (ref.conv(x, w, b, p, site=SITE, bias_site=BIAS, exact=exact, **how) for exact in (False, True))
    assert_within_torch_error(y.cpu(), same, truth)
    for t, kept, version in zip(inputs, before, versions, strict=True):
        assert torch.equal(bits(t), kept) and t._version == version
    return y


def conv_inputs(c, o, kernel, size, device, rows=4, groups=1, dtype=torch.float32):
    shapes = [(rows, c, *size), (o, c // groups, *kernel), (o,)]
    return [randn(*s, seed=i, dtype=dtype, device=device) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("case", CONVS, ids=lambda c: f"{c['kernel']}x{c['c']}g{c.get('groups', 1)}")
def test_conv2d_shapes(case, device):
    how = {k: v for k, v in case.items() if k in ("stride", "padding", "dilation", "groups")}
    geometry = {k: case[k] for k in ("c", "o", "kernel", "size")} | {"groups": case.get("groups", 1)}
    x, w, b = conv_inputs(**geometry, device=device)
    y = check_conv(Pass(device), x, w, b, **how)
    last = check_conv(Pass(device), x.contiguous(memory_format=torch.channels_last), w, None, **how)
    if min(x.shape[1:]) > 1 and last.shape[1] > 1 and last.shape[2] * last.shape[3] > 1:
        assert last.is_contiguous(memory_format=torch.channels_last) and y.is_contiguous()
    channels_last_weight = w.contiguous(memory_format=torch.channels_last)
    check_conv(Pass(device), x, channels_last_weight, b, **how)
    check_conv(Pass(device, queries=2), torch.cat([x, x], 3)[..., :: 2 if case["size"][1] > 7 else 1], w, b, **how)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("noise", "params"), NOISES)
def test_conv2d_noises_and_dtypes(noise, params, dtype, device):
    x, w, b = conv_inputs(5, 7, (3, 3), (6, 6), device, dtype=dtype)
    p = Pass(device, noise=noise, params=params)
    check_conv(p, x, w, b, padding=1)
    check_conv(p, x, w.float(), b.float(), padding=1)


@pytest.mark.parametrize(("queries", "signs"), PASSES)
@pytest.mark.parametrize("shared", [False, True])
def test_conv2d_passes(queries, signs, shared, device):
    groups = queries * len(signs)
    x, w, b = conv_inputs(4, 6, (3, 3), (7, 5), device, rows=2 * (1 if shared else groups))
    y = check_conv(Pass(device, queries=queries, signs=signs), x, w, b, shared=shared)
    assert y.shape == (2 * groups, 6, 5, 3)


def test_conv1d(device):
    x, w, b = (randn(*s, seed=i, device=device) for i, s in enumerate([(4, 6, 19), (8, 3, 5), (8,)]))
    for how in (dict(), dict(stride=2, padding=3), dict(dilation=2, padding=4)):
        check_conv(Pass(device), x, w, b, groups=2, **how)
    check_conv(Pass(device), x.transpose(1, 2).contiguous().transpose(1, 2), w, None, groups=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "signs"), PASSES)
@pytest.mark.parametrize("shared", [False, True])
def test_embedding(queries, signs, shared, dtype, device):
    """Bitwise: a gathered row is one product, one sum, one rounding."""
    p = Pass(device, queries=queries, signs=signs)
    groups = queries * len(signs)
    w = randn(50, 21, dtype=dtype, device=device)
    ids = torch.randint(0, 50, (2 * (1 if shared else groups), 5), generator=torch.Generator().manual_seed(1))
    ids[0, :3] = 7  # repeated
    ids[0, 3:] = torch.tensor([0, 49])
    for index in (ids, ids.int(), ids.t().contiguous().t()):
        y = ops.perturbed_embedding(index.to(device), w, p.p, site=SITE, shared=shared)
        assert_bitwise_equal(y, ref.embedding(ids, w, p, site=SITE, shared=shared))
    strided = torch.cat([w, w], 1)[:, 21:]
    assert_bitwise_equal(ops.perturbed_embedding(ids.to(device), strided, p.p, site=SITE, shared=shared), y)
    assert w._version == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("noise", "params"), NOISES)
@pytest.mark.parametrize("shape", [(), (5,), (3, 70), (2, 3, 4), (4, 3, 2, 5)])
def test_perturbed_copies(noise, params, dtype, shape, device):
    """Bitwise: w + (sign * eps) * z, product rounded, then the sum, in fp32."""
    p = Pass(device, noise=noise, params=params, queries=2, query=9, eps=0.37)
    w = randn(*shape, dtype=dtype, device=device)
    assert_bitwise_equal(ops.perturb(w, p.p, site=SITE), torch.stack(p.weights(w, SITE)))
    full = ops.perturb(w, p.p, site=SITE, dtype=torch.float32)
    assert_bitwise_equal(full, torch.stack(p.weights(w, SITE, dtype=torch.float32)))
    if len(shape) == 2:
        assert_bitwise_equal(ops.perturb(w.t().contiguous().t(), p.p, site=SITE, dtype=torch.float32), full)
