"""Dropout masks in the interpreter: the reference's, bit for bit."""

from __future__ import annotations

import pytest
import torch

from ezo_kernels.ops.dropout import dropout_mask


@pytest.mark.parametrize(("rows", "features"), [(1, 1), (3, 7), (5, 300), (9, 256)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("rounds", [7, 10])
def test_mask_is_the_reference(rows, features, p, rounds, key, on_cpu):
    call = dict(key=key, site=(1 << 31) + 256, query=3, rounds=rounds)
    assert torch.equal(dropout_mask(rows, features, p, **call), on_cpu(dropout_mask, rows, features, p, **call))
