"""Rows of a batch drawn by how much they matter, with the weights that make the mean of their losses the batch's.

    e_r = |softmax(x_r) - onehot(target(r))|      of a row that counts: the norm of its loss's gradient by the logits
    p_r = 0.9 e_r / sum of e + 0.1 / n            n rows count; 1 / n each where no row is wrong
    row_j = the first r with p_0 + ... + p_r > (j + u) / R,  j = 0 ... R - 1        systematic resampling, one u for all
    w_j = 1 / (n p_row_j)                         E over u of sum_j w_j loss(row_j) / R = the mean loss of the batch

The norm by the logits bounds that by the parameters up to a constant (Katharopoulos and Fleuret, arXiv 1803.00942, section
3.3), and needs no backward pass. Fractions are whole numbers of 2^-16 and sums are int64, so nothing depends on their order:

    q_r = floor(65536 e_r + 1/2), 2^17 where e_r is not a number;  Q = sum of q, or q_r = 1 and Q = n where all are 0
    m_r = 9 n q_r + Q, 0 of a row that does not count;  M = 10 n Q = sum of m
    t = M u >> 32, u of 32 bits;   row_j = how many r have R (m_0 + ... + m_r) <= j M + t;   w_j = fp32(10 Q) / fp32(m_row_j)

Where some e_r is not a number all w are NaN, for so is the mean of the batch's losses.

| tensor | shape |
|---|---|
| logits x | fp32, fp16 or bf16 [P, classes] |
| target | int64 [P]; rows with ``ignore_index`` do not count |
| key | int32 [2]; u is word 0 of counter (0, 0, draw << 8 \\| 9, 0) |
| rows | int64 [R], rising |
| weight w | fp32 [R]; NaN where no row counts, too |
"""

from __future__ import annotations

import torch

from . import _constants as C
from ._library import launcher, register
from ._perturbation import FLOATS
from .noise import check_index, check_rounds, key_words, philox4x32

#: Rows that are drawn from, and drawn: R M stays below 2^57, and M below 2^45.
MOST_ROWS = 1 << 12
#: q of a row whose e is not a number: above any other, for e is at most the root of two.
NO_NUMBER = 1 << 17


def _importance_rows_cpu(logits, target, key, ignore_index, draw, rounds, rows, weight) -> None:
    import numpy as np

    counts = (target != ignore_index).numpy()
    n = int(counts.sum())
    if n:
        valid = target[target != ignore_index]
        low, high = int(valid.min()), int(valid.max())
        if low < 0 or high >= logits.shape[1]:
            raise ValueError(f"target must be in [0, {logits.shape[1]}), got {low if low < 0 else high}")
    error = torch.softmax(logits.float(), 1)
    error[torch.arange(len(target)), torch.where(target == ignore_index, 0, target)] -= 1
    norms = error.square().sum(1).sqrt().numpy()
    q = np.where(
        np.isnan(norms), NO_NUMBER, np.floor(np.nan_to_num(norms) * np.float32(65536) + np.float32(0.5))
    ).astype(np.int64)
    q = np.where(counts, q, 0)
    if not q.any():
        q = counts.astype(np.int64)
    total = int(q.sum())
    mass = np.where(counts, 9 * n * q + total, 0)
    word = philox4x32((0, 0, draw << 8 | C.STREAM_IMPORTANCE, 0), map(int, key_words(key)), rounds)[0]
    everything = 10 * n * total
    at = np.arange(len(rows), dtype=np.int64) * everything + (everything * word >> 32)
    drawn = np.searchsorted(np.cumsum(mass) * len(rows), at, side="right").clip(max=len(target) - 1)
    rows.copy_(torch.from_numpy(drawn))
    share = np.float32("nan" if (q == NO_NUMBER).any() else 10 * total)
    with np.errstate(invalid="ignore"):
        weight.copy_(torch.from_numpy(share / mass[drawn].astype(np.float32)))


_importance_rows = register(
    "importance_rows",
    "(Tensor logits, Tensor target, Tensor key, int ignore_index, int draw, int rounds, Tensor(a!) rows, Tensor(b!) weight) "
    "-> ()",
    cpu=_importance_rows_cpu,
    cuda=launcher("_importance_triton", "launch_importance_rows"),
)


@torch.no_grad()
def importance_rows(
    logits: torch.Tensor,
    target: torch.Tensor,
    count: int,
    key: torch.Tensor,
    *,
    ignore_index: int = -100,
    draw: int = 0,
    rounds: int = 7,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``count`` rows of a batch, drawn by the norm of their cross-entropy's gradient; formulas and shapes above.

    Args:
        logits: [P, classes] of a plain forward.
        target: class indices int64 [P]. On CUDA one that is no class makes its row's e not a number; a CPU refuses it.
        count: R, how many are drawn, 1 to 4096; a row may be drawn several times.
        key: int32[2], of the step (:func:`ezo_kernels.ops.noise.fold_key`).
        ignore_index: of rows that are not drawn.
        draw: number of the draw in its step, [0, 2^24).
        rounds: Philox rounds, 7 or 10.

    Returns:
        int64 [count], and their weights fp32 [count].

    Raises:
        TypeError: logits, targets or a key of another dtype.
        ValueError: shapes or devices that do not fit, more than 4096 rows; on a CPU a target that is no class.
    """
    count, draw = check_index(count, "count", MOST_ROWS + 1), check_index(draw, "draw", 1 << 24)
    check_rounds(rounds)
    for name, tensor in (("logits", logits), ("target", target), ("key", key)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if logits.dtype not in FLOATS:
        raise TypeError(f"logits must be float32, float16 or bfloat16, got {logits.dtype}")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be class indices, int64, got {target.dtype}")
    if key.dtype != torch.int32:
        raise TypeError(f"key must be int32, got {key.dtype}")
    if logits.dim() != 2 or not logits.numel() or target.shape != logits.shape[:1] or key.shape != (2,):
        raise ValueError(
            f"logits must be [P, classes], target [P] and key [2], got {tuple(logits.shape)}, {tuple(target.shape)} and "
            f"{tuple(key.shape)}"
        )
    if count < 1 or target.shape[0] > MOST_ROWS:
        raise ValueError(f"1 to {MOST_ROWS} rows are drawn out of as many, got {count} out of {target.shape[0]}")
    if not logits.device == target.device == key.device:
        raise ValueError(f"logits are on {logits.device}, target on {target.device} and key on {key.device}")
    rows = torch.empty(count, dtype=torch.int64, device=logits.device)
    weight = torch.empty(count, dtype=torch.float32, device=logits.device)
    _importance_rows(logits.contiguous(), target.contiguous(), key, ignore_index, draw, rounds, rows, weight)
    return rows, weight
