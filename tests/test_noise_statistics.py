"""z looks random where it should, and the checks that say so reject the bad generators that peers have shipped.

Seeds are fixed: these tests pass or fail for good. The threshold is corrected for all p-values together.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.noise_statistics import (
    THRESHOLD,
    failures,
    good,
    law,
    moments,
    neighbours,
    shape,
    suite,
    tails,
    within,
    zeros,
)

NOISES = ["gaussian", "clt4", "uniform", "hadamard", "rademacher"]


@pytest.mark.parametrize("rounds", [7, 10])
@pytest.mark.parametrize("noise", NOISES)
def test_noise_passes_every_check(noise, rounds):
    # squares inside a hadamard segment correlate by -0.02: docs/rng.md says so
    least = suite(good(noise, rounds=rounds), noise, magnitudes=noise != "hadamard")
    assert not failures(least), least


@pytest.mark.parametrize("noise", NOISES)
def test_variance_is_one(noise):
    assert law(noise).moments[1] == pytest.approx(1, abs=2e-4 if noise == "clt4" else 1e-6)


def test_kurtosis_is_as_documented():
    assert law("clt4").moments[3] == pytest.approx(3, abs=1e-3)
    assert law("hadamard").moments[3] == pytest.approx(2.9625, abs=1e-3)


@pytest.mark.parametrize("p_zero", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("noise", ["sparse", "sparse_int8"])
def test_sparse_noises(noise, p_zero):
    p = []
    for seed in range(8):
        z = good(noise, p_zero=p_zero)(128, 1024, seed=seed, site=seed)
        exact = round(65536 * p_zero) / 65536
        if noise == "sparse":
            p += [*zeros(z, exact), *moments(z[z != 0] * math.sqrt(1 - exact), law("sparse"))]
            p += [*shape(z[z != 0] * math.sqrt(1 - exact), law("sparse")), *within(z, True)]
        else:  # a kept value may be zero too
            at_zero = law(noise).weights[law(noise).values == 0].item()
            p += [*zeros(z, exact + (1 - exact) * at_zero), *within(z, True)]
            whole = good(noise)(128, 1024, seed=seed, site=seed)
            p += [*shape(whole, law(noise)), *moments(whole, law(noise))]
            assert np.abs(whole).max() == 15
    assert min(p) > THRESHOLD


@pytest.mark.parametrize("noise", ["sparse", "sparse_int8"])
def test_mask_is_independent_of_the_neighbours(noise):
    assert neighbours(good(noise, p_zero=0.5)).min() > THRESHOLD


def test_gaussian_tails_beyond_five_sigma():
    p = tails(good("gaussian"))
    assert p.min() > THRESHOLD, p


def test_hadamard_is_uncorrelated_inside_a_segment():
    """E[z z'] = I: the 32 columns that share their bytes are as uncorrelated as any."""
    z = good("hadamard")(1 << 15, 32, seed=9)
    score = (z.T @ z / math.sqrt(len(z)))[np.triu_indices(32, 1)]
    assert np.abs(score).max() < 5.2, score  # 496 pairs at 1e-4
    assert np.abs(np.square(z).mean(axis=0) - 1).max() < 5.2 * math.sqrt(2 / len(z))


# ---- planted bad generators: each must fail the check that is there for it

N01 = good("gaussian")


def _normals(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape)


def same_in_every_layer(rows, columns, *, seed=1, step=0, site=0, query=0):
    return N01(rows, columns, seed=seed, step=step, query=query)


def same_magnitudes_in_every_layer(rows, columns, *, seed=1, step=0, site=0, query=0):
    sign = np.sign(N01(rows, columns, seed=seed, step=step, site=site, query=query))
    return np.abs(N01(rows, columns, seed=seed, step=step, query=query)) * sign


def sequential_seeds_overlap(rows, columns, *, seed=1, step=0, site=0, query=0):
    """A flat stream read from an offset that the seed moves by less than what is drawn."""
    flat = N01(1, rows * columns + 100 * (seed % 64), step=step, site=site, query=query)[0]
    return flat[100 * (seed % 64) :].reshape(rows, columns)


def next_step_is_shifted_by_a_block(rows, columns, *, seed=1, step=0, site=0, query=0):
    return N01(rows, columns + 4 * (step % 8), seed=seed, site=site, query=query)[:, 4 * (step % 8) :]


def next_query_is_the_negative(rows, columns, *, seed=1, step=0, site=0, query=0):
    return N01(rows, columns, seed=seed, step=step, site=site) * (-1) ** query


def seed_is_cut_to_32_bits(rows, columns, *, seed=1, step=0, site=0, query=0):
    return N01(rows, columns, seed=seed % 2**32, step=step, site=site, query=query)


def seed_plus_step(rows, columns, *, seed=1, step=0, site=0, query=0):
    return N01(rows, columns, seed=seed + step, site=site, query=query)


def scaled_by_the_root(rows, columns, **at):
    """std sqrt(h) where h = 1/2 was meant."""
    return N01(rows, columns, **at) * math.sqrt(0.5)


def drawn_as_one_tensor(rows, columns, *, seed=1, step=0, site=0, query=0):
    """Flat counter: rows move with the width, so that a row-wise draw gives other values."""
    return N01(1, rows * columns, seed=seed, step=step, site=site, query=query).reshape(rows, columns)


def every_row_the_same_sign(rows, columns, **at):
    z = N01(rows, columns, **at)
    return np.abs(z) * np.sign(z[:, :1])


def row_and_column_swapped_words_repeat(rows, columns, **at):
    z = N01(rows, columns, **at)
    z[:, columns // 2 :] = z[:, : columns - columns // 2]
    return z


def every_row_the_same(rows, columns, **at):
    return np.tile(N01(1, columns, **at), (rows, 1))


def block_of_rows_repeats(rows, columns, **at):
    return np.concatenate([N01(16, columns, **at)] * (rows // 16 + 1))[:rows]


def uniform_for_normal(rows, columns, **at):
    return good("uniform")(rows, columns, **at)


def constant_shift(rows, columns, **at):
    return N01(rows, columns, **at) + 0.03


def skewed(rows, columns, **at):
    z = N01(rows, columns, **at)
    return (z + 0.02 * (z * z - 1)) / math.sqrt(1 + 2 * 0.02**2)


@pytest.mark.parametrize(
    ("bad", "check"),
    [
        (same_in_every_layer, "neighbours"),
        (same_magnitudes_in_every_layer, "neighbours"),
        (sequential_seeds_overlap, "neighbours"),
        (next_step_is_shifted_by_a_block, "neighbours"),
        (next_query_is_the_negative, "neighbours"),
        (seed_is_cut_to_32_bits, "neighbours"),
        (seed_plus_step, "neighbours"),
        (scaled_by_the_root, "moments"),
        (scaled_by_the_root, "shape"),
        (drawn_as_one_tensor, "corner"),
        (every_row_the_same_sign, "within"),
        (row_and_column_swapped_words_repeat, "within"),
        (every_row_the_same, "within"),
        (block_of_rows_repeats, "within"),
        (uniform_for_normal, "shape"),
        (uniform_for_normal, "moments"),
        (constant_shift, "seeds"),
        (skewed, "moments"),
    ],
)
def test_planted_bad_generators_fail(bad, check):
    least = suite(bad, "gaussian", seeds=range(6))
    assert check in failures(least), least


def test_normal_thresholded_against_the_mask_ratio_fails():
    """A peer's mask: 0.9 zeroes 81.6% and 0.1 zeroes 54%."""
    for p_zero in (0.1, 0.9):
        z = N01(128, 1024)
        z[N01(128, 1024, query=1) < p_zero] = 0
        assert zeros(z, p_zero).min() < THRESHOLD
        assert abs((z == 0).mean() - {0.1: 0.54, 0.9: 0.816}[p_zero]) < 0.01


def test_clipped_and_heavy_tails_fail():
    clipped = good("clt4")  # never beyond 4.04
    assert tails(clipped).min() < THRESHOLD
    assert tails(lambda rows, columns, **at: N01(rows, columns, **at) * 1.1).min() < THRESHOLD
