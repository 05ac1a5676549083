"""Perturbed convolution, the strategy ``slab``: W + eps z and W - eps z in memory, then torch's own convolution.

    room[i] = W[slab] + sign_i eps z_q[slab]                          fp32, rounded once to x's dtype
    y_g[:, slab] = conv(x_g, room[i]) + b_g[slab]                     b_g: perturbed in fp32, rounded to x's dtype

| tensor | shape |
|---|---|
| room | [signs, outputs of a slab, I / groups, R, S] in x's memory format, reused by every slab and query |
| x, y | [groups of the pass, B, C, H, W], [groups of the pass, B, O, H', W'] |

z is made once for both signs, and every group has a call of its own, of the same shapes, strides and alignment: a library that
chooses its algorithm by those takes one for all groups, for a sign alone and for any number of queries. (One call for all
groups of a shared x would read x once, but its algorithm would depend on how many groups there are, and its outputs would have
to be copied into their groups: more bytes than x has in most layers.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._perturbation import group_slices
from ._slab import reserve
from ._tiles import SLAB_ROWS, ConvSlabs, conv_slab_plan


def allocate(x: torch.Tensor, shape, groups: int, signs: int) -> tuple[ConvSlabs, torch.Tensor]:
    """The slabs of a weight of ``shape`` and the memory for one of them, in x's dtype and on its device.

    Out of memory, slabs get smaller, with a warning; the smallest have :data:`SLAB_ROWS` outputs, and raise.
    """
    outputs, columns = shape[0], shape[1:].numel()

    def make(most: int | None):
        plan = conv_slab_plan(outputs, columns, groups, x.element_size(), most)
        return plan, plan.rows, plan.bytes_of(signs)

    return reserve(x, "perturbed_conv2d", make, SLAB_ROWS)


def _room(memory: torch.Tensor, signs: int, shape, last: bool) -> torch.Tensor:
    """[signs, *shape] at the start of ``memory``, each part at a multiple of 64 bytes; channels last or first."""
    line = 64 // memory.element_size()
    step = -(-shape.numel() // line) * line
    parts = memory[: signs * step].view(signs, step)[:, : shape.numel()]
    if not last:
        return parts.view(signs, *shape)
    rows, channels, *kernel = shape
    return parts.view(signs, rows, *kernel, channels).permute(0, 1, 4, 2, 3)


def takes_cudnn(x, w, stride, padding, dilation, groups: int) -> bool:
    """Whether torch would convolve these by cuDNN."""
    backend = torch._C._select_conv_backend(x, w, None, stride, padding, dilation, False, [0, 0], groups)
    return backend == torch._C._ConvBackend.Cudnn


def convolve(x, w, b, y, stride, padding, dilation, groups: int, tf32: bool) -> None:
    """Write y = conv(x, w) + b, by cuDNN without a copy where torch would take it, else by what torch takes.

    cuDNN is told what torch's flags would tell it otherwise: no timing of algorithms, deterministic ones, ``tf32`` for fp32.
    """
    if not takes_cudnn(x, w, stride, padding, dilation, groups):
        y.copy_(F.conv2d(x, w, b, stride, padding, dilation, groups))
        return
    dense = y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last)
    to = y if dense and y.data_ptr() % 64 == 0 else torch.empty_like(y)
    torch.ops.aten.cudnn_convolution.out(x, w, padding, stride, dilation, groups, False, True, tf32, out=to)
    if b is not None:
        to.add_(b[:, None, None])
    if to is not y:
        y.copy_(to)


def multiply(x, w, b, out, how, shared: bool, queries: int, signs: int, tf32: bool, fill) -> None:
    """Write ``out``.

    Args:
        x: [groups * B, C, H, W], or [B, C, H, W] with ``shared``.
        w: [O, C / conv groups, R, S].
        b: perturbed biases [groups, O] in x's dtype, or None.
        out: [groups * B, O, H', W'].
        how: stride, padding, dilation and conv groups.
        queries, signs: how many; groups = queries * signs.
        tf32: of fp32 products.
        fill: ``fill(room, w, first, q)`` writes the perturbed copies of outputs ``first`` and on of the weight, given as ``w``,
            for each sign of query q of this pass.
    """
    *where, conv_groups = how
    last = out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous()
    memory_format = torch.channels_last if last else torch.contiguous_format
    x = x.contiguous(memory_format=memory_format)
    x = x.clone() if x.data_ptr() % 64 else x  # one group alone, too: cuDNN chooses by alignment
    xs, ys = group_slices(x, queries * signs, shared), out.chunk(queries * signs)
    plan, memory = allocate(x, w.shape, conv_groups, signs)
    own, channels = w.shape[0] // conv_groups, w.shape[1]
    for first, rows, count in plan.slabs:
        slab = slice(first, first + rows)
        room = _room(memory, signs, torch.Size((rows, *w.shape[1:])), last)
        inputs = slice(first // own * channels, (first // own + count) * channels)
        for q in range(queries):
            fill(room, w[slab], first, q)
            for i in range(signs):
                g = q * signs + i
                x_g = xs[g] if count == conv_groups else xs[g][:, inputs].contiguous(memory_format=memory_format)
                convolve(x_g, room[i], None if b is None else b[g, slab], ys[g][:, slab], *where, count, tf32)
