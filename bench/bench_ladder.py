"""The ladder of generators: values a second in a kernel that does nothing else, a rung a case (``bench/ladder.py``)."""

from __future__ import annotations

import pytest

from bench import ladder
from bench.timing import devices, time_case
from ezo_kernels.ops.noise import key_tensor, z_cpu

#: Rows fill an H200's processors twice over; columns make a launch of a millisecond.
ROWS, COLUMNS = 2 * 132 * 8 * 64, 16384


@pytest.mark.parametrize("rung", [r for r in ladder.RUNGS if "cuda" in devices()], ids=lambda r: r.name)
def test_rung(benchmark, rung):
    key = key_tensor(1, 2, "cuda")
    few = ladder.make(rung, key, 64, 512, store=True).cpu()
    truth = z_cpu(few.shape, key.cpu(), ladder.SITE, 0, ladder.spec(rung), "matrix") if rung.contract else None
    ladder.check(rung, few, truth)
    time_case(
        benchmark, lambda: ladder.make(rung, key, ROWS, COLUMNS), "cuda", case="ladder", rung=rung.name,
        values=ROWS * COLUMNS,
    )  # fmt: skip
