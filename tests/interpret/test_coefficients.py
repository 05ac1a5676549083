"""g, coefficients and counts: the kernel against the CPU reference."""

from __future__ import annotations

import pytest
import torch

from ezo_kernels.ops.coefficients import Coefficients, coefficients


def run(losses, queries, antithetic, clip, bad, **head):
    step, skipped = torch.tensor([(1 << 40) + 7]), torch.tensor(3)
    bad = None if bad is None else torch.tensor([bad])
    out = coefficients(
        losses, torch.tensor([3e-4]), torch.tensor([1e-3]), queries=queries, antithetic=antithetic, clip=clip, bad=bad,
        step=step, skipped=skipped, **head,
    )  # fmt: skip
    assert bad is None or not bad
    return *out, step, skipped


@pytest.mark.parametrize("broken", [None, 0, -1])
@pytest.mark.parametrize("bad", [None, 0.0, 1.0])
@pytest.mark.parametrize("clip", [None, 5.0])
@pytest.mark.parametrize("queries", [0, 1, 2, 33])
def test_both_signs(on_cpu, queries, clip, bad, broken):
    losses = 2.3 + 0.01 * torch.randn(max(1, 2 * queries), generator=torch.Generator().manual_seed(queries))
    if broken is not None:
        losses[broken] = float("nan") if queries == 1 else float("inf")
    ours, theirs = run(losses, queries, True, clip, bad), on_cpu(run, losses, queries, True, clip, bad)
    for name, a, b in zip(Coefficients._fields + ("step", "skipped"), ours, theirs, strict=True):
        if name == "mean":  # the order of summation is the backend's own
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0, equal_nan=True)
        else:
            assert torch.equal(a.nan_to_num(nan=-7.0), b.nan_to_num(nan=-7.0)), name


@pytest.mark.parametrize("queries", [2, 3, 64, 700])
def test_one_sign(on_cpu, queries):
    losses = 2.3 + 0.01 * torch.randn(queries, generator=torch.Generator().manual_seed(queries))
    (g, coef, *ours), (g_own, coef_own, *theirs) = (
        run(losses, queries, False, 5.0, None),
        on_cpu(run, losses, queries, False, 5.0, None),
    )
    # the mean's order of summation is the backend's own
    torch.testing.assert_close(g, g_own, rtol=1e-5, atol=2e-3)
    torch.testing.assert_close(coef, coef_own, rtol=1e-5, atol=1e-6)
    ok, skip, mean, *counts = ours
    torch.testing.assert_close(mean, theirs[2], rtol=1e-6, atol=0)
    assert all(torch.equal(a, b) for a, b in zip((ok, skip, *counts), (*theirs[:2], *theirs[3:]), strict=True))


@pytest.mark.parametrize("broken", [None, 0, -1])
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shapes", [[(10, 84), (10,)], [(1,)], [(84, 120), (84,), (10, 84), (10,)], [(0,), (33, 31)]], ids=str
)
def test_a_small_heads_step(on_cpu, shapes, dtype, learns, broken):
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    if broken is not None:
        grads[broken].view(-1)[:1] = float("inf" if broken else "nan")
    start = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    losses = 2.3 + 0.01 * torch.randn(4, generator=generator)

    def both():
        weights = [w.clone() for w in start]
        head = {"grads": grads, **({"weights": weights, "head_lr": torch.tensor(0.3)} if learns else {})}
        return *run(losses, 2, True, None, None, **head), *weights

    finite = all(bool(grad.isfinite().all()) for grad in grads)
    ours, theirs = both(), on_cpu(both)
    assert ours[2] == finite
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if i == 4:  # the mean: the order of summation is the backend's own
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
        else:
            assert torch.equal(a, b), i
    moved = [not torch.equal(a, b) for a, b in zip(ours[7:], start, strict=True)]
    assert moved == [learns and finite and bool(w.numel()) for w in start]
