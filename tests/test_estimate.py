"""g from one sign a query (antithetic=False): the formula, its scale, and what goes with it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.ops import materialize
from ezo_kernels.ops.coefficients import projected_gradient
from tests.test_step import batch, bits, lenet, same


def test_formula():
    losses, eps = torch.tensor([3.0, 1.0, 2.5]), torch.tensor([0.5])
    want = [(3.0 - 1.75) / 0.5, (1.0 - 2.75) / 0.5, (2.5 - 2.0) / 0.5]
    assert projected_gradient(losses, eps, False).tolist() == pytest.approx(want, rel=1e-6)
    pairs = torch.tensor([3.0, 1.0, 2.5, 2.0])
    assert projected_gradient(pairs, eps, True).tolist() == pytest.approx([2.0, 0.5])


def test_mean_of_g_z_is_the_gradient():
    """Scale and direction on a loss whose curvature would drown a difference with L(w): its offset is 8 times the slope."""
    d, queries, passes, eps = 40, 200, 60, torch.tensor([0.1])
    gradient = torch.randn(d, generator=torch.Generator().manual_seed(0))
    gradient *= 1 / gradient.norm()

    def loss(v):
        return v @ gradient + 2.0 * v.square().sum(-1)

    z = torch.stack([materialize((queries, d), seed=3, step=step, site=1) for step in range(passes)])
    g = torch.stack([projected_gradient(loss(eps * each), eps, False) for each in z])
    estimates = torch.einsum("pq,pqd->pd", g, z) / queries
    along = float((estimates @ gradient).mean())
    assert along == pytest.approx(1, abs=0.05)
    # var of a query: (d + 1) |G|^2 / n of the slope, and the curvature's own noise, eps^2 / 4 * var(z^T H z) * d / n
    spread = eps.item() ** 2 * 2.0**2 * 2 * d * d
    want = math.sqrt(1 / (1 + (d + 1 + spread) / queries))
    cosine = along / float(estimates.square().sum(1).mean().sqrt())
    assert cosine == pytest.approx(want, abs=0.03)


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_step_is_the_formula_at_the_same_z(mode):
    model = ezo.convert_(lenet(), head=["fc2", "fc3"])
    opt = ezo.ElasticZO(model, lr=1e-3, queries=3, seed=5, antithetic=False, mode=mode, head_lr=0.0)
    before, (x, y) = bits(model), batch(8)
    opt.train_step(x, y)
    z = {
        s.names[0]: [materialize(s.shape, seed=5, step=0, site=s.site, query=q, layout=s.layout) for q in range(3)]
        for s in model._ezo.manifest
    }
    losses = []
    for q in range(3):
        twin = lenet()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                if name in z:
                    p.add_(1e-3 * z[name][q])
        losses.append(F.cross_entropy(twin(x), y).item())
    torch.testing.assert_close(opt.losses, torch.tensor(losses), rtol=1e-5, atol=1e-6)
    others = (opt.losses.sum() - opt.losses) / 2
    torch.testing.assert_close(opt.g, (opt.losses - others) / 1e-3, rtol=1e-3, atol=1e-3)
    for name, each in z.items():
        step = sum(g * v for g, v in zip(opt.g, each, strict=True)) / 3
        torch.testing.assert_close(model.state_dict()[name], before[name] - 1e-3 * step, rtol=1e-5, atol=1e-6)


def test_stacked_equals_sequential_bitwise_without_a_head():
    found = []
    for mode in ("stacked", "sequential"):
        model = ezo.convert_(lenet(), head=0)
        opt = ezo.ElasticZO(model, queries=4, antithetic=False, mode=mode, lr=1e-3)
        for i in range(3):
            opt.train_step(*batch(8, i))
        found.append(bits(model))
    assert same(*found)


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_one_mask_of_a_dropout_for_all_queries(mode):
    """At a tiny eps nothing but the masks could tell the losses apart."""
    torch.manual_seed(0)
    model = ezo.convert_(nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3)), head=["3"])
    opt = ezo.ElasticZO(model, queries=4, antithetic=False, eps=1e-7, lr=0.0, mode=mode)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 6, generator=g), torch.randint(0, 3, (8,), generator=g)
    seen = []
    for _ in range(2):
        opt.train_step(x, y)
        assert (opt.losses.max() - opt.losses.min()).item() < 1e-5
        seen.append(opt.losses.mean().item())
    assert abs(seen[0] - seen[1]) > 1e-3  # another step has other masks
    pairs = ezo.ElasticZO(model, queries=4, eps=1e-7, lr=0.0, mode=mode)
    pairs.train_step(x, y)
    assert (pairs.losses.max() - pairs.losses.min()).item() > 1e-3  # each query has its own again


def test_state_is_of_one_kind():
    def start(antithetic):
        model = ezo.convert_(lenet(), head=["fc3"])
        return model, ezo.ElasticZO(model, queries=2, antithetic=antithetic, seed=1)

    (one, opt), (_, pairs) = start(False), start(True)
    opt.train_step(*batch(8))
    state = opt.state_dict()
    with pytest.raises(ValueError, match="antithetic=False"):
        pairs.load_state_dict(state)
    again, other = start(False)
    again.load_state_dict(one.state_dict())
    other.load_state_dict(state)
    opt.train_step(*batch(8, 2))
    other.train_step(*batch(8, 2))
    assert same(bits(one), bits(again))
    old = {k: v for k, v in pairs.state_dict().items() if k != "antithetic"}
    pairs.load_state_dict(old)  # from before the option was there
    with pytest.raises(ValueError, match="antithetic=True"):
        opt.load_state_dict(old)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"antithetic": False}, ValueError, "2 queries or more"),
        ({"antithetic": False, "queries": 2, "head_grad": "plus"}, ValueError, "plus"),
        ({"antithetic": 0, "queries": 2}, TypeError, "antithetic"),
    ],
)
def test_bad_arguments(kwargs, error, match):
    with pytest.raises(error, match=match):
        ezo.ElasticZO(ezo.convert_(lenet(), head=["fc3"]), **kwargs)


def test_step_runs_under_fake_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        model = ezo.convert_(ezo.models.LeNet5(), head=["fc3"])
        opt = ezo.ElasticZO(model, queries=2, clip=5.0, antithetic=False)
        for _ in range(2):
            opt.train_step(torch.randn(8, 1, 28, 28), torch.zeros(8, dtype=torch.long))
