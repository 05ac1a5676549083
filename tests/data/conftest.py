"""A cache and a genuine set of the tests' own."""

from __future__ import annotations

import hashlib

import pytest
from synthetic_idx import make_arrays

from ezo_kernels.data.files import MD5, PARTS
from ezo_kernels.data.idx import idx_bytes


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ezo_kernels"


@pytest.fixture
def genuine(monkeypatch):
    """Arrays that the library takes for the genuine MNIST."""
    arrays = make_arrays()
    sums = {part: hashlib.md5(idx_bytes(arrays[part])).hexdigest() for part in PARTS}
    monkeypatch.setitem(MD5, "mnist", sums)
    return arrays
