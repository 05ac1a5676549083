"""The convolution kernel against the CPU operator: shapes, strides, formats, groups, signs, queries, noises."""

from __future__ import annotations

import pytest
import torch

from ezo_kernels.ops import Noise, Perturbation, perturbed_conv1d, perturbed_conv2d

EPS = 0.25
#: Of the largest output: sums of fp32 in another order, and one rounding of fp16.
LIMITS = {torch.float32: 2e-6, torch.float16: 2.0**-10}


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def compare(on_cpu, fn, *args, **kwargs):
    ours, theirs = fn(*args, **kwargs), on_cpu(fn, *args, **kwargs)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert error <= LIMITS[ours.dtype], f"error {error:.3g}"
    return ours


def pass_of(key, noise="gaussian", **kwargs):
    noise = noise if isinstance(noise, Noise) else Noise(noise)
    return Perturbation(key, torch.tensor([EPS]), noise, **kwargs)


def test_noises(key, noise, on_cpu, poisoned_empty):
    x, w, b = normal(4, 3, 4, 4), normal(5, 3, 3, 2), normal(5)
    p = pass_of(key, noise[0])
    compare(on_cpu, perturbed_conv2d, x, w, b, p, site=0xFFFFFFF0, bias_site=3, padding=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("channels", "outputs", "size", "kernel", "groups", "options"),
    [
        (1, 6, (7, 8), (5, 5), 1, {}),
        (3, 17, (7, 4), (1, 1), 1, {"stride": 2}),
        (5, 4, (6, 7), (3, 2), 1, {"padding": (2, 1), "dilation": (2, 1)}),
        (40, 20, (3, 4), (2, 3), 1, {"padding": 1, "stride": (1, 2)}),
        (6, 9, (3, 4), (3, 3), 3, {"padding": 1}),
        (3, 3, (4, 5), (3, 3), 3, {"padding": 1}),
        (4, 8, (2, 3), (5, 5), 4, {"padding": 2, "dilation": 1, "stride": 3}),
    ],
    ids=["lenet", "1x1", "dilated", "many channels", "groups", "depthwise", "all padding"],
)
def test_shapes(key, on_cpu, poisoned_empty, dtype, channels, outputs, size, kernel, groups, options):
    x, w = normal(2 * 2, channels, *size, dtype=dtype), normal(outputs, channels // groups, *kernel, dtype=dtype)
    b = normal(outputs, dtype=dtype)
    compare(on_cpu, perturbed_conv2d, x, w, b, pass_of(key, "clt4"), site=1, bias_site=2, groups=groups, **options)


@pytest.mark.parametrize("name", ["hadamard", "rademacher"])
def test_segments_wider_than_a_tap(key, on_cpu, name):
    x, w, b = normal(2, 36, 3, 3), normal(34, 18, 2, 2), normal(34)
    compare(on_cpu, perturbed_conv2d, x, w, b, pass_of(key, name), site=1, bias_site=2, groups=2)
    x, w, b = normal(2, 150, 2, 2), normal(3, 150, 1, 2), normal(3)
    compare(on_cpu, perturbed_conv2d, x, w, b, pass_of(key, name), site=1, bias_site=2)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("queries", "signs"), [(2, (1, -1)), (1, (1, -1)), (2, (1,)), (1, (-1,)), (2, (0,))])
def test_groups_of_a_pass(key, on_cpu, poisoned_empty, queries, signs, shared):
    p = pass_of(key, "uniform", query=300, queries=queries, signs=signs)
    x, w, b = normal(3 if shared else 3 * p.groups, 2, 5, 4), normal(4, 2, 2, 3), normal(4)
    compare(on_cpu, perturbed_conv2d, x, w, b, p, site=1, bias_site=2, shared=shared)


def test_memory_formats(key, on_cpu):
    p = pass_of(key, "clt4")
    x, w, b = normal(4, 6, 5, 4), normal(8, 6, 3, 3), normal(8)
    plain = compare(on_cpu, perturbed_conv2d, x, w, b, p, site=1, bias_site=2)
    last = torch.channels_last
    y = compare(on_cpu, perturbed_conv2d, x.to(memory_format=last), w.to(memory_format=last), b, p, site=1, bias_site=2)
    assert torch.equal(plain, y)
    gaps = normal(8, 12, 10, 4)[::2, ::2, ::2]
    y = perturbed_conv2d(gaps, w.transpose(2, 3), normal(16)[::2], p, site=1, bias_site=2)
    same = perturbed_conv2d(
        gaps.contiguous(), w.transpose(2, 3).contiguous(), normal(16)[::2].contiguous(), p, site=1, bias_site=2
    )
    assert torch.equal(y, same)


def test_mixed_and_no_bias(key, on_cpu):
    x, w = normal(4, 3, 5, 4, dtype=torch.float16), normal(4, 3, 3, 3)
    compare(on_cpu, perturbed_conv2d, x, w, None, pass_of(key), site=1)


def test_one_dimension(key, on_cpu):
    x, w, b = normal(4, 3, 11), normal(5, 3, 4), normal(5)
    compare(on_cpu, perturbed_conv1d, x, w, b, pass_of(key), site=1, bias_site=2, stride=2, padding=3, dilation=2)


def test_eps_zero_gives_equal_signs(key):
    p = Perturbation(key, torch.zeros(1), Noise())
    x, w, b = normal(3, 3, 5, 5), normal(4, 3, 3, 3), normal(4)
    plus, minus = perturbed_conv2d(torch.cat([x, x]), w, b, p, site=1, bias_site=2).chunk(2)
    assert torch.equal(plus, minus)


def test_pair_equals_single_signs(key):
    x, w, b = normal(4, 3, 4, 5), normal(4, 3, 3, 3), normal(4)
    pair = perturbed_conv2d(x, w, b, pass_of(key), site=1, bias_site=2)
    apart = [
        perturbed_conv2d(part, w, b, pass_of(key, signs=(sign,)), site=1, bias_site=2)
        for part, sign in zip(x.chunk(2), (1, -1), strict=True)
    ]
    assert torch.equal(pair, torch.cat(apart))


@pytest.mark.parametrize(
    ("dtype", "memory_format"),
    [(torch.float32, torch.contiguous_format), (torch.float16, torch.channels_last)],
    ids=str,
)
@pytest.mark.parametrize(("relu", "pool"), [(True, 1), (False, 2), (True, 2)])
@pytest.mark.parametrize(("size", "options"), [((5, 7), {}), ((8, 5), {"stride": (2, 1), "groups": 2})], ids=str)
def test_relu_and_pooling_in_the_kernel(key, poisoned_empty, dtype, memory_format, relu, pool, size, options):
    """The very bits of the operators one after the other, in the kernel as on the CPU; a window holds its NaN."""
    p = pass_of(key, "clt4")
    x = normal(2 * 2, 6, *size, dtype=dtype).to(memory_format=memory_format)
    x[1, 0, 2, 2] = float("nan")
    w, b = normal(5 * 2, 6 // options.get("groups", 1), 3, 3, dtype=dtype), normal(10, dtype=dtype)
    where = {"site": 1, "bias_site": 2, **options}
    want = perturbed_conv2d(x, w, b, p, **where)
    want = torch.nn.functional.max_pool2d(want, pool)
    want = want.relu() if relu else want
    got = perturbed_conv2d(x, w, b, p, relu=relu, pool=pool, **where)
    assert got.is_contiguous(memory_format=memory_format) and want.isnan().any()
    assert torch.equal(got.nan_to_num(nan=-3.0), want.nan_to_num(nan=-3.0))
