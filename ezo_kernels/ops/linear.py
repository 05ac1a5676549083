"""Perturbed linear: y_g = x_g (W + sign_g eps z_q)^T + (b + sign_g eps z'_q), z made inside the matmul.

| tensor | shape |
|---|---|
| x | [groups * B, ..., K] stacked group-major, or [B, ..., K] shared by all groups |
| W | [N, K], or [K, N] when transposed (Hugging Face's Conv1D) |
| b | [N] |
| y | [groups * B, ..., N] |

W is read once and z made once for both signs of a tile. W + sign eps z is formed in fp32 and rounded once to the dtype of x;
the sum runs in fp32. Tiles never straddle two groups and are chosen from the rows of one group, so that both signs run alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._library import register
from ._perturbation import SCHEMA, Perturbation, check_pass, compute_dtype, group_slices
from .noise import Noise, check_index
from .perturb import perturbed_cpu


def _linear_cpu(
    x, w, b, key, eps, site, bias_site, shared, transposed, precision,
    query, queries, signs, noise, rounds, p_zero, out,
) -> None:  # fmt: skip
    spec = Noise(noise, rounds, p_zero)
    groups = queries * len(signs)
    head = (key, eps)
    tail = (query, queries, signs, spec, x.dtype)
    weights = perturbed_cpu(w, *head, site, "matrix", *tail)
    biases = [None] * groups if b is None else perturbed_cpu(b, *head, bias_site, "matrix", *tail)
    for x_g, y_g, w_g, b_g in zip(group_slices(x, groups, shared), out.chunk(groups), weights, biases, strict=True):
        if x_g.dim() == 2 and b_g is not None:  # what F.linear calls, without a copy of its result
            torch.addmm(b_g, x_g, w_g if transposed else w_g.t(), out=y_g)
        else:
            y_g.copy_(F.linear(x_g, w_g.t() if transposed else w_g, b_g))


def _linear_cuda(
    x, w, b, key, eps, site, bias_site, shared, transposed, precision,
    query, queries, signs, noise, rounds, p_zero, out,
) -> None:  # fmt: skip
    from ._linear_triton import launch_linear

    launch_linear(
        x, w, b, key, eps, site, bias_site, shared, transposed, precision,
        query, queries, signs, Noise(noise, rounds, p_zero), out,
    )  # fmt: skip


_linear = register(
    "linear",
    "(Tensor x, Tensor w, Tensor? b, Tensor key, Tensor eps, int site, int bias_site, bool shared, bool transposed, "
    f"str precision, {SCHEMA}, Tensor(a!) out) -> ()",
    cpu=_linear_cpu,
    cuda=_linear_cuda,
)


def perturbed_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    p: Perturbation,
    *,
    site: int,
    bias_site: int = 0,
    shared: bool = False,
    transposed: bool = False,
    precision: str | None = None,
) -> torch.Tensor:
    """Linear layer of every group of a pass, in one launch.

    Args:
        x: [groups * B, ..., K] (group-major), or [B, ..., K] with ``shared``. fp32, fp16 or bf16; autocast is honoured.
        weight: [N, K] ([K, N] if ``transposed``), of x's dtype or fp32. Any strides. Never written.
        bias: [N] or None; perturbed too.
        p: the pass.
        site, bias_site: ids of weight and bias.
        shared: x is one batch for all groups and is not copied.
        transposed: the weight is stored [K, N]; its rows and columns in the noise contract are those of [K, N].
        precision: of fp32 products on CUDA, ``ieee`` or ``tf32``; by default torch's float32 matmul precision.

    Returns:
        [groups * B, ..., N] in x's dtype (autocast's, where it is on).

    Raises:
        TypeError: dtypes that do not go together.
        ValueError: shapes, devices, rows that are no multiple of the groups, x that requires grad.
    """
    if weight.dim() != 2:
        raise ValueError(f"perturbed_linear: weight must be 2-D, got {tuple(weight.shape)}")
    n, k = weight.shape[::-1] if transposed else weight.shape
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"perturbed_linear: x {tuple(x.shape)} does not end in the {k} inputs of the weight")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"perturbed_linear: bias must be [{n}], got {tuple(bias.shape)}")
    if precision not in (None, "ieee", "tf32"):
        raise ValueError(f"precision must be 'ieee' or 'tf32', got {precision!r}")
    site, bias_site = check_index(site, "site", 1 << 32), check_index(bias_site, "bias_site", 1 << 32)
    if x.dim() == 1:
        if p.groups > 1:
            raise ValueError("perturbed_linear: a pass of several groups needs x of at least two dimensions")
        return perturbed_linear(
            x[None], weight, bias, p, site=site, bias_site=bias_site, transposed=transposed, precision=precision
        )[0]
    rows = check_pass(x, (weight, bias), p, x.shape[0], shared, "perturbed_linear", site)
    x = x.to(compute_dtype(x, weight, "perturbed_linear"))
    out = x.new_empty((p.groups * rows, *x.shape[1:-1], n))
    if out.numel():
        _linear(
            x, weight, bias, p.key, p.eps, site, bias_site, shared, transposed, precision or "", *p.schema_args(), out
        )
    return out
