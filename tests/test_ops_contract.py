"""What the operators promise: equal groups at eps = 0, empty batches, autocast's inputs, and clear errors."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from ezo_kernels import ops
from ezo_kernels.ops import Noise, Perturbation
from ezo_kernels.ops.noise import key_tensor
from tests.materialised import Pass, randn
from tests.tolerance import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def groups_of(y, count):
    return y.reshape(count, y.shape[0] // count, *y.shape[1:])


def assert_groups_equal(y, count):
    parts = groups_of(y, count)
    for g in range(1, count):
        assert_bitwise_equal(parts[0], parts[g], f"group {g}")


def assert_is_the_plain_layer(y, plain):
    """Bit for bit; in 16 bits a GPU's matrix instructions take the inputs of a weight as it is in another order."""
    if y.is_cuda and y.dtype != torch.float32:
        torch.testing.assert_close(y, plain, rtol=torch.finfo(y.dtype).eps, atol=1e-5)
    else:
        assert_bitwise_equal(y, plain)


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 33, 64])
def test_eps_zero_gives_equal_groups_and_the_plain_layer(rows, dtype, noise, device):
    """Bitwise: loss+ == loss- where nothing was perturbed. And the plain layer."""
    zero = Pass(device, eps=0.0, queries=2, noise=noise)
    plain = Pass(device, signs=(0,))
    half, w, b = (randn(*s, seed=i, dtype=dtype, device=device) for i, s in enumerate([(rows, 47), (31, 47), (31,)]))
    y = ops.perturbed_linear(torch.cat([half] * 4), w, b, zero.p, site=1, bias_site=2)
    assert_groups_equal(y, 4)
    assert_is_the_plain_layer(groups_of(y, 4)[0], ops.perturbed_linear(half, w, b, plain.p, site=1, bias_site=2))
    assert_bitwise_equal(y, ops.perturbed_linear(half, w, b, zero.p, site=1, bias_site=2, shared=True))

    ids = torch.arange(rows, device=device) % 31
    y = ops.perturbed_embedding(torch.cat([ids] * 4), w, zero.p, site=1)
    assert_groups_equal(y, 4)
    assert_bitwise_equal(groups_of(y, 4)[0], ops.perturbed_embedding(ids, w, plain.p, site=1))
    assert_bitwise_equal(ops.perturb(w, zero.p, site=1), torch.stack([w] * 4))

    image = randn(min(rows, 9), 3, 7, 9, seed=3, dtype=dtype, device=device)
    kernel, bias = randn(5, 3, 3, 3, seed=4, dtype=dtype, device=device), randn(5, seed=5, dtype=dtype, device=device)
    for x in (image, image.contiguous(memory_format=torch.channels_last)):
        stacked = torch.cat([x] * 4)
        y = ops.perturbed_conv2d(stacked, kernel, bias, zero.p, site=1, bias_site=2)
        assert_groups_equal(y, 4)
        assert_is_the_plain_layer(
            groups_of(y, 4)[0], ops.perturbed_conv2d(x, kernel, bias, plain.p, site=1, bias_site=2)
        )


@pytest.mark.parametrize("rows", [1, 3, 7, 33])
@pytest.mark.parametrize("k", [5, 37, 84, 256])
def test_eps_zero_whatever_the_memory_of_x(rows, k):
    """A matmul's last bit may depend on alignment and strides: no group may differ from another in them."""
    zero = Pass(eps=0.0)
    half, w = randn(rows, k), randn(10, k, seed=1)
    stacked = torch.cat([half, half])
    for offset in (0, 1, 3, 5):
        raw = torch.from_numpy(np.zeros(stacked.numel() + offset, np.float32)[offset:]).view(2 * rows, k)
        wide = torch.zeros(2 * rows, k + offset + 4)[:, offset : offset + k]
        for x in (raw, wide, torch.zeros(k, 2 * rows).t()):
            x.copy_(stacked)
            assert_groups_equal(ops.perturbed_linear(x, w, None, zero.p, site=1), 2)


@pytest.mark.parametrize("size", [(1, 1), (1, 33), (4, 9), (7, 7), (5, 13)])
@pytest.mark.parametrize(("c", "o"), [(3, 5), (5, 17), (16, 1), (33, 64), (64, 100)])
def test_eps_zero_gives_equal_groups_of_pointwise_convolutions(c, o, size, device):
    """On the CPU these are products of matrices, whose last bit depends on where a group's rows begin."""
    zero, plain = Pass(device, eps=0.0, queries=2), Pass(device, signs=(0,))
    w, b = randn(o, c, 1, 1, seed=1, device=device), randn(o, seed=2, device=device)
    for rows in (1, 3, 8):
        x = randn(rows, c, *size, device=device)
        for bias in (b, None):
            y = ops.perturbed_conv2d(torch.cat([x] * 4), w, bias, zero.p, site=1, bias_site=2)
            assert_groups_equal(y, 4)
            assert_bitwise_equal(groups_of(y, 4)[0], ops.perturbed_conv2d(x, w, bias, plain.p, site=1, bias_site=2))
    wide = randn(8, c + 1, *size, seed=3, device=device)
    for x in (
        randn(6, c, *size, device=device)[::2],
        wide[:, :c],
    ):  # a group that runs alone may be a view, stacked ones are not
        y = ops.perturbed_conv2d(torch.cat([x] * 4), w, b, zero.p, site=1, bias_site=2)
        assert_bitwise_equal(groups_of(y, 4)[0], ops.perturbed_conv2d(x, w, b, plain.p, site=1, bias_site=2))


def test_both_signs_are_opposite_and_queries_are_consecutive(device):
    """One pass of three queries is three passes of one, and the mean of a pair is the plain layer."""
    w = randn(8, 40, device=device)
    whole = Pass(device, queries=3, query=5, eps=0.25)
    copies = ops.perturb(w, whole.p, site=9, dtype=torch.float32)
    for q in range(3):
        one = Pass(device, query=5 + q, eps=0.25)
        assert_bitwise_equal(copies[2 * q : 2 * q + 2], ops.perturb(w, one.p, site=9, dtype=torch.float32))
        for sign, copy in zip((1, -1), copies[2 * q :], strict=False):
            alone = Pass(device, query=5 + q, eps=0.25, signs=(sign,))
            assert_bitwise_equal(copy, ops.perturb(w, alone.p, site=9, dtype=torch.float32)[0])
        torch.testing.assert_close(
            (copies[2 * q] - copies[2 * q + 1]).cpu() / 0.5, whole.z((8, 40), 9, q), atol=1e-5, rtol=0
        )


def test_sites_differ_and_the_bias_has_its_own(device):
    p, w = Pass(device, eps=1.0), torch.zeros(4, 4, device=device)
    assert not torch.equal(ops.perturb(w, p.p, site=1), ops.perturb(w, p.p, site=2))
    x = torch.zeros(2, 4, device=device)
    ones = [ops.perturbed_linear(x, w, w[0], p.p, site=1, bias_site=s) for s in (1, 2)]
    assert not torch.equal(*ones)  # x is zero: the output is the perturbed bias alone


@pytest.mark.parametrize("shared", [False, True])
def test_empty_batches(shared, device):
    p = Pass(device).p
    w, b = randn(6, 5, device=device), randn(6, device=device)
    assert ops.perturbed_linear(torch.empty(0, 5, device=device), w, b, p, site=1, shared=shared).shape == (0, 6)
    assert ops.perturbed_linear(torch.empty(4, 0, 5, device=device), w, b, p, site=1).shape == (4, 0, 6)
    kernel = randn(6, 5, 3, 3, device=device)
    x = torch.empty(0, 5, 8, 8, device=device)
    assert ops.perturbed_conv2d(x, kernel, b, p, site=1, shared=shared).shape == (0, 6, 6, 6)
    ids = torch.empty(0, 3, dtype=torch.int64, device=device)
    assert ops.perturbed_embedding(ids, w, p, site=1, shared=shared).shape == (0, 3, 5)
    assert ops.perturb(torch.empty(0, 3, device=device), p, site=1).shape == (2, 0, 3)
    none = ops.perturbed_linear(
        torch.zeros(4, 0, device=device), torch.empty(6, 0, device=device), b, p, site=1, bias_site=2
    )
    assert none.shape == (4, 6) and torch.isfinite(none).all()  # no inputs: the bias alone


# ---- errors: every one that a docstring lists, and nothing is written


def good_linear(**change):
    a = dict(x=randn(4, 5), weight=randn(6, 5), bias=randn(6), p=Pass().p, site=1, bias_site=2) | change
    return lambda: ops.perturbed_linear(a.pop("x"), a.pop("weight"), a.pop("bias"), a.pop("p"), **a)


def good_conv(**change):
    a = dict(x=randn(4, 6, 8, 8), weight=randn(6, 3, 3, 3), bias=randn(6), p=Pass().p, site=1, groups=2) | change
    return lambda: ops.perturbed_conv2d(a.pop("x"), a.pop("weight"), a.pop("bias"), a.pop("p"), **a)


def good_conv1d(**change):
    return lambda: ops.perturbed_conv1d(randn(4, 6, 8), randn(6, 6, 3), None, Pass().p, site=1, **change)


def good_embedding(**change):
    a = dict(ids=torch.arange(4), weight=randn(6, 5), p=Pass().p, site=1) | change
    return lambda: ops.perturbed_embedding(a.pop("ids"), a.pop("weight"), a.pop("p"), **a)


def good_perturb(**change):
    a = dict(weight=randn(6, 5), p=Pass().p, site=1) | change
    return lambda: ops.perturb(a.pop("weight"), a.pop("p"), **a)


def good_pass(**change):
    return lambda: Perturbation(**dict(key=key_tensor(0, 0), eps=torch.ones(1)) | change)


meta = dict(device="meta")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (good_linear(weight=randn(6, 5, 1)), ValueError, "weight must be 2-D"),
        (good_linear(x=randn(4, 6)), ValueError, "does not end in the 5 inputs"),
        (good_linear(x=torch.tensor(1.0)), ValueError, "does not end in"),
        (good_linear(bias=randn(5)), ValueError, "bias must be [6]"),
        (good_linear(x=randn(5, 5)), ValueError, "no multiple of the 2 groups"),
        (good_linear(x=randn(5)), ValueError, "at least two dimensions"),
        (good_linear(x=torch.ones(4, 5, dtype=torch.int64)), TypeError, "int64"),
        (good_linear(x=torch.ones(4, 5, dtype=torch.float64)), TypeError, "float64"),
        (good_linear(weight=randn(6, 5).half()), TypeError, "goes with x of the same dtype"),
        (good_linear(x=randn(4, 5).half(), weight=randn(6, 5).bfloat16()), TypeError, "goes with x of the same dtype"),
        (good_linear(bias=randn(6).double()), TypeError, "weight and bias must be float32"),
        (good_linear(bias=torch.ones(6, dtype=torch.int32)), TypeError, "int32"),
        (good_linear(p=Pass(eps=-1.0).p), ValueError, "eps must be finite and at least 0, got -1.0"),
        (good_linear(p=Pass(eps=math.nan).p), ValueError, "got nan"),
        (good_linear(p=Pass(eps=math.inf).p), ValueError, "got inf"),
        (good_conv(p=Pass(eps=-1.0).p), ValueError, "eps"),
        (good_embedding(p=Pass(eps=math.nan).p), ValueError, "eps"),
        (good_perturb(p=Pass(eps=-math.inf).p), ValueError, "eps"),
        (good_linear(weight=torch.empty(6, 5, **meta)), ValueError, "a weight, the key or eps is on meta"),
        (good_linear(x=randn(4, 5).requires_grad_()), ValueError, "requires grad"),
        (good_linear(precision="bf16"), ValueError, "precision"),
        (good_linear(site=2**32), ValueError, "site must be in"),
        (good_linear(bias_site=-1), ValueError, "bias_site must be in"),
        (good_linear(site="fc1"), TypeError, "site must be an int"),
        (good_linear(transposed=True), ValueError, "does not end in the 6 inputs"),
        (good_linear(p=Pass(noise="gaussian_fast").p), NotImplementedError, "CUDA only"),
        (good_conv(weight=randn(6, 3, 3)), ValueError, "must be 4-D"),
        (good_conv(x=randn(4, 5, 8, 8)), ValueError, "does not fit"),
        (good_conv(groups=0), ValueError, "does not fit"),
        (good_conv(groups=4), ValueError, "does not fit"),
        (good_conv(bias=randn(3)), ValueError, "bias must be [6]"),
        (good_conv(stride=0), ValueError, "stride"),
        (good_conv(padding=-1), ValueError, "padding"),
        (good_conv(dilation=(1, 0)), ValueError, "dilation"),
        (good_conv(stride=(1, 1, 1)), ValueError, "stride"),
        (good_conv(stride=1.5), TypeError, "stride must be one or two integers, got 1.5"),
        (good_conv(padding="same"), TypeError, "padding"),
        (good_conv(groups=2.0), TypeError, "groups"),
        (good_conv(weight=randn(6, 3, 0, 3)), ValueError, "empty kernel"),
        (good_conv(bias=torch.ones(6, dtype=torch.int64)), TypeError, "int64"),
        (good_conv1d(stride=(1, 2)), ValueError, "one integer each"),
        (good_conv(x=randn(4, 6, 2, 2)), ValueError, "larger than the padded"),
        (good_conv(x=randn(5, 6, 8, 8)), ValueError, "no multiple of the 2 groups"),
        (good_conv(x=randn(4, 6, 8, 8).requires_grad_()), ValueError, "requires grad"),
        (good_conv(weight=randn(6, 3, 3, 3).half()), TypeError, "goes with x"),
        (good_conv(precision="fast"), ValueError, "precision"),
        (good_embedding(ids=torch.ones(4)), TypeError, "int32 or int64"),
        (good_embedding(weight=randn(6, 5).double()), TypeError, "float64"),
        (good_embedding(weight=randn(6)), ValueError, "2-D"),
        (good_embedding(ids=torch.arange(5)), ValueError, "no multiple"),
        (good_embedding(ids=torch.tensor(1)), ValueError, "at least one dimension"),
        (good_embedding(ids=torch.tensor([0, 6])), IndexError, "id 6 is outside [0, 6)"),
        (good_embedding(ids=torch.tensor([0, -1])), IndexError, "id -1"),
        (good_embedding(site=-1), ValueError, "site"),
        (good_perturb(weight=randn(6, 5).double()), TypeError, "float64"),
        (good_perturb(dtype=torch.int32), TypeError, "int32"),
        (good_perturb(layout="rows"), ValueError, "layout"),
        (good_perturb(site=2**32), ValueError, "site"),
        (good_pass(key=torch.zeros(2)), TypeError, "key must be int32"),
        (good_pass(eps=torch.ones(1).double()), TypeError, "eps must be float32"),
        (good_pass(key=torch.zeros(3, dtype=torch.int32)), ValueError, "key must be [2]"),
        (good_pass(eps=torch.tensor(1.0)), ValueError, "eps [1]"),
        (good_pass(signs=(-1, 1)), ValueError, "signs"),
        (good_pass(signs=()), ValueError, "signs"),
        (good_pass(queries=0), ValueError, "queries"),
        (good_pass(queries=1.5), TypeError, "queries"),
        (good_pass(queries=True), TypeError, "queries"),
        (good_pass(noise="gaussian"), TypeError, "noise must be a Noise, got str"),
        (good_pass(eps=1.0), TypeError, "eps must be a Tensor, got float"),
        (good_pass(query=-1), ValueError, "query"),
        (good_pass(query=2**24 - 1, queries=2), ValueError, "query"),
        (good_pass(noise=Noise("sparse_int8")), NotImplementedError, "integer layers"),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_x_that_requires_grad_is_fine_without_autograd():
    x = randn(4, 5).requires_grad_()
    with torch.no_grad():
        y = ops.perturbed_linear(x, randn(6, 5), None, Pass().p, site=1)
    assert not y.requires_grad
