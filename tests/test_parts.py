"""Into how many parts K is cut where outputs are few: pure functions, and the memory that a strategy says it takes."""

from __future__ import annotations

import pytest
import torch

from ezo_kernels.ops._strategy import choose
from ezo_kernels.ops._tiles import int8_parts, int8_tile, linear_parts, linear_tile, small_parts, small_tile


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


@pytest.mark.parametrize(
    ("rows", "n", "k", "dtype", "arch", "parts"),
    [
        (32, 120, 784, torch.float32, 90, (7, 4)),  # LeNet-5's fc1: 4 programs
        (32, 84, 120, torch.float32, 90, (1, 4)),  # its fc2 and fc3: too short
        (32, 10, 84, torch.float32, 90, (1, 3)),
        (64, 4096, 4096, torch.float32, 90, (1, 128)),  # 128 programs
        (1, 1024, 1024, torch.float32, 90, (8, 4)),  # 32 programs of four warps
        (128, 4096, 4096, torch.bfloat16, 90, (4, 16)),  # 32 programs of eight warps
        (250, 4096, 4096, torch.bfloat16, 90, (2, 32)),
        (512, 4096, 4096, torch.bfloat16, 90, (1, 64)),
        (128, 1000, 512, torch.bfloat16, 80, (1, 16)),
        (128, 64, 100_000, torch.bfloat16, 90, (8, 196)),
    ],
)
def test_parts_of_k_of_the_fused_kernel(rows, n, k, dtype, arch, parts):
    tile = linear_tile(rows, n, k, dtype, "clt4", "ieee", False, arch)
    assert linear_parts(tile, rows, n, k, dtype == torch.float32, arch) == parts
    assert (parts[0] - 1) * parts[1] * tile.bk < k <= parts[0] * parts[1] * tile.bk


def test_fused_by_name_takes_no_memory():
    call = (32, (120, 784), torch.float32, torch.float32, "gaussian")
    assert choose(*call, arch=90).workspace_bytes == 4 * 7 * 2 * 32 * 120
    assert choose(*call, arch=90, signs=(-1,)).workspace_bytes == 4 * 7 * 32 * 120
    assert choose(*call, arch=90, asked="fused").workspace_bytes == 0
    assert choose(*call, arch=0).workspace_bytes == choose(*call, arch=90, signs=(0,)).workspace_bytes == 0
    stored = choose(128, (2048, 1024), torch.bfloat16, torch.bfloat16, "gaussian", arch=90, transposed=True)
    assert stored.name == "fused" and stored.workspace_bytes % (4 * 2 * 128 * 1024) == 0 < stored.workspace_bytes


def test_no_rows_have_no_parts():
    assert choose(0, (4096, 4096), torch.bfloat16, torch.bfloat16, "rademacher", arch=90).workspace_bytes == 0
