"""The embedding kernel against the CPU operator, bit for bit where the noise is."""

from __future__ import annotations

import pytest
import torch

from ezo_kernels.ops import Noise, Perturbation, perturbed_embedding

EPS = 0.25


def table(rows, width, dtype=torch.float32):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)


def draw(*shape, below=50, dtype=torch.int64):
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def pass_of(key, noise="clt4", **kwargs):
    noise = noise if isinstance(noise, Noise) else Noise(noise)
    return Perturbation(key, torch.tensor([EPS]), noise, **kwargs)


def compare(on_cpu, ids, w, p, atol=0.0, **kwargs):
    ours = perturbed_embedding(ids, w, p, site=0xFFFFFFF0, **kwargs)
    theirs = on_cpu(perturbed_embedding, ids, w, p, site=0xFFFFFFF0, **kwargs)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("width", [1, 37, 130])
def test_noises(key, noise, on_cpu, poisoned_empty, width):
    compare(on_cpu, draw(4, 5), table(50, width), pass_of(key, noise[0]), atol=noise[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("same", [False, True])
def test_stacked_groups_with_equal_and_other_ids(key, on_cpu, poisoned_empty, same, dtype):
    ids = draw(4 * 20)
    if same:  # in the first tile of both queries; the second one differs
        ids[20:36], ids[60:76] = ids[:16], ids[40:56]
    compare(on_cpu, ids, table(50, 20, dtype), pass_of(key, queries=2, query=300))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("queries", "signs"), [(2, (1, -1)), (2, (1,)), (1, (-1,)), (2, (0,))])
def test_groups_of_a_pass(key, on_cpu, queries, signs, shared):
    p = pass_of(key, queries=queries, signs=signs)
    ids = draw(3 if shared else 3 * p.groups, 7, dtype=torch.int32)
    compare(on_cpu, ids, table(50, 20), p, shared=shared)


def test_strides(key, on_cpu):
    compare(on_cpu, draw(8, 9)[::2, ::3], table(100, 40)[::2, ::2], pass_of(key))
    compare(on_cpu, draw(4, 3, below=20), table(20, 50).t().contiguous().t(), pass_of(key))


def test_only_ids_outside_the_table_are_poisoned(key, on_cpu):
    ids = draw(2, 20)
    y = on_cpu(perturbed_embedding, ids, table(50, 20), pass_of(key), site=0xFFFFFFF0)
    ids[0, 3], ids[1, 7] = -1, 50
    bad = torch.zeros(2, 20, dtype=torch.bool)
    bad[0, 3] = bad[1, 7] = True
    ours = perturbed_embedding(ids, table(50, 20), pass_of(key), site=0xFFFFFFF0)
    assert bool(ours[bad].isnan().all()) and torch.equal(ours[~bad], y[~bad])


def test_eps_zero_gives_equal_signs(key):
    p = Perturbation(key, torch.zeros(1), Noise())
    plus, minus = perturbed_embedding(draw(5, 4), table(50, 20), p, site=1, shared=True).chunk(2)
    assert torch.equal(plus, minus)
