"""Perturbed convolution: y_g = conv(x_g, W + sign_g eps z_q) + (b + sign_g eps z'_q), z made inside the implicit GEMM.

| tensor | shape |
|---|---|
| x | [groups * B, C, H, W] stacked group-major, or [B, C, H, W] shared by all groups |
| W | [O, C / g, R, S]; row o, column (r S + s) pad(C / g) + c in the noise contract |
| b | [O] |
| y | [groups * B, O, H', W'], or with ``pool`` 2 [groups * B, O, H' // 2, W' // 2] |

With ``pool`` 2 what is written is the maximum of each 2 x 2 window, with ``relu`` what of it is above 0. Rounding commutes with
both, so the bits are those of the operators one after the other; but the convolution's own output is never in memory.

As a GEMM: M = B H' W' of one group, N = O / g, K = R S pad(C / g). A 1-D convolution is one with H = R = 1. ``fused`` is that
GEMM with z made in it; ``slab`` writes some outputs of W + sign eps z to memory for torch's convolution
(:mod:`ezo_kernels.ops._strategy`).
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F

from . import _conv2d_slab, _cpu, _strategy
from ._library import register
from ._perturbation import SCHEMA, Perturbation, check_pass, compute_dtype, group_slices
from .linear import input_precision
from .noise import Noise, check_index
from .perturb import perturbed_cpu


def _conv2d_cpu(
    x, w, b, key, eps, site, bias_site, shared, stride, padding, dilation, conv_groups, precision, strategy, relu, pool,
    query, queries, signs, noise, rounds, p_zero, out,
) -> None:  # fmt: skip
    spec = Noise(noise, rounds, p_zero)
    groups = queries * len(signs)
    how = (stride, padding, dilation, conv_groups)
    tail = (query, queries, signs, spec, x.dtype)
    biases = [None] * groups if b is None else perturbed_cpu(b, key, eps, bias_site, "matrix", *tail)
    if strategy_for(x, w, out, groups, 0, conv_groups, precision, strategy, signs, noise, pool).name == "slab":

        def fill(room, rows, first, q):
            own = (query + q, 1, signs, spec, x.dtype)
            for to, part in zip(room, perturbed_cpu(rows, key, eps, site, "conv", *own, first_row=first), strict=True):
                to.copy_(part)

        biases = None if b is None else torch.stack(list(biases))
        _slab(x, w, biases, out, how, shared, queries, len(signs), False, fill, relu, pool)
        return
    weights = perturbed_cpu(w, key, eps, site, "conv", *tail)
    pointwise = _is_pointwise(x, w, out, how)
    for x_g, y_g, w_g, b_g in zip(group_slices(x, groups, shared), out.chunk(groups), weights, biases, strict=True):
        if pointwise and pool == 1:
            _pointwise(x_g, w_g, b_g, y_g)
            _finish(y_g, relu, pool, y_g)
            continue
        if pointwise:  # pooled or not, the same way: the bits are those of the operators one after the other
            y = x_g.new_empty((len(x_g), len(w_g), *x_g.shape[2:]))
            _pointwise(x_g, w_g, b_g, y)
        else:
            y = F.conv2d(x_g, w_g, b_g, *how)
        if pool == 2 and y.dtype == torch.float32 and y.is_contiguous() and y_g.is_contiguous():
            _cpu.convolutions().pool_2x2(y.flatten(0, 1).numpy(), relu, y_g.flatten(0, 1).numpy())
            continue
        _finish(y, relu, pool, y_g)


#: Positions of an image from which a product of matrices an image is faster than torch's convolution, which copies into a
#: layout of its own: 1.2 to 4 times at 64 (torch 2.13, AVX-512), and the slower one at 16.
_POINTWISE_FROM = 32


def _is_pointwise(x, w, out, how) -> bool:
    """Whether a convolution is taken as one product of matrices an image.

    By shapes, dtype and the layout of ``out`` alone, which are the same for groups that are stacked and that run one by one.
    """
    plain = how == ([1, 1], [0, 0], [1, 1], 1) and tuple(w.shape[2:]) == (1, 1)
    large = x.shape[2] * x.shape[3] >= _POINTWISE_FROM
    return plain and large and x.dtype == torch.float32 and out.is_contiguous()


def _pointwise(x, w, b, out) -> None:
    """out [B, O, H, W] = w [O, C, 1, 1] x [B, C, H, W] + b."""
    w, x, y = w.flatten(1).expand(len(x), -1, -1), x.contiguous().flatten(2), out.view(*out.shape[:2], -1)
    to = y if y.data_ptr() % 64 == 0 else torch.empty_like(y)  # MKL's bits depend on it, and groups must not
    if b is None:
        torch.bmm(w, x, out=to)
    else:
        torch.baddbmm(b[:, None], w, x, out=to)
    if to is not y:
        y.copy_(to)


def _finish(y, relu: bool, pool: int, out) -> None:
    """Write what pooling and relu make of a convolution's output."""
    if pool == 2:
        out.copy_(F.max_pool2d(y, 2))
    elif y is not out:
        out.copy_(y)
    if relu:
        out.relu_()


def _slab(x, w, biases, out, how, shared, queries, signs, tf32, fill, relu, pool) -> None:
    """:func:`._conv2d_slab.multiply`, and after it the pooling and the relu, which torch's convolution does not take in."""
    stride, padding, dilation, _ = how
    full = out
    if pool == 2:
        memory_format = torch.channels_last if not out.is_contiguous() else torch.contiguous_format
        size = [_reach(*one) for one in zip(x.shape[2:], w.shape[2:], stride, padding, dilation, strict=True)]
        full = torch.empty((*out.shape[:2], *size), dtype=out.dtype, device=out.device, memory_format=memory_format)
    _conv2d_slab.multiply(x, w, biases, full, how, shared, queries, signs, tf32, fill)
    _finish(full, relu, pool, out)


def _reach(n: int, kernel: int, stride: int, pad: int, dilation: int) -> int:
    """Positions of a kernel along n."""
    return (n + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1


def strategy_for(x, w, out, groups, arch, conv_groups, precision, strategy, signs, noise, pool=1) -> _strategy.Strategy:
    """What a call with these tensors and arguments of the operator takes; ``arch`` 0: the CPU. They may be fake."""
    positions = out.shape[0] // groups * out.shape[2] * out.shape[3] * pool * pool
    precision = input_precision(x.dtype, precision)
    # cuDNN is told its precision at each call; the CPU has one only
    told = not arch or (torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled)
    return _strategy.choose_conv(
        positions, tuple(w.shape), conv_groups, x.dtype, noise, arch=arch, signs=tuple(signs), precision=precision,
        torch_precision=precision if told else input_precision(x.dtype, ""), asked=strategy,
    )  # fmt: skip


def _conv2d_cuda(
    x, w, b, key, eps, site, bias_site, shared, stride, padding, dilation, conv_groups, precision, strategy, relu, pool,
    query, queries, signs, noise, rounds, p_zero, out,
) -> None:  # fmt: skip
    from ._conv2d_triton import launch_conv2d
    from ._linear_triton import architecture
    from ._perturb_triton import launch_perturb

    spec, groups = Noise(noise, rounds, p_zero), queries * len(signs)
    arch = architecture(x.device)
    chosen = strategy_for(x, w, out, groups, arch, conv_groups, precision, strategy, signs, noise, pool)
    if chosen.name == "fused":
        launch_conv2d(
            x, w, b, key, eps, site, bias_site, shared, stride, padding, dilation, conv_groups, precision, relu, pool,
            query, queries, signs, spec, out,
        )  # fmt: skip
        return

    def fill(room, rows, first, q):
        launch_perturb(rows, key, eps, site, "conv", query + q, 1, signs, spec, room, first_row=first)

    biases = None
    if b is not None:
        biases = x.new_empty(groups, b.shape[0])
        launch_perturb(b, key, eps, bias_site, "matrix", query, queries, signs, spec, biases)
    tf32 = input_precision(x.dtype, precision) == "tf32"
    how = (stride, padding, dilation, conv_groups)
    _slab(x, w, biases, out, how, shared, queries, len(signs), tf32, fill, relu, pool)


_conv2d = register(
    "conv2d",
    "(Tensor x, Tensor w, Tensor? b, Tensor key, Tensor eps, int site, int bias_site, bool shared, SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation, int conv_groups, str precision, str strategy, bool relu, int pool, "
    f"{SCHEMA}, Tensor(a!) out) -> ()",
    cpu=_conv2d_cpu,
    cuda=_conv2d_cuda,
)


def _pair(value, name: str, least: int, op: str) -> tuple[int, int]:
    try:
        pair = tuple(map(operator.index, value if isinstance(value, (tuple, list)) else (value, value)))
    except TypeError:
        raise TypeError(f"{op}: {name} must be one or two integers, got {value!r}") from None
    if len(pair) != 2 or any(v < least for v in pair):
        raise ValueError(f"{op}: {name} must be one or two integers >= {least}, got {value}")
    return pair


def output_size(op: str, x, weight, bias, stride, padding, dilation, groups: int):
    """Stride, padding and dilation as pairs, and (H', W') of a convolution; ValueError in ``op``'s name if it has none."""
    if weight.dim() != 4 or x.dim() != 4:
        raise ValueError(f"{op}: x and weight must be 4-D, got {tuple(x.shape)} and {tuple(weight.shape)}")
    stride, padding = _pair(stride, "stride", 1, op), _pair(padding, "padding", 0, op)
    dilation = _pair(dilation, "dilation", 1, op)
    o, c, *kernel = weight.shape
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"{op}: groups must be an int, got {groups!r}")
    if min(kernel) < 1:
        raise ValueError(f"{op}: weight {tuple(weight.shape)} has an empty kernel")
    if groups < 1 or o % groups or x.shape[1] != c * groups:
        raise ValueError(f"{op}: x {tuple(x.shape)} does not fit weight {tuple(weight.shape)} with groups={groups}")
    if bias is not None and bias.shape != (o,):
        raise ValueError(f"{op}: bias must be [{o}], got {tuple(bias.shape)}")
    size = tuple(_reach(*one) for one in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True))
    if min(size) < 1:
        raise ValueError(f"{op}: the kernel {tuple(kernel)} is larger than the padded x {tuple(x.shape)}")
    return stride, padding, dilation, size


def pooled_size(op: str, size, pool) -> tuple[int, int]:
    """(H', W') of an output of ``size`` in windows of ``pool`` by ``pool``; ValueError in ``op``'s name if none fits."""
    if pool not in (1, 2):
        raise ValueError(f"{op}: pool must be 1 or 2, got {pool!r}")
    if min(size) < pool:
        raise ValueError(f"{op}: an output of {tuple(size)} has no window of 2 x 2")
    return tuple(n // pool for n in size)


def perturbed_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    p: Perturbation,
    *,
    site: int,
    bias_site: int = 0,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    shared: bool = False,
    relu: bool = False,
    pool: int = 1,
    precision: str | None = None,
    strategy: str = "auto",
) -> torch.Tensor:
    """2-D convolution of every group of a pass, in one launch (``slab``: one for each slab of outputs, and torch's).

    Args:
        x: [groups of the pass * B, C, H, W], or [B, C, H, W] with ``shared``. Contiguous or channels_last.
        weight: [O, C / groups, R, S], of x's dtype or fp32. Any strides. Never written.
        bias: [O] or None; perturbed too.
        p: the pass.
        site, bias_site: ids of weight and bias.
        stride, padding, dilation: an int or two; padding is with zeros.
        groups: of the convolution, as in ``F.conv2d`` (not the groups of the pass).
        shared, precision: as in :func:`perturbed_linear`.
        relu: of the output, after the pooling.
        pool: 2 for the maximum of windows of 2 x 2, of whole ones alone, as ``F.max_pool2d(y, 2)``; 1 for none.
        strategy: ``fused``, ``slab``, or ``auto``, which the shipped table resolves
            (:func:`ezo_kernels.ops._strategy.choose_conv`); on a CPU ``auto`` is ``fused``.

    Returns:
        [groups of the pass * B, O, H', W'], in x's memory format; with ``pool`` 2 half as high and wide.

    Raises:
        TypeError: dtypes that do not go together.
        ValueError: shapes, devices, rows that are no multiple of the groups of the pass, x that requires grad, unknown names.
        NotImplementedError: a strategy that was asked for and cannot be taken, with every reason.
    """
    _strategy.check_name(strategy)
    stride, padding, dilation, size = output_size(
        "perturbed_conv2d", x, weight, bias, stride, padding, dilation, groups
    )
    size = pooled_size("perturbed_conv2d", size, pool)
    if precision not in (None, "ieee", "tf32"):
        raise ValueError(f"precision must be 'ieee' or 'tf32', got {precision!r}")
    site, bias_site = check_index(site, "site", 1 << 32), check_index(bias_site, "bias_site", 1 << 32)
    rows = check_pass(x, (weight, bias), p, x.shape[0], shared, "perturbed_conv2d", site)
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    x = x.to(compute_dtype(x, weight, "perturbed_conv2d"))
    out = torch.empty(
        (p.groups * rows, weight.shape[0], *size),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    if out.numel():
        _conv2d(
            x, weight, bias, p.key, p.eps, site, bias_site, shared, stride, padding, dilation, groups,
            precision or "", strategy, bool(relu), int(pool), *p.schema_args(), out,
        )  # fmt: skip
    return out


def perturbed_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    p: Perturbation,
    *,
    site: int,
    bias_site: int = 0,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    shared: bool = False,
    precision: str | None = None,
    strategy: str = "auto",
) -> torch.Tensor:
    """1-D convolution of every group of a pass: :func:`perturbed_conv2d` with a height of one.

    Args:
        x: [groups of the pass * B, C, L], or [B, C, L] with ``shared``.
        weight: [O, C / groups, S].
        bias: [O] or None.

    Returns:
        [groups of the pass * B, O, L'].
    """
    if weight.dim() != 3 or x.dim() != 3:
        raise ValueError(f"perturbed_conv1d: x and weight must be 3-D, got {tuple(x.shape)} and {tuple(weight.shape)}")
    one = [v[0] if isinstance(v, (tuple, list)) and len(v) == 1 else v for v in (stride, padding, dilation)]
    if any(isinstance(v, (tuple, list)) for v in one):
        raise ValueError(f"perturbed_conv1d: stride, padding and dilation must be one integer each, got {one}")
    return perturbed_conv2d(
        x.unsqueeze(2),
        weight.unsqueeze(2),
        bias,
        p,
        site=site,
        bias_site=bias_site,
        stride=(1, one[0]),
        padding=(0, one[1]),
        dilation=(1, one[2]),
        groups=groups,
        shared=shared,
        precision=precision,
        strategy=strategy,
    ).squeeze(2)
