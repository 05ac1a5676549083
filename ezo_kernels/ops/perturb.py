"""Perturbed copies of a small parameter: out[g] = w + (sign_g * eps) * z_query(g), in fp32, rounded to out's dtype.

| tensor | shape |
|---|---|
| w | any |
| out | [groups, *w.shape] |

For parameters that no fused layer reads (norm affine, bare parameters): they live in the step's workspace, never in the
model. The linear and conv operators of the CPU backend take their weights from here too.
"""

from __future__ import annotations

import torch

from ._layout import LAYOUTS, default_layout
from ._library import register
from ._perturbation import FLOATS, SCHEMA, Perturbation, check_devices, scale_of
from .noise import Noise, check_index, shifter_cpu


def perturbed_cpu(
    weight, key, eps, site, layout, query, queries, signs, noise: Noise, dtype, *, z_dtype: str = "float32",
    first_row: int = 0,
):  # fmt: skip
    """Yield the perturbed weight of each group, in order, in ``dtype``; z is rounded to ``z_dtype`` first.

    ``weight`` is the rows from ``first_row`` on of its parameter.
    """
    scale = scale_of(eps)
    w = weight.detach().float().contiguous()
    if tuple(signs) == (0,) or not w.numel():
        yield from [w.to(dtype)] * (queries * len(signs))
        return
    shift = shifter_cpu(w, key, site, noise, layout, z_dtype, first_row)
    scales = [sign * scale for sign in signs]
    for q in range(query, query + queries):
        moved = [torch.empty_like(w) for _ in signs]
        shift(moved, scales, q)
        yield from moved if dtype == torch.float32 else [part.to(dtype) for part in moved]


def _perturb_cpu(w, key, eps, site, layout, query, queries, signs, noise, rounds, p_zero, out) -> None:
    spec = Noise(noise, rounds, p_zero)
    for g, part in enumerate(perturbed_cpu(w, key, eps, site, layout, query, queries, signs, spec, out.dtype)):
        out[g].copy_(part)


def _perturb_cuda(w, key, eps, site, layout, query, queries, signs, noise, rounds, p_zero, out) -> None:
    from ._perturb_triton import launch_perturb

    launch_perturb(w, key, eps, site, layout, query, queries, signs, Noise(noise, rounds, p_zero), out)


_perturb = register(
    "perturb",
    f"(Tensor w, Tensor key, Tensor eps, int site, str layout, {SCHEMA}, Tensor(a!) out) -> ()",
    cpu=_perturb_cpu,
    cuda=_perturb_cuda,
)


def perturb(weight: torch.Tensor, p: Perturbation, *, site: int, layout: str | None = None, dtype=None) -> torch.Tensor:
    """Perturbed copies of ``weight``, one a group.

    Args:
        weight: any shape, fp32, fp16 or bf16.
        p: the pass.
        site: id of the parameter.
        layout: ``matrix`` or ``conv``; by default by shape (docs/rng.md).
        dtype: of the copies; the weight's by default.

    Returns:
        [groups, *weight.shape].

    Raises:
        TypeError: a dtype that is no float of the three.
        ValueError: an unknown layout, a site out of range, devices that differ.
    """
    if weight.dtype not in FLOATS:
        raise TypeError(f"perturb takes float32, float16 or bfloat16, got {weight.dtype}")
    if dtype not in (None, *FLOATS):
        raise TypeError(f"perturb makes float32, float16 or bfloat16, not {dtype}")
    check_devices("perturb", weight, p.key, p.eps)
    layout = layout or default_layout(weight.shape)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    site = check_index(site, "site", 1 << 32)
    out = weight.new_empty((p.groups, *weight.shape), dtype=dtype or weight.dtype)
    if out.numel():
        _perturb(weight, p.key, p.eps, site, layout, *p.schema_args(), out)
    return out
