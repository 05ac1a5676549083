"""g and the count of an integer step in the interpreter: the bits of the CPU."""

from __future__ import annotations

import pytest
import torch
from test_int8 import ints, tensor

from ezo_kernels.ops import int8_cross_entropy, int8_signs, int8_squared_error


@pytest.mark.parametrize(
    ("antithetic", "queries"), [(True, 0), (True, 1), (True, 7), (True, 40), (False, 0), (False, 2), (False, 40)]
)
def test_signs(on_cpu, antithetic, queries):
    generator = torch.Generator().manual_seed(queries)
    for high in (3, (1 << 44) << 12):
        groups = queries * (1 + antithetic) or 2
        losses = torch.randint(0, high, (groups,), generator=generator)
        found = []
        for run in (lambda f, *a, **k: f(*a, **k), on_cpu):
            step = torch.tensor([5])
            g, total = run(int8_signs.int8_signs, losses, queries=queries, antithetic=antithetic, step=step)
            found.append((g.tolist(), total.item(), step.item()))
        assert found[0] == found[1] and found[0][2] == 6


@pytest.mark.parametrize(
    ("antithetic", "queries", "rows"), [(True, 1, 5), (True, 1, 300), (True, 3, 130), (False, 2, 1), (False, 33, 70)]
)
def test_the_last_program_of_a_loss_makes_them(on_cpu, antithetic, queries, rows):
    """However many programs it has, once each of them has added what it has."""
    groups = queries * (1 + antithetic)
    y = tensor(groups * rows, 9, low=-128, exponents=[-4 - g % 3 for g in range(groups)])
    labels, target = ints(rows, low=0, high=9, dtype=torch.int64), tensor(rows, 9, exponents=[-5], seed=1)
    for loss, of in ((int8_cross_entropy, labels), (int8_squared_error, target)):
        found = []
        for run in (lambda f, *a, **k: f(*a, **k), on_cpu):
            signs = int8_signs.Signs.of(y, queries, antithetic)
            losses = run(loss, y, of, signs=signs)
            found.append((losses.tolist(), signs.g.tolist(), signs.total.item()))
            alone = run(int8_signs.int8_signs, losses, queries=queries, antithetic=antithetic, step=torch.tensor([0]))
            assert (alone[0].tolist(), alone[1].item()) == found[-1][1:]
        assert found[0] == found[1]
