"""The update in place: against materialised noise bitwise, its rounding, and what it must not touch."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from ezo_kernels.ops import Noise, UpdatePlan, update_
from ezo_kernels.ops._layout import default_layout, grid
from ezo_kernels.ops.noise import key_tensor
from ezo_kernels.ops.update import round_stochastic, rounding_lanes, update_strategy
from tests import materialised as ref
from tests.materialised import NOISES, Pass, randn
from tests.tolerance import assert_bitwise_equal, bits

pytestmark = pytest.mark.usefixtures("poisoned_empty")

SHAPES = [(), (7,), (5, 33), (2, 3, 4), (4, 3, 3, 2)]
HALF = [torch.float16, torch.bfloat16]


def run(params, coefs, p: Pass, sites, **how):
    device = params[0].device
    update_(params, p.p.key, torch.tensor(coefs, device=device), sites=sites, noise=p.p.noise, query=p.query, **how)


@pytest.mark.parametrize("coefs", [[0.25], [-1.5], [0.1, -0.2, 0.3]])
@pytest.mark.parametrize(("noise", "params"), NOISES)
def test_fp32_is_bitwise_the_materialised_update(noise, params, coefs, device):
    """w - coef_0 z_0 - coef_1 z_1 ..., in this order, each product rounded."""
    p = Pass(device, noise=noise, params=params, query=6, queries=len(coefs))
    weights = [randn(*s, seed=i, device=device) for i, s in enumerate(SHAPES)]
    sites = [2**32 - 1 - i for i in range(len(SHAPES))]
    want = [ref.update(w, coefs, p, site=s) for w, s in zip(weights, sites, strict=True)]
    run(weights, coefs, p, sites)
    for w, expected in zip(weights, want, strict=True):
        assert_bitwise_equal(w.cpu(), expected)


@pytest.mark.parametrize(("noise", "params"), NOISES)
def test_scales_multiply_coefficients_in_fp32(noise, params, device):
    p = Pass(device, noise=noise, params=params, queries=2)
    weights, scales = [randn(5, 9, device=device), randn(7, 3, seed=1, device=device)], [0.3, 1.0]
    coefs = np.array([0.1, -0.7], np.float32)
    scaled = [(coefs * np.float32(s)).tolist() for s in scales]
    want = [ref.update(w, c, p, site=i) for i, (w, c) in enumerate(zip(weights, scaled, strict=True))]
    plan = UpdatePlan.build(weights, [0, 1], ["matrix"] * 2, p.p.noise, scales=scales)
    run(weights, coefs.tolist(), p, [0, 1], plan=plan)
    for a, b in zip(weights, want, strict=True):
        assert_bitwise_equal(a, b)
    with pytest.raises(ValueError, match="other scales"):
        run(weights, coefs.tolist(), p, [0, 1], plan=plan, scales=[1.0, 1.0])


def test_update_goes_down_the_slope(device):
    """Positive coef times z is subtracted: w - lr g z."""
    p, w = Pass(device, noise="rademacher"), torch.zeros(6, 9, device=device)
    run([w], [0.5], p, [3])
    assert torch.equal(w.cpu(), -0.5 * p.z((6, 9), 3))


def test_strides_and_layouts(device):
    p = Pass(device)
    base = randn(6, 4, 3, 5, device=device)
    want = ref.update(base, [0.3], p, site=1)
    wide = torch.zeros(12, 8, 3, 10, device=device)
    for w in (
        base.contiguous(memory_format=torch.channels_last),
        base.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        wide[::2, ::2, :, ::2],
    ):
        w.copy_(base)
        run([w], [0.3], p, [1])
        assert_bitwise_equal(w.cpu(), want)
    assert (
        not wide[1::2].any() and not wide[:, 1::2].any() and not wide[..., 1::2].any()
    )  # nothing between the elements
    matrix = base.clone()
    run([matrix], [0.3], p, [1], layouts=["matrix"])
    assert_bitwise_equal(matrix.cpu(), ref.update(base, [0.3], p, site=1, layout="matrix"))
    line = randn(6, 4, 3, device=device)
    want = ref.update(line, [0.3], p, site=1, layout="conv")
    run([line], [0.3], p, [1], layouts=["conv"])
    assert_bitwise_equal(line.cpu(), want)


def test_parameters_of_several_dtypes_in_one_call(device):
    p = Pass(device)
    weights = [randn(5, 8, dtype=d, device=device) for d in (torch.float32, *HALF)]
    want = [ref.update(w, [0.3], p, site=i) for i, w in enumerate(weights)]
    run(weights, [0.3], p, [0, 1, 2], stochastic_rounding=False)
    for w, expected in zip(weights, want, strict=True):
        assert_bitwise_equal(w.cpu(), expected.to(w.dtype))


# ---- rounding of 16-bit weights


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale", [1.0, 1e-5])  # 1e-5: subnormal in fp16
def test_stochastic_rounding_picks_a_neighbour_with_the_right_chance(dtype, scale):
    """Over every value of the 16 random bits: the mean is the value itself, and only its two neighbours appear."""
    lanes = torch.arange(65536, dtype=torch.int32)
    for value in (randn(40, seed=4) * scale).tolist() + [scale, -scale, 2.0**-14, 2.0**-24, -3 * 2.0**-25, 0.0]:
        v = torch.full((65536,), value)
        rounded = round_stochastic(v, lanes, dtype).double()
        exact, ulp = v[0].double(), (rounded.max() - rounded.min()).item()
        assert rounded.unique().numel() <= 2
        assert rounded.min() <= exact <= rounded.max()
        assert abs(rounded.mean() - exact) <= ulp * (2.0**-13 if dtype == torch.float16 else 2.0**-16)
        if exact.to(dtype).double() == exact:
            assert ulp == 0 and rounded[0] == exact


@pytest.mark.parametrize("dtype", HALF)
def test_updates_below_half_an_ulp_add_up(dtype, device):
    """300 steps of a twentieth of an ulp: to nearest loses them all, stochastic rounding keeps their sum on average."""
    ulp = torch.finfo(dtype).eps
    coef, steps, shape = ulp / 20, 300, (64, 128)
    drift, p0 = torch.zeros(shape), Pass(device, noise="rademacher")
    kept, lost = (torch.full(shape, 1.5, dtype=dtype, device=device) for _ in range(2))
    for step in range(steps):
        p = Pass(device, noise="rademacher", step=step)
        drift -= coef * p.z(shape, 8)
        run([kept], [coef], p, [8])
        run([lost], [coef], p0, [8], stochastic_rounding=False)
    assert bool((lost == 1.5).all())
    error = (kept.cpu().float() - 1.5 - drift) / ulp
    spread = (steps / 20) ** 0.5  # a step's rounding error has variance (1/20)(19/20) ulp^2
    assert abs(error.mean()) < 5 * spread / error.numel() ** 0.5, "biased"
    assert error.std() < 1.5 * spread
    moved = kept.cpu().float() - 1.5
    assert torch.corrcoef(torch.stack([moved.flatten(), drift.flatten()]))[0, 1] > 0.15


@pytest.mark.parametrize("dtype", HALF)
def test_rounding_words_are_those_of_the_contract(dtype, device):
    p = Pass(device)
    for shape, layout in (((9, 21), "matrix"), ((5, 3, 2, 2), "conv")):
        w = randn(*shape, dtype=dtype, device=device)
        lanes = rounding_lanes(w.shape, key_tensor(p.seed, p.step), 13, grid(shape, layout, 4), 7)
        want = round_stochastic(ref.update(w, [0.01], p, site=13), lanes, dtype)
        run([w], [0.01], p, [13])
        assert_bitwise_equal(w.cpu(), want)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("stochastic", [True, False])
def test_weights_that_are_not_finite_stay(dtype, stochastic, device):
    w = randn(8, 16, dtype=dtype, device=device)
    special = torch.tensor([float("inf"), float("-inf"), float("nan")]).to(device, dtype)
    w[0, :3] = special
    run([w], [0.1], Pass(device), [1], stochastic_rounding=stochastic)
    assert torch.equal(w[0, :2], special[:2]) and bool(w[0, 2].isnan())
    assert bool(torch.isfinite(w.flatten()[3:]).all())


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("coefs", [[0.0], [0.0, 0.0], [-0.0]])
def test_a_zero_coefficient_leaves_every_bit_alone(dtype, coefs, device):
    """A skipped step: -0, subnormals and NaN with a payload are as they were."""
    w = randn(64, 64, dtype=dtype, device=device)
    w[0] = -0.0
    w[1] = torch.finfo(dtype).smallest_normal * 0.37
    w[2] = float("inf")
    w[3] = float("nan")
    w[4] = torch.finfo(dtype).max
    before = bits(w).clone()
    run([w], coefs, Pass(device), [1])
    assert torch.equal(bits(w), before)


def test_empty_lists_and_tensors(device):
    update_([], key_tensor(0, 0), torch.ones(1), sites=[])
    w = torch.empty(0, 4, device=device)
    run([w], [0.1], Pass(device), [1])
    assert w.shape == (0, 4)


def test_parameters_that_require_grad_are_updated_outside_autograd(device):
    w = randn(3, 4, device=device).requires_grad_()
    version = w._version
    run([w], [0.1], Pass(device), [1])
    assert w.is_leaf and w.grad is None and w._version > version  # autograd must hear of it


def test_a_plan_spares_building_and_is_refused_for_other_shapes(device):
    p, w = Pass(device), randn(5, 8, device=device)
    plan = UpdatePlan.build([w], [4], ["matrix"], p.p.noise)
    want = ref.update(w, [0.2], p, site=4)
    assert plan.fits([w])
    run([w], [0.2], p, [4], plan=plan)
    assert_bitwise_equal(w.cpu(), want)
    other = randn(8, 5, device=device)
    before = other.clone()
    with pytest.raises(ValueError, match="plan was built for other tensors"):
        run([other], [0.2], p, [4], plan=plan)
    assert torch.equal(other, before)


# ---- z of the weight's dtype


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize(("noise", "params"), NOISES)
@pytest.mark.parametrize("dtype", HALF)
def test_z_is_rounded_where_the_caller_says(dtype, noise, params, stochastic, device):
    """Bitwise the materialised update with rounded z; every other parameter of the call keeps z in fp32."""
    p, coefs = Pass(device, noise=noise, params=params, queries=2), [0.3, -0.02]
    weights = [randn(*s, seed=i, dtype=dtype, device=device) for i, s in enumerate(SHAPES)]
    names = [name_of(dtype) if i % 2 == 0 else "float32" for i in range(len(SHAPES))]
    sites = list(range(len(weights)))
    want = [
        ref.update(w, coefs, p, site=i, z_dtype=getattr(torch, z))
        for i, (w, z) in enumerate(zip(weights, names, strict=True))
    ]
    kept = [rounded_like(w, to, p, i, stochastic) for i, (w, to) in enumerate(zip(weights, want, strict=True))]
    run(weights, coefs, p, sites, z_dtypes=names, stochastic_rounding=stochastic)
    for w, expected in zip(weights, kept, strict=True):
        assert_bitwise_equal(w.cpu(), expected)


def name_of(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rounded_like(w, to, p: Pass, site: int, stochastic: bool):
    """``to`` as the update leaves it in w's dtype."""
    if not stochastic:
        return to.to(w.dtype)
    where = grid(w.shape, default_layout(w.shape), p.p.noise.segment)
    return round_stochastic(to, rounding_lanes(w.shape, key_tensor(p.seed, p.step), site, where, 7), w.dtype)


def test_dtypes_of_z_that_cannot_be():
    half, full = randn(3, 4, dtype=torch.bfloat16), randn(3, 4)
    for params, z_dtypes, error, message in (
        ([half], ["float16"], TypeError, "'float32' or its own 16 bits, got 'float16'"),
        ([full], ["bfloat16"], TypeError, "z_dtypes of a torch.float32 parameter"),
        ([half, full], ["bfloat16"], ValueError, "2 params and 1 z_dtypes"),
    ):
        before = [bits(w).clone() for w in params]
        with pytest.raises(error, match=message):
            run(params, [0.1], Pass(), list(range(len(params))), z_dtypes=z_dtypes)
        assert all(torch.equal(bits(w), old) for w, old in zip(params, before, strict=True))
    run([full], [0.1], Pass(), [1], z_dtypes=["float32"])
    plan = UpdatePlan.build([half], [1], ["matrix"], Noise(), z_dtypes=["bfloat16"])
    run([half], [0.1], Pass(), [1], plan=plan)  # the plan has them
    run([half], [0.1], Pass(), [1], plan=plan, z_dtypes=["bfloat16"])
    with pytest.raises(ValueError, match="plan was built for other dtypes of z"):
        run([half], [0.1], Pass(), [1], plan=plan, z_dtypes=["float32"])


# ---- several steps in one pass


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("stochastic", [True, False])
def test_several_steps_are_as_many_calls(dtype, stochastic, device):
    """A replay of a log: the rounding of each step is made in between; a step of zeros is none."""
    steps = [(3, 5), (2**63, 9), (3, 6), (3, 7)]
    coefs = torch.tensor([[0.1, -0.2], [0.0, 0.0], [0.3, 0.0], [1e-4, 2e-4]])
    keys = torch.stack([key_tensor(*s) for s in steps]).to(device)
    once, each = ([randn(*s, seed=i, dtype=dtype, device=device) for i, s in enumerate(SHAPES)] for _ in "ab")
    how = dict(sites=list(range(len(SHAPES))), query=7, stochastic_rounding=stochastic)
    how["z_dtypes"] = [name_of(dtype)] * len(SHAPES)
    update_(once, keys, coefs.to(device), **how)
    for key, coef in zip(keys, coefs.to(device), strict=True):
        update_(each, key, coef, **how)
    for a, b in zip(once, each, strict=True):
        assert_bitwise_equal(a.cpu(), b.cpu())


# ---- arrays of other libraries, and which kernel runs


def test_arrays_of_other_libraries_are_updated_where_they_lie():
    """DLPack: the array itself changes, by its own strides."""
    p, w = Pass(), randn(6, 9)
    array = w.numpy().copy()
    column = np.ascontiguousarray(w.numpy().T).T
    for a in (array, column):
        update_([a], p.p.key, torch.tensor([0.25]), sites=[4])
        assert_bitwise_equal(torch.from_numpy(a), ref.update(w, [0.25], p, site=4))
    fixed = w.numpy().copy()
    fixed.flags.writeable = False
    with pytest.raises(BufferError, match="readonly"):
        update_([fixed], p.p.key, torch.tensor([0.25]), sites=[4])
    with pytest.raises(TypeError, match="__dlpack__, got list"):
        update_([[1.0]], p.p.key, torch.tensor([0.25]), sites=[4])
    assert np.array_equal(np.from_dlpack(ref.update(w, [0.25], p, site=4)), array)


def test_the_strategy_is_a_pure_function(monkeypatch):
    assert update_strategy("gaussian", {torch.bfloat16}, cupy=True) == "triton", "no GPU has timed the two"
    monkeypatch.setattr(
        "ezo_kernels.ops.update.FASTER_IN_CUDA", {"gaussian": frozenset((torch.bfloat16, torch.float16))}
    )
    half, full = {torch.bfloat16}, {torch.float32, torch.bfloat16}
    assert update_strategy("gaussian", half, cupy=True) == "cuda"
    assert update_strategy("gaussian", half, cupy=False) == "triton"
    assert update_strategy("gaussian", full, cupy=True) == "triton"
    assert update_strategy("clt4", half, cupy=True) == "triton"


def test_a_cpu_has_no_strategies():
    w = randn(3, 4)
    before = w.clone()
    with pytest.raises(NotImplementedError, match="'cuda' is a GPU's"):
        run([w], [0.1], Pass(), [1], strategy="cuda")
    with pytest.raises(ValueError, match="strategy must be one of .* got 'fast'"):
        run([w], [0.1], Pass(), [1], strategy="fast")
    plan = UpdatePlan.build([w], [1], ["matrix"], Noise())
    with pytest.raises(ValueError, match="built for strategy 'triton', not 'cuda'"):
        run([w], [0.1], Pass(), [1], plan=plan, strategy="cuda")
    assert torch.equal(w, before)


def test_without_cupy_the_strategy_names_the_extra(monkeypatch):
    from ezo_kernels.ops import _cuda

    monkeypatch.setattr(_cuda, "available", lambda: False)
    with pytest.raises(ImportError, match=r"ezo-kernels\[cuda12\]"):
        _cuda.require()


# ---- errors: nothing changes


def bad(**change):
    good = dict(params=[randn(3, 4), randn(4)], key=key_tensor(0, 0), coef=torch.tensor([0.5]), sites=[1, 2])
    return good | change


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (bad(sites=[1]), ValueError, "2 params, 1 sites"),
        (bad(layouts=["matrix"]), ValueError, "1 layouts"),
        (bad(layouts=["matrix", "rows"]), ValueError, "layout must be"),
        (bad(layouts=["matrix", "conv"]), ValueError, "conv"),
        (bad(coef=torch.tensor([0.5]).double()), TypeError, "coef must be float32"),
        (bad(key=torch.zeros(2)), TypeError, "key int32"),
        (bad(key=torch.zeros(3, dtype=torch.int32)), ValueError, "key [2]"),
        (bad(coef=torch.tensor(0.5)), ValueError, "coef must be [queries]"),
        (bad(coef=torch.empty(0)), ValueError, "coef must be [queries]"),
        (bad(coef=torch.ones(2, 1)), ValueError, "(2, 1), (2,)"),
        (bad(coef=torch.ones(2, 1), key=torch.zeros(3, 2, dtype=torch.int32)), ValueError, "(2, 1), (3, 2)"),
        (bad(params=[randn(3, 4), randn(4).double()]), TypeError, "float64"),
        (bad(params=[randn(3, 4), torch.ones(4, dtype=torch.int8)]), TypeError, "int8"),
        (bad(params=[randn(3, 4), torch.empty(4, device="meta")]), ValueError, "on meta"),
        (bad(params=[randn(3, 4), randn(1).expand(4)]), ValueError, "is expanded"),
        (bad(sites=[1, -1]), ValueError, "site"),
        (bad(sites=[1, 2.0]), TypeError, "site"),
        (bad(query=2**24), ValueError, "query"),
        (bad(scales=[1.0]), ValueError, "2 params and 1 scales"),
        (bad(scales=[1.0, 0.0]), ValueError, "range of fp32, got 0.0"),
        (bad(scales=[float("inf"), 1.0]), ValueError, "range of fp32, got inf"),
        (bad(scales=[1.0, "2"]), TypeError, "got str"),
        (bad(query=2**24 - 1, coef=torch.ones(2)), ValueError, "query"),
        (bad(noise=Noise("sparse_int8")), NotImplementedError, "integer layers"),
        (bad(noise=Noise("gaussian_fast")), NotImplementedError, "CUDA only"),
    ],
)  # fmt: skip
def test_errors_change_nothing(arguments, error, message):
    arguments = dict(arguments)
    params = arguments.pop("params")
    before = [(bits(w).clone(), w._version) for w in params if w.device.type != "meta"]
    with pytest.raises(error, match=re.escape(message)):
        update_(params, arguments.pop("key"), arguments.pop("coef"), **arguments)
    for w, (kept, version) in zip(params, before, strict=False):
        assert torch.equal(bits(w), kept) and (w._version == version or arguments.get("noise"))
