"""Batch norm of every group: the kernels against torch's own of each group, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ezo_kernels.ops import _batch_norm_triton as T
from ezo_kernels.ops import _int8_triton
from ezo_kernels.ops.batch_norm import batch_norm, move_running_statistics
from tests.tolerance import FLOORS, assert_bitwise_equal, error

LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def problem(groups, shape, dtype=torch.float32, shift=3.0, of_group=True):
    generator = torch.Generator().manual_seed(len(shape))
    x = (shift + 2 * torch.randn(groups * shape[0], *shape[1:], generator=generator)).to(dtype)
    affine = [torch.randn(groups, shape[1], generator=generator).to(dtype) for _ in "wb"]
    return x, *(affine if of_group else [t[0] for t in affine])


def by_torch(x, w, b, groups, eps, dtype):
    """y, mean and unbiased var of each group, in ``dtype``."""
    ys, means, variances = [], [], []
    for g, part in enumerate(x.to(dtype).chunk(groups)):
        own = [None if t is None else (t if t.dim() == 1 else t[g]).to(dtype) for t in (w, b)]
        mean, var = torch.zeros(x.shape[1], dtype=dtype), torch.ones(x.shape[1], dtype=dtype)
        ys.append(F.batch_norm(part, mean, var, *own, True, 1.0, eps))
        means.append(mean)
        variances.append(var)
    return torch.cat(ys), torch.stack(means), torch.stack(variances)


def assert_right(x, w, b, groups, eps=1e-5, least=2.0**-22):
    ours = batch_norm(x, w, b, groups, eps)
    near, truth = by_torch(x, w, b, groups, eps, torch.float32), by_torch(x, w, b, groups, eps, torch.float64)
    for mine, torchs, exact in zip(ours, near, truth, strict=True):
        # torch's statistics on a CPU are summed in fp64
        floor = max(FLOORS[mine.dtype], least)
        assert error(mine, exact) <= 2 * error(torchs.to(mine.dtype), exact) + floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("groups", "shape"),
    [
        (1, (2, 1)),
        (2, (33, 10)),
        (3, (5, 7, 11)),
        (2, (3, 6, 9, 9)),
        (4, (2, 70, 1, 1)),
        (2, (2, 5, 3, 4, 5)),
        (2, (9, 3, 200)),
    ],
    ids=str,
)
def test_shapes(groups, shape, dtype):
    assert_right(*problem(groups, shape, dtype), groups)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_formats(layout):
    x, w, b = problem(2, (3, 6, 5, 7))
    x = x.contiguous(memory_format=LAYOUTS[layout])
    assert_right(x, w, b, 2)
    assert batch_norm(x, w, b, 2, 1e-5)[0].stride() == x.stride()
    for view in (x[:, :, ::2, 1:], x[:, 1:4], x[..., 2:3], x.transpose(2, 3)):
        assert_right(view, w[:, : view.shape[1]], b[:, : view.shape[1]], 2, eps=0.5)


def test_without_an_affine_or_with_one_for_all_groups():
    x, w, b = problem(2, (4, 5, 6), of_group=False)
    for own in ((w, b), (w, None), (None, b), (None, None)):
        assert_right(x, *own, 2)


@pytest.mark.parametrize("side_by_side", [False, True])
def test_values_far_from_zero_in_many_parts(monkeypatch, side_by_side):
    """A sum of squares less the square of the sum would have no digit left; the mean's last bit is 6e-5 of a deviation."""
    monkeypatch.setattr(T, "_BLOCK", 64)
    x, w, b = problem(2, (400, 3) if side_by_side else (40, 3, 9), shift=3000.0)
    values = x.numel() // 6
    c, m, span = T.batch_norm_tile(values, 3, side_by_side)
    assert values > span >= m and c >= 3
    assert_right(x, w, b, 2, least=6e-5)


def test_as_many_values_as_there_are(monkeypatch):
    """Axes of a grid but the first end at 65535 programs: at a thousand images of 32 by 32 with channels last."""
    monkeypatch.setattr(T, "_BLOCK", 64)
    monkeypatch.setattr(_int8_triton, "MOST_PROGRAMS", 40)
    x, w, b = problem(2, (80, 5, 3, 3))
    assert 720 / T.batch_norm_tile(720, 5, True)[1] > 40 and 720 / T.batch_norm_tile(720, 5, False)[1] > 40
    assert_right(x.contiguous(memory_format=torch.channels_last), w, b, 2)
    assert_right(x, w, b, 2)


def test_a_group_has_the_bits_of_its_own():
    x, w, b = problem(4, (9, 20, 30))
    y, mean, var = batch_norm(x, w, b, 4, 1e-5)
    for g, part in enumerate(x.chunk(4)):
        alone = batch_norm(part, w[g], b[g], 1, 1e-5)
        for ours, own in zip((y.chunk(4)[g], mean[g : g + 1], var[g : g + 1]), alone, strict=True):
            assert_bitwise_equal(ours, own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("ok", [True, False])
def test_running_statistics(on_cpu, ok, dtype):
    generator = torch.Generator().manual_seed(0)
    mean, var = torch.randn(3, 300, generator=generator), torch.rand(3, 300, generator=generator)
    ours, theirs = ([torch.zeros(300, dtype=dtype), torch.ones(300, dtype=dtype)] for _ in "ab")
    move_running_statistics(*ours, mean, var, torch.tensor(ok), 0.1)
    on_cpu(move_running_statistics, *theirs, mean, var, torch.tensor(ok), 0.1)
    for a, b, before in zip(ours, theirs, (0.0, 1.0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=1e-6)
        assert bool((a == before).all()) != ok


def test_one_value_has_no_variance():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm(torch.ones(2, 3), None, None, 2, 1e-5)
