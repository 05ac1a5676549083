"""A scale a layer: what is perturbed how far, that the update goes as far, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.nn.convert import context_of
from ezo_kernels.ops import materialize
from tests.test_step import batch, bits, lenet, same
from tests.zoo import BasicBlock

SCALES = {"conv1": 2.0, "fc1": 0.3}


def scale_in(scales: dict, name: str) -> float:
    return next((s for prefix, s in scales.items() if name.startswith(prefix + ".")), 1.0)


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
@pytest.mark.parametrize("antithetic", [True, False])
def test_step_is_the_formula_at_the_scaled_z(mode, antithetic):
    """Against the plain model with w + eps s z written into it, and w - lr / q sum g s z."""
    model = ezo.convert_(lenet(), head=["fc2", "fc3"])
    opt = ezo.ElasticZO(
        model, lr=1e-3, eps=1e-3, queries=2, seed=5, antithetic=antithetic, mode=mode, head_lr=0.0, scales=SCALES
    )
    before, (x, y) = bits(model), batch(8)
    opt.train_step(x, y)
    z = {
        s.names[0]: [materialize(s.shape, seed=5, step=0, site=s.site, query=q, layout=s.layout) for q in range(2)]
        for s in model._ezo.manifest
    }
    losses = []
    for q in range(2):
        for sign in (1, -1) if antithetic else (1,):
            twin = lenet()
            with torch.no_grad():
                for name, p in twin.named_parameters():
                    if name in z:
                        p.add_(sign * 1e-3 * scale_in(SCALES, name) * z[name][q])
            losses.append(F.cross_entropy(twin(x), y).item())
    torch.testing.assert_close(opt.losses, torch.tensor(losses), rtol=1e-5, atol=1e-6)
    for name, each in z.items():
        step = scale_in(SCALES, name) * sum(g * v for g, v in zip(opt.g, each, strict=True)) / 2
        torch.testing.assert_close(model.state_dict()[name], before[name] - 1e-3 * step, rtol=1e-5, atol=1e-6)


def test_one_is_no_scale():
    found = []
    for scales in (None, {}, {"conv1": 1.0, "fc1": 1}):
        model = ezo.convert_(lenet(), head=["fc3"])
        opt = ezo.ElasticZO(model, scales=scales, clip=5.0)
        assert opt.scales == {}
        for i in range(2):
            opt.train_step(*batch(8, i))
        found.append(bits(model))
    assert same(found[0], found[1]) and same(found[0], found[2])


def test_equal_scales_are_another_eps_and_rate():
    """All layers at scale 2 are twice the eps, where g is half as large, at four times the rate (powers of two: to the bit)."""
    found = []
    for kwargs in ({"scales": dict.fromkeys(("conv1", "conv2", "fc1", "fc2", "fc3"), 2.0)}, {"eps": 2e-3, "lr": 4e-3}):
        model = ezo.convert_(lenet(), head=0)
        opt = ezo.ElasticZO(model, **{"lr": 1e-3, "eps": 1e-3, **kwargs})
        opt.train_step(*batch(8))
        found.append(bits(model))
    assert same(*found)


class Mixed(nn.Module):
    """Fused layers of every kind, a norm and a bare parameter as copies, an embedding tied to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.token = nn.Parameter(torch.randn(8))
        self.out = nn.Linear(8, 12, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids) + self.token
        return self.out(self.norm(self.conv(x.mT).mT))


def mixed() -> nn.Module:
    torch.manual_seed(0)
    return Mixed()


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_copies_ties_and_single_parameters(mode):
    scales = {"embed": 0.5, "out": 0.5, "norm.weight": 4.0, "token": 0.25, "conv": 2.0}
    model = ezo.convert_(mixed(), head=0)
    opt = ezo.ElasticZO(model, lr=1e-2, seed=3, mode=mode, scales=scales)
    ids = torch.arange(24).view(4, 6) % 12
    before = {k: v.clone() for k, v in model.named_parameters()}
    opt.train_step(ids, ids, loss_fn=lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten()))
    of = {
        "embed.weight": 0.5,
        "norm.weight": 4.0,
        "token": 0.25,
        "conv.weight": 2.0,
        "conv.bias": 2.0,
        "norm.bias": 1.0,
    }
    z = {
        s.names[0]: materialize(s.shape, seed=3, step=0, site=s.site, layout=s.layout)
        for s in context_of(model).manifest
    }
    losses = []
    for sign in (1, -1):
        twin = mixed()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p.add_(sign * 1e-3 * of[name] * z[name])
        losses.append(F.cross_entropy(twin(ids).flatten(0, 1), ids.flatten()))
    torch.testing.assert_close(opt.losses, torch.stack(losses).detach(), rtol=1e-5, atol=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name] - 1e-2 * opt.g * of[name] * z[name], rtol=1e-5, atol=1e-6)


def test_the_longest_name_counts_and_modules_that_run_once_a_group_have_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(BasicBlock(3, 4, 2), nn.Flatten(), nn.Linear(64, 3))
    ezo.convert_(model, head=["2"])
    opt = ezo.ElasticZO(model, scales={"0": 2.0, "0.conv1": 0.5, "0.downsample.1": 3.0})
    names = {s.names[0]: opt.scales.get(s.site, 1.0) for s in model._ezo.manifest}
    assert names["0.conv1.weight"] == 0.5 and names["0.conv2.weight"] == names["0.downsample.0.weight"] == 2.0
    assert names["0.downsample.1.weight"] == names["0.downsample.1.bias"] == 3.0
    before = bits(model)
    opt.train_step(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))
    moved = {k: (v - before[k]).abs().mean().item() for k, v in model.state_dict().items() if k in names}
    ratio = moved["0.downsample.1.weight"] / moved["0.conv1.weight"]
    assert ratio == pytest.approx(6, rel=0.5)  # the mean of |z| over 4 weights against 108


def test_a_schedule_of_eps_reaches_every_layer():
    model = ezo.convert_(lenet(), head=0)
    opt = ezo.ElasticZO(model, eps=1e-3, scales=SCALES)
    opt.param_groups[0]["eps"] = 5e-3
    opt.train_step(*batch(4))
    here = {site: own["eps"] for site, own in model._ezo.own.items()}
    assert {s.names[0].split(".")[0] for s in model._ezo.manifest if s.site in here} == set(SCALES)
    want = {"conv1": 1e-2, "fc1": 1.5e-3}
    for s in model._ezo.manifest:
        if s.site in here:
            assert here[s.site].item() == pytest.approx(want[s.names[0].split(".")[0]], rel=1e-6)


def test_another_optimizer_of_the_model_has_its_own():
    model = ezo.convert_(lenet(), head=0)
    ezo.ElasticZO(model, scales=SCALES).train_step(*batch(4))
    ezo.ElasticZO(model).train_step(*batch(4))
    assert model._ezo.own == {}


def test_state_goes_on_and_refuses_other_scales():
    model = ezo.convert_(lenet(), head=["fc3"])
    opt = ezo.ElasticZO(model, scales=SCALES, clip=5.0)
    opt.train_step(*batch(8))
    held, state = bits(model), copy.deepcopy(opt.state_dict())
    opt.train_step(*batch(8, 2))
    want = bits(model)
    model.load_state_dict(held)
    again = ezo.ElasticZO(model, scales=dict(reversed(SCALES.items())), clip=5.0)
    again.load_state_dict(state)
    again.train_step(*batch(8, 2))
    assert same(want, bits(model))
    for scales in (None, {"conv1": 2.0}):
        with pytest.raises(ValueError, match="of scales"):
            ezo.ElasticZO(model, scales=scales).load_state_dict(state)
    old = {k: v for k, v in ezo.ElasticZO(model).state_dict().items() if k != "scales"}
    ezo.ElasticZO(model).load_state_dict(old)  # a state from before there were scales


def test_copies_of_the_optimizer_keep_them():
    model = ezo.convert_(lenet(), head=0)
    opt = ezo.ElasticZO(model, scales=SCALES)
    twin, other = copy.deepcopy((model, opt))
    opt.train_step(*batch(4))
    other.train_step(*batch(4))
    assert same(bits(model), bits(twin))


@pytest.mark.parametrize(
    ("scales", "error", "message"),
    [
        ([("conv1", 2.0)], TypeError, "map names to numbers, got list"),
        ({1: 2.0}, TypeError, "a name in scales must be a string, got int"),
        ({"conv1": "2"}, TypeError, "Python number, got str"),
        ({"conv1": 0.0}, ValueError, "above 0.0, got 0.0"),
        ({"conv1": float("nan")}, ValueError, "got nan"),
        ({"conv1": 1e39}, ValueError, "in the range of fp32, got 1e\\+39"),
        ({"conv1": 1e-44}, ValueError, "in the range of fp32, got 1e-44"),
        ({"conv1": 1e-36}, ValueError, "eps 0.001 times the scale 1e-36"),
        ({"": 2.0}, ValueError, "nothing named ''"),
        ({"conv9": 2.0}, ValueError, "nothing named 'conv9'; its layers are: conv1, conv2, fc1, fc2"),
        ({"fc3": 2.0}, ValueError, "the trunk has nothing named 'fc3'"),
        ({"fc1.weight": 2.0}, ValueError, "name 'fc1'"),
    ],
)
def test_bad_scales(scales, error, message):
    model = ezo.convert_(lenet(), head=["fc3"])
    with pytest.raises(error, match=message):
        ezo.ElasticZO(model, scales=scales)


def test_a_later_eps_that_does_not_go_with_a_scale_changes_nothing():
    model = ezo.convert_(lenet(), head=["fc3"])
    opt = ezo.ElasticZO(model, scales={"conv1": 1e10})
    opt.param_groups[0]["eps"] = 1e30
    for _ in range(2):
        with pytest.raises(ValueError, match="eps 1e\\+30 times the scale"):
            opt.train_step(*batch(4))
    opt.param_groups[0]["eps"] = 1e-12
    opt._fill_scalars()
    assert opt._eps.item() == pytest.approx(1e-12) and opt._scaled_eps._tensors[1e10].item() == pytest.approx(1e-2)


def test_a_single_layer_is_named_by_its_parameters():
    model = ezo.convert_(nn.Linear(3, 2), head=0)
    with pytest.raises(ValueError, match="name both"):
        ezo.ElasticZO(model, scales={"weight": 2.0})
    ezo.ElasticZO(model, scales={"weight": 2.0, "bias": 2.0}).train_step(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))


def test_a_tied_parameter_has_one():
    with pytest.raises(ValueError, match="one parameter, tied"):
        ezo.ElasticZO(ezo.convert_(mixed(), head=0), scales={"embed": 0.5})
