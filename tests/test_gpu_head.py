"""What a GPU takes for all groups at once: cross-entropy, the head's linear layers, batch norm. Marked ``gpu``."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import ezo_kernels as ezo
from ezo_kernels.ops import grouped_cross_entropy
from ezo_kernels.ops.batch_norm import batch_norm, move_running_statistics
from ezo_kernels.ops.coefficients import coefficients
from ezo_kernels.ops.cross_entropy import cross_entropy_and_gradient
from ezo_kernels.ops.grouped_linear import grouped_linear, is_for_groups
from ezo_kernels.ops.importance import importance_rows
from ezo_kernels.ops.noise import key_tensor
from ezo_kernels.optim.capture import WARM_UP
from tests.test_gpu import batch, bits, lenet, same
from tests.test_importance import by_hand
from tests.test_importance import problem as drawing
from tests.tolerance import FLOORS, assert_within_torch_error, error

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run(function, *tensors, share):
    """The outputs, and the gradients of their sum weighted by ``share``."""
    tensors = [t.clone().requires_grad_() for t in tensors]
    y = function(*tensors)
    y.backward(share.to(y.dtype).view(y.shape))
    return [y.detach(), *(t.grad for t in tensors)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("groups", "rows", "classes"), [(2, 32, 10), (16, 33, 10), (2, 128, 1000), (3, 700, 257), (2, 65, 32000), (1, 1, 1)]
)
def test_cross_entropy(groups, rows, classes, dtype):
    torch.manual_seed(0)
    logits = (3 * torch.randn(groups * rows, classes, device="cuda")).to(dtype)
    target = torch.randint(classes, (rows,), device="cuda")
    target[: rows // 3] = -100

    def apart(logits):
        return torch.stack([F.cross_entropy(part, target) for part in logits.chunk(groups)])

    share = torch.linspace(0.5, 2, groups, device="cuda")
    losses, grad = run(lambda x: grouped_cross_entropy(x, target, groups), logits, share=share)
    truth, slope = run(apart, logits.double(), share=share)
    near, _ = run(apart, logits.float(), share=share)
    _, theirs = run(apart, logits, share=share)
    assert_within_torch_error(losses, near, truth.cpu())
    # the special function unit's exp is good to 2^-22
    floor = max(FLOORS[dtype], 2.0**-20)
    assert error(grad, slope.cpu()) <= 2 * error(theirs, slope.cpu()) + floor
    for g, part in enumerate(logits.chunk(groups)):
        assert torch.equal(grouped_cross_entropy(part, target), losses[g : g + 1])
    for a, b in zip(cross_entropy_and_gradient(logits, target, share), (losses, grad), strict=True):
        assert torch.equal(a, b)


def test_a_target_that_is_no_class_makes_the_loss_nan_and_reads_nothing():
    logits, target = torch.randn(8, 5, device="cuda"), torch.tensor([0, 7, -5, 1 << 40], device="cuda")
    assert grouped_cross_entropy(logits, target, 2).isnan().all()
    model = lenet()
    before = bits(model)
    opt = ezo.ElasticZO(ezo.convert_(model, head=["fc3"]))
    x, y = batch(8)
    opt.train_step(x, y + 10)
    assert opt.skipped == 1 and same(bits(model), before)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("groups", "shape", "n"), [(2, (64, 84), 10), (16, (16 * 33, 120), 84), (3, (6, 50, 72), 130), (1, (1, 5), 3)]
)
def test_linear(groups, shape, n, dtype, bias, relu):
    torch.manual_seed(0)
    x, w, b = torch.randn(shape), torch.randn(n, shape[-1]) / shape[-1] ** 0.5, torch.randn(n)
    tensors = [t.cuda().to(dtype) for t in ((x, w, b) if bias else (x, w))]
    share = torch.linspace(-1, 1, x[..., 0].numel() * n, device="cuda")
    assert is_for_groups(tensors[0], tensors[1], tensors[2] if bias else None, groups)

    def together(x, w, b=None):
        return grouped_linear(x, w, b, groups, relu)

    def apart(x, w, b=None):
        return F.relu(F.linear(x, w, b)) if relu else F.linear(x, w, b)

    ours, same_dtype = run(together, *tensors, share=share), run(apart, *tensors, share=share)
    for a, b, exact in zip(ours, same_dtype, run(apart, *(t.double() for t in tensors), share=share), strict=True):
        assert_within_torch_error(a, b, exact.cpu())
    w, b = tensors[1], tensors[2] if bias else None
    for part, own in zip(tensors[0].chunk(groups), ours[0].chunk(groups), strict=True):
        assert torch.equal(grouped_linear(part, w, b, 1, relu), own)


@pytest.mark.parametrize("own", [True, False], ids=["own SGD", "torch's"])
@pytest.mark.parametrize("queries", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_replays_equal_eager_steps(queries, dtype, own):
    """With torch's own cross-entropy as the loss, which a step takes for all groups at once."""
    torchs = functools.partial(torch.optim.SGD, lr=0.05, fused=True)
    runs = []
    for capture in (True, False):
        model = ezo.convert_(lenet().to(dtype), head=["fc2", "fc3"])
        opt = ezo.ElasticZO(
            model, queries=queries, antithetic=queries == 1, clip=5.0, capture=capture,
            head_optimizer=None if own else torchs,
        )  # fmt: skip
        for i in range(20 + WARM_UP + 1):
            x, y = batch(32, i % 4)
            opt.train_step(x.to(dtype), y)
        runs.append((bits(model), opt.losses.clone()))
        assert opt.skipped == 0
    assert same(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("rows", [None, 9])
def test_stacked_equals_sequential_bitwise(rows):
    gs = []
    for mode in ("stacked", "sequential"):
        opt = ezo.ElasticZO(ezo.convert_(lenet(), head=["fc2", "fc3"]), queries=3, mode=mode, importance_rows=rows)
        opt.train_step(*batch(33))
        gs.append(opt.g)
    assert torch.equal(*gs)


@pytest.mark.parametrize(("rows", "classes", "count"), [(23, 5, 7), (128, 10, 16), (9, 3000, 40), (4000, 10, 4000)])
def test_rows_drawn_by_importance_are_the_contracts(rows, classes, count):
    logits, target = drawing(rows, classes)
    drawn, weight = importance_rows(logits.cuda(), target.cuda(), count, key_tensor(2, 9, device="cuda"), draw=3)
    want, weights = by_hand(logits, target, count, key_tensor(2, 9), 3)
    # an exp of another unit may differ in its last bit, and a row on a boundary be its neighbour
    assert (drawn.cpu() == torch.tensor(want)).float().mean() > 0.99
    torch.testing.assert_close(weight.cpu().sum(), torch.tensor(weights).sum(), rtol=1e-2, atol=0)


def test_steps_on_drawn_rows_replay():
    runs = []
    for capture in (True, False):
        model = ezo.convert_(lenet(), head=["fc3"])
        opt = ezo.ElasticZO(model, queries=8, antithetic=False, clip=5.0, importance_rows=16, capture=capture)
        for i in range(20 + WARM_UP + 1):
            opt.train_step(*batch(128, i % 4))
        runs.append((bits(model), opt.losses.clone()))
    assert same(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(32, 64, 28, 28), (5, 3, 7, 9), (128, 257, 1, 1)], ids=str)
def test_batch_norm(shape, layout, dtype):
    torch.manual_seed(0)
    groups, (rows, channels) = 3, shape[:2]
    x = (2 + torch.randn(groups * rows, *shape[1:], device="cuda")).to(dtype).contiguous(memory_format=layout)
    w, b = (torch.randn(groups, channels, device="cuda").to(dtype) for _ in "wb")
    y, mean, var = batch_norm(x, w, b, groups, 1e-5)
    assert y.stride() == x.stride()
    for g, part in enumerate(x.chunk(groups)):
        found = []
        for kind in (torch.float32, torch.float64):
            stats = [torch.zeros(channels, dtype=kind, device="cuda"), torch.ones(channels, dtype=kind, device="cuda")]
            found.append([F.batch_norm(part.to(kind), *stats, w[g].to(kind), b[g].to(kind), True, 1.0, 1e-5), *stats])
        for ours, near, truth in zip((y.chunk(groups)[g], mean[g], var[g]), *found, strict=True):
            floor = max(FLOORS[ours.dtype], 2.0**-21)
            assert error(ours, truth.cpu()) <= 2 * error(near.to(ours.dtype), truth.cpu()) + floor
        for ours, own in zip(batch_norm(part, w[g], b[g], 1, 1e-5), (y.chunk(groups)[g], mean[g], var[g]), strict=True):
            assert torch.equal(ours.view(own.shape), own)
    running = torch.zeros(channels, device="cuda"), torch.ones(channels, device="cuda")
    move_running_statistics(*running, mean, var, torch.tensor(False, device="cuda"), 0.1)
    assert not running[0].any() and (running[1] == 1).all()
    move_running_statistics(*running, mean, var, torch.tensor(True, device="cuda"), 0.1)
    torch.testing.assert_close(running[0], 0.1 * mean.mean(0))
    torch.testing.assert_close(running[1], 0.9 + 0.1 * var.mean(0))


@pytest.mark.parametrize("broken", [None, 0, 1], ids=["fine", "weight", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_small_heads_step_is_the_references(dtype, broken):
    torch.manual_seed(0)
    grads = [torch.randn(shape).to(dtype) for shape in ((84, 120), (84,), (10, 84), (10,))]
    if broken is not None:
        grads[broken].view(-1)[-1] = float("inf")
    start, found = [torch.randn_like(grad) for grad in grads], []
    for device in ("cuda", "cpu"):
        at = functools.partial(torch.tensor, device=device)
        weights = [w.to(device, copy=True) for w in start]
        out = coefficients(
            at([2.5, 2.25]), at([1e-3]), at([0.25]), queries=1, antithetic=True, clip=None, step=at([7]), skipped=at(3),
            grads=[grad.to(device) for grad in grads], weights=weights, head_lr=at(0.3),
        )  # fmt: skip
        found.append([out.ok.cpu(), out.coef.cpu(), *(w.cpu() for w in weights)])
    assert found[0][0] == (broken is None)
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_that_is_not_finite_skips_the_step_of_a_large_head_once(dtype):
    """Its check is a launch of torch's, and what it found is set back by the one that reads it."""
    model = torch.nn.Sequential(
        torch.nn.Linear(784, 64), torch.nn.ReLU(), torch.nn.Linear(64, 600), torch.nn.Linear(600, 10)
    )
    opt = ezo.ElasticZO(ezo.convert_(model.cuda().to(dtype), head=["2", "3"]), lr=1e-3)
    x, y = batch(8)
    x = x.flatten(1).to(dtype)
    opt.train_step(x, y)
    opt.train_step(x * float("inf"), y)
    opt.train_step(x, y)
    assert opt.skipped == 1 and opt.step_count == 2
