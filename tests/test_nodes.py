"""Node perturbation: the operators against z in memory, a step against its formula written out, and what is refused."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from materialised import NOISES, Pass, randn
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.ops import Noise, decorrelated_gradient, materialize, output_errors, perturb_outputs
from ezo_kernels.ops.noise import key_tensor
from tests.test_step import batch, bits, lenet, same

LAYERS = ["fc1", "fc2"]


def optimizer(head=("fc3",), *, nodes=None, model=None, **kwargs):
    own = ezo.NodePerturbation(**{"layers": LAYERS, **(nodes or {})})
    model = ezo.convert_(model or lenet(), head=list(head))
    return ezo.ElasticZO(model, node_perturbation=own, **{"seed": 5, **kwargs})


# ---- operators


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("signs", [(1, -1), (1,), (-1,), (0,)], ids=str)
@pytest.mark.parametrize(("noise", "params"), NOISES)
def test_perturbed_outputs_are_y_plus_eps_z(noise, params, signs, shared):
    own = Pass(noise=noise, params=params, query=2, queries=3, signs=signs)
    p = own.p
    y = randn((1 if shared else p.groups) * 4, 3, 5)
    got = perturb_outputs(y, p, site=9, shared=shared).view(p.groups, 12, 5)
    rows = y.view(-1, 12, 5).expand(p.groups, 12, 5)
    for g in range(p.groups):
        query, sign = divmod(g, len(signs))
        z = materialize((12, 5), seed=3, step=5, site=9, query=2 + query, noise=noise, **params)
        assert torch.equal(got[g], rows[g] + z * (signs[sign] * 0.5))


def test_perturbed_outputs_of_16_bits_are_rounded_once():
    p = Pass().p
    y = randn(8, 5, dtype=torch.bfloat16)
    want = perturb_outputs(y.float(), p, site=1).bfloat16()
    assert torch.equal(perturb_outputs(y, p, site=1), want)


def test_noise_of_a_row_does_not_depend_on_how_many_there_are():
    p = Pass(signs=(1,)).p
    assert torch.equal(perturb_outputs(torch.zeros(9, 5), p, site=1)[:4], perturb_outputs(torch.zeros(4, 5), p, site=1))


@pytest.mark.parametrize(("noise", "params"), NOISES)
def test_output_errors_are_the_weighed_noise(noise, params):
    coef = randn(3, 4, seed=2)
    got = output_errors(coef, key_tensor(3, 5), (12, 5), site=9, noise=Noise(noise, **params), query=2)
    want = torch.zeros(12, 5, dtype=torch.float64)
    for q in range(3):
        z = materialize((12, 5), seed=3, step=5, site=9, query=2 + q, noise=noise, **params)
        want += coef[q].double().repeat_interleave(3)[:, None] * z.double()
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "inputs"), [(6, 40), (40, 6), (7, 7)])
def test_decorrelated_gradient_is_the_inverse_of_the_moments(rows, inputs, bias):
    x, e = randn(rows, inputs), randn(rows, 3, seed=1)
    weight, of_bias = decorrelated_gradient(x, e, 0.02, bias)
    wide = torch.cat([x, torch.ones(rows, int(bias))], 1).double()
    moments = wide.T @ wide / rows
    want = e.double().T @ wide @ torch.linalg.inv(moments + 0.02 * moments.trace() * torch.eye(len(moments)))
    torch.testing.assert_close(weight, want[:, :inputs].float(), rtol=1e-4, atol=1e-4)
    if bias:
        torch.testing.assert_close(of_bias, want[:, inputs].float(), rtol=1e-4, atol=1e-4)
    else:
        assert of_bias is None


def test_without_damping_it_is_the_plain_gradient():
    x, e = randn(6, 4), randn(6, 3, seed=1)
    weight, bias = decorrelated_gradient(x, e, None, True)
    torch.testing.assert_close(weight, e.T @ x)
    torch.testing.assert_close(bias, e.sum(0))


def test_what_operators_refuse():
    p, key = Pass().p, key_tensor(0, 0)
    with pytest.raises(TypeError, match="int64"):
        perturb_outputs(torch.zeros(4, 2, dtype=torch.int64), p, site=1)
    with pytest.raises(ValueError, match=r"\(3, 2\) does not hold 2 groups"):
        perturb_outputs(torch.zeros(3, 2), p, site=1)
    with pytest.raises(ValueError, match="2 groups"):
        perturb_outputs(torch.zeros(4), p, site=1)
    with pytest.raises(ValueError, match="5 rows are no multiple"):
        output_errors(torch.zeros(1, 2), key, (5, 2), site=1, noise=Noise())
    with pytest.raises(TypeError, match="float64"):
        output_errors(torch.zeros(1, 2).double(), key, (4, 2), site=1, noise=Noise())


# ---- a step


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("damping", [0.01, None])
def test_step_is_the_formula(mode, antithetic, damping):
    """Noise in memory, the plain model's parts, the sums one by one."""
    nodes = {"lr": 0.3, "eps": 0.1, "damping": damping}
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


# ---- what goes with it


def test_a_step_that_is_skipped_changes_nothing():
    opt = optimizer(queries=2)
    held = bits(opt.model)
    x, y = batch(8)
    x[3] = float("inf")
    opt.train_step(x, y)
    assert opt.skipped == 1 and opt.step_count == 0 and same(held, bits(opt.model))
    opt.train_step(*batch(8))
    assert opt.step_count == 1 and not same(held, bits(opt.model))


def test_a_system_that_cannot_be_solved_skips_the_whole_step(monkeypatch):
    opt = optimizer(queries=2)
    held = bits(opt.model)
    factor = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda m: factor(m * float("nan")))
    opt.train_step(*batch(8))
    assert opt.skipped == 1 and same(held, bits(opt.model))


def test_a_factor_that_does_not_exist_skips_the_whole_step():
    """LAPACK leaves numbers of one, and they are finite."""
    x, skipped = randn(16, 40).repeat(2, 1), 0
    for seed in range(20):
        moments = torch.cat([x + 1e-3 * seed, torch.ones(32, 1)], 1)
        moments = moments @ moments.T / 32
        moments.diagonal().add_(1e-9 * moments.diagonal().sum())
        fails = bool(torch.linalg.cholesky_ex(moments).info > 0)
        weight, bias = decorrelated_gradient(x + 1e-3 * seed, randn(32, 3), 1e-9, True)
        assert bool(weight.isnan().all()) == bool(bias.isnan().all()) == fails
        skipped += fails
    assert skipped


def test_another_loss_than_the_first_steps_is_skipped():
    opt = optimizer(queries=2)
    opt.train_step(*batch(8))
    held = bits(opt.model)
    opt.train_step(*batch(8, 2), nn.CrossEntropyLoss(weight=torch.arange(1.0, 11.0)))
    assert opt.skipped == 1 and same(held, bits(opt.model))


def test_schedules_go_on_from_a_state():
    opt = optimizer()
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
    opt.train_step(*batch(6))
    schedule.step()
    again = optimizer()
    again.load_state_dict(opt.state_dict())
    torch.optim.lr_scheduler.LambdaLR(again, lambda step: 0.5**step, last_epoch=1)
    assert again.param_groups[-1]["lr"] == pytest.approx(0.05)


def test_schedules_move_its_rate():
    opt = optimizer(nodes={"lr": 0.4})
    assert [group.get("name", "head") for group in opt.param_groups] == ["trunk", "head", "nodes"]
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
    opt.train_step(*batch(6))
    schedule.step()
    held = bits(opt.model)
    opt.train_step(*batch(6))
    assert opt.param_groups[-1]["lr"] == 0.2 and opt.nodes._lr.item() == pytest.approx(0.2)
    opt.param_groups[-1]["lr"] = 0.0
    held = bits(opt.model)
    opt.train_step(*batch(6))
    assert torch.equal(held["fc1.weight"], opt.model.fc1.weight)
    assert not torch.equal(held["conv1.weight"], opt.model.conv1.weight)


def test_a_run_goes_on_from_its_state():
    whole, part = optimizer(queries=2), optimizer(queries=2)
    for i in range(4):
        whole.train_step(*batch(6, i))
    for i in range(2):
        part.train_step(*batch(6, i))
    stream = io.BytesIO()
    torch.save((part.model.state_dict(), part.state_dict()), stream)
    stream.seek(0)
    weights, state = torch.load(stream, weights_only=True)
    again = optimizer(queries=2, nodes={"lr": 0.9, "eps": 0.9})
    again.model.load_state_dict(weights)
    again.load_state_dict(state)
    for i in range(2, 4):
        again.train_step(*batch(6, i))
    assert same(bits(whole.model), bits(again.model)) and again.param_groups[-1] is again.nodes.group
    for other in (optimizer(queries=2, nodes={"layers": ["fc1"]}), optimizer(queries=2, nodes={"damping": 0.5})):
        with pytest.raises(ValueError, match="the state is of node_perturbation"):
            other.load_state_dict(state)
    plain = ezo.ElasticZO(ezo.convert_(lenet(), head=["fc3"]), queries=2)
    with pytest.raises(ValueError, match="the state is of node_perturbation"):
        plain.load_state_dict(state)
    broken = {**state, "node_perturbation": {**state["node_perturbation"], "eps": -1}}
    with pytest.raises(ValueError, match="eps of node_perturbation"):
        again.load_state_dict(broken)


def test_a_copy_of_the_optimizer_trains_its_own_model():
    opt = optimizer(queries=2)
    opt.train_step(*batch(6))
    twin, again = copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))
    for own in (opt, twin, again):
        own.train_step(*batch(6, 1))
    assert same(bits(opt.model), bits(twin.model)) and same(bits(opt.model), bits(again.model))
    assert opt.model.fc1.weight is not twin.model.fc1.weight


def test_another_optimizer_of_the_model_perturbs_weights_again():
    opt = optimizer(queries=2)
    opt.train_step(*batch(6))
    other = ezo.ElasticZO(opt.model, queries=2)
    held = opt.model.fc1.weight.clone()
    other.train_step(*batch(6))
    z = [materialize(held.shape, seed=0, step=0, site=opt.model.fc1.site, query=q) for q in range(2)]
    want = held - 1e-4 * sum(g * v for g, v in zip(other.g, z, strict=True)) / 2
    torch.testing.assert_close(opt.model.fc1.weight.detach(), want, rtol=1e-5, atol=1e-7)


def test_under_autocast_and_compiled():
    opt, kinds = optimizer(queries=2, mode="stacked"), []
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        factor = torch.linalg.cholesky_ex
        patch.setattr(torch.linalg, "cholesky_ex", lambda m: kinds.append(m.dtype) or factor(m))
        opt.train_step(*batch(6))
    assert opt.skipped == 0 and kinds == [torch.float32] * 2  # the moments are no product of 16 bits
    plain, compiled = optimizer(queries=2), optimizer(queries=2)
    compiled.model.compile(backend="eager")
    for i in range(2):
        for own in (plain, compiled):
            own.train_step(*batch(6, i))
    for a, b in zip(bits(plain.model).values(), bits(compiled.model).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Remembered(nn.Module):
    """A trunk and a head whose activations a checkpoint makes again."""

    def __init__(self, again: bool):
        super().__init__()
        self.inner, self.out, self.again = nn.Linear(4, 6), nn.Linear(6, 3), again

    def forward(self, x):
        def run(x):
            return self.out(torch.tanh(self.inner(x)))

        return torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False) if self.again else run(x)


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_a_checkpoint_that_runs_the_layer_again(mode):
    runs = []
    for again in (True, False):
        torch.manual_seed(0)
        model = ezo.convert_(Remembered(again), head=["out"])
        opt = ezo.ElasticZO(model, queries=2, node_perturbation=ezo.NodePerturbation(["inner"]), mode=mode)
        for _ in range(2):
            opt.train_step(randn(6, 4), torch.arange(6) % 3)
        runs.append(bits(model))
    assert same(*runs)


# ---- what is refused


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"layers": "fc1"}, TypeError, "list of names"),
        ({"layers": []}, ValueError, "at least one"),
        ({"lr": -1.0}, ValueError, "lr of node_perturbation must be finite and at least 0"),
        ({"eps": 0.0}, ValueError, "eps of node_perturbation must be finite and above 0"),
        ({"damping": 0}, ValueError, "damping of node_perturbation"),
        ({"layers": ["fc9"]}, ValueError, "no layer 'fc9'; the trunk's linear layers are fc1, fc2"),
        ({"layers": ["conv1", "fc3"]}, NotImplementedError, "'conv1' .*; 'fc3' "),
    ],
    ids=str,
)
def test_settings_that_cannot_be(kwargs, error, words):
    with pytest.raises(error, match=words):
        optimizer(nodes=kwargs)


def test_layers_that_cannot_learn_so():
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    tied[1].weight = tied[0].weight
    half = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.Linear(4, 2).bfloat16())
    for model, words in ((tied, "the weight of '0' is tied"), (half, "the weight of '0' is torch.bfloat16")):
        with pytest.raises(NotImplementedError, match=words):
            ezo.ElasticZO(ezo.convert_(model, head=1), node_perturbation=ezo.NodePerturbation(["0"]))
    with pytest.raises(TypeError, match="NodePerturbation, got list"):
        ezo.ElasticZO(ezo.convert_(lenet(), head=["fc3"]), node_perturbation=["fc1"])
    with pytest.raises(ValueError, match="nothing named 'fc1'"):
        optimizer(scales={"fc1": 0.3})


@pytest.mark.parametrize("mode", ["auto", "stacked", "sequential"])
def test_steps_that_cannot_be(mode):
    opt = optimizer(mode=mode)
    held = bits(opt.model)
    x, y = batch(6)
    with pytest.raises(NotImplementedError, match="update=False"):
        opt.train_step(x, y, update=False)
    with pytest.raises(ValueError, match="loss of each row"):
        opt.step(lambda: F.cross_entropy(opt.model(x), y))
    with pytest.raises(NotImplementedError, match="<lambda> takes no reduction"):
        opt.train_step(x, y, lambda out, y: F.cross_entropy(out, y))
    weighed = nn.CrossEntropyLoss(weight=torch.arange(1.0, 11.0))
    with pytest.raises(ValueError, match="every row counts alike"):
        opt.train_step(x, y, weighed)
    with pytest.raises(ValueError, match="must give a tensor"):
        opt.train_step(x, y, functools.partial(lambda out, y, reduction="mean": F.cross_entropy(out, y)))
    assert same(held, bits(opt.model)) and opt.step_count == 0
    opt.train_step(x, y)
    assert opt.step_count == 1


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.inner(torch.tanh(self.inner(x))))


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_a_layer_that_runs_twice(mode):
    opt = ezo.ElasticZO(ezo.convert_(Twice(), head=1), node_perturbation=ezo.NodePerturbation(["inner"]), mode=mode)
    with pytest.raises(ValueError, match="inner: a layer whose outputs are perturbed ran twice"):
        opt.train_step(randn(6, 4), torch.arange(6) % 3)


def test_models_whose_rows_depend_on_each_other():
    norm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    mean = nn.Sequential(nn.Linear(4, 4), Centred(), nn.Linear(4, 3))
    x, y = randn(6, 4), torch.arange(6) % 3
    nodes = ezo.NodePerturbation(["0"])
    opt = ezo.ElasticZO(ezo.convert_(norm, head=["2"]), node_perturbation=nodes)
    with pytest.raises(NotImplementedError, match=r"'1' would take batch statistics"):
        opt.train_step(x, y)
    norm.eval()
    opt.train_step(x, y)
    norm.train()
    norm[1].track_running_stats, norm[1].running_mean, norm[1].running_var = False, None, None
    allowed = ezo.NodePerturbation(["0"], constant_statistics=True)
    with pytest.raises(NotImplementedError, match="keep running statistics"):
        ezo.ElasticZO(norm, node_perturbation=allowed).train_step(x, y)
    opt = ezo.ElasticZO(ezo.convert_(mean, head=["2"]), node_perturbation=nodes, mode="sequential")
    with pytest.raises(ValueError, match="does not treat the rows of a batch apart"):
        opt.train_step(x, y)


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_batch_norms_whose_statistics_count_as_constants(mode):
    """The step is the formula with each group's own statistics; they move as in any step, and the modes stay."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    twin, (x, y) = copy.deepcopy(model), (randn(6, 4), torch.arange(6) % 3)
    model[1].requires_grad_(False)
    ezo.convert_(model, head=["3"])
    nodes = ezo.NodePerturbation(["0"], lr=1.0, damping=None, constant_statistics=True)
    opt = ezo.ElasticZO(model, queries=2, node_perturbation=nodes, seed=1, mode=mode)
    opt.train_step(x, y)
    rows, noise = [], [materialize((6, 5), seed=1, step=0, site=model[0].site, query=q) for q in range(2)]
    with torch.no_grad():
        for z in noise:
            for sign in (1, -1):
                h = twin[0](x) + sign * 0.05 * z
                rows.append(F.cross_entropy(twin[3](F.relu(twin[1](h))), y, reduction="none"))
    want = sum(((rows[2 * q] - rows[2 * q + 1]) / 0.1 / 12)[:, None] * noise[q] for q in range(2))
    torch.testing.assert_close(twin[0].bias.detach() - model[0].bias.detach(), want.sum(0), rtol=1e-3, atol=1e-6)
    assert model[1].training and not torch.equal(model[1].running_mean, torch.zeros(5)) and opt.skipped == 0


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


def test_a_first_batch_of_one_row_has_shown_nothing():
    model = nn.Sequential(nn.Linear(4, 4), Centred(), nn.Linear(4, 3))
    own = {"node_perturbation": ezo.NodePerturbation(["0"]), "mode": "sequential"}
    opt = ezo.ElasticZO(ezo.convert_(model, head=["2"]), **own)
    x, y = randn(6, 4), torch.arange(6) % 3
    opt.train_step(x[:1], y[:1])
    opt.train_step(x * float("nan"), y)
    with pytest.raises(ValueError, match="does not treat the rows of a batch apart"):
        opt.train_step(x, y)


class Placed(nn.Module):
    """A layer whose input is a table of positions, not the batch."""

    def __init__(self, rows: int):
        super().__init__()
        self.register_buffer("table", randn(rows, 5))
        self.position, self.out = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(x + self.position(self.table).mean(0))


@pytest.mark.parametrize("rows", [8, 1])
def test_a_layer_whose_input_is_not_the_batch(rows):
    own = {"node_perturbation": ezo.NodePerturbation(["position"]), "mode": "sequential"}
    opt = ezo.ElasticZO(ezo.convert_(Placed(rows), head=["out"]), **own)
    with pytest.raises(ValueError, match=f"'position' is given {rows} rows of a batch of 4 and {rows} of one of 2"):
        opt.train_step(randn(4, 4), torch.arange(4) % 3)


def test_masks_of_tokens_and_outputs_that_hold_nothing():
    """As many tokens as rows: a [T, T] mask is no batch."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x, mask):
            x = torch.tanh(self.inner(x))
            return {"logits": self.out((mask @ x).mean(1)), "none": x[:, :0].flatten(1)}

    opt = ezo.ElasticZO(ezo.convert_(Masked(), head=["out"]), node_perturbation=ezo.NodePerturbation(["inner"]))

    def loss(out, y, reduction="mean"):
        return F.cross_entropy(out["logits"], y, reduction=reduction)

    opt.train_step((randn(5, 5, 4), torch.ones(5, 5).tril()), torch.arange(5) % 3, loss)
    assert opt.step_count == 1


def test_what_a_loss_or_a_model_may_not_do_later():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1), nn.Flatten(0))
    opt = ezo.ElasticZO(ezo.convert_(model, head=["1"]), node_perturbation=ezo.NodePerturbation(["0"]))
    with pytest.raises(ValueError, match="the target was broadcast"):
        opt.train_step(randn(6, 5), randn(6, 1), F.mse_loss)
    opt.model.bfloat16()
    with pytest.raises(ValueError, match="no longer float32"):
        opt.train_step(randn(6, 5).bfloat16(), randn(6).bfloat16(), F.mse_loss)


def test_rows_in_another_order_at_the_layer():
    model = Tokens(turned=True)
    model.out.requires_grad_(False)
    opt = ezo.ElasticZO(
        ezo.convert_(model, head=0), node_perturbation=ezo.NodePerturbation(["inner"]), mode="sequential"
    )
    ids = torch.randint(7, (4, 6), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="in another order at a perturbed layer"):
        opt.train_step(ids, ids, token_loss)
