"""``choose_cut``: losses given as modules, and the budget that an error names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.models import MLP


def test_the_smallest_budget_that_is_named_is_enough():
    """A third of a second has no six digits."""
    model, batch = MLP(6, 4, 3), (torch.randn(8, 6), torch.randint(3, (8,)))
    times = {"time_step": lambda step: 1 / 3}
    with pytest.raises(ValueError, match="the smallest that one does is ") as refused:
        ezo.choose_cut(model, batch, time_budget=1e-6, **times)
    named = float(str(refused.value).rsplit(" ", 1)[1])
    assert ezo.choose_cut(model, batch, time_budget=named, **times).rows


@pytest.mark.parametrize(("module", "function"), [(nn.CrossEntropyLoss, F.cross_entropy), (nn.MSELoss, F.mse_loss)])
def test_a_loss_as_a_module_is_its_function(module, function):
    model, x = MLP(6, 4, 3), torch.randn(16, 6)
    y = torch.randn(16, 3) if module is nn.MSELoss else torch.randint(3, (16,))
    a, b = (ezo.choose_cut(model, (x, y), loss_fn=loss, time_step=lambda step: 0.0) for loss in (module(), function))
    assert a.signals == b.signals and [row.gain for row in a.rows] == [row.gain for row in b.rows]
    with pytest.raises(ValueError, match="curvature of this loss_fn is not known"):
        ezo.choose_cut(model, (x, y), loss_fn=module(reduction="sum"))
    with pytest.raises(ValueError, match="16 rows in x and 12 in y"):
        ezo.choose_cut(model, (x, y[:12]), loss_fn=module())
