"""The rungs of the ladder of generators make what they say; that of bf16 products is for a GPU: the interpreter's are wrong."""

from __future__ import annotations

import pytest
import torch

from bench import ladder
from ezo_kernels.ops.noise import key_tensor, z_cpu


@pytest.mark.parametrize("rung", [r for r in ladder.RUNGS if r.transform != "bf16"], ids=lambda r: r.name)
def test_rungs(rung):
    key = key_tensor(1, 2, "cpu")
    z = ladder.make(rung, key, 128, 192, store=True)
    truth = z_cpu(z.shape, key, ladder.SITE, 0, ladder.spec(rung), "matrix") if rung.contract else None
    ladder.check(rung, z, truth)
    if rung.noise:
        torch.testing.assert_close(ladder.make(rung, key, 128, 192), z.sum(1), rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="100"):
        ladder.make(rung, key, 128, 100)
