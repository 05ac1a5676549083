"""Statistical checks of a noise: functions that return p-values, so that planted bad generators meet the same ones.

A generator is ``g(rows, columns, seed=, step=, site=, query=) -> float64 array [rows, columns]``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ezo_kernels.ops import _constants as C
from ezo_kernels.ops import materialize

#: Chance that a good generator fails anywhere in all that is tested; seeds are fixed, so it is paid once.
FAMILY = 1e-3
#: The number of p-values in all, rounded up: a test may reject below THRESHOLD only (Bonferroni).
TESTS = 10_000
THRESHOLD = FAMILY / TESTS


def good(noise, **params):
    """The library's own generator."""

    def g(rows, columns, *, seed=1, step=0, site=0, query=0):
        z = materialize((rows, columns), seed=seed, step=step, site=site, query=query, noise=noise, **params)
        return z.numpy().astype(np.float64)

    return g


# ---- the right distributions


@dataclass(frozen=True)
class Law:
    """A distribution: continuous by ``cdf`` or discrete by ``values`` and ``weights``; ``moments`` are E z^1..E z^8."""

    moments: tuple
    cdf: object = None
    values: object = None
    weights: object = None


def _discrete(values, weights) -> Law:
    values, weights = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    order = np.argsort(values)
    values, weights = values[order], weights[order] / weights.sum()
    return Law(tuple(float((weights * values**k).sum()) for k in range(1, 9)), values=values, weights=weights)


@functools.cache
def law(noise: str, r_max: int = 15) -> Law:
    """What z of a noise should be (``sparse`` by its kept values times the root of the kept fraction)."""
    if noise in ("gaussian", "sparse"):
        return Law((0, 1, 0, 3, 0, 15, 0, 105), cdf=stats.norm.cdf)
    if noise == "uniform":
        return Law((0, 1, 0, 9 / 5, 0, 27 / 7, 0, 9), cdf=stats.uniform(-math.sqrt(3), 2 * math.sqrt(3)).cdf)
    if noise == "rademacher":
        return _discrete([-1, 1], [1, 1])
    if noise == "clt4":
        weights = functools.reduce(np.convolve, [np.ones(256)] * 4)
        s = (np.arange(1021) - 510).astype(np.float32)
        return _discrete(s * (np.float32(C.CLT4_A) + np.float32(C.CLT4_B) * (s * s)), weights)
    if noise == "hadamard":  # every column is a sum of 32 symmetric half-integers, whatever the signs
        weights = functools.reduce(np.convolve, [np.ones(256) / 256] * 32)
        s = (np.arange(len(weights)) - 32 * 127.5).astype(np.float32)
        return _discrete(s * np.float32(C.HADAMARD_SCALE), weights)
    assert noise == "sparse_int8", noise
    values, counts = np.unique((np.arange(65536) * (2 * r_max + 1) >> 16) - r_max, return_counts=True)
    return _discrete(values, counts)


# ---- one sample


def two_sided(score) -> np.ndarray:
    """p of a standard normal score."""
    return 2 * stats.norm.sf(np.abs(score))


def moments(z: np.ndarray, want: Law) -> np.ndarray:
    """p of the first four raw moments."""
    p = []
    for k in range(1, 5):
        mean = float((z**k).mean())
        expected, variance = want.moments[k - 1], want.moments[2 * k - 1] - want.moments[k - 1] ** 2
        if variance < 1e-12:  # a moment that is a constant, as rademacher's square
            p.append(1.0 if abs(mean - expected) < 1e-6 else 0.0)
        else:
            p.append(float(two_sided((mean - expected) / math.sqrt(variance / z.size))))
    return np.array(p)


def shape(z: np.ndarray, want: Law) -> np.ndarray:
    """p of Kolmogorov and Smirnov for a continuous law, of chi-squared over merged levels for a discrete one."""
    z = z.ravel()
    if want.cdf is not None:
        return np.array([stats.kstest(z, want.cdf).pvalue])
    at = np.searchsorted(want.values, z - 1e-6 * (1 + np.abs(z)))
    if at.max() >= len(want.values) or np.abs(want.values[at] - z).max() > 1e-5:
        return np.array([0.0])  # a value that the noise cannot take
    observed, expected = np.bincount(at, minlength=len(want.values)).astype(float), want.weights * z.size
    bins = np.floor(np.cumsum(expected) / max(20.0, z.size / 200)).astype(int)
    observed, expected = np.bincount(bins, observed), np.bincount(bins, expected)
    keep = expected > 10
    observed = np.append(observed[keep], observed[~keep].sum())
    expected = np.append(expected[keep], expected[~keep].sum())
    some = expected > 0
    if observed[~some].any():
        return np.array([0.0])
    return np.array([stats.chi2.sf(((observed - expected)[some] ** 2 / expected[some]).sum(), some.sum() - 1)])


def zeros(z: np.ndarray, fraction: float) -> np.ndarray:
    """p of the number of zeros."""
    return np.array([stats.binomtest(int((z == 0).sum()), z.size, fraction).pvalue])


def tails(g, beyond: float = 5.0, draws: int = 1 << 26) -> np.ndarray:
    """p of the number of normals beyond ``beyond`` sigma on each side."""
    rows, columns, low, high = 1024, 1 << 13, 0, 0
    for site in range(draws // (rows * columns)):
        z = g(rows, columns, site=site, seed=5)
        low, high = low + int((z < -beyond).sum()), high + int((z > beyond).sum())
    expected = stats.norm.sf(beyond) * draws
    return np.array([min(1.0, 2 * min(stats.poisson.cdf(n, expected), stats.poisson.sf(n - 1, expected)))
                     for n in (low, high)])  # fmt: skip


# ---- independence


def _features(z: np.ndarray):
    """z, and what else of it could be shared: its magnitude, where that varies."""
    yield (z - z.mean()) / z.std()
    square = z * z
    if square.std() > 1e-6:
        yield (square - square.mean()) / square.std()


def between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """p of the correlation of two samples at every cyclic shift, of values and of magnitudes: overlaps show."""
    p = []
    for x, y in zip(_features(a.ravel()), _features(b.ravel()), strict=True):
        spectrum = np.fft.rfft(x) * np.conj(np.fft.rfft(y))
        worst = np.abs(np.fft.irfft(spectrum, x.size)).max() / math.sqrt(x.size)
        p.append(min(1.0, x.size * two_sided(worst)))
    return np.array(p)


def within(z: np.ndarray, magnitudes: bool) -> np.ndarray:
    """p of the correlation along rows and along columns at every lag, and of the row and column sums."""
    p = []
    for x in list(_features(z))[: 2 if magnitudes else 1]:
        for axis in (0, 1):
            n = x.shape[axis]
            spectrum = np.abs(np.fft.rfft(x, 2 * n, axis=axis)) ** 2
            lagged = np.fft.irfft(spectrum.sum(axis=1 - axis), 2 * n)[1 : n // 2]
            pairs = (n - np.arange(1, n // 2)) * x.shape[1 - axis]
            p.append(min(1.0, len(lagged) * two_sided(np.abs(lagged / np.sqrt(pairs)).max())))
            sums = x.sum(axis=axis) / math.sqrt(n)
            square = (sums**2).sum()
            p.append(2 * min(stats.chi2.sf(square, len(sums)), stats.chi2.cdf(square, len(sums))))
    return np.minimum(np.array(p), 1.0)


#: What a neighbour in each index is: z must have nothing in common with it.
NEIGHBOURS = (
    dict(site=8), dict(site=7 + 256), dict(site=7 + 2**16), dict(query=1), dict(query=256), dict(step=1),
    dict(step=2**32), dict(seed=2), dict(seed=1 + 2**32), dict(seed=2, step=2**32), dict(seed=0, step=1),
)  # fmt: skip


def neighbours(g, rows=64, columns=512) -> np.ndarray:
    """p of the correlation with the neighbours in site, query, step and seed, at every shift."""
    base = g(rows, columns, seed=1, site=7)
    return np.concatenate([between(base, g(rows, columns, **{"seed": 1, "site": 7, **n})) for n in NEIGHBOURS])


def corner(g) -> np.ndarray:
    """0 where z depends on the shape it is made in, else 1 (no chance in it)."""
    return np.array([float(np.array_equal(g(96, 777)[:10, :20], g(10, 20)))])


def suite(g, noise: str, seeds=range(24), magnitudes: bool = True) -> dict[str, float]:
    """The least p of every check, by name. A good generator has none below THRESHOLD."""
    want = law(noise)
    least: dict[str, float] = {"corner": float(corner(g).min()), "neighbours": float(neighbours(g).min())}
    means = []
    for seed in seeds:
        z = g(96, 1024, seed=seed, site=3 * seed + 1, step=seed % 5)
        means.append(z.mean() * math.sqrt(z.size))
        for name, p in (("moments", moments(z, want)), ("shape", shape(z, want)), ("within", within(z, magnitudes))):
            least[name] = min(least.get(name, 1.0), float(p.min()))
    square = float(np.square(means).sum())  # the means over many seeds scatter as they should, neither more nor less
    least["seeds"] = float(2 * min(stats.chi2.sf(square, len(means)), stats.chi2.cdf(square, len(means))))
    return least


def failures(least: dict[str, float]) -> set[str]:
    return {name for name, p in least.items() if p < THRESHOLD}
