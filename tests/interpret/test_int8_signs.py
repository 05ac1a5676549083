"""g and the count of an integer step in the interpreter: the bits of the CPU."""

from __future__ import annotations

import pytest
import torch

from ezo_kernels.ops import int8_signs


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
