"""Random numbers of the data, each a function of where it is used: no order of calls can change one.

They are Philox's raw words, whose stream numpy has frozen, and plain arithmetic on them; the distributions of a
numpy.random.Generator may change between versions.
"""

from __future__ import annotations

import functools
import operator

import numpy as np

#: What words are for; words of different purposes share nothing.
STREAMS = ("angle", "cloud", "surface", "split", "resample", "turn", "jitter")


def _integer(value, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None


def check_seed(seed, name: str = "seed") -> int:
    """``seed``, or another place of a draw, as a Python int.

    Raises:
        TypeError: no integer. ValueError: a negative one.
    """
    seed = _integer(seed, name)
    if seed < 0:
        raise ValueError(f"{name} is {seed}: it must not be negative")
    return seed


def check_count(count, name: str) -> int:
    """``count`` as a Python int.

    Raises:
        TypeError: no integer. ValueError: less than 1.
    """
    count = _integer(count, name)
    if count < 1:
        raise ValueError(f"{name} is {count}: at least 1 is needed")
    return count


def words(count: int, seed: int, stream: str, place: int = 0, index: int = 0) -> np.ndarray:
    """uint64 [count]: of a purpose (one of STREAMS), a place such as an epoch or a split, and the index of a row in it."""
    counter = np.array([0, index, 0, 0], np.uint64)  # 2^64 blocks a row
    return np.random.Philox(key=_key(seed, stream, place), counter=counter).random_raw(count)


@functools.lru_cache(maxsize=64)
def _key(seed: int, stream: str, place: int) -> np.ndarray:
    # spawn_key keeps the two apart from a seed of any size.
    return np.random.SeedSequence(seed, spawn_key=(STREAMS.index(stream), place)).generate_state(2, np.uint64)


def uniforms(raw: np.ndarray) -> np.ndarray:
    """Words as float64 in [0, 1), 53 bits each."""
    return (raw >> np.uint64(11)) * 2.0**-53


def below(raw: np.ndarray, n) -> np.ndarray:
    """Words as int64 in 0 .. n - 1; ``n`` below 2^32, a number or one a word. (Uneven by less than n / 2^32.)"""
    return ((raw >> np.uint64(32)) * np.asarray(n, np.uint64) >> np.uint64(32)).astype(np.int64)


def normals(raw: np.ndarray) -> np.ndarray:
    """Words, an even number of them, as as many float64 of variance one (Box and Muller)."""
    u, v = uniforms(raw).reshape(2, -1)
    radius = np.sqrt(-2.0 * np.log1p(-u))
    return np.concatenate([radius * np.cos(2 * np.pi * v), radius * np.sin(2 * np.pi * v)])


def shuffled(n: int, seed: int, stream: str, place: int = 0, index: int = 0) -> np.ndarray:
    """A permutation of 0 .. n - 1: int64 [n]."""
    return np.argsort(words(n, seed, stream, place, index), kind="stable")
