"""z of 16 bits (docs/rng.md): which sites round it, and that forward, update and reference apply the same bits of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from recording_graphs import RecordingGraphs
from torch import nn

import ezo_kernels as ezo
from ezo_kernels import ops
from ezo_kernels.optim import capture
from tests import materialised as ref
from tests.materialised import Pass, randn
from tests.tolerance import assert_bitwise_equal
from tests.zoo import Conv1D

pytestmark = pytest.mark.usefixtures("poisoned_empty")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
HALF = [BF16, F16]
NOISES = ["gaussian", "clt4", "hadamard", "rademacher"]


def name_of(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def mlp(dtype=BF16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(18, 24), nn.Tanh(), nn.Linear(24, 5)).to(dtype)


def batch(dtype=BF16, rows: int = 24):
    y = torch.randint(0, 5, (rows,), generator=torch.Generator().manual_seed(6))
    return randn(rows, 18, seed=5, dtype=dtype), y


def loss_fn(out, y):
    return F.cross_entropy(out.float(), y)


def start(dtype=BF16, strategy: str = "auto", **options):
    model = ezo.convert_(mlp(dtype), head=0, strategy=strategy)
    return model, ezo.ElasticZO(model, **{"lr": 0.5, "eps": 0.05, "seed": 3, **options})


def weights(model) -> dict:
    return {k: v.clone() for k, v in model.state_dict().items()}


def z_dtypes(model) -> dict:
    """Resolved, by the parameter's own name."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return {s.names[0]: s.z_dtype_for(named[s.names[0]]) for s in model._ezo.manifest}


# ---- which sites


def test_sites_of_a_mixed_model():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(8, 16)
            self.free = nn.Linear(16, 16)
            self.twin = nn.Linear(16, 16)
            self.tied = nn.Linear(16, 8, bias=False)
            self.conv = nn.Conv1d(2, 3, 3)
            self.gpt = Conv1D(16, 16)
            self.norm = nn.LayerNorm(16)
            self.mixed = nn.Bilinear(4, 4, 4)
            self.attention = nn.MultiheadAttention(16, 2)
            self.tied.weight = self.embed.weight
            self.twin.weight = self.free.weight

    model = ezo.convert_(Mixed().to(BF16))
    rounded = {name for name, z in z_dtypes(model).items() if z == "bfloat16"}
    assert rounded == {"free.weight"} and len(model._ezo.manifest) == 16
    assert set(z_dtypes(model).values()) == {"bfloat16", "float32"}


@pytest.mark.parametrize(("strategy", "rounds"), [("auto", 1), ("two_products", 1), ("fused", 0), ("slab", 0)])
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_strategy_and_dtype_decide(strategy, rounds, dtype):
    model, _ = start(dtype, strategy)
    want = name_of(dtype) if rounds else "float32"
    assert z_dtypes(model) == {"0.bias": "float32", "0.weight": want, "2.bias": "float32", "2.weight": want}


def test_a_linear_that_is_a_copy_keeps_fp32():
    """A weight that one module multiplies and another reads as a perturbed copy."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Bilinear(4, 4, 4)
            self.c = nn.ParameterList([self.a.weight])

    assert z_dtypes(ezo.convert_(Both().to(BF16)))["a.weight"] == "float32"


# ---- the same z in forward and update


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("strategy", ["fused", "two_products", "slab"])
def test_the_z_that_a_product_shows_is_the_z_that_the_update_subtracts(strategy, dtype, noise):
    """W = 0: rows of the identity at eps = 1 show z, and so does an update by -1, which has nothing to round."""
    p, z_dtype = Pass(eps=1.0, noise=noise, signs=(1,)), name_of(dtype)
    w = torch.zeros(40, 24, dtype=dtype)
    shown = ops.perturbed_linear(torch.eye(24, dtype=dtype), w, None, p.p, site=7, strategy=strategy, z_dtype=z_dtype)
    ops.update_([w], p.p.key, torch.tensor([-1.0]), sites=[7], noise=p.p.noise, z_dtypes=[z_dtype])
    assert_bitwise_equal(w, shown.T.contiguous())
    assert_bitwise_equal(w, p.z(w.shape, 7).to(dtype))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_a_step_is_the_materialised_one_bit_for_bit(mode, dtype, noise):
    """Losses from W + sign eps z in memory and the weights after the update, both with z of the weights rounded."""
    model, opt = start(dtype, noise=noise, mode=mode, queries=2, stochastic_rounding=False)
    before, (x, y) = weights(model), batch(dtype)
    opt.train_step(x, y, loss_fn)
    p = Pass(seed=3, step=0, eps=0.05, noise=noise, queries=2)
    sites = {s.names[0]: (s.site, dtype if s.names[0].endswith("weight") else F32) for s in model._ezo.manifest}
    losses, plain = [], mlp(dtype)
    moved = {k: p.weights(w, sites[k][0], z_dtype=sites[k][1]) for k, w in before.items()}
    for g in range(4):
        plain.load_state_dict({k: m[g] for k, m in moved.items()})
        losses.append(loss_fn(plain(x), y).detach())
    assert_bitwise_equal(opt.losses, torch.stack(losses))
    coefs = (opt._lr * opt.g / 2).tolist()
    differ = False
    for k, w in before.items():
        site, z_dtype = sites[k]
        after = model.state_dict()[k]
        assert_bitwise_equal(after, ref.update(w, coefs, p, site=site, z_dtype=z_dtype).to(dtype), k)
        differ |= not torch.equal(after, ref.update(w, coefs, p, site=site).to(dtype))
    assert differ == (noise != "rademacher"), "a step with z in fp32 would have passed"


@pytest.mark.parametrize("strategy", ["auto", "two_products"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_stacked_equals_sequential_and_eps_zero_gives_equal_losses(dtype, strategy):
    runs = []
    for mode in ("stacked", "sequential"):
        model, opt = start(dtype, strategy, mode=mode, queries=2)
        for _ in range(2):
            opt.train_step(*batch(dtype), loss_fn)
        runs.append(weights(model))
        opt._eps.zero_()
        opt.train_step(*batch(dtype), loss_fn)
        assert (opt.losses == opt.losses[0]).all()
    assert all(torch.equal(v, runs[1][k]) for k, v in runs[0].items())


def test_rounding_moves_neither_mean_nor_variance():
    for noise in ("gaussian", "clt4", "hadamard", "uniform"):
        z = ops.materialize((1024, 1024), seed=1, step=2, site=3, noise=noise).double()
        for dtype, limit in ((BF16, 2e-4 if noise == "clt4" else 3e-5), (F16, 3e-5)):
            rounded = z.to(dtype).double()
            assert abs((rounded.square().mean() / z.square().mean() - 1).item()) < limit
            assert abs((rounded - z).mean().item()) < 1e-5
            assert ((rounded - z).abs() <= z.abs() * torch.finfo(dtype).eps / 2 + 2.0**-25).all()


# ---- g along the rounded z


@pytest.mark.parametrize("strategy", ["two_products", "auto"])
def test_difference_along_the_rounded_z(strategy):
    """g of a bf16 MLP against the fp64 difference along the same rounded z, relative to the spread of g over 32 directions."""
    eps, queries = 0.05, 32
    model, opt = start(strategy=strategy, eps=eps, lr=0.0, queries=queries)
    (x, y), before = batch(), weights(model)
    opt.train_step(x, y, loss_fn)
    p, exact = Pass(seed=3, step=0, eps=eps, queries=queries), mlp().double()
    sites = {s.names[0]: (s.site, BF16 if s.names[0].endswith("weight") else F32) for s in model._ezo.manifest}
    moved = {k: p.weights(w, sites[k][0], exact=True, z_dtype=sites[k][1]) for k, w in before.items()}
    losses = []
    with torch.no_grad():
        for g in range(2 * queries):
            exact.load_state_dict({k: m[g] for k, m in moved.items()})
            losses.append(F.cross_entropy(exact(x.double()), y))
    pair = torch.stack(losses).view(queries, 2)
    want = (pair[:, 0] - pair[:, 1]) / (2 * eps)
    assert (opt.g.double() - want).norm() / want.norm() < 6e-3


# ---- casts, states, captures


def test_a_cast_after_conversion_is_followed():
    first = ezo.convert_(mlp(BF16), head=0)
    then = ezo.convert_(mlp(F32), head=0).bfloat16()
    for model in (first, then):
        opt = ezo.ElasticZO(model, lr=0.5, eps=0.05, seed=3)
        opt.train_step(*batch(), loss_fn)
    assert z_dtypes(first) == z_dtypes(then) and "bfloat16" in z_dtypes(then).values()
    assert all(torch.equal(v, then.state_dict()[k]) for k, v in first.state_dict().items())


def test_a_cast_between_steps_is_followed():
    model, opt = start(F32, noise="clt4", stochastic_rounding=False)
    for step, dtype in enumerate([F32, BF16, F16]):
        model.to(dtype)
        before = weights(model)
        opt.train_step(*batch(dtype), loss_fn)
        p, coefs = Pass(seed=3, step=step, noise="clt4"), (opt._lr * opt.g).tolist()
        for s in model._ezo.manifest:
            z_dtype = dtype if s.names[0].endswith("weight") else F32
            want = ref.update(before[s.names[0]], coefs, p, site=s.site, z_dtype=z_dtype).to(dtype)
            assert_bitwise_equal(model.state_dict()[s.names[0]], want, f"{dtype} {s.names[0]}")


def test_a_plan_ends_with_a_cast():
    w = nn.Parameter(randn(6, 8, dtype=BF16), requires_grad=False)
    plan = ops.UpdatePlan.build([w], [1], ["matrix"], ops.Noise(), z_dtypes=["bfloat16"])
    assert plan.fits([w]) and plan.rounded == (True,)
    w.data = w.data.half()
    assert not plan.fits([w])


def test_states_of_other_z_are_refused():
    model, opt = start()
    opt.train_step(*batch(), loss_fn)
    saved = opt.state_dict()
    assert {row[4] for row in saved["manifest"]} == {"float32", "bfloat16"}
    for other in (start(strategy="fused")[1], start(F16)[1]):
        held = other._seed.clone()
        with pytest.raises(
            ValueError, match=r"z of '0.weight' is bfloat16 in the state and float.* in this run, and 1 more"
        ):
            other.load_state_dict(saved)
        assert torch.equal(held, other._seed) and not other._step.any()
    twin, other = start(strategy="two_products", seed=9)  # the same z, multiplied otherwise
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(saved)
    assert torch.equal(other._seed, opt._seed) and torch.equal(other._step, opt._step)


def test_unconvert_and_convert_again():
    model, _ = start()
    x, _ = batch()
    want = mlp()(x)
    assert torch.equal(ezo.unconvert_(model)(x), want)
    assert set(z_dtypes(ezo.convert_(model, strategy="fused")).values()) == {"float32"}


class Casting(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x.to(self.net[0].weight.dtype))


def test_a_model_that_was_cast_twice_is_captured_again(monkeypatch):
    """Its tensors may lie where they were, and its batches look alike."""
    monkeypatch.setattr("ezo_kernels.optim.elastic_zo.graphs_for", RecordingGraphs)
    runs, half = [], capture.WARM_UP + 2
    for on in (True, False):
        model = ezo.convert_(Casting(), head=0)
        opt = ezo.ElasticZO(model, lr=0.5, eps=0.05, seed=3, capture=on)
        for i in range(2 * half):
            if i == half:
                for p in model.parameters():
                    p.data = p.data.view(F16)  # the same memory, other numbers
            opt.train_step(*batch(F32), loss_fn)
        runs.append((weights(model), opt.capture_counters))
    assert all(torch.equal(v, runs[1][0][k]) for k, v in runs[0][0].items())
    assert runs[0][1]["captures"] == 2


def test_autocast_of_fp32_weights_keeps_fp32():
    model, opt = start(F32, stochastic_rounding=False)
    before = weights(model)
    with torch.autocast("cpu", BF16):
        opt.train_step(*batch(F32), loss_fn)
    p, coefs = Pass(seed=3, step=0), (opt._lr * opt.g).tolist()
    for s in model._ezo.manifest:
        assert_bitwise_equal(model.state_dict()[s.names[0]], ref.update(before[s.names[0]], coefs, p, site=s.site))
