"""Perturbed embedding: y_g[i] = W[id_i] + sign_g eps z_q[id_i], noise made for the gathered rows only.

| tensor | shape |
|---|---|
| ids | [groups * B, ...] stacked group-major, or [B, ...] shared by all groups; int32 or int64 |
| W | [V, D]; row = id, column = feature in the noise contract |
| y | [groups * B, ..., D] |
"""

from __future__ import annotations

import torch

from ._library import register
from ._perturbation import FLOATS, SCHEMA, Perturbation, check_pass, scale_of
from .noise import Noise, check_index, fill_cpu


def _embedding_cpu(ids, w, key, eps, site, shared, query, queries, signs, noise, rounds, p_zero, out) -> None:
    import numpy as np

    spec = Noise(noise, rounds, p_zero)
    groups, width = queries * len(signs), w.shape[1]
    columns = -(-width // spec.segment) * spec.segment
    parts = [ids] * groups if shared or groups == 1 else list(ids.chunk(groups))
    outs = list(out.chunk(groups))
    bad = (ids < 0) | (ids >= w.shape[0])
    if bool(bad.any()):
        raise IndexError(f"embedding id {int(ids[bad][0])} is outside [0, {w.shape[0]})")
    for q in range(queries):
        own = range(q * len(signs), (q + 1) * len(signs))
        rows, inverse = torch.unique(torch.stack([parts[g] for g in own]), return_inverse=True)
        base = w.detach()[rows].float()
        if tuple(signs) != (0,):
            z = fill_cpu(key, site, query + q, columns, spec, rows.numpy().astype(np.uint32))
            z = torch.from_numpy(z)[:, :width] * scale_of(eps)
        for j, g in enumerate(own):
            table = base if signs[j] == 0 else (base + z if signs[j] > 0 else base - z)
            outs[g].copy_(table.to(out.dtype)[inverse[j]])


def _embedding_cuda(ids, w, key, eps, site, shared, query, queries, signs, noise, rounds, p_zero, out) -> None:
    from ._embedding_triton import launch_embedding

    launch_embedding(
        ids, w, key, eps, site, shared, query, queries, signs, Noise(noise, rounds, p_zero), out
    )  # fmt: skip


_embedding = register(
    "embedding",
    f"(Tensor ids, Tensor w, Tensor key, Tensor eps, int site, bool shared, {SCHEMA}, Tensor(a!) out) -> ()",
    cpu=_embedding_cpu,
    cuda=_embedding_cuda,
)


def perturbed_embedding(
    ids: torch.Tensor, weight: torch.Tensor, p: Perturbation, *, site: int, shared: bool = False
) -> torch.Tensor:
    """Embedding lookup of every group of a pass, in one launch.

    Args:
        ids: int32 or int64, [groups * B, ...] (group-major), or [B, ...] with ``shared``.
        weight: [V, D], fp32, fp16 or bf16. Any strides. Never written.
        p: the pass.
        site: id of the weight.
        shared: ids are one batch for all groups.

    Returns:
        [groups * B, ..., D] in the weight's dtype.

    Raises:
        TypeError: ids that are no integers.
        ValueError: shapes, devices, rows that are no multiple of the groups.
        IndexError: an id outside [0, V), on the CPU. On CUDA nothing waits for the ids, so nothing is raised: the row
            of y of such an id is NaN, and so is the loss, and a step whose loss is not finite changes nothing.
    """
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"perturbed_embedding: ids must be int32 or int64, got {ids.dtype}")
    if weight.dtype not in FLOATS:
        raise TypeError(f"perturbed_embedding takes float32, float16 or bfloat16, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"perturbed_embedding: weight must be 2-D, got {tuple(weight.shape)}")
    site = check_index(site, "site", 1 << 32)
    if ids.dim() == 0:
        if p.groups > 1:
            raise ValueError("perturbed_embedding: a pass of several groups needs ids of at least one dimension")
        return perturbed_embedding(ids[None], weight, p, site=site)[0]
    rows = check_pass(ids, (weight,), p, ids.shape[0], shared, "perturbed_embedding", site)
    out = weight.new_empty((p.groups * rows, *ids.shape[1:], weight.shape[1]))
    if out.numel():
        _embedding(ids, weight, p.key, p.eps, site, shared, *p.schema_args(), out)
    return out
