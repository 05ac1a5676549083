"""The update: one launch over all parameters against the CPU reference, bit for bit where the noise is."""

from __future__ import annotations

import pytest
import torch

from ezo_kernels import ops
from ezo_kernels.ops._update_triton import update_table
from ezo_kernels.ops.noise import Noise, key_tensor


def plan(params, sites, layouts, noise, z_dtypes=None, scales=None):
    rounded = tuple(name != "float32" for name in z_dtypes or ["float32"] * len(params))
    table = update_table(params, sites, layouts, noise, rounded=rounded, scales=scales)
    where = tuple(map(ops.UpdatePlan._address, params))
    return ops.UpdatePlan(tuple(sites), tuple(layouts), where, table, rounded=rounded, scales=tuple(scales or ()))


def both(on_cpu, params, layouts, key, coef, noise, z_dtypes=None, scales=None, **options):
    """The parameters after our update and after the reference's."""
    sites = [0xFEDCBA98 + i for i in range(len(params))]
    ours, theirs = ([torch.empty_strided(w.shape, w.stride(), dtype=w.dtype).copy_(w) for w in params] for _ in "ab")
    options |= {"sites": sites, "layouts": layouts, "noise": noise}
    ops.update_(ours, key, coef, plan=plan(ours, sites, layouts, noise, z_dtypes, scales), **options)
    on_cpu(ops.update_, theirs, key, coef, z_dtypes=z_dtypes, scales=scales, **options)
    return ours, theirs


def test_noises(on_cpu, key, noise):
    spec, limit = noise
    params = [torch.randn(20, 40), torch.randn(5), torch.randn(6, 3, 5, 5)]
    layouts = ["matrix", "matrix", "conv"]
    ours, theirs = both(on_cpu, params, layouts, key, torch.tensor([0.5, 0.0, -0.25]), spec, query=4)
    for a, b, w in zip(ours, theirs, params, strict=True):
        assert not torch.equal(a, w)
        torch.testing.assert_close(a, b, rtol=0, atol=limit and 2 * limit + 1e-6)


def _params():
    yield "matrix", torch.randn(20, 264)
    yield "matrix", torch.randn(36, 20).t()
    yield "matrix", torch.randn(20, 72).clone().as_strided((10, 23), (144, 3))
    yield "matrix", torch.randn(())
    yield "matrix", torch.randn(0, 4)
    yield "matrix", torch.randn(3, 2, 4, 2, 5).permute(3, 1, 0, 2, 4)
    yield "conv", torch.randn(6, 5, 3, 3)
    yield "conv", torch.randn(6, 8, 3, 3).to(memory_format=torch.channels_last)
    yield "conv", torch.randn(6, 5, 3)
    yield "conv", torch.randn(3, 9, 2, 2, 2).to(memory_format=torch.channels_last_3d)


def test_scales(on_cpu, key):
    params = [torch.randn(20, 40), torch.randn(5), torch.randn(6, 3, 5, 5), torch.randn(9, 24).half()]
    layouts, scales = ["matrix", "matrix", "conv", "matrix"], [0.3, 1.0, 2.7, 1e-3]
    ours, theirs = both(on_cpu, params, layouts, key, torch.tensor([0.5, 0.1]), Noise("clt4"), scales=scales)
    plain, _ = both(on_cpu, params, layouts, key, torch.tensor([0.5, 0.1]), Noise("clt4"))
    for a, b, c, scale in zip(ours, theirs, plain, scales, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c) == (scale == 1.0)


@pytest.mark.parametrize("stochastic", [True, False])
def test_layouts_and_dtypes_in_one_launch(on_cpu, key, stochastic):
    layouts, params = zip(*_params(), strict=True)
    # the interpreter truncates where it casts to bf16: only the stochastic rounding, done in integers, is bf16's here
    dtypes = [torch.float32, torch.float16, torch.bfloat16 if stochastic else torch.float16]
    params = [w.to(dtypes[i % 3]) for i, w in enumerate(params)]
    ours, theirs = both(
        on_cpu, params, list(layouts), key, torch.tensor([0.01, 0.02]), Noise("clt4"), stochastic_rounding=stochastic
    )
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a, b), i


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_of_special_values(on_cpu, key, dtype):
    """Infinities, NaN, both zeros, subnormals and the largest number."""
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    row = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), largest, -largest, tiny, -tiny, tiny / 8])
    w = row.repeat(16, 8).to(dtype)
    ours, theirs = both(on_cpu, [w], ["matrix"], key, torch.tensor([1e-6]), Noise("clt4"))
    assert torch.equal(ours[0].nan_to_num(nan=7.0), theirs[0].nan_to_num(nan=7.0))
    assert torch.equal(ours[0].isnan(), theirs[0].isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_skipped_step_leaves_every_bit_alone(key, dtype):
    w = torch.tensor([0.0, -0.0, 1.0, float("nan")]).repeat(8, 8).to(dtype)
    before = w.clone()
    noise = Noise("clt4")
    ops.update_([w], key, torch.zeros(2), sites=[1], noise=noise, plan=plan([w], [1], ["matrix"], noise))
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(w.view(kind), before.view(kind))


@pytest.mark.parametrize("name", ["clt4", "uniform", "hadamard", "rademacher", "sparse"])
def test_z_of_the_parameters_dtype(on_cpu, key, name):
    """bf16, fp16 and fp32 in one launch, some with z rounded, of several queries: the reference's bits."""
    params = [w.to(d) for d in (torch.bfloat16, torch.float16) for w in (torch.randn(20, 40), torch.randn(6, 3, 5, 5))]
    params.append(torch.randn(9, 21))
    z_dtypes = ["bfloat16", "float32", "float32", "float16", "float32"]
    noise = Noise(name, p_zero=0.5 if name == "sparse" else 0.0)
    layouts, coef = ["matrix", "conv", "matrix", "conv", "matrix"], torch.tensor([0.5, -0.25])
    ours, theirs = both(on_cpu, params, layouts, key, coef, noise, z_dtypes)
    plain, _ = both(on_cpu, params, layouts, key, coef, noise)
    for a, b, c, z_dtype in zip(ours, theirs, plain, z_dtypes, strict=True):
        if name == "sparse":  # a gaussian, whose last bit is the interpreter's
            torch.testing.assert_close(a.float(), b.float(), rtol=2**-7, atol=1e-5)
        else:
            assert torch.equal(a, b)
            assert torch.equal(a, c) == (z_dtype == "float32" or name == "rademacher")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_rounded_z_is_the_materialised_one(key, dtype):
    """w = 0 and a coefficient of -1: what is left has nothing to round."""
    z = ops.materialize((33, 70), seed=0x0123456789ABCDEF, step=77, site=3, noise="clt4")
    w, noise = torch.zeros(33, 70, dtype=dtype), Noise("clt4")
    own = plan([w], [3], ["matrix"], noise, [str(dtype).removeprefix("torch.")])
    ops.update_([w], key, torch.tensor([-1.0]), sites=[3], noise=noise, plan=own)
    assert torch.equal(w, z.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_several_steps_in_one_launch(on_cpu, dtype):
    """Rounded after each step, in registers: what a launch a step gives."""
    params = [torch.randn(20, 40).to(dtype), torch.randn(6, 5, 3, 3).to(dtype)]
    keys = torch.stack([key_tensor(1, 2), key_tensor(2**63, 9), key_tensor(1, 3)])
    coef = torch.tensor([[0.1, -0.2], [0.0, 0.0], [0.3, 0.0]])
    ours, theirs = both(on_cpu, params, ["matrix", "conv"], keys, coef, Noise("clt4"))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_the_forward_and_the_update_make_the_same_z(key, noise):
    """w + eps z - eps z in exact arithmetic: with w = 0 the update by -eps is the perturbed copy."""
    spec, _ = noise
    w = torch.zeros(33, 70)
    copy = ops.perturb(w, ops.Perturbation(key, torch.tensor([0.25]), spec, signs=(1,)), site=3)[0]
    ops.update_([w], key, torch.tensor([-0.25]), sites=[3], noise=spec, plan=plan([w], [3], ["matrix"], spec))
    assert torch.equal(w, copy)
