"""g, the coefficients of the update and the counts of steps, made of a pass's losses in one launch."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ezo_kernels as ezo
from ezo_kernels.ops import _library
from ezo_kernels.ops.coefficients import MOST_ELEMENTS, coefficients, in_one_launch
from ezo_kernels.optim import updates
from tests.test_step import batch, bits, lenet

INF, NAN = math.inf, math.nan


def made(losses, *, queries=None, antithetic=True, clip=None, bad=None, lr=0.5, eps=0.25, **head):
    step, skipped = torch.tensor([7]), torch.tensor(3)
    queries = len(losses) // (1 + antithetic) if queries is None else queries
    bad = None if bad is None else torch.tensor([bad])
    out = coefficients(
        torch.tensor(losses), torch.tensor([lr]), torch.tensor([eps]), queries=queries, antithetic=antithetic, clip=clip,
        bad=bad, step=step, skipped=skipped, **head,
    )  # fmt: skip
    assert bad is None or not bad  # the next step finds it as this one did
    counts = (step.item(), skipped.item())
    assert counts == ((8, 3) if out.ok else (7, 4)) and out.skip.item() == (not out.ok)
    torch.testing.assert_close(out.mean, torch.tensor(losses).mean(), equal_nan=True)
    return out


def test_both_signs():
    out = made([3.0, 1.0, 2.5, 2.0])
    assert out.ok and out.g.tolist() == [4.0, 1.0]
    assert out.coef.tolist() == [0.5 * 4 / 2, 0.5 * 1 / 2]


def test_one_sign():
    out = made([3.0, 1.0, 2.0], antithetic=False)
    assert out.ok and out.g.tolist() == [6.0, -6.0, 0.0] and out.coef.tolist() == [1.0, -1.0, 0.0]


def test_clip():
    out = made([3.0, 1.0, 0.0, 2.0, 2.5, 2.0], clip=1.5)
    assert out.g.tolist() == [1.5, -1.5, 1.0] and out.coef.tolist() == pytest.approx([0.25, -0.25, 1 / 6])


@pytest.mark.parametrize("losses", [[1.0, NAN], [INF, 1.0], [1.0, -INF], [1.0, 2.0, 3.0, NAN]])
@pytest.mark.parametrize("clip", [None, 2.0])
def test_a_loss_that_is_not_finite_skips_the_step(losses, clip):
    out = made(losses, clip=clip)
    assert not out.ok and not out.coef.any()


def test_a_derivative_that_overflows_skips_the_step():
    out = made([3e38, -3e38], clip=1.0)
    assert not out.ok and not out.coef.any()


def test_a_gradient_of_the_head_that_is_not_finite_skips_the_step():
    assert made([3.0, 1.0], bad=0.0).ok
    out = made([3.0, 1.0], bad=1.0)
    assert not out.ok and not out.coef.any() and out.g.tolist() == [4.0]


def test_a_small_heads_step_is_taken_with_them():
    w, grad = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    head = {"grads": [grad], "weights": [w], "head_lr": torch.tensor(0.25)}
    assert made([3.0, 1.0], **head).ok and w.tolist() == [0.875, -2.75]
    grad[1] = INF
    for losses in ([3.0, 1.0], [3.0, NAN]):
        out = made(losses, **head)
        assert not out.ok and not out.coef.any() and w.tolist() == [0.875, -2.75]
    assert not made([3.0, 1.0], grads=[grad]).ok


def test_weights_that_do_not_fit_their_gradients_are_refused():
    for grad in (torch.ones(3), torch.ones(2).half()):
        with pytest.raises(ValueError, match="differ in shape or dtype"):
            made([3.0, 1.0], grads=[grad], weights=[torch.ones(2)], head_lr=torch.tensor(0.1))


def test_what_is_small():
    assert in_one_launch([torch.ones(4, 4)] * 4) and in_one_launch([torch.ones(MOST_ELEMENTS)])
    assert not in_one_launch([torch.ones(1)] * 5) and not in_one_launch([torch.ones(MOST_ELEMENTS), torch.ones(1)])
    for t in (torch.ones(4, 4).t()[:2], torch.ones(2).double(), torch.ones(2, 2).to_sparse()):
        assert not in_one_launch([t])


def test_without_a_trunk():
    out = made([0.5], queries=0)
    assert out.ok and out.g.numel() == out.coef.numel() == 0
    assert not made([NAN], queries=0).ok


def test_losses_of_another_number_are_refused():
    with pytest.raises(ValueError, match="2 queries have 4 losses, got 3"):
        made([1.0, 2.0, 3.0], queries=2)


class Operators(TorchDispatchMode):
    """Names of the operators of a step that are launches on a GPU: views and allocations are not."""

    FREE = (
        "view",
        "detach",
        "slice",
        "split",
        "t",
        "transpose",
        "unsqueeze",
        "expand",
        "_unsafe_view",
        "select",
        "alias",
    )
    FREE += (
        "empty",
        "new_empty",
        "empty_like",
        "_record_function_enter_new",
        "_record_function_exit",
        "squeeze",
        "unbind",
    )

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("head", "queries", "most"),
    # of a head each linear layer has its backward; the rest of its step is in the launches that there are anyway
    [(0, 1, 9), (["fc3"], 1, 10), (["fc2", "fc3"], 1, 11), (0, 16, 9), (["fc2", "fc3"], 16, 11)],
    ids=["pure", "fc3", "fc2+fc3", "16 queries", "fc2+fc3, 16 queries"],
)
def test_launches_of_a_step(monkeypatch, head, queries, most):
    """LeNet-5 is bound by launches: as many whatever the number of queries, and after the losses two for the trunk."""
    monkeypatch.setattr(_library, "bound_by_launches", lambda device: True)
    opt = ezo.ElasticZO(ezo.convert_(lenet(), head=head), lr=1e-4, queries=queries, clip=5.0)
    x, y = batch(4)
    opt.train_step(x, y)
    with Operators() as seen:
        opt.train_step(x, y)
    assert len(seen.names) <= most, seen.names
    after = seen.names[len(seen.names) - 1 - seen.names[::-1].index("coefficients") :]
    assert after[:2] == ["coefficients", "update_"]


def counted(monkeypatch) -> list:
    """A list that grows with each call of torch's SGD."""
    calls, inner = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *a: calls.append(1) or inner(self, *a))
    return calls


def run(monkeypatch, at_once, head=("fc2", "fc3"), steps=4, **options):
    """Bits of a LeNet-5 after some steps, and whether the head's optimizer was called."""
    monkeypatch.setattr(_library, "bound_by_launches", lambda device: at_once)
    opt = ezo.ElasticZO(ezo.convert_(lenet(), head=list(head)), lr=1e-3, seed=1, **options)
    calls = counted(monkeypatch)
    for i in range(steps):
        opt.train_step(*batch(9, i))
    assert opt.skipped == 0
    return bits(opt.model), bool(calls)


@pytest.mark.parametrize("options", [{}, {"mode": "sequential"}, {"queries": 3, "antithetic": False}], ids=str)
def test_its_own_sgd_is_torchs(monkeypatch, options):
    # two steps: from the third on this run's losses, which grow, differ by more than rounding
    ours, called = run(monkeypatch, True, steps=2, **options)
    theirs, asked = run(monkeypatch, False, steps=2, **options)
    assert not called and asked
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)  # g has the losses' rounding over eps


@pytest.mark.parametrize(
    "change", ["momentum", "weight_decay", "maximize", "hook", "own", "tensor lr", "group", "wrapped"]
)
def test_what_is_left_to_the_heads_optimizer(monkeypatch, change):
    monkeypatch.setattr(_library, "bound_by_launches", lambda device: True)
    own = (lambda p: torch.optim.SGD(p, lr=0.05)) if change == "own" else None
    opt = ezo.ElasticZO(ezo.convert_(lenet(), head=["fc3"]), lr=1e-3, head_optimizer=own)
    inner = opt.head_optimizer.optimizer
    if change == "hook":
        inner.register_step_post_hook(lambda *a: None)
    elif change == "group":
        inner.param_groups[0]["params"].pop()
        inner.add_param_group({"params": [opt.model.fc3.bias], "lr": 0.2})
    elif change == "tensor lr":
        inner.param_groups[0]["lr"] = torch.tensor(0.05)
    elif change not in ("own", "wrapped"):
        inner.param_groups[0][change] = 0.5
    calls = counted(monkeypatch)
    if change == "wrapped":
        step = inner.step
        inner.step = lambda: step()
    opt.train_step(*batch(9))
    assert calls


@pytest.mark.parametrize("of_head", [False, True])
def test_its_lr_follows_a_schedule(monkeypatch, of_head):
    monkeypatch.setattr(_library, "bound_by_launches", lambda device: True)
    opt = ezo.ElasticZO(ezo.convert_(lenet(), head=["fc3"]), lr=1e-3)
    whose = opt.head_optimizer.optimizer if of_head else opt
    schedule = torch.optim.lr_scheduler.LambdaLR(whose, lambda step: 0.0 if step else 1.0)
    moved, calls = [], counted(monkeypatch)
    for i in range(2):
        before = opt.model.fc3.weight.detach().clone()
        opt.train_step(*batch(9, i))
        schedule.step()
        moved.append(not torch.equal(before, opt.model.fc3.weight))
    assert moved == [True, False] and not calls


def test_a_check_that_was_not_used_is_not_left_to_the_next_step(monkeypatch):
    """An error between the check of the gradients and the launch that reads it."""
    opt = ezo.ElasticZO(ezo.convert_(lenet(), head=["fc3"]), lr=1e-3)
    x, y = batch(9)
    with monkeypatch.context() as patch:
        patch.setattr(updates, "coefficients", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            opt.train_step(x * float("inf"), y)
    opt.train_step(x, y)
    assert opt.skipped == 0 and opt.step_count == 1


def test_an_error_is_the_one_that_is_raised(monkeypatch):
    """Of a capture that failed nothing can be reset on the device; what was collected is dropped all the same."""
    opt = ezo.ElasticZO(ezo.convert_(lenet(), head=["fc3"]), lr=1e-3)

    class Lost:
        def zero_(self):
            raise RuntimeError("previous error during capture")

    monkeypatch.setattr(opt, "_bad", Lost())
    monkeypatch.setattr(opt, "_update", lambda coef: 1 / 0)
    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", lambda *a: None)
    monkeypatch.setattr(updates, "coefficients", lambda *a, **k: coefficients(*a, **{**k, "bad": None}))
    with pytest.raises(ZeroDivisionError):
        opt.train_step(*batch(9))
    assert opt._losses is None and opt._micro == 0 and all(p.grad is None for p in opt.head)
