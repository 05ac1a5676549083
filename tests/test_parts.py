"""Into how many parts K is cut where outputs are few: pure functions, and the memory that a strategy says it takes."""

from __future__ import annotations

import pytest
import torch

from ezo_kernels.ops._strategy import choose
from ezo_kernels.ops._tiles import int8_parts, int8_tile, small_parts, small_tile


@pytest.mark.parametrize(
    ("rows", "n", "k", "arch", "parts"),
    [
        (64, 4096, 4096, 90, (4, 16)),  # 64 programs of 64 outputs, two a multiprocessor
        (1, 4096, 4096, 90, (4, 16)),
        (16, 8192, 8192, 90, (2, 64)),
        (16, 16384, 4096, 90, (1, 64)),  # enough programs
        (32, 120, 784, 90, (1, 13)),  # too short to cut
        (16, 1024, 1024, 90, (4, 4)),
        (16, 64, 100_000, 90, (8, 196)),  # no more than eight
        (16, 4096, 4096, 80, (3, 22)),
        (16, 4096, 4096, 86, (2, 32)),
        (16, 4096, 4096, 120, (5, 13)),
        (16, 4096, 1408, 120, (5, 5)),  # 22 steps, of which the last part has two
        (16, 1024, 1200, 120, (4, 5)),  # 19 steps by four
        (16, 2048, 2624, 100, (7, 6)),  # eight parts of 41 steps would leave the last one none
    ],
)
def test_parts_of_k(rows, n, k, arch, parts):
    tile = small_tile(rows, torch.bfloat16, "clt4", True, arch)
    assert small_parts(tile, rows, n, k, arch) == parts
    assert (parts[0] - 1) * parts[1] * tile.bk < k <= parts[0] * parts[1] * tile.bk  # none is empty


def test_parts_of_one_group_and_memory_of_a_query():
    """Of one group's rows alone; both signs of a query are kept in each part, in fp32."""
    of_pair = choose(16, (4096, 4096), torch.bfloat16, torch.bfloat16, "rademacher", arch=90)
    assert of_pair.name == "two_products" and of_pair.workspace_bytes == 4 * 4 * 2 * 16 * 4096
    one = choose(16, (4096, 4096), torch.bfloat16, torch.bfloat16, "rademacher", arch=90, signs=(1,))
    assert one.workspace_bytes * 2 == of_pair.workspace_bytes
    wide = choose(16, (32768, 4096), torch.bfloat16, torch.bfloat16, "rademacher", arch=90)
    assert wide.name == "two_products" and wide.workspace_bytes == 0


@pytest.mark.parametrize(
    ("rows", "n", "k", "repeats", "arch", "parts"),
    [
        (16, 4096, 4096, 1, 90, (2, 16)),  # 128 programs of four warps
        (64, 4096, 4096, 1, 90, (2, 16)),
        (16, 4096, 4096, 2, 90, (1, 32)),
        (16, 8192, 8192, 1, 90, (1, 64)),  # 128 of eight
        (1, 1024, 4096, 1, 90, (8, 4)),
        (1, 64, 4096, 9000, 90, (1, 32)),
        (1, 64, (1 << 31) - 200, 1, 90, (1, (1 << 24) - 1)),
        (32, 120, 784, 1, 90, (1, 7)),
        (2048, 4096, 4096, 1, 90, (1, 64)),
        (16, 4096, 4096, 1, 80, (1, 32)),
    ],
)
def test_parts_of_k_of_integers(rows, n, k, repeats, arch, parts):
    """And queries, for integers add up alike in any parts."""
    assert int8_parts(int8_tile(rows, n, k, True, arch), rows, n, k, repeats, arch) == parts


def test_no_rows_have_no_parts():
    assert choose(0, (4096, 4096), torch.bfloat16, torch.bfloat16, "rademacher", arch=90).workspace_bytes == 0
