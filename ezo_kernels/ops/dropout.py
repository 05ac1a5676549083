"""Dropout masks from the noise contract (stream 5), one for both signs of a query.

| tensor | shape |
|---|---|
| mask | bool [rows, features]: true where kept |

Row = sample inside the group, column = feature; a lane below round(65536 * p) is dropped. ``site`` is the id of the dropout
module (and of the call, where a module runs several times in a forward).
"""

from __future__ import annotations

import torch

from . import _constants as C
from . import _cpu
from ._library import register
from .noise import check_index, check_rounds, key_words


def _dropout_mask_cpu(out, key, site, query, rounds, threshold) -> None:
    import numpy as np

    N = _cpu.noises()

    rows, features = out.shape
    k0, k1 = key_words(key)
    lanes = np.empty((rows, -(-features // 8) * 8), np.uint16)
    c2 = np.uint32(query << 8 | C.STREAM_DROPOUT)
    N.lanes(lanes, k0, k1, np.uint32(site), c2, np.arange(rows, dtype=np.uint32), rounds)
    out.copy_(torch.from_numpy(lanes[:, :features] >= threshold))


def _dropout_mask_cuda(out, key, site, query, rounds, threshold) -> None:
    from ._dropout_triton import launch_dropout_mask

    launch_dropout_mask(out, key, site, query, rounds, threshold)


_dropout_mask = register(
    "dropout_mask",
    "(Tensor(a!) out, Tensor key, int site, int query, int rounds, int threshold) -> ()",
    cpu=_dropout_mask_cpu,
    cuda=_dropout_mask_cuda,
)


def dropout_mask(
    rows: int, features: int, p: float, key: torch.Tensor, *, site: int, query: int = 0, rounds: int = 7
) -> torch.Tensor:
    """Bool [rows, features], true with probability 1 - p (to 1 / 65536).

    Raises:
        ValueError: p outside [0, 1), an index out of range, rounds other than 7 and 10.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout p must be in [0, 1), got {p}")
    site, query = check_index(site, "site", 1 << 32), check_index(query, "query", 1 << 24)
    check_rounds(rounds)
    out = torch.empty(rows, features, dtype=torch.bool, device=key.device)
    if out.numel():
        _dropout_mask(out, key, site, query, rounds, round(65536 * p))
    return out
