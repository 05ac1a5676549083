"""The paper's tally of a model that is not the same at each forward; its numbers are in tests/test_method.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.planning.tally import paper_tally


class Skips(nn.Module):
    """A layer that later forwards leave out, as LayerDrop does by chance."""

    calls = itertools.count()

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.c(x if next(Skips.calls) else torch.relu(self.b(x)))


@pytest.mark.parametrize("plan", [paper_tally, ezo.memory_plan])
def test_layers_left_out_by_chance_are_named(monkeypatch, plan):
    monkeypatch.setattr(Skips, "calls", itertools.count())
    with pytest.raises(ValueError, match="the forward ran 'b' once and not the next time"):
        plan(Skips(), torch.randn(4, 8))
