"""Perturbed linear: y_g = x_g (W + sign_g eps z_q)^T + (b + sign_g eps z'_q), z made inside the matmul.

| tensor | shape |
|---|---|
| x | [groups * B, ..., K] stacked group-major, or [B, ..., K] shared by all groups |
| W | [N, K], or [K, N] when transposed (Hugging Face's Conv1D) |
| b | [N] |
| y | [groups * B, ..., N] |

W is read once and z made once for both signs of a tile. ``fused`` forms W + sign eps z in fp32 and rounds it once to the dtype
of x; ``two_products`` multiplies by W and by z apart; ``slab`` writes some rows of W + sign eps z to memory for torch's matmul;
``specialized`` is ``fused`` with warps for z beside warps for the product (:mod:`ezo_kernels.ops._strategy`). Sums run in fp32.
Tiles never straddle two groups, and tiles and strategies are chosen from the rows of one group, so that both signs run alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import _slab, _strategy
from ._library import register
from ._perturbation import SCHEMA, Perturbation, check_pass, compute_dtype, group_slices, scale_of
from .noise import Noise, check_index, z_cpu
from .perturb import perturbed_cpu


def _linear_cpu(
    x, w, b, key, eps, site, bias_site, shared, transposed, precision, strategy, z_dtype, relu,
    query, queries, signs, noise, rounds, p_zero, out,
) -> None:  # fmt: skip
    spec = Noise(noise, rounds, p_zero)
    groups = queries * len(signs)
    chosen = strategy_for(x, w, out, groups, 0, transposed, precision, strategy, z_dtype, signs, noise)
    tail = (query, queries, signs, spec, x.dtype)
    if chosen.name == "two_products":
        with torch.autocast("cpu", enabled=False):  # it would round the products of fp32 to 16 bits
            _two_products_cpu(x, w, b, key, eps, site, bias_site, shared, query, queries, signs, spec, out)
    elif chosen.name == "slab":
        _slab_cpu(x, w, b, (key, eps), site, bias_site, shared, tail, z_dtype, out)
    else:
        _fused_cpu(x, w, b, (key, eps), site, bias_site, shared, transposed, tail, z_dtype, out)
    if relu:
        out.relu_()


def _fused_cpu(x, w, b, head, site, bias_site, shared, transposed, tail, z_dtype, out) -> None:
    queries, signs = tail[1:3]
    groups = queries * len(signs)
    weights = perturbed_cpu(w, *head, site, "matrix", *tail, z_dtype=z_dtype)
    biases = [None] * groups if b is None else perturbed_cpu(b, *head, bias_site, "matrix", *tail)
    for x_g, y_g, w_g, b_g in zip(group_slices(x, groups, shared), out.chunk(groups), weights, biases, strict=True):
        if x_g.dim() == 2 and b_g is not None:  # what F.linear calls, without a copy of its result
            torch.addmm(b_g, x_g, w_g if transposed else w_g.t(), out=y_g)
        else:
            y_g.copy_(F.linear(x_g, w_g.t() if transposed else w_g, b_g))


def _groups_first(x, w, out, groups, shared) -> torch.Tensor:
    n, k = w.shape
    return x.reshape(1 if shared else groups, out.numel() // (n * groups), k)


def _slab_cpu(x, w, b, head, site, bias_site, shared, tail, z_dtype, out) -> None:
    query, queries, signs, spec, dtype = tail

    def fill(room, rows, first, q):
        own = (query + q, 1, signs, spec, dtype)
        copies = perturbed_cpu(rows, *head, site, "matrix", *own, z_dtype=z_dtype, first_row=first)
        for to, part in zip(room, copies, strict=True):
            to.copy_(part)

    groups = queries * len(signs)
    biases = None if b is None else torch.stack(list(perturbed_cpu(b, *head, bias_site, "matrix", *tail)))
    x = _slab.stacked(_groups_first(x, w, out, groups, shared))
    y = torch.empty_like(out, memory_format=torch.contiguous_format)
    _slab.multiply(x, w, biases, y, queries, signs, fill, _slab.one_by_one)
    out.copy_(y)


def _slab_cuda(x, w, b, key, eps, site, bias_site, shared, z_dtype, query, queries, signs, spec, out) -> None:
    from ._perturb_triton import launch_perturb

    def fill(room, rows, first, q):
        launch_perturb(
            rows, key, eps, site, "matrix", query + q, 1, signs, spec, room,
            first_row=first, rounded=z_dtype != "float32",
        )  # fmt: skip

    biases = None
    if b is not None:
        biases = x.new_empty(queries * len(signs), b.shape[0])
        launch_perturb(b, key, eps, bias_site, "matrix", query, queries, signs, spec, biases)
    x = _groups_first(x, w, out, queries * len(signs), shared).contiguous()
    _slab.multiply(x, w, biases, out, queries, signs, fill, _slab.batched)


def _two_products_cpu(x, w, b, key, eps, site, bias_site, shared, query, queries, signs, spec, out) -> None:
    """What the two-product kernel computes: W and z in x's dtype, sums and the rest in fp32, one rounding at the end."""
    groups = queries * len(signs)
    scale = scale_of(eps)
    noises = [z_cpu(w.shape, key, site, q, spec, "matrix").to(x.dtype).float() for q in range(query, query + queries)]
    zero = torch.zeros(w.shape[0]) if b is None else b.float()
    of_bias = [
        0.0 if b is None else z_cpu(b.shape, key, bias_site, q, spec, "matrix") for q in range(query, query + queries)
    ]
    w = w.float()
    for g, (x_g, y_g) in enumerate(zip(group_slices(x, groups, shared), out.chunk(groups), strict=True)):
        q, sign = g // len(signs), signs[g % len(signs)]
        x_g = x_g.float()
        step = F.linear(x_g, noises[q]) * scale + of_bias[q] * scale
        y_g.copy_(F.linear(x_g, w) + zero + sign * step)


def strategy_for(x, w, out, groups, arch, transposed, precision, strategy, z_dtype, signs, noise) -> _strategy.Strategy:
    """What a call with these tensors and arguments of the operator takes; ``arch`` 0: the CPU. They may be fake."""
    rows = out.numel() // (out.shape[-1] * groups)
    torch_precision = input_precision(x.dtype, "")
    precision = input_precision(x.dtype, precision)
    missing = ""
    if strategy == "specialized" and arch:
        from ._gluon import MISSING as missing
    return _strategy.choose(
        rows, tuple(w.shape), x.dtype, w.dtype, noise, arch=arch, signs=tuple(signs), z_dtype=z_dtype,
        precision=precision, torch_precision=torch_precision if arch else precision, transposed=transposed,
        regular=_strategy.regular(x, w), one_stride=_strategy.rows_at_one_stride(x), missing=missing, asked=strategy,
    )  # fmt: skip


def input_precision(dtype: torch.dtype, precision: str) -> str:
    """``ieee`` or ``tf32`` of fp32 products: as asked, else as torch takes them on CUDA."""
    if dtype != torch.float32:
        return "ieee"
    if precision:
        return precision
    # torch's older switch can no longer be read once its newer one was set, which tells of both
    own = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    tf32 = torch.get_float32_matmul_precision() != "highest" if own is None else own == "tf32"
    return "tf32" if tf32 else "ieee"


def _linear_cuda(
    x, w, b, key, eps, site, bias_site, shared, transposed, precision, strategy, z_dtype, relu,
    query, queries, signs, noise, rounds, p_zero, out,
) -> None:  # fmt: skip
    from ._linear_small_triton import launch_linear_small
    from ._linear_triton import architecture, launch_linear

    if not out.is_contiguous():
        whole = torch.empty_like(out, memory_format=torch.contiguous_format)
        _linear_cuda(
            x, w, b, key, eps, site, bias_site, shared, transposed, precision, strategy, z_dtype, relu,
            query, queries, signs, noise, rounds, p_zero, whole,
        )  # fmt: skip
        out.copy_(whole)
        return
    spec, precision = Noise(noise, rounds, p_zero), input_precision(x.dtype, precision)
    chosen = strategy_for(
        x, w, out, queries * len(signs), architecture(x.device), transposed, precision, strategy, z_dtype, signs, noise
    )
    if chosen.name != "slab" and queries * chosen.workspace_bytes > _strategy.WORKSPACE_BYTES and queries > 1:
        # parts of all queries at once would be memory without a bound; each has the same bits in any company
        at_once = max(1, _strategy.WORKSPACE_BYTES // chosen.workspace_bytes)
        _in_turn(
            at_once, x, w, b, key, eps, site, bias_site, shared, transposed, precision, strategy, z_dtype, relu,
            query, queries, signs, noise, rounds, p_zero, out,
        )  # fmt: skip
        return
    if chosen.name == "two_products":
        launch_linear_small(
            x, w, b, key, eps, site, bias_site, shared, precision, query, queries, signs, spec, out, relu=relu
        )  # fmt: skip
    elif chosen.name == "specialized":
        from ._linear_specialized_gluon import launch_linear_specialized

        launch_linear_specialized(
            x, w, b, key, eps, site, bias_site, shared, query, queries, signs, spec, out, rounded=z_dtype != "float32"
        )
    elif chosen.name == "slab":
        _slab_cuda(x, w, b, key, eps, site, bias_site, shared, z_dtype, query, queries, signs, spec, out)
    else:
        launch_linear(
            x, w, b, key, eps, site, bias_site, shared, transposed, precision, query, queries, signs, spec, out,
            rounded=z_dtype != "float32", relu=relu, split=chosen.workspace_bytes > 0,
        )  # fmt: skip
        return
    if relu and chosen.name != "two_products":
        out.relu_()


def _in_turn(at_once: int, x, *args) -> None:
    """:func:`_linear_cuda` of so many queries at a time; its arguments."""
    *middle, query, queries, signs, noise, rounds, p_zero, out = args
    shared = middle[6]
    for first in range(0, queries, at_once):
        count = min(at_once, queries - first)
        part, to = (t.narrow(0, t.shape[0] // queries * first, t.shape[0] // queries * count) for t in (x, out))
        _linear_cuda(x if shared else part, *middle, query + first, count, signs, noise, rounds, p_zero, to)


_linear = register(
    "linear",
    "(Tensor x, Tensor w, Tensor? b, Tensor key, Tensor eps, int site, int bias_site, bool shared, bool transposed, "
    f"str precision, str strategy, str z_dtype, bool relu, {SCHEMA}, Tensor(a!) out) -> ()",
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
    strategy: str = "auto",
    z_dtype: str = "float32",
    relu: bool = False,
) -> torch.Tensor:
    """Linear layer of every group of a pass, in one launch (``slab``: some for each slab of outputs; ``two_products`` of few
    outputs: a second, which adds parts of K up).

    Args:
        x: [groups * B, ..., K] (group-major), or [B, ..., K] with ``shared``. fp32, fp16 or bf16; autocast is honoured.
        weight: [N, K] ([K, N] if ``transposed``), of x's dtype or fp32. Any strides. Never written.
        bias: [N] or None; perturbed too.
        p: the pass.
        site, bias_site: ids of weight and bias.
        shared: x is one batch for all groups and is not copied.
        transposed: the weight is stored [K, N]; its rows and columns in the noise contract are those of [K, N].
        precision: of fp32 products on CUDA, ``ieee`` or ``tf32``; by default torch's float32 matmul precision.
        strategy: ``fused``, ``two_products``, ``slab``, ``specialized``, or ``auto``, which the shipped table resolves
            (:func:`ezo_kernels.ops._strategy.choose`); on a CPU ``auto`` is ``fused``.
        z_dtype: of z of the weight, ``float32`` or the 16-bit dtype of x (its name): z is rounded to it before it is used,
            by every strategy. The update must be told the same. z of the bias is float32.
        relu: then a relu, with the bits of the two; ``fused`` and ``two_products`` have it in the kernel.

    Returns:
        [groups * B, ..., N] in x's dtype (autocast's, where it is on).

    Raises:
        TypeError: dtypes that do not go together.
        ValueError: shapes, devices, rows that are no multiple of the groups, x that requires grad, unknown names.
        NotImplementedError: a strategy that was asked for and cannot be taken, with every reason.
    """
    if strategy not in _strategy.STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(_strategy.STRATEGIES)}, got {strategy!r}")
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
            x[None], weight, bias, p, site=site, bias_site=bias_site, transposed=transposed, precision=precision,
            strategy=strategy, z_dtype=z_dtype, relu=relu,
        )[0]  # fmt: skip
    rows = check_pass(x, (weight, bias), p, x.shape[0], shared, "perturbed_linear", site)
    x = x.to(compute_dtype(x, weight, "perturbed_linear"))
    if z_dtype != "float32" and (x.dtype == torch.float32 or z_dtype != str(x.dtype).removeprefix("torch.")):
        raise TypeError(
            f"perturbed_linear: z_dtype must be 'float32' or x's own 16-bit dtype, got {z_dtype!r} and {x.dtype}"
        )
    out = x.new_empty((p.groups * rows, *x.shape[1:-1], n))
    if out.numel():
        _linear(
            x, weight, bias, p.key, p.eps, site, bias_site, shared, transposed, precision or "", strategy, z_dtype, relu,
            *p.schema_args(), out,
        )  # fmt: skip
    return out
