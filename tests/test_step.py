"""The contract of a step (docs/rng.md; the numbered points are those of the design's contract)."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.ops import _library
from ezo_kernels.optim.baselines import BackpropSGD, MeZO


def lenet(seed: int = 0) -> nn.Module:
    return ezo.models.LeNet5(generator=torch.Generator().manual_seed(seed))


def batch(rows: int = 33, seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 1, 28, 28, generator=g), torch.randint(0, 10, (rows,), generator=g)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("noise", ["gaussian", "clt4", "hadamard", "rademacher", "uniform"])
def test_eps_zero_gives_equal_losses(mode, queries, noise):
    """Contract 1: with eps = 0 every group computes the same bits, 33 rows a group (no multiple of anything)."""
    model = ezo.convert_(lenet(), head=["fc2", "fc3"])
    opt = ezo.ElasticZO(model, queries=queries, noise=noise, mode=mode)
    opt._eps.zero_()
    opt.train_step(*batch())
    assert (opt.losses == opt.losses[0]).all()


@pytest.mark.parametrize("head", [0, ["fc3"], ["fc2", "fc3"]])
def test_stacked_equals_sequential_bitwise(head):
    runs = []
    for mode in ("stacked", "sequential"):
        model = ezo.convert_(lenet(), head=head)
        opt = ezo.ElasticZO(model, queries=2, mode=mode, clip=5.0)
        for i in range(3):
            opt.train_step(*batch(33, i))
        runs.append((bits(model), opt.g.clone()))
    assert torch.equal(runs[0][1], runs[1][1])
    trunk = [s.names[0] for s in model._ezo.manifest]
    assert same({k: runs[0][0][k] for k in trunk}, {k: runs[1][0][k] for k in trunk})
    for k in runs[0][0]:  # the head's gradient is summed in another order
        torch.testing.assert_close(runs[0][0][k], runs[1][0][k], rtol=1e-5, atol=1e-6)


def test_update_uses_the_forward_z():
    """Contract 2: the update moves every site along the z that its forward used, and by lr * g."""
    model = ezo.convert_(lenet(), head=["fc3"])
    before = bits(model)
    opt = ezo.ElasticZO(model, lr=1e-2, seed=5)
    opt.train_step(*batch())
    g = opt.g.item()
    for s in model._ezo.manifest:
        z = ezo.ops.materialize(s.shape, seed=5, step=0, site=s.site, layout=s.layout)
        want = before[s.names[0]] - (opt._lr * opt.g) * z
        assert torch.equal(model.state_dict()[s.names[0]], want), s.names
    x, y = batch()
    moved = copy.deepcopy(ezo.unconvert_(model))
    losses = []
    for sign in (1, -1):
        moved.load_state_dict(before)
        with torch.no_grad():
            named = dict(moved.named_parameters())
            for s in opt.zo.manifest:
                z = ezo.ops.materialize(s.shape, seed=5, step=0, site=s.site, layout=s.layout)
                named[s.names[0]].add_(z, alpha=sign * 1e-3)
            losses.append(F.cross_entropy(moved(x), y).item())
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(g, abs=1e-3)


def test_forward_never_writes_a_weight():
    """Contract 3: the perturbed passes leave the weights' bits and version counters alone."""
    model = ezo.convert_(lenet(), head=["fc3"])
    before, versions = bits(model), {n: p._version for n, p in model.named_parameters()}
    opt = ezo.ElasticZO(model, lr=0.0, head_lr=0.0)
    seen = {}
    opt.train_step(*batch(), loss_fn=lambda out, y: seen.update({n: p._version for n, p in model.named_parameters()})
                   or F.cross_entropy(out, y))  # fmt: skip
    assert seen == versions
    assert same(before, bits(model))


def test_same_seed_same_run_and_other_seed_other_run():
    """Contract 5."""

    def run(seed):
        model = ezo.convert_(lenet(), head=["fc3"])
        opt = ezo.ElasticZO(model, seed=seed)
        for i in range(4):
            opt.train_step(*batch(16, i))
        return bits(model)

    assert same(run(3), run(3))
    assert not same(run(3), run(4))


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_non_finite_step_changes_nothing(mode, optimizer):
    """Contract 8: weights, head state, running statistics and counters stay; the next step is as if it had not been."""
    make = {
        "sgd": None,
        "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
        "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    }[optimizer]

    def start():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        ezo.convert_(model, head=["3"])
        return model, ezo.ElasticZO(model, head_optimizer=make, mode=mode, lr=1e-2)

    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 8, generator=g), torch.randint(0, 3, (16,), generator=g)
    bad = x.clone()
    bad[0, 0] = math.inf
    a, opt_a = start()
    b, opt_b = start()
    opt_a.train_step(bad, y)  # before any state exists
    assert opt_a.skipped.item() == 1 and opt_a.step_count.item() == 0
    assert same(bits(a), bits(b))
    for opt in (opt_a, opt_b):
        opt.train_step(x, y)
    assert same(bits(a), bits(b))
    held = bits(a)
    opt_a.train_step(bad, y)
    assert same(held, bits(a)) and opt_a.skipped.item() == 2
    for opt in (opt_a, opt_b):
        opt.train_step(x, y)
    assert same(bits(a), bits(b)) and opt_a.step_count.item() == 2


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_non_finite_gradient_of_the_head_changes_nothing(mode):
    """The losses may be finite all the same: here by a root at zero."""
    model = ezo.convert_(lenet(), head=["fc3"])
    opt = ezo.ElasticZO(model, lr=1e-2, mode=mode)
    x, y = batch(4)
    opt.train_step(x, y)
    held = bits(model)
    loss = opt.train_step(x, y, lambda out, y: F.cross_entropy(out, y) + (0 * out.sum()).sqrt())
    assert math.isfinite(loss) and opt.skipped.item() == 1 and opt.step_count.item() == 1 and same(held, bits(model))


def test_head_all_is_sgd_bitwise():
    model, plain = lenet(), lenet()
    ezo.convert_(model, head="all")
    opt, sgd = ezo.ElasticZO(model, head_lr=0.05), BackpropSGD(plain, lr=0.05)
    for i in range(5):
        a, b = opt.train_step(*batch(32, i)), sgd.train_step(*batch(32, i))
        assert torch.equal(a, b)
    assert same(bits(model), bits(plain))


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("head", [0, ["fc3"]])
def test_equals_eager_mezo_at_the_same_z(queries, head):
    model, plain = lenet(), lenet()
    ezo.convert_(model, head=head)
    opt = ezo.ElasticZO(model, lr=1e-3, eps=1e-2, queries=queries, clip=5.0, seed=9)
    mezo = MeZO(plain, lr=1e-3, eps=1e-2, queries=queries, clip=5.0, seed=9, head=head)
    for i in range(3):
        a, b = opt.train_step(*batch(32, i)), mezo.train_step(*batch(32, i))
        assert a.item() == pytest.approx(b.item(), rel=1e-4)
    for (k, v), w in zip(bits(model).items(), bits(plain).values(), strict=True):
        torch.testing.assert_close(v, w, rtol=1e-3, atol=2e-5, msg=lambda m, k=k: f"{k}: {m}")


def test_nothing_is_saved_before_the_cut():
    """Inference memory below the cut: autograd packs tensors of head layers only."""
    model = ezo.convert_(lenet(), head=["fc2", "fc3"])
    opt = ezo.ElasticZO(model)
    opt.train_step(*batch(32))
    saved = []
    inside = {"head": False}
    model.fc2.register_forward_pre_hook(lambda *_: inside.update(head=True))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(inside["head"]) or t, lambda t: t):
        opt.train_step(*batch(32))
    assert saved and all(saved)


@pytest.mark.parametrize("at_once", [False, True])
def test_step_runs_under_fake_tensors(monkeypatch, at_once):
    """Contract 4, on a CPU: a step that asked the host for a value would raise here."""
    from torch._subclasses import FakeTensorMode

    monkeypatch.setattr(_library, "bound_by_launches", lambda device: at_once)
    with FakeTensorMode():
        for mode in ("stacked", "sequential"):
            model = ezo.convert_(ezo.models.LeNet5(), head=["fc2", "fc3"])
            opt = ezo.ElasticZO(model, queries=2, clip=5.0, mode=mode)
            opt.train_step(torch.randn(8, 1, 28, 28), torch.zeros(8, dtype=torch.long))
            opt.train_step(torch.randn(8, 1, 28, 28), torch.zeros(8, dtype=torch.long))


def test_an_error_after_the_losses_leaves_none_to_the_next_step(monkeypatch):
    opt, other = (ezo.ElasticZO(ezo.convert_(lenet(), head=["fc3"]), seed=2) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(opt, "_coefficients", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            opt.train_step(*batch(8))
    opt.train_step(*batch(8, 1))
    other.train_step(*batch(8, 1))
    assert same(bits(opt.model), bits(other.model)) and torch.equal(opt.losses, other.losses)


def test_accumulation_averages_losses_with_the_same_z():
    x, y = batch(32)
    whole, parts = (ezo.convert_(lenet(), head=["fc3"]) for _ in range(2))
    a, b = ezo.ElasticZO(whole, seed=2, lr=1e-3), ezo.ElasticZO(parts, seed=2, lr=1e-3)
    a.train_step(x, y)
    held = bits(parts)
    for i in range(3):
        b.train_step(x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8], update=False)
        assert same(held, bits(parts))
    b.train_step(x[24:], y[24:])
    assert b.step_count.item() == 1
    torch.testing.assert_close(a.losses, b.losses, rtol=1e-6, atol=1e-6)
    for v, w in zip(bits(whole).values(), bits(parts).values(), strict=True):
        torch.testing.assert_close(v, w, rtol=1e-3, atol=1e-5)


def test_clip_bounds_the_update():
    model = ezo.convert_(lenet(), head=0)
    opt = ezo.ElasticZO(model, clip=1e-3, lr=1.0)
    before = bits(model)
    opt.train_step(*batch())
    assert abs(opt.g.item()) == pytest.approx(1e-3)
    assert max((v - before[k]).abs().max().item() for k, v in bits(model).items()) < 1e-3 * 7


def test_schedulers_drive_lr_and_eps():
    model = ezo.convert_(lenet(), head=["fc3"])
    opt = ezo.ElasticZO(model, lr=1e-2, head_lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    opt.train_step(*batch(8))
    schedule.step()
    assert [g["lr"] for g in opt.param_groups] == [5e-3, 0.05]
    before = bits(model)
    opt.param_groups[0]["eps"] = 1e-2
    opt.train_step(*batch(8))
    assert opt._lr.item() == pytest.approx(5e-3) and opt._eps.item() == pytest.approx(1e-2)
    s = model._ezo.manifest[0]
    z = ezo.ops.materialize(s.shape, seed=0, step=1, site=s.site, layout=s.layout)
    assert torch.equal(model.state_dict()[s.names[0]], before[s.names[0]] - (opt._lr * opt.g) * z)


@pytest.mark.parametrize("grad", ["plus", "minus", "mean"])
def test_head_gradient_choice(grad):
    model = ezo.convert_(lenet(), head=["fc3"])
    opt = ezo.ElasticZO(model, lr=0.0, head_lr=1.0, head_grad=grad, eps=1e-2, mode="sequential")
    losses = []
    real = torch.autograd.backward

    def spy(loss, inputs):
        losses.append(loss.item())
        real(loss, inputs=inputs)

    torch.autograd.backward = spy
    try:
        opt.train_step(*batch(16))
    finally:
        torch.autograd.backward = real
    want = {"plus": opt.losses[:1], "minus": opt.losses[1:], "mean": opt.losses / 2}[grad]
    assert losses == pytest.approx(want.tolist())


def test_closure_is_called_once_a_group():
    model = ezo.convert_(lenet(), head=0)
    opt = ezo.ElasticZO(model, queries=2)
    x, y = batch(8)
    calls = []

    def closure():
        calls.append(1)
        return (model(x).argmax(1) != y).float().mean()  # not differentiable, and need not be

    opt.step(closure)
    assert len(calls) == 4
    other = ezo.convert_(lenet(), head=["fc3"])
    a = ezo.ElasticZO(other, seed=1)
    a.step(lambda: F.cross_entropy(other(x), y))
    twin = ezo.convert_(lenet(), head=["fc3"])
    b = ezo.ElasticZO(twin, seed=1, mode="sequential")
    b.train_step(x, y)
    assert same(bits(other), bits(twin))


def test_state_round_trip_continues_bit_for_bit(tmp_path):
    def start():
        model = ezo.convert_(lenet(), head=["fc2", "fc3"])
        return model, ezo.ElasticZO(model, seed=7, head_optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))

    model, opt = start()
    for i in range(3):
        opt.train_step(*batch(16, i))
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "c.pt")
    tensors = (opt._seed, opt._step)
    for i in range(3, 5):
        opt.train_step(*batch(16, i))
    saved = torch.load(tmp_path / "c.pt")
    again, other = start()
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["opt"])
    for i in range(3, 5):
        other.train_step(*batch(16, i))
    assert same(bits(model), bits(again))
    opt.load_state_dict(saved["opt"])
    assert (opt._seed, opt._step)[0] is tensors[0] and opt._step is tensors[1]
    for key, value, match in (
        ("rng_version", "ezo-0/x", "noise contract"),
        ("queries", 9, "queries"),
        ("manifest", [], "another model"),
    ):
        with pytest.raises(ValueError, match=match):
            opt.load_state_dict({**saved["opt"], key: value})
    with pytest.raises(ValueError, match="lacks"):
        opt.load_state_dict({})


def test_pure_backpropagation_skips_running_statistics_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    ezo.convert_(model, head="all")
    opt = ezo.ElasticZO(model)
    x, y = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
    opt.train_step(x, y)
    before = bits(model)
    opt.train_step(x * math.inf, y)
    assert same(before, bits(model)) and opt.skipped.item() == 1
    with pytest.raises(RuntimeError):
        opt.train_step(x, y, loss_fn=lambda out, target: (_ for _ in ()).throw(RuntimeError("after the forward")))
    assert same(before, bits(model))
    opt.train_step(x, y)
    assert not same(before, bits(model)) and model[1].num_batches_tracked.item() == 2
