"""What a first step refuses of a forward, a plan and a choice of a cut refuse, too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.planning import memory_plan


class Drawn(nn.Module):
    """Attention, whose dropout is a function, and a buffer that may be counted."""

    def __init__(self, dropout: float, counts: bool) -> None:
        super().__init__()
        self.t, self.o = nn.TransformerEncoderLayer(8, 2, 8, dropout, batch_first=True), nn.Linear(8, 3)
        self.counts = counts
        self.register_buffer("n", torch.zeros(1))

    def forward(self, x):
        if self.counts:
            self.n += 1
        return self.o(self.t(x).mean(1))


@pytest.mark.parametrize(("dropout", "counts"), [(0.1, False), (0.0, True), (0.0, False)])
def test_cuts_that_a_first_step_refuses_are_left_out_and_named(dropout, counts):
    torch.manual_seed(0)
    model, sample = Drawn(dropout, counts), (torch.randn(4, 5, 8), torch.arange(4) % 3)
    plan = memory_plan(model, sample)
    refused = dropout > 0 or counts
    assert [cut.layers for cut in plan.cuts] == ([4] if refused else [0, 1, 2, 3, 4])
    for head, why in plan.refused:
        assert ("random in a way that would differ" in why) == (dropout > 0) and ("forward: 'n'" in why) == counts
        with pytest.raises(ValueError, match="cannot take a zeroth-order step"):
            ezo.ElasticZO(ezo.convert_(copy.deepcopy(model), head=list(head))).train_step(*sample)
    if refused:
        assert ezo.choose_cut(model, sample).head == "all"
    assert memory_plan(model.eval(), sample).cuts[0].layers == (4 if counts else 0)
