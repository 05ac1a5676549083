"""What ElasticZO is held against keeps its rules: nothing is left perturbed, nothing not finite is learned from."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.optim.baselines import BackpropSGD, FrozenTrunk, MeZO

NAN = float("nan")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def batch():
    g = torch.Generator().manual_seed(1)
    return torch.randn(5, 6, generator=g), torch.randint(3, (5,), generator=g)


def weights(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_back(model, before, exactly=()):
    """MeZO's own rounding of + eps z - eps z is all that may be left."""
    for name, t in model.state_dict().items():
        torch.testing.assert_close(t, before[name], rtol=0, atol=0 if name.startswith(exactly or "-") else 1e-6)


def scaled(*factors):
    """Cross-entropy, times one factor after the other."""
    left = iter(factors)
    return lambda out, y: F.cross_entropy(out, y) * next(left)


@pytest.mark.parametrize("clip", [None, 5.0])
@pytest.mark.parametrize("factors", [(NAN, NAN), (1.0, NAN), (float("inf"), 1.0)])
def test_mezo_skips_a_loss_that_is_not_finite(clip, factors):
    model = net()
    opt, before = MeZO(model, lr=0.1, clip=clip, head="2"), weights(model)
    loss = opt.train_step(*batch(), scaled(*factors))
    assert not torch.isfinite(loss) and opt.skipped.item() == 1 and opt.steps == 0
    assert_back(model, before, exactly="2.")
    assert all(p.grad is None for p in model.parameters())
    opt.train_step(*batch())
    assert opt.skipped.item() == 1 and opt.steps == 1 and not torch.equal(model[2].weight, before["2.weight"])


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_mezo_takes_a_perturbation_back_when_the_loss_raises(failing):
    def loss_fn(out, y):
        calls.append(0)
        if len(calls) > failing:
            raise RuntimeError("oops")
        return F.cross_entropy(out, y)

    calls, model = [], net()
    opt, before = MeZO(model, lr=0.1, eps=0.1, head="2", queries=2), weights(model)
    with pytest.raises(RuntimeError, match="oops"):
        opt.train_step(*batch(), loss_fn)
    assert opt.steps == 0 and all(p.grad is None for p in model.parameters())
    assert_back(model, before, exactly="2.")


def test_mezo_learns_from_no_gradient_of_somebody_else():
    clean, other = net(), net()
    for model in (clean, other):
        opt = MeZO(model, head="2")
        if model is other:
            model[2].weight.grad = torch.full_like(model[2].weight, 9.0)
        opt.train_step(*batch())
    assert all(torch.equal(a, b) for a, b in zip(clean.parameters(), other.parameters(), strict=True))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.o, self.un = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(2, 2)

    def forward(self, x):
        return self.o(torch.relu(self.a(x)))


def test_a_head_layer_that_the_forward_leaves_out_is_told_of_as_elastic_zo_does():
    model = Unused()
    opt, before = MeZO(model, head=["o", "un"]), weights(model)
    with pytest.warns(UserWarning, match="the head's 'un.weight', 'un.bias' got no gradient"):
        opt.train_step(*batch())
    assert opt.steps == 1 and torch.equal(model.un.weight, before["un.weight"])
    assert not torch.equal(model.o.weight, before["o.weight"])


def test_mezo_needs_a_loss_that_depends_on_its_head():
    model = net()
    opt, before = MeZO(model, head="2"), weights(model)
    with pytest.raises(ValueError, match="does not depend on the head's parameters"):
        opt.train_step(*batch(), lambda out, y: out.detach().sum())
    with pytest.raises(ValueError, match=r"one element, or a number, got \(5, 3\)"):
        opt.train_step(*batch(), lambda out, y: out)
    assert_back(model, before, exactly="2.")


REFUSED = [
    (dict(lr=-1), ValueError, "lr must be finite and at least 0.0, got -1"),
    (dict(lr="a"), TypeError, "lr must be a Python number, got str"),
    (dict(eps=0), ValueError, "eps must be finite and above 0.0, got 0"),
    (dict(eps=NAN), ValueError, "eps must be finite"),
    (dict(queries=0), ValueError, "queries must be at least 1, got 0"),
    (dict(queries=1.5), TypeError, "queries must be an int, got float"),
    (dict(clip=-1), ValueError, "clip must be finite and above 0.0, got -1"),
    (dict(head_lr=-1), ValueError, "head_lr must be finite and at least 0.0, got -1"),
    (dict(seed=-1), ValueError, "seed must be in"),
    (dict(noise="x"), ValueError, "unknown noise 'x'"),
    (dict(rounds=3), ValueError, "rounds must be 7 or 10, got 3"),
    (dict(noise="sparse_int8"), NotImplementedError, "use 'sparse' for float weights"),
    (dict(noise="gaussian_fast"), NotImplementedError, "exists on CUDA only"),
    (dict(head="nope"), ValueError, "no module 'nope'"),
]


@pytest.mark.parametrize("arguments, error, text", REFUSED, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_mezo_refuses_an_argument_and_leaves_the_model(arguments, error, text):
    model = net()
    with pytest.raises(error, match=text):
        MeZO(model, **arguments)
    assert all(p.requires_grad for p in model.parameters())


def test_mezo_refuses_rates_that_became_none_before_it_moves_a_weight():
    model = net()
    opt, before = MeZO(model, head="2"), weights(model)
    for group, name, value in ((0, "lr", NAN), (0, "eps", 0.0), (1, "lr", -1.0)):
        held, opt.param_groups[group][name] = opt.param_groups[group][name], value
        with pytest.raises(ValueError, match="must be finite"):
            opt.train_step(*batch())
        opt.param_groups[group][name] = held
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_mezo_of_frozen_parameters_has_nothing_to_train():
    with pytest.raises(ValueError, match="no parameter to train"):
        MeZO(net().requires_grad_(False))


def test_mezo_without_a_noise_contract_takes_any_seed():
    assert torch.isfinite(MeZO(net(), noise=None, seed=2**64 - 1).train_step(*batch()))


@pytest.mark.parametrize("of", [lambda t: (t * 1000).round().long(), lambda t: t > 1.0])
def test_mezo_takes_losses_of_integers_and_bools_as_floats(of):
    models = [net() for _ in range(2)]
    x, y = batch()
    closures = [lambda m=m: of(F.cross_entropy(m(x), y)) for m in models]
    losses = [
        MeZO(models[0], clip=1.0).step(closures[0]),
        MeZO(models[1], clip=1.0).step(lambda: closures[1]().float()),
    ]
    assert losses[0].dtype == torch.float32 and torch.equal(*losses)
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_mezo_goes_on_from_its_state():
    whole, begun = net(), net()
    a, b = MeZO(whole, seed=3), MeZO(begun, seed=3)
    for opt in (a, a, b):
        opt.train_step(*batch())
    b.train_step(*batch(), scaled(NAN, NAN))
    begun.load_state_dict(weights(whole))  # of a skipped step it keeps the rounding
    state = b.state_dict() | {"steps": 2}
    c = MeZO(begun.requires_grad_(), seed=3)
    c.load_state_dict(state)
    assert c.steps == 2 and c.skipped.item() == 1
    for opt in (a, c):
        opt.train_step(*batch())
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), begun.parameters(), strict=True))

    old = {key: value for key, value in state.items() if key not in ("steps", "skipped")}
    c.load_state_dict(old)  # of before they were in it
    assert c.steps == 3
    for wrong, error in (({**old, "steps": -1}, ValueError), ({**old, "steps": "a"}, TypeError), (None, TypeError)):
        with pytest.raises(error):
            c.load_state_dict(wrong)
    assert c.steps == 3


def test_mezo_is_watched_for_skipped_steps():
    opt = MeZO(net())
    watch = ezo.Diagnostics(opt, every=3, warn=False)
    found = [watch.observe(opt.train_step(*batch(), scaled(NAN, NAN))) for _ in range(3)]
    assert [finding.kind for finding in found[-1]] == ["not_finite"]


@pytest.mark.parametrize("make", [MeZO, BackpropSGD, lambda model: FrozenTrunk(model, "2")])
def test_a_step_without_a_closure_says_what_is_needed(make):
    with pytest.raises(ValueError, match=r"step needs a closure that returns the loss; or call train_step\(x, y\)"):
        make(net()).step()


@pytest.mark.parametrize("head, options", [(0, {}), ("nope", {}), ("2", {"lr": -1.0})])
def test_a_frozen_trunk_that_cannot_be_leaves_the_model(head, options):
    model = net()
    with pytest.raises(ValueError):
        FrozenTrunk(model, head, **options)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_batch_norms_of_a_frozen_trunk_follow_the_mode_of_the_model(training):
    """As its documentation says: parameters stay, running statistics only in eval mode."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    opt = FrozenTrunk(model, "3")
    model[1].train(training)
    before = copy.deepcopy(model)
    opt.train_step(*batch())
    assert torch.equal(model[1].running_mean, before[1].running_mean) != training
    assert torch.equal(model[0].weight, before[0].weight) and torch.equal(model[1].weight, before[1].weight)
    assert not torch.equal(model[3].weight, before[3].weight)
