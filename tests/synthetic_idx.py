"""Small MNIST-like sets, written by the tests that read them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

from ezo_kernels.data.files import PARTS
from ezo_kernels.data.idx import idx_bytes


def make_arrays(train: int = 120, test: int = 40, seed: int = 0) -> dict[str, np.ndarray]:
    """Images [n, 28, 28] whose label is the row of a bright bar under noise: learnable, and all labels there."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for split, n in (("train", train), ("test", test)):
        y = (np.arange(n) % 10).astype(np.uint8)
        x = rng.integers(0, 60, (n, 28, 28), dtype=np.uint8)
        for image, label in zip(x, y, strict=True):
            image[4 + 2 * label : 6 + 2 * label] = 250
        arrays[f"x_{split}"], arrays[f"y_{split}"] = x, y
    return arrays


def write_idx(folder: Path, arrays: dict[str, np.ndarray], compress: bool = False) -> Path:
    """The four IDX files of ``arrays``, raw or .gz."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, (name, _) in PARTS.items():
        raw = idx_bytes(arrays[part])
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
        else:
            (folder / name).write_bytes(raw)
    return folder
