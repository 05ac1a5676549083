"""What a run says of itself: each finding provoked by a real small training, silence when all is well, and no bit changed."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ezo_kernels as ezo
from ezo_kernels.ops.int8_tensor import quantize
from ezo_kernels.optim import Diagnostics, TrainingWarning
from ezo_kernels.optim import diagnostics as D


def mlp(*widths, seed=0):
    layers = []
    for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [nn.Linear(a, b), nn.ReLU()] if i < len(widths) - 2 else [nn.Linear(a, b)]
    model = nn.Sequential(*layers)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * (2 / widths[0]) ** 0.5 if p.dim() > 1 else 0.0 * p)
    return model


def batches(steps, rows=16, width=12, classes=4, labels="blobs", seed=0):
    """Blobs in places that tell the class, or labels that nothing tells."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(classes, width, generator=generator)
    for _ in range(steps):
        y = torch.randint(classes, (rows,), generator=generator)
        x = torch.randn(rows, width, generator=generator)
        yield (x if labels == "random" else x + centres[y]), y


def floats(head="4", logits=1.0, **kwargs):
    model = mlp(12, 16, 16, 4)
    model[4].weight.data.mul_(logits)
    ezo.convert_(model, head=[head] if isinstance(head, str) else head)
    return ezo.ElasticZO(model, **({"lr": 1e-3, "head_lr": 0.05, "seed": 3, "noise": "rademacher"} | kwargs))


def integers(head=("4",), widths=(12, 16, 16, 4), **kwargs):
    model = mlp(*widths)
    ezo.convert_(model, head=list(head), precision="int8")
    return ezo.ElasticZOInt8(model, **({"r_max": 15, "p_zero": 0.9, "bits": 0, "head_bits": 1, "seed": 3} | kwargs))


def run(opt, watch, data, losses=None):
    found = []
    for x, y in data:
        opt.train_step(quantize(x) if isinstance(opt, ezo.ElasticZOInt8) else x, y)
        found += watch.observe()
        if losses is not None:
            losses.append(watch._losses().mean().item())
    watch.close()
    return found


def parameters(opt):
    return [p.detach().clone() for p in opt.model.parameters()]


# ---- it changes nothing


@pytest.mark.parametrize("make", [floats, integers], ids=["floats", "integers"])
@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_a_watched_run_is_the_same_bit_for_bit(make, mode):
    plain, watched = make(mode=mode), make(mode=mode)
    watch = Diagnostics(watched, every=3, memory_bytes=1, warn=False)
    for x, y in batches(8):
        x = quantize(x) if make is integers else x
        a, b = plain.train_step(x, y), watched.train_step(x, y)
        watch.observe()
        assert torch.equal(a, b) and torch.equal(plain.losses, watched.losses)
    assert len(watch._windows) == 2  # it did look
    for a, b in zip(parameters(plain), parameters(watched), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", [floats, integers], ids=["floats", "integers"])
def test_hooks_are_there_for_few_steps_only(make):
    opt = make()
    watch = Diagnostics(opt, every=4)

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in opt.model.modules())

    seen = [hooks() > 0]
    for x, y in batches(9):
        opt.train_step(quantize(x) if make is integers else x, y)
        watch.observe()
        seen.append(hooks() > 0)
    assert seen == [True, False, False, True, False, False, False, True, False, False]
    watch._arm()
    watch.close()
    assert hooks() == 0


@pytest.mark.parametrize("kind", ["floats", "integers"])
def test_the_step_path_waits_for_nothing(kind):
    """Fake tensors have no values: whatever asks for one raises. Only a reading does."""
    opt = floats() if kind == "floats" else integers()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for name in ("losses", "g", "skipped"):
            setattr(opt, name, mode.from_tensor(getattr(opt, name)))
        watch = Diagnostics(opt, every=5)
        for _ in range(4):
            assert watch.observe() == []
        with pytest.raises(Exception, match="(?i)data|item|fake|scalar"):
            watch.observe()


@pytest.mark.gpu
def test_no_synchronisation_on_a_gpu():
    opt = ezo.ElasticZO(ezo.convert_(mlp(12, 16, 4).cuda(), head=0))
    watch = Diagnostics(opt, every=100)
    data = [(x.cuda(), y.cuda()) for x, y in batches(20)]
    for x, y in data[:3]:
        opt.train_step(x, y)
        watch.observe()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in data[3:]:
            opt.train_step(x, y)
            watch.observe()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- silence


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_a_healthy_run_is_silent(noise):
    opt, losses = floats(noise=noise, head_lr=0.02), []
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        watch = Diagnostics(opt, every=30)
        data = ((0.5 * x, y) for x, y in batches(300))
        assert run(opt, watch, data, losses) == [] and watch.active == {}
    assert sum(losses[-30:]) < 0.3 * sum(losses[:30])


def test_a_healthy_run_in_integers_is_silent():
    opt, losses = integers(p_zero=0.97), []
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        watch = Diagnostics(opt, every=30)
        assert run(opt, watch, batches(180), losses) == [] and watch.active == {}
    assert sum(losses[-30:]) < 0.7 * sum(losses[:30])


def test_a_run_that_has_converged_is_silent():
    """Flat, but nothing is promised any more: the end of a schedule."""
    opt = floats()
    watch = Diagnostics(opt, every=10, warn=False)
    data = list(batches(140))
    assert run(opt, watch, data[:60]) == []
    opt.param_groups[0]["lr"] = opt.param_groups[1]["lr"] = 0.0
    assert run(opt, watch, data[60:]) == []


def test_a_loss_near_zero_may_double():
    opt = floats(lr=0.0)
    watch = Diagnostics(opt, every=10, warn=False)
    for i, (x, y) in enumerate(batches(100)):
        opt.train_step(x, y)
        assert watch.observe(torch.tensor(1.0 if i < 10 else 1e-3 if i < 40 else 3e-3)) == []


# ---- the rules


def test_a_plateau_with_a_noisy_g():
    opt = floats(head=0, lr=0.002, logits=0.01)
    watch = Diagnostics(opt, every=20)
    with pytest.warns(TrainingWarning, match="has not fallen for 80 steps.*promised.*noise.*more queries .now 1."):
        found = run(opt, watch, batches(180, labels="random"))
    assert [f.kind for f in found] == ["plateau"] and found[0].step == 100  # once, though it stands to the end
    assert D.PROMISED * found[0].numbers["loss"] < found[0].numbers["promised"] < 0.4
    assert "smaller lr (now 0.002)" in found[0].advice and "gives more layers" in found[0].advice
    assert "eps" not in found[0].advice and watch.active["plateau"] is found[0]


def test_a_plateau_says_when_eps_is_too_large():
    opt = floats(head=0, lr=0.01, eps=1.0, logits=0.01)
    found = run(opt, Diagnostics(opt, every=20, warn=False), batches(100, labels="random"))
    assert [f.kind for f in found] == ["plateau"]
    assert found[0].advice.startswith("a smaller eps: the losses of the two signs differ by ")


def test_a_plateau_says_when_eps_is_too_small():
    """Rounding over a tiny eps is a large g, and a promise that is never kept."""
    opt = floats(head=0, lr=3e-3, eps=1e-7, logits=0.01)
    found = run(opt, Diagnostics(opt, every=20, warn=False), batches(120, labels="random"))
    assert [f.kind for f in found] == ["plateau"] and found[0].advice.startswith("a larger eps")


def test_a_run_that_diverged_promises_nothing_and_is_told_of():
    opt = floats(head=0, lr=0.05)
    found = run(opt, Diagnostics(opt, every=20, warn=False), batches(100, labels="random"))
    assert [f.kind for f in found] == ["plateau"] and "the loss has risen for 80 steps" in found[0].seen
    assert found[0].numbers["promised"] == 0 and "eps" not in found[0].advice and "smaller lr" in found[0].advice


def test_the_noise_of_perturbed_outputs_is_no_promise():
    """It is in g, too, which would be a plateau's with any lr of weights."""
    nodes = ezo.NodePerturbation(["0", "2", "4"], lr=0.0, eps=0.2, damping=None)
    opt = floats(head=0, lr=0.1, logits=0.01, node_perturbation=nodes)
    watch = Diagnostics(opt, every=20, warn=False)
    assert run(opt, watch, batches(180, labels="random")) == [] and opt.g.abs() > 0.1
    assert watch._smaller_steps() == "a smaller lr (now 0.1, of perturbed outputs 0)"


def test_a_plateau_in_integers():
    opt = integers(head=[], p_zero=0.0, bits=5)
    found = run(opt, Diagnostics(opt, every=20, warn=False), batches(200, labels="random"))
    plateau = [f for f in found if f.kind == "plateau"]
    assert len(plateau) == 1 and "a larger p_zero" in plateau[0].advice


def test_losses_that_are_often_not_finite_and_then_no_more():
    opt = floats()
    watch = Diagnostics(opt, every=20, warn=False)

    def broken(data, every):
        for i, (x, y) in enumerate(data):
            yield (x * float("inf") if i % every == 0 else x), y

    (finding,) = run(opt, watch, broken(batches(60), 10))
    assert finding.kind == "not_finite" and finding.step == 20
    assert "2 of the last 20 steps were not finite (10%)" in finding.seen and "eps" in finding.advice
    assert run(opt, watch, batches(20)) == [] and watch.active == {}  # it cleared
    assert [f.kind for f in run(opt, watch, broken(batches(20), 5))] == ["not_finite"]  # and is new again
    assert opt.skipped.item() == 6 + 4


def test_steps_skipped_for_the_gradient_of_the_head():
    opt = floats()
    watch = Diagnostics(opt, every=10, warn=False)

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("nan")

    found = []
    for x, y in batches(10):
        opt.train_step(x, y, loss_fn=lambda out, y: F.cross_entropy(Poison.apply(out), y))
        found += watch.observe()
    assert [f.kind for f in found] == ["not_finite"] and "in 10 of them only the gradients of the head" in found[0].seen


def test_one_bad_step_is_no_finding():
    opt = floats()
    data = [(x * float("inf") if i == 7 else x, y) for i, (x, y) in enumerate(batches(40))]
    assert run(opt, Diagnostics(opt, every=20, warn=False), data) == [] and opt.skipped.item() == 1


def test_saturated_weights_of_the_head():
    opt = integers(head_bits=6)
    found = run(opt, Diagnostics(opt, every=20, warn=False), batches(60))
    finding = next(f for f in found if f.kind == "saturated_weights")
    assert "'4.weight' are at +-127" in finding.seen and "smaller head_bits" in finding.advice
    assert "z only" not in finding.seen, "the head has no z"
    weight = opt.model[4].weight
    assert finding.numbers["count"] >= D.LEAST_AT_RAILS and finding.numbers["of"] == weight.numel() == 64
    assert (weight.abs() == 127).sum() > D.AT_RAILS * weight.numel()


def test_saturated_weights_of_the_trunk():
    opt = integers(head=[], bits=6, p_zero=0.0)
    found = run(opt, Diagnostics(opt, every=20, warn=False), batches(60, labels="random"))
    finding = next(f for f in found if f.kind == "saturated_weights")
    assert "p_zero" in finding.advice and "head_bits" not in finding.advice and "one side of z only" in finding.seen


def test_drifting_exponents():
    """Two layers whose weights start near zero against their exponents grow together."""
    opt = integers(head=("2", "4"), head_bits=5)
    for name in ("2.weight", "4.weight"):
        opt.model.get_parameter(name).data.div_(12, rounding_mode="trunc")
    found = run(opt, Diagnostics(opt, every=20, warn=False), batches(80))
    finding = next(f for f in found if f.kind == "exponent_drift")
    assert finding.numbers["bits"] >= D.DRIFT and "has moved by +" in finding.seen and "head_bits" in finding.advice


def test_activations_that_dominate_memory():
    opt = floats(queries=4)
    parameters = sum(p.nbytes for p in opt.model.parameters())
    watch = Diagnostics(opt, every=2, memory_bytes=60_000)
    with pytest.warns(TrainingWarning, match="mode='sequential', which runs the 8 groups one by one"):
        (finding,) = run(opt, watch, batches(4, rows=64))
    rows = 64 * 8
    # the first layer's output and its input pass (and the ReLU's: the same size or more); the head keeps its logits
    assert watch.passing_bytes == rows * (16 + 16) * 4 and watch.kept_bytes == rows * 4 * 4
    assert finding.numbers["bytes"] == watch.passing_bytes + watch.kept_bytes
    assert finding.numbers["parameter_bytes"] == parameters and "a smaller batch" in finding.advice


def test_a_head_that_keeps_much_is_told_of_the_cut_and_of_checkpointing():
    model = ezo.convert_(mlp(12, 16, 16, 16, 4), head=["2", "4", "6"])
    opt = ezo.ElasticZO(model, mode="sequential", seed=3)
    watch = Diagnostics(opt, every=2, memory_bytes=9_000, warn=False)
    (finding,) = run(opt, watch, batches(4, rows=64))
    # what a ReLU of the head reads is freed, what it gives is kept, and so are the logits
    assert watch.kept_bytes == 64 * (16 + 16 + 4) * 4
    assert "a cut nearer to the output, or torch.utils.checkpoint" in finding.advice
    assert "sequential" not in finding.advice  # it is


def test_memory_of_integers_is_the_arena():
    opt = integers()
    (finding,) = run(opt, Diagnostics(opt, every=2, memory_bytes=1_000, warn=False), batches(2, rows=64))
    assert finding.kind == "activation_memory" and finding.numbers["bytes"] == opt.memory()["planned_bytes"]


def test_parameters_that_dominate_are_no_finding():
    opt = floats()
    assert run(opt, Diagnostics(opt, every=2, memory_bytes=1_000, warn=False), batches(4, rows=1)) == []


@pytest.mark.parametrize("make", [floats, integers], ids=["floats", "integers"])
def test_an_evaluation_between_two_steps_is_not_noted(make):
    """It may come with a thousand rows when the hooks are there for the next step."""
    opt = make()
    watch = Diagnostics(opt, every=1, warn=False)
    large = quantize(torch.randn(1000, 12)) if make is integers else torch.randn(1000, 12)
    opt.model(large)
    assert watch.passing_bytes == watch.kept_bytes == 0 and watch._exponents == {}
    run(opt, watch, batches(2))
    assert (len(watch._exponents) == 3) if make is integers else (0 < watch.passing_bytes < 1000 * 12 * 4)


def test_a_step_after_a_reading_that_raised_is_watched(monkeypatch):
    opt = floats()
    watch = Diagnostics(opt, every=1, warn=False)
    monkeypatch.setattr(watch, "_memory", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(opt, watch, batches(1))
    assert watch._hooks and not watch._scales


@pytest.mark.parametrize("every", [20, 100])
def test_a_run_that_blows_up_within_the_first_window_is_told_of(every):
    """Afterwards all windows are alike, and g is zero: nothing is promised."""
    opt = floats(head=0, lr=10.0)
    watch = ezo.Diagnostics(opt, every=every, warn=False)
    losses = []
    found = run(opt, watch, batches(6 * every), losses)
    assert min(map(float, losses[every:])) > 100 * float(losses[0])
    assert [f.kind for f in found] == ["plateau"] and "has risen" in found[0].seen and "smaller lr" in found[0].advice


def test_a_perturbation_that_no_loss_shows_is_told_of():
    opt = floats(head=0, eps=1e-12)
    watch = ezo.Diagnostics(opt, every=20, warn=False)
    found = run(opt, watch, list(batches(1)) * 200)
    assert not opt.g.any()
    assert [f.kind for f in found] == ["plateau"] and found[0].advice.startswith("a larger eps")
