"""What a step asks of the head, its optimizer and its numbers, each time."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import ezo_kernels as ezo
from tests.test_checks import Net, Sequences, examples, made
from tests.test_step import batch, bits, lenet, same


def test_parameters_of_the_head_are_still_those_of_the_model():
    opt = made(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), head=["2"])
    opt.train_step(*examples(4))
    held = opt.model[2]
    opt.model[2] = nn.Linear(8, 3)
    with pytest.raises(ValueError, match="'2.weight' was replaced"):
        opt.train_step(*examples(4))
    opt.model[2] = held
    held.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="'2.bias' of the head was frozen"):
        opt.train_step(*examples(4))
    held.bias.requires_grad_(True)
    opt.train_step(*examples(4))
    assert opt.step_count.item() == 2
    whole = made(Net, head="all")
    whole.model.load_state_dict(bits(whole.model), assign=True)
    with pytest.raises(ValueError, match="was replaced"):
        whole.train_step(*examples(4))


@pytest.mark.parametrize("wrap", ["compile", "wrapper", "parametrization", "prune"])
def test_a_head_that_is_wrapped_is_still_the_models(wrap):
    """Its parameters have other names or places then, and learn as before."""
    opt = made(Net, head=["o"])
    opt.train_step(*examples(4))
    weight = opt.model.o.weight
    if wrap == "parametrization":
        nn.utils.parametrizations.spectral_norm(opt.model.o)
    elif wrap == "prune":
        prune.l1_unstructured(opt.model.o, "weight", 0.5)
    else:
        opt.model.o = torch.compile(opt.model.o, backend="eager") if wrap == "compile" else nn.Sequential(opt.model.o)
    before = weight.detach().clone()
    opt.train_step(*examples(4))
    assert opt.step_count.item() == 2 and not torch.equal(weight, before)


class Adaptive(torch.optim.SGD):
    """Makes its own rate, as Adafactor does, and has None in its groups."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        self.defaults["lr"] = self.param_groups[0]["lr"] = None

    def step(self, closure=None):
        self.param_groups[0]["lr"] = 0.1
        super().step(closure)
        self.param_groups[0]["lr"] = None


def test_rates_that_optimizers_and_schedules_have():
    opt = made(Net, head=["o"], head_optimizer=Adaptive)
    opt.train_step(*examples(4))
    opt = made(Net, head=["o"], clip=1e300)
    opt.param_groups[0]["lr"] = opt.param_groups[1]["lr"] = -9.25e-19  # LinearLR to 0
    before = bits(opt.model)
    opt.train_step(*examples(4))
    assert opt.step_count.item() == 1
    torch.testing.assert_close(bits(opt.model), before, rtol=0, atol=1e-12)
    other = made(Net, head=["o"], clip=1e300)
    other.load_state_dict(opt.state_dict())


def test_warnings_are_the_users_lines():
    class Idle(Net):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(2, 2)

    for opt, data in (
        (made(Idle, head=["o", "idle"]), examples(4)),
        (made(Sequences), (torch.randint(0, 20, (6, 4)), torch.randint(0, 5, (4,)))),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt.train_step(*data)
        assert [w.filename for w in caught] == [__file__]


def test_a_head_that_gets_no_gradient_is_named_once():
    class Idle(Net):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(2, 2)

    opt = made(Idle, head=["o", "idle"])
    with pytest.warns(UserWarning, match="'idle.weight', 'idle.bias' got no gradient"):
        opt.train_step(*examples(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.train_step(*examples(4))


def test_eps_stays_while_losses_are_accumulated():
    opt = made(Net)
    opt.train_step(*examples(4), update=False)
    opt.param_groups[0]["eps"] = 0.1
    with pytest.raises(ValueError, match="eps was 0.001 for the losses accumulated so far, and is now 0.1"):
        opt.train_step(*examples(4))
    opt.train_step(*examples(4))
    assert opt.step_count.item() == 1


def test_a_head_optimizer_that_raises_has_changed_nothing():
    opt = made(Net, head=["o"], head_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    opt.train_step(*examples(4))
    before = bits(opt.model)

    def fail(*_):
        raise RuntimeError("a hook of the user's")

    hook = opt.head_optimizer.optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a hook of the user's"):
        opt.train_step(*examples(4))
    assert same(bits(opt.model), before) and (opt.step_count.item(), opt.skipped.item()) == (1, 0)
    hook.remove()
    opt.train_step(*examples(4))
    assert opt.step_count.item() == 2


@pytest.mark.parametrize("lr", [float("nan"), -1.0, "x"])
def test_the_heads_rate_is_checked_at_every_step(lr):
    opt = made(Net, head=["o"])
    opt.param_groups[1]["lr"] = lr
    before = bits(opt.model)
    with pytest.raises((TypeError, ValueError), match="lr of the head must be"):
        opt.train_step(*examples(4))
    assert same(bits(opt.model), before) and opt.step_count.item() == 0


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"eps": 1e39}, ValueError, "eps must be in the range of fp32"),
        ({"eps": 1e-50}, ValueError, "eps must be in the range of fp32"),
        ({"lr": 1e39}, ValueError, "lr must be in the range of fp32"),
        ({"queries": True}, TypeError, "queries must be an int, got bool"),
        ({"seed": True}, TypeError, "seed must be an int, got bool"),
        ({"seed": torch.tensor(True)}, TypeError, "seed must be an int, got Tensor"),
        ({"stochastic_rounding": "no"}, TypeError, "stochastic_rounding must be a bool"),
        ({"head_optimizer": "adam"}, TypeError, "head_optimizer must be a torch optimizer"),
    ],
)
def test_arguments(options, error, match):
    with pytest.raises(error, match=match):
        made(Net, head=["o"], **options)


def test_a_loss_that_cannot_be_called():
    with pytest.raises(TypeError, match="loss_fn must be a function of the output and y, got str"):
        made(Net).train_step(*examples(4), loss_fn="cross_entropy")


def test_a_model_that_was_converted_anew_wants_a_new_optimizer():
    model = ezo.convert_(lenet(), head=["fc3"])
    opt = ezo.ElasticZO(model)
    ezo.unconvert_(model)
    ezo.convert_(model, head=["fc2", "fc3"])
    with pytest.raises(ValueError, match="converted anew"):
        opt.train_step(*batch(4))


def test_one_autocast_around_all_steps_is_one_around_each():
    runs = []
    for around in (True, False):
        opt = made(Net, head=["o"], head_lr=0.5)
        with torch.autocast("cpu", torch.bfloat16) if around else contextlib.nullcontext():
            for i in range(4):
                with torch.autocast("cpu", torch.bfloat16):
                    opt.train_step(*examples(8, seed=i))
        runs.append(bits(opt.model))
    assert same(*runs)


@pytest.mark.parametrize("setting", ["'high'", "cuda.matmul", ""])
def test_any_switch_of_tf32_is_read(setting):
    change = {
        "'high'": "torch.set_float32_matmul_precision('high')",
        "cuda.matmul": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "": "torch.backends.fp32_precision = 'tf32'",
    }[setting]
    code = f"""
import torch
from ezo_kernels.ops.linear import input_precision
assert input_precision(torch.float32, "") == "ieee"
{change}
assert input_precision(torch.float32, "") == "tf32" and input_precision(torch.float32, "ieee") == "ieee"
assert input_precision(torch.float16, "") == "ieee"
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize("touch", ["model", "in place", "copy"])
def test_accumulated_gradients_that_are_lost_are_told_of(touch):
    """The others would be divided by the number of all: a head that learns half as much."""
    opt = made(Net, head=["o"])
    opt.train_step(*examples(4), update=False)
    if touch == "model":
        opt.model.zero_grad()
    elif touch == "in place":
        opt.head_optimizer.optimizer.zero_grad(set_to_none=False)
    else:
        opt = copy.deepcopy(opt)
    before = bits(opt.model)
    with pytest.raises(ValueError, match=r"gradients of the 1 micro-batches .* zero_grad\(\) of this optimizer"):
        opt.train_step(*examples(4, seed=2))
    assert same(before, bits(opt.model)) and opt.step_count.item() == 0
    opt.train_step(*examples(4, seed=2))  # what was accumulated is forgotten


@pytest.mark.parametrize("head", [0, ["o"], "all"])
@pytest.mark.parametrize("options", [{}, {"set_to_none": False}])
def test_zero_grad_forgets_all_that_was_accumulated(head, options):
    fresh, opt = made(Net, head=head), made(Net, head=head)
    opt.train_step(*examples(4), update=False)
    opt.zero_grad(**options)
    for each in (fresh, opt):
        each.train_step(*examples(4, seed=2), update=False)
        each.train_step(*examples(4, seed=3))
    assert same(bits(fresh.model), bits(opt.model)) and torch.equal(fresh.losses, opt.losses)


def test_zero_grad_in_a_closure_forgets_no_loss_of_a_group():
    losses = []
    for zeroing in (True, False):
        opt = made(Net)
        opt.train_step(*examples(4), update=False)

        def closure(opt=opt, zeroing=zeroing):
            if zeroing:
                opt.zero_grad()
            return F.cross_entropy(opt.model(examples(4, seed=2)[0]), examples(4, seed=2)[1])

        opt.step(closure)
        losses.append(opt.losses)
    assert torch.equal(*losses)


@pytest.mark.parametrize("everywhere", [False, True])
def test_step_hooks_run_around_a_train_step_that_updates(everywhere):
    calls = []
    opt = made(Net, head=["o"])

    def note(optimizer, args, kwargs):
        if optimizer is opt:
            calls.append((opt.step_count.item(), args[0] is opt))

    if everywhere:
        hooks = [register_optimizer_step_pre_hook(note), register_optimizer_step_post_hook(note)]
    else:
        hooks = [opt.register_step_pre_hook(note), opt.register_step_post_hook(note)]
    opt.train_step(*examples(4), update=False)
    assert not calls
    opt.train_step(*examples(4))
    for hook in hooks:
        hook.remove()
    opt.train_step(*examples(4))
    assert calls == [(0, True), (1, True)]


def test_the_default_dtype_rounds_no_rate_of_a_head():
    runs = []
    for dtype in (torch.float32, torch.bfloat16):
        opt, (x, y) = made(Net, head=["o"]), examples(4)  # before the default moves
        torch.set_default_dtype(dtype)
        try:
            opt = ezo.ElasticZO(opt.model, head_optimizer=lambda p: torch.optim.SGD(p, lr=0.123, fused=True))
            opt.train_step(x, y)
        finally:
            torch.set_default_dtype(torch.float32)
        runs.append(bits(opt.model))
    assert same(*runs)


@pytest.mark.parametrize("bad", [None, float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_a_large_head_in_16_bits_are_looked_at(dtype, bad, monkeypatch):
    """What torch's check of CUDA takes: no bf16."""
    check = torch._amp_foreach_non_finite_check_and_unscale_

    def on_cuda(grads, found, scale):
        if any(grad.dtype == torch.bfloat16 for grad in grads):
            raise NotImplementedError("not implemented for 'BFloat16'")
        return check(grads, found, scale)

    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", on_cuda)
    model = ezo.convert_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)).to(dtype), head=["1"])
    opt, (x, y) = ezo.ElasticZO(model), examples(4)
    before, seen = bits(model), []
    if bad is not None:
        model[1].bias.register_hook(lambda grad: torch.full_like(grad, bad))
    for _ in range(2):
        seen.append(opt.train_step(x.to(dtype), y))
    assert opt.skipped.item() == (0 if bad is None else 2) and all(map(torch.isfinite, seen))
    assert same(bits(model), before) == (bad is not None)
    assert opt._bad.item() == 0
