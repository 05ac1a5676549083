"""Node perturbation: a step against its formula written out, what it tends to and what it is worth."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from materialised import randn
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.ops import materialize, output_errors
from tests.test_step import batch, bits, lenet, same

LAYERS = ["fc1", "fc2"]


def optimizer(head=("fc3",), *, nodes=None, model=None, **kwargs):
    own = ezo.NodePerturbation(**{"layers": LAYERS, **(nodes or {})})
    model = ezo.convert_(model or lenet(), head=list(head))
    return ezo.ElasticZO(model, node_perturbation=own, **{"seed": 5, **kwargs})


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize(("damping", "clip"), [(0.01, None), (None, 0.7)])
def test_step_is_the_formula(mode, antithetic, damping, clip):
    """Noise in memory, the plain model's parts, the sums one by one."""
    nodes = {"lr": 0.3, "eps": 0.1, "damping": damping, "clip": clip}
    opt = optimizer(nodes=nodes, lr=1e-3, queries=3, antithetic=antithetic, mode=mode, head_lr=0.1)
    model, before, (x, y) = opt.model, bits(opt.model), batch(6)
    site = {s.names[0]: s for s in model._ezo.manifest}

    def z(name, q, shape, layout="matrix"):
        return materialize(shape, seed=5, step=0, site=site[name].site, query=q, layout=layout)

    inputs, rows, losses, heads = {name: [] for name in LAYERS}, [], [], []
    signs = (1, -1) if antithetic else (1,)
    for q in range(3):
        for sign in signs:
            twin = lenet()
            with torch.no_grad():
                for name in ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"):
                    own = site[name]
                    twin.get_parameter(name).add_(sign * 1e-3 * z(name, q, own.shape, own.layout))
                h = F.relu(F.max_pool2d(twin.conv1(x), 2))
                h = F.relu(F.max_pool2d(twin.conv2(h), 2)).flatten(1)
                for name in LAYERS:
                    inputs[name].append(h)
                    out = twin.get_submodule(name)(h)
                    h = F.relu(out + sign * 0.1 * z(f"{name}.weight", q, out.shape))
            own = F.cross_entropy(twin.fc3(h), y, reduction="none")
            heads.append(torch.autograd.grad(own.mean(), twin.fc3.weight)[0])
            rows.append(own.detach())
            losses.append(own.mean().item())
    opt.train_step(x, y)
    torch.testing.assert_close(opt.losses, torch.tensor(losses), rtol=1e-5, atol=1e-6)
    rows = torch.stack(rows)
    if antithetic:
        g = (rows[0::2] - rows[1::2]) / (2 * 0.1)
    else:
        g = torch.stack([(rows[q] - (rows.sum(0) - rows[q]) / 2) / 0.1 for q in range(3)])
    if clip is not None:
        assert 0.1 < (g.abs() > clip).float().mean() < 0.9
        g = g.clamp(-clip, clip)
    for name in LAYERS:
        mean = torch.stack(inputs[name]).mean(0)
        noise = [z(f"{name}.weight", q, (6, model.get_submodule(name).out_features)) for q in range(3)]
        error = sum(g[q][:, None] * noise[q] for q in range(3)) / (3 * 6)
        wide = torch.cat([mean, torch.ones(6, 1)], 1).double()
        step = error.double().T @ wide
        if damping is not None:
            moments = wide.T @ wide / 6
            step = step @ torch.linalg.inv(moments + damping * moments.trace() * torch.eye(len(moments)))
        step = step.float()
        moved = {leaf: before[f"{name}.{leaf}"] - model.state_dict()[f"{name}.{leaf}"] for leaf in ("weight", "bias")}
        torch.testing.assert_close(moved["weight"], 0.3 * step[:, :-1], rtol=1e-3, atol=2e-6)
        torch.testing.assert_close(moved["bias"], 0.3 * step[:, -1], rtol=1e-3, atol=2e-6)
    torch.testing.assert_close(opt.g, torch.tensor(_g(losses, antithetic)), rtol=1e-2, atol=1e-3)
    for name in ("conv1.weight", "conv2.bias"):
        own = site[name]
        step = sum(opt.g[q] * z(name, q, own.shape, own.layout) for q in range(3)) / 3
        torch.testing.assert_close(model.state_dict()[name], before[name] - 1e-3 * step, rtol=1e-5, atol=1e-6)
    moved = (before["fc3.weight"] - model.fc3.weight.detach()) / 0.1
    torch.testing.assert_close(moved, torch.stack(heads).mean(0), rtol=1e-4, atol=1e-5)


def _g(losses, antithetic, eps=1e-3):
    if antithetic:
        return [(a - b) / (2 * eps) for a, b in zip(losses[0::2], losses[1::2], strict=True)]
    return [(own - (sum(losses) - own) / (len(losses) - 1)) / eps for own in losses]


def test_stacked_and_sequential_agree():
    runs = []
    for mode in ("stacked", "sequential"):
        opt = optimizer(queries=2, mode=mode)
        for i in range(3):
            opt.train_step(*batch(9, i))
        runs.append(bits(opt.model))
    for name, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][name], rtol=1e-4, atol=1e-5)


def test_layers_after_frozen_ones_have_the_bits_of_copies():
    """fc1's input is every group's then: the plain product runs once, and the noise makes it each one's own. Of six groups: the
    sum of as many equal inputs is not six times one.
    """
    runs = []
    for shared in (True, False):
        model = lenet()
        model.conv1.requires_grad_(False), model.conv2.requires_grad_(False)
        opt = optimizer(model=model, queries=6, antithetic=False, mode="stacked")
        opt._checks._compiled = not shared  # each group has a copy then
        opt.train_step(*batch(8))
        assert bool(opt._checks._shared) is shared
        runs.append(bits(opt.model))
    assert same(*runs)


def test_the_estimate_tends_to_the_gradient():
    """Over many directions, with plain gradients: the step of each layer points where backpropagation's does."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
    plain, x, y = copy.deepcopy(model), randn(16, 6), torch.arange(16) % 3
    F.cross_entropy(plain(x), y).backward()
    ezo.convert_(model, head=0)
    own = ezo.NodePerturbation(["0", "2", "4"], lr=1.0, eps=1e-2, damping=None)
    opt = ezo.ElasticZO(model, queries=4000, node_perturbation=own)
    before = bits(model)
    opt.train_step(x, y)
    for name in ("0", "2", "4"):
        both = [f"{name}.weight", f"{name}.bias"]
        moved = torch.cat([(before[own] - model.state_dict()[own]).flatten() for own in both])
        want = torch.cat([plain.get_parameter(own).grad.flatten() for own in both])
        assert F.cosine_similarity(moved, want, 0) > 0.97, name
        assert 0.9 < moved.norm() / want.norm() < 1.1, name


def test_it_learns_where_perturbed_weights_have_hardly_begun():
    x, y = batch(256, 3)
    x = x + F.one_hot(y, 10).float().repeat_interleave(79, 1)[:, None, :784].reshape(-1, 1, 28, 28)
    ends = []
    for nodes in (True, False):
        own = ezo.NodePerturbation(LAYERS) if nodes else None
        opt = ezo.ElasticZO(ezo.convert_(lenet(), head=["fc3"]), queries=4, clip=5.0, node_perturbation=own)
        for i in range(60):
            at = torch.arange(32) + 32 * (i % 8)
            loss = opt.train_step(x[at], y[at])
        ends.append(loss.item())
    assert ends[0] < 0.6 * ends[1], ends


def test_a_clip_keeps_large_weights_from_feeding_themselves():
    """Large weights make large g, and large g large steps: labels that are partly noise set it going."""
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))
    x = randn(512, 12)
    y = (x[:, 0] * x[:, 1] > 0).long() + 2 * (x[:, 2] > 0).long()
    y[::5] = torch.arange(103) % 4
    ends = []
    for clip in (ezo.NodePerturbation.clip, None):
        model = ezo.convert_(copy.deepcopy(start), head=0)
        own = ezo.NodePerturbation(["0", "2", "4"], lr=1.0, clip=clip)
        opt = ezo.ElasticZO(model, queries=4, node_perturbation=own)
        for i in range(300):
            at = torch.arange(32) + 32 * (i % 16)
            opt.train_step(x[at], y[at])
        with torch.no_grad():
            ends.append(F.cross_entropy(model(x), y).item())
    assert 5 * ends[0] < ends[1], ends


def test_rows_that_do_not_count_and_drawn_ones():
    x, y = batch(12)
    y[::3] = -100
    opts = [optimizer(queries=2) for _ in range(2)]
    opts[0].train_step(x, y)
    opts[1].train_step(x, y, nn.CrossEntropyLoss(ignore_index=-100))
    assert same(*(bits(opt.model) for opt in opts)) and opts[0].skipped == 0
    opt = optimizer(queries=2, importance_rows=5)
    held = bits(opt.model)
    opt.train_step(*batch(12))
    assert opt.skipped == 0 and not torch.equal(held["fc1.weight"], opt.model.fc1.weight)


class Tokens(nn.Module):
    """[B, T] ids -> [B, T, 7] logits."""

    def __init__(self, turned: bool = False):
        super().__init__()
        self.embed, self.inner, self.out = nn.Embedding(7, 6), nn.Linear(6, 9), nn.Linear(9, 7)
        self.turned = turned

    def forward(self, ids):
        x = self.embed(ids)
        if self.turned:
            return torch.tanh(self.inner(x.transpose(0, 1))).transpose(0, 1) @ self.out.weight.T
        return self.out(torch.tanh(self.inner(x)))


def token_loss(logits, ids, reduction="mean"):
    own = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
    return own.mean() if reduction == "mean" else own


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_tokens_share_the_loss_of_their_row(mode):
    torch.manual_seed(0)
    model = Tokens()
    ids = torch.randint(7, (4, 5))
    ezo.convert_(model, head=["out"])
    own = ezo.NodePerturbation(["inner"], lr=0.5, damping=None)
    opt = ezo.ElasticZO(model, queries=2, node_perturbation=own, seed=1, mode=mode)
    held = {name: value.clone() for name, value in model.state_dict().items()}
    e = [materialize((20, 9), seed=1, step=0, site=model.inner.site, query=q) for q in range(2)]
    opt.train_step(ids, ids, token_loss)
    moved = held["inner.bias"] - model.inner.bias
    losses = []
    for q in range(2):
        for sign in (1, -1):
            table = held["embed.weight"] + sign * 1e-3 * materialize(
                (7, 6), seed=1, step=0, site=model.embed.site, query=q
            )
            h = F.linear(table[ids], held["inner.weight"], held["inner.bias"]) + sign * 0.05 * e[q].view(4, 5, 9)
            out = F.linear(torch.tanh(h), held["out.weight"], held["out.bias"])
            losses.append(token_loss(out, ids, "none").mean(1))
    want = sum(
        ((losses[2 * q] - losses[2 * q + 1]) / 0.1 / 8).repeat_interleave(5)[:, None] * e[q] for q in range(2)
    ).sum(0)
    torch.testing.assert_close(moved, 0.5 * want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_losses_of_tokens_answer_for_their_row(mode):
    """Flat or not: the noise of a row moves all of its tokens."""
    runs = []
    for turn in (
        lambda out, ids: (out, ids, token_loss),
        lambda out, ids: (out.flatten(0, 1), ids.flatten(), F.cross_entropy),
        lambda out, ids: (out.transpose(1, 2), ids, F.cross_entropy),
    ):
        torch.manual_seed(0)
        model, ids = Tokens(), torch.randint(7, (4, 5))
        own = ezo.NodePerturbation(["inner"], lr=0.5)
        opt = ezo.ElasticZO(ezo.convert_(model, head=["out"]), queries=2, node_perturbation=own, seed=1, mode=mode)
        forward = model.forward
        model.forward = lambda ids, forward=forward, turn=turn: turn(forward(ids), ids)[0]
        _, y, loss = turn(torch.zeros(4, 5, 7), ids)
        opt.train_step(ids, y, loss)
        runs.append(bits(model))
    for name, value in runs[0].items():
        for other in runs[1:]:
            torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5)


def test_inputs_that_are_all_zero_move_nothing_else_either():
    """Of a branch that begins at zero: the gradient is zero, not undefined."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 5, bias=False), nn.Linear(5, 3))
    nn.init.zeros_(model[0].weight)
    model[0].requires_grad_(False)
    opt = ezo.ElasticZO(ezo.convert_(model, head=["3"]), node_perturbation=ezo.NodePerturbation(["2"]))
    held = bits(model)
    opt.train_step(randn(6, 4), torch.arange(6) % 3)
    assert opt.skipped == 0 and torch.equal(held["2.weight"], model[2].weight)
    assert not torch.equal(held["3.weight"], model[3].weight)


def test_a_regression_by_torchs_loss():
    model = ezo.convert_(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1)), head=["2"])
    opt = ezo.ElasticZO(model, queries=4, node_perturbation=ezo.NodePerturbation(["0"]))
    x = randn(32, 5)
    y = x.sum(1, keepdim=True).sin()
    losses = [opt.train_step(x, y, nn.MSELoss()).item() for _ in range(80)]
    assert losses[-1] < 0.7 * losses[0] and opt.skipped == 0
    assert opt.train_step(x, y, F.mse_loss).item() < losses[0]


@pytest.mark.parametrize("antithetic", [True, False])
def test_the_clip_is_of_a_rows_own_loss_where_others_do_not_count(antithetic, monkeypatch):
    """clip is of what a row's own loss changes by, so rows that are ignored make no other row's smaller."""
    seen = []

    def noted(coef, *args, **kwargs):
        seen.append(coef)
        return output_errors(coef, *args, **kwargs)

    monkeypatch.setattr("ezo_kernels.optim.nodes.output_errors", noted)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    with torch.no_grad():
        model[1].weight *= 50
    x, y = torch.randn(8, 6), torch.arange(8) % 4
    y[2:] = -100
    for clip in (1e300, 2.0):  # the first is above what fp32 holds
        own = ezo.NodePerturbation(["0"], lr=0.0, clip=clip)
        opt = ezo.ElasticZO(
            ezo.convert_(copy.deepcopy(model), head=0), queries=3, antithetic=antithetic, node_perturbation=own
        )
        opt.train_step(x, y)
    free, clipped = (6 * coef for coef in seen)  # 3 queries, 2 rows that count
    assert free.abs().max() > 10
    torch.testing.assert_close(clipped, free.clamp(-2.0, 2.0))
