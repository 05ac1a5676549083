"""What a module that runs once a group gives as one tensor, and how much is held meanwhile."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.nn.grouped import _filled
from ezo_kernels.planning import memory_plan
from tests.tolerance import assert_bitwise_equal

ROWS, CHANNELS, POINTS = 4, 32, 64


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "parts",
    [
        [randn(2, 3, seed=i) for i in range(3)],
        [randn(2, 3, 4, 5, seed=i).contiguous(memory_format=torch.channels_last) for i in range(2)],
        [randn(2, 3, 4, 5, 2, seed=i).contiguous(memory_format=torch.channels_last_3d) for i in range(2)],
        [randn(4, 3, seed=i).t() for i in range(2)],
        [randn(2, 3), randn(2, 3, seed=1), randn(5, 3, seed=2), randn(2, 3, seed=3)],  # groups of other sizes
        [randn(2, 3), randn(2, 3, seed=1).double()],
        [randn(2, 3), randn(2, 3, seed=1).requires_grad_()],
        [randn(0, 3), randn(0, 3)],
    ],
    ids=["rows", "channels_last", "channels_last_3d", "transposed", "sizes", "dtypes", "grad", "empty"],
)
def test_it_is_what_cat_gives(parts):
    want, rest = torch.cat(parts), iter(parts[1:])
    got = _filled(len(parts), [parts[0]], rest)
    assert_bitwise_equal(got.detach(), want.detach())
    assert got.stride() == want.stride() and got.requires_grad == want.requires_grad and next(rest, None) is None


def test_batch_norm_holds_one_groups_output_beside_the_whole():
    """Input and output of both groups, and one group's output: with torch.cat it was twice that."""
    model = nn.Sequential(
        nn.Conv1d(3, CHANNELS, 1), nn.BatchNorm1d(CHANNELS), nn.Flatten(), nn.Linear(CHANNELS * POINTS, 2)
    )
    sample = torch.randn(ROWS, 3, POINTS), torch.arange(ROWS) % 2
    plan = ezo.memory_plan(model, sample)
    of_a_group = 4 * ROWS * CHANNELS * POINTS
    cut = next(cut for cut in plan.cuts if cut.layers == 1)
    peak = cut.bytes["stacked", "sgd"]
    held = (peak.activations + peak.workspace) / of_a_group
    assert 5 <= held < 5.5, held


def test_a_batch_norm_with_a_cumulative_average_is_planned():
    """torch's own asks the host for the number of batches, which a fake tensor cannot answer."""

    def made(momentum):
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(4, momentum=momentum)
        return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))

    batch = torch.randn(4, 1, 8, 8), torch.randint(3, (4,))
    model = made(None)
    assert str(memory_plan(model, batch)) == str(memory_plan(made(0.1), batch))
    assert model[1].momentum is None
