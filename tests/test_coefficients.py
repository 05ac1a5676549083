"""g, the coefficients of the update and the counts of steps, made of a pass's losses in one launch."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ezo_kernels as ezo
from ezo_kernels.ops import _library
from ezo_kernels.ops.coefficients import coefficients
from tests.test_step import batch, lenet

INF, NAN = math.inf, math.nan


def made(losses, *, queries=None, antithetic=True, clip=None, bad=None, lr=0.5, eps=0.25):
    step, skipped = torch.tensor([7]), torch.tensor(3)
    queries = len(losses) // (1 + antithetic) if queries is None else queries
    out = coefficients(
        torch.tensor(losses), torch.tensor([lr]), torch.tensor([eps]), queries=queries, antithetic=antithetic, clip=clip,
        bad=None if bad is None else torch.tensor([bad]), step=step, skipped=skipped,
    )  # fmt: skip
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
    # zeros for the check of gradients, where of each of the head's parameters, and its optimizer are launches of the head
    [(0, 1, 10), (["fc3"], 1, 20), (["fc2", "fc3"], 1, 29), (0, 16, 10), (["fc2", "fc3"], 16, 29)],
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
