"""Rows drawn by importance: the contract against Python integers, and the mean that the weights keep."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ezo_kernels.ops.importance import importance_rows
from ezo_kernels.ops.noise import key_tensor, philox4x32

IGNORED = -100


def problem(rows=23, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, classes, generator=generator)
    target = torch.randint(classes, (rows,), generator=generator)
    logits[torch.arange(0, rows, 2), target[::2]] += 4  # half of them are right already
    target[3::7] = IGNORED
    return logits, target


def by_hand(logits, target, count, key, draw=0, rounds=7):
    """The contract, in Python integers."""
    error = torch.softmax(logits.float(), 1) - F.one_hot(target.clamp(min=0), logits.shape[1])
    counts = (target != IGNORED).tolist()
    q = [int(e * 65536 + 0.5) if c else 0 for e, c in zip(error.norm(dim=1).tolist(), counts, strict=True)]
    q = q if any(q) else [int(c) for c in counts]
    n, total = sum(counts), sum(q)
    mass = [9 * n * own + total if c else 0 for own, c in zip(q, counts, strict=True)]
    everything = sum(mass)
    assert everything == 10 * n * total
    word = philox4x32((0, 0, draw << 8 | 9, 0), [int(k) & 0xFFFFFFFF for k in key], rounds)[0]
    rows, weights = [], []
    for j in range(count):
        at, row, before = j * everything + (everything * word >> 32), 0, mass[0]
        while before * count <= at:
            row += 1
            before += mass[row]
        rows.append(row)
        weights.append(10 * total / mass[row])
    return rows, weights


@pytest.mark.parametrize("count", [1, 7, 23, 60])
def test_the_rows_of_the_contract(count):
    logits, target = problem()
    for draw, rounds in ((0, 7), (5, 10)):
        key = key_tensor(3, draw)
        rows, weight = importance_rows(logits, target, count, key, draw=draw, rounds=rounds)
        want, weights = by_hand(logits, target, count, key, draw, rounds)
        assert rows.tolist() == want and rows.dtype == torch.int64
        torch.testing.assert_close(weight, torch.tensor(weights))


def test_the_weighted_mean_is_the_batchs():
    """Over draws, within the error of their mean; without the weights it is a quarter larger."""
    logits, target = problem(64, 10)
    losses = F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="none")
    drawn = [importance_rows(logits, target, 8, key_tensor(0, step)) for step in range(2000)]
    means = torch.stack([(weight * losses[rows]).mean() for rows, weight in drawn]).double()
    truth = F.cross_entropy(logits, target, ignore_index=IGNORED).item()
    assert abs(means.mean().item() - truth) < 4 * means.std().item() / 2000**0.5
    assert torch.stack([losses[rows].mean() for rows, _ in drawn]).mean() > 1.2 * truth


def test_rows_that_are_all_right_or_do_not_count():
    key = key_tensor(0, 0)
    right = torch.full((6, 3), -200.0)
    target = torch.tensor([0, 1, 2, IGNORED, 1, 0])
    right[torch.arange(6), target.clamp(min=0)] = 200.0
    rows, weight = importance_rows(right, target, 5, key)
    assert sorted(rows.tolist()) == [0, 1, 2, 4, 5] and (weight == 1).all()  # as likely each
    rows, weight = importance_rows(right, torch.full((6,), IGNORED), 4, key)
    assert weight.isnan().all() and (rows >= 0).all() and (rows < 6).all()  # a step that will be skipped
    for row, found in ((1, True), (3, False)):  # a batch whose loss would be no number, and one whose would not
        bad = right.clone()
        bad[row, 0] = float("nan")
        assert bool(importance_rows(bad, target, 2, key)[1].isnan().all()) == found


def test_most_rows_fit():
    logits = torch.zeros(4096, 2)
    logits[:, 0] = -60  # every e is the root of two
    rows, weight = importance_rows(logits, torch.zeros(4096, dtype=torch.int64), 4096, key_tensor(1, 1))
    assert rows.tolist() == list(range(4096)) and (weight == 1).all()


def test_what_cannot_be_drawn_from():
    logits, target = problem()
    key = key_tensor(0, 0)
    for error, change in (
        (TypeError, {"logits": logits.double()}),
        (TypeError, {"target": target.int()}),
        (TypeError, {"key": key.long()}),
        (TypeError, {"count": 2.0}),
        (TypeError, {"target": target.tolist()}),
        (ValueError, {"count": 0}),
        (ValueError, {"count": 4097}),
        (ValueError, {"target": target[1:]}),
        (ValueError, {"target": target + 1}),
        (ValueError, {"key": key[:1]}),
        (ValueError, {"logits": logits[None]}),
        (ValueError, {"logits": torch.zeros(4097, 2), "target": torch.zeros(4097, dtype=torch.int64)}),
        (ValueError, {"draw": 1 << 24}),
    ):
        arguments = {"logits": logits, "target": target, "count": 4, "key": key, **change}
        with pytest.raises(error):
            importance_rows(**arguments)
