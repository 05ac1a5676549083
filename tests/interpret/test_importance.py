"""Rows drawn by importance: the kernels against the CPU reference, and against the contract in Python integers."""

from __future__ import annotations

import pytest
import torch

from ezo_kernels.ops import _importance_triton as T
from ezo_kernels.ops.importance import importance_rows
from ezo_kernels.ops.noise import key_tensor
from tests.test_importance import IGNORED, by_hand, problem


@pytest.mark.parametrize(("rows", "classes", "count"), [(23, 5, 7), (130, 10, 16), (1, 1, 1), (9, 3000, 40)])
def test_the_rows_of_the_contract(on_cpu, rows, classes, count):
    logits, target = problem(rows, classes)
    key = key_tensor(2, 9)
    drawn, weight = importance_rows(logits, target, count, key, draw=3, rounds=10)
    want, weights = by_hand(logits, target, count, key, 3, 10)
    # an exp of another unit may differ in its last bit, and a fraction by one
    assert drawn.tolist() == want == on_cpu(importance_rows, logits, target, count, key, draw=3, rounds=10)[0].tolist()
    torch.testing.assert_close(weight, torch.tensor(weights), rtol=1e-4, atol=0)


def test_many_programs_of_few_rows(monkeypatch):
    monkeypatch.setattr(T, "_PAIRS", 64)
    logits, target = problem(40)
    drawn, _ = importance_rows(logits.half(), target, 9, key_tensor(2, 9))
    assert drawn.tolist() == by_hand(logits.half(), target, 9, key_tensor(2, 9))[0]


def test_rows_that_do_not_count_and_classes_that_are_none():
    logits, target = problem(6)
    key = key_tensor(0, 0)
    rows, weight = importance_rows(logits, torch.full_like(target, IGNORED), 5, key)
    assert weight.isnan().all() and (rows == 5).all()
    target = torch.zeros(6, dtype=torch.int64)
    logits[:] = torch.tensor([90.0, 0, 0, 0, 0])
    rows, weight = importance_rows(logits, target, 6, key)
    assert rows.tolist() == list(range(6)) and (weight == 1).all()
    for wrong in (7, -1):
        target[4] = wrong
        assert importance_rows(logits, target, 2, key)[1].isnan().all()
