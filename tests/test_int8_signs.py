"""g, the summed loss and the count of an integer step: one launch with the bits of torch's operators."""

from __future__ import annotations

import gc

import pytest
import torch

import ezo_kernels as ezo
from ezo_kernels.ops import int8_cross_entropy, int8_squared_error, int8_update_
from ezo_kernels.ops.int8_signs import Signs, int8_signs, ternary_gradient
from tests.int8_models import given, same, state, tiny, tiny_batch
from tests.test_coefficients import Operators

MOST = (1 << 44) - 1


@pytest.mark.parametrize(
    ("losses", "queries", "antithetic"),
    [
        ([5, 4, 4, 5, 3, 3], 3, True),
        ([MOST << 18, 0], 1, True),
        ([3, 1, 2], 3, False),
        ([7, 7, 7, 7], 4, False),
        ([MOST << 18, 0], 2, False),
        ([MOST << 9] * 300 + [(MOST << 9) - 1] * 201, 501, False),
        ([0, 9] * 700, 700, True),
        ([11], 0, True),
        ([11, 4, 2], 0, False),
    ],
    ids=lambda v: f"{len(v)}" if isinstance(v, list) else str(v),
)
def test_is_what_operators_give(losses, queries, antithetic, device):
    losses = torch.tensor(losses, device=device)
    step = torch.tensor([41], device=device)
    g, total = int8_signs(losses, queries=queries, antithetic=antithetic, step=step)
    assert step.item() == 42 and g.dtype == torch.int32 and total.dtype == torch.int64
    assert total.item() == losses.sum().item() and total.dim() == 0
    want = ternary_gradient(losses, antithetic).tolist() if queries else []
    assert g.tolist() == want


def test_refusals():
    step = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(TypeError, match="int8_signs takes int64 losses, got torch.float32"):
        int8_signs(torch.ones(2), queries=1, antithetic=True, step=step)
    with pytest.raises(ValueError, match="2 queries have 4 losses, got 3"):
        int8_signs(torch.ones(3, dtype=torch.int64), queries=2, antithetic=True, step=step)
    for bad in (step.int(), step.float(), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(TypeError, match=r"step must be int64 \[1\]"):
            int8_signs(torch.ones(2, dtype=torch.int64), queries=1, antithetic=True, step=bad)
        with pytest.raises(TypeError, match=r"int8_update_: step must be int64 \[1\]"):
            int8_update_([], torch.zeros(2).int(), torch.ones(1).int(), torch.zeros(1).int(), sites=[], step=bad)
    int8_update_([], torch.zeros(2).int(), torch.ones(1).int(), torch.zeros(1).int(), sites=[], step=step)
    assert step.item() == 1  # of no parameters, too
    most = torch.tensor([2**63 - 1, 3])
    assert int8_signs(most, queries=1, antithetic=True, step=step)[1] == most.sum()  # both wrap
    y, labels = given(4, 1, 3), torch.zeros(1, dtype=torch.int64)
    for queries, antithetic, groups in ((1, True, 2), (2, False, 2), (0, True, 0)):
        signs = Signs.of(y, queries, antithetic)
        with pytest.raises(ValueError, match=f"signs of {groups} groups, at most 1024, do not fit 4 losses"):
            int8_cross_entropy(y, labels, signs=signs)


@pytest.mark.parametrize(("queries", "antithetic"), [(1, True), (3, True), (4, False)])
def test_the_losses_launch_makes_the_same(queries, antithetic, device):
    y = given(queries * (1 + antithetic), 40, 6, device=device)
    labels, target = torch.arange(40, device=device) % 6, given(1, 40, 6, seed=1, device=device)
    for loss, of in ((int8_cross_entropy, labels), (int8_squared_error, target)):
        signs = Signs.of(y, queries, antithetic)
        losses = loss(y, of, signs=signs)
        assert torch.equal(losses, loss(y, of))
        step = torch.zeros(1, dtype=torch.int64, device=device)
        g, total = int8_signs(losses, queries=queries, antithetic=antithetic, step=step)
        assert signs.g.tolist() == g.tolist() and signs.total == total


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_a_head_that_raises_leaves_the_step_uncounted(monkeypatch, mode):
    """g is made with the losses, and what comes after them may raise: nothing has changed then, the count of steps neither."""
    opt = ezo.ElasticZOInt8(tiny(("fc2",)), mode=mode, bits=3, r_max=40)
    opt.train_step(*tiny_batch(0))
    before = state(opt.model), opt.g.tolist(), opt.step_count.item()
    with monkeypatch.context() as patch:
        patch.setattr("ezo_kernels.nn.tape.MOST_TERMS", 1)
        with pytest.raises(ValueError, match="its gradient sums"):
            opt.train_step(*tiny_batch(1))
    assert same(state(opt.model), before[0]) and (opt.g.tolist(), opt.step_count.item()) == before[1:]
    opt.train_step(*tiny_batch(1))
    assert opt.step_count.item() == 2


def test_losses_that_are_kept_do_not_change_with_the_next_step():
    """All zeros of a pass are made at once, and each pass has its own."""
    opt = ezo.ElasticZOInt8(tiny(), bits=3, r_max=40)
    kept, totals = [], []
    for i in range(3):
        totals.append(opt.train_step(*tiny_batch(i)))
        kept.append((opt.losses, opt.losses.tolist(), opt.g, opt.g.tolist()))
    assert all(losses.tolist() == seen and g.tolist() == found for losses, seen, g, found in kept)
    assert [t.item() for t in totals] == [sum(seen) for _, seen, _, _ in kept] and len({str(k[1]) for k in kept}) == 3


def test_zeros_of_a_pass_are_made_with_the_key():
    """However many layers: peaks, the sums of the loss, and who has arrived."""
    made, zeros = [], torch.zeros
    opt = ezo.ElasticZOInt8(tiny(), strategy="buffer")
    opt.train_step(*tiny_batch(0))

    def counting(*args, **kwargs):
        made.append(args)
        return zeros(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros", counting)
        opt.train_step(*tiny_batch(1))
    assert not made, "the launch that makes the key clears them"
    assert {t.data_ptr() % 16 for t in (opt.losses, opt.g)} == {0}  # as kernels are compiled for


@pytest.mark.parametrize("head_grad", ["plus", "minus"])
def test_sequential_passes_leave_nothing_behind(head_grad):
    """Of a pass that the head does not learn from, the notes for its backward would hold the arena until gc came by."""
    opt = ezo.ElasticZOInt8(tiny(("fc2",)), mode="sequential", head_grad=head_grad)
    gc.collect()
    gc.disable()
    try:
        buffers = set()
        for i in range(4):
            opt.train_step(*tiny_batch(i))
            buffers.add(opt.arena.buffer.data_ptr())
    finally:
        gc.enable()
    assert len(buffers) == 1


@pytest.mark.parametrize(("strategy", "launches"), [("twice", 8), ("buffer", 12)])
def test_launches_of_a_step(strategy, launches):
    """LeNet-5 is bound by them. With ``twice`` each product is two launches on a GPU, with ``buffer`` a linear layer is one."""
    opt = ezo.ElasticZOInt8(ezo.convert_(ezo.models.LeNet5(), head=0, precision="int8"), strategy=strategy)
    x, y = ezo.quantize(torch.rand(4, 1, 28, 28)), torch.arange(4)
    opt.train_step(x, y)
    with Operators() as seen:
        opt.train_step(x, y)
    on_a_gpu = [
        name for name in seen.names if name != "_local_scalar_dense"
    ]  # looking at the exponent costs no wait here
    assert len(on_a_gpu) == launches, on_a_gpu
