"""Is the estimate a gradient? Against autograd over many directions, and against a difference along one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ezo_kernels import ops
from tests.materialised import Pass, randn

SITES = {"w1": 1, "b1": 2, "w2": 3, "b2": 4}


def net():
    """18 x 12 and 12 x 5 with biases: d = 293."""
    weights = {"w1": randn(12, 18, seed=1) / 4, "b1": randn(12, seed=2) / 4}
    return weights | {"w2": randn(5, 12, seed=3) / 3, "b2": randn(5, seed=4) / 4}


def batch():
    return randn(24, 18, seed=5), torch.randint(0, 5, (24,), generator=torch.Generator().manual_seed(6))


def plain_loss(w, x, y):
    hidden = torch.tanh(F.linear(x, w["w1"], w["b1"]))
    return F.cross_entropy(F.linear(hidden, w["w2"], w["b2"]), y)


def losses(p: Pass, w, x, y):
    """[queries, 2]: the loss of every group, in one stacked pass."""
    how = [dict(site=SITES["w1"], bias_site=SITES["b1"]), dict(site=SITES["w2"], bias_site=SITES["b2"])]
    hidden = torch.tanh(ops.perturbed_linear(x, w["w1"], w["b1"], p.p, shared=True, **how[0]))
    logits = ops.perturbed_linear(hidden, w["w2"], w["b2"], p.p, **how[1])
    each = F.cross_entropy(logits, y.repeat(2 * p.queries), reduction="none")
    return each.view(p.queries, 2, -1).mean(2)


def flat(tensors):
    return torch.cat([t.double().flatten() for t in tensors])


def truth(w, x, y):
    leaves = {k: v.double().requires_grad_() for k, v in w.items()}
    plain_loss(leaves, x.double(), y).backward()
    return flat(v.grad for v in leaves.values())


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_cosine_to_autograd_follows_theory(noise):
    """cos(mean of g z over n, gradient) = sqrt(n / (n + d + 1)) for normals; d - 1 where |z| is constant."""
    w, (x, y) = net(), batch()
    gradient = truth(w, x, y)
    d, each, passes = gradient.numel(), 600, 12
    directions, slopes = [], []
    for step in range(passes):
        p = Pass(queries=each, eps=1e-2, noise=noise, seed=11, step=step)
        plus, minus = losses(p, w, x, y).double().unbind(1)
        slopes.append((plus - minus) / (2 * p.eps))
        directions += [flat(p.z(w[k].shape, SITES[k], q) for k in SITES) for q in range(each)]
    z, g = torch.stack(directions), torch.cat(slopes)
    for n in (50, 400):  # the same directions, averaged by n
        estimates = torch.einsum("rn,rnd->rd", g.view(-1, n), z.view(-1, n, d)) / n
        along = float((estimates @ gradient).mean())
        cosine = along / float(estimates.square().sum(1).mean().sqrt() * gradient.norm())
        assert cosine == pytest.approx(math.sqrt(n / (n + d + (1 if noise == "gaussian" else -1))), abs=0.01), n
        assert along / float(gradient @ gradient) == pytest.approx(1, abs=0.05)  # the scale, not only the direction


@pytest.mark.parametrize("noise", ["gaussian", "clt4", "uniform", "hadamard", "rademacher"])
def test_difference_along_z_in_fp32(noise):
    """g against the fp64 difference along the same z, relative to the spread of g: below 1e-3."""
    w, (x, y) = net(), batch()
    p = Pass(queries=16, eps=1e-2, noise=noise)
    plus, minus = losses(p, w, x, y).unbind(1)
    g = ((plus - minus) / (2 * p.eps)).double()
    exact = float(torch.tensor(p.eps))
    want = []
    for q in range(p.queries):
        z = {k: p.z(v.shape, SITES[k], q).double() for k, v in w.items()}
        up, down = (
            plain_loss({k: v.double() + s * exact * z[k] for k, v in w.items()}, x.double(), y) for s in (1, -1)
        )
        want.append((up - down) / (2 * exact))
    want = torch.stack(want)
    assert (g - want).norm() / want.norm() < 1e-3
    slope = torch.stack(
        [truth(w, x, y) @ flat(p.z(v.shape, SITES[k], q) for k, v in w.items()) for q in range(p.queries)]
    )
    assert (g - slope).norm() / slope.norm() < 1e-2  # and close to the derivative itself, to eps squared


def test_a_step_along_the_estimate_lowers_the_loss():
    """update_ takes the same z as the forward, with the right sign."""
    w, (x, y) = net(), batch()
    start = float(plain_loss(w, x, y))
    for step in range(200):
        p = Pass(queries=2, eps=1e-3, step=step)
        plus, minus = losses(p, w, x, y).unbind(1)
        coef = 0.03 * (plus - minus) / (2 * p.eps) / p.queries
        ops.update_(list(w.values()), p.p.key, coef, sites=list(SITES.values()))
    assert float(plain_loss(w, x, y)) < 0.8 * start
