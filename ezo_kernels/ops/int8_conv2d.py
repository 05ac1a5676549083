"""Integer convolution of every group of a pass: the linear layer's arithmetic (:mod:`.int8_matmul`) as an implicit GEMM.

| tensor | shape |
|---|---|
| x | int8 [groups * B, C, H, W], or [B, C, H, W] of one group shared by all |
| W, b | int8 [O, C / g, R, S], [O]; row o, column (r S + s) pad(C / g) + c in the noise contract |
| y | int8 [groups * B, O, H', W'] |
"""

from __future__ import annotations

import torch

from ._library import register
from .conv2d import output_size
from .int8_matmul import (
    REQUANTIZE,
    STORE,
    _of_activations,
    aligned_bias,
    check_input,
    check_weight,
    multiply,
    perturbed_weights,
    shift_of,
)
from .int8_pass import ROUNDINGS, SCHEMA, IntegerPerturbation, check_terms, pass_groups
from .int8_tensor import Int8Tensor
from .noise import Noise, check_index


def _conv2d_cpu(
    x, w, b, x_exponent, w_exponent, b_exponent, key, site, bias_site, stride, padding, dilation, conv_groups, size,
    what, rounding, query, queries, signs, rounds, p_zero, r_max, acc, peak, out, exponent,
) -> None:  # fmt: skip
    from . import _int8_cpu as K

    noise = Noise("sparse_int8", rounds, p_zero, r_max)
    groups, outputs = peak.numel(), w.shape[0]
    parts = x.chunk(x_exponent.numel())
    tail = (groups, query, signs, noise)
    weights = perturbed_weights(w, key, site, "conv", *tail)
    biases = [None] * groups if b is None else perturbed_weights(b, key, bias_site, "matrix", *tail)
    per = (groups, -1, outputs, size[0] * size[1])
    accs = acc.view(per) if what == STORE else acc.new_empty(groups, 0, 0, 0)
    outs = out.view(per) if what == REQUANTIZE else out.new_empty(groups, 0, 0, 0)
    mode = ROUNDINGS.index(rounding)
    for g, (w_g, b_g) in enumerate(zip(weights, biases, strict=True)):
        own = min(g, len(parts) - 1)
        bias = aligned_bias(b_g, b_exponent, x_exponent[own], w_exponent, outputs)
        shift = shift_of(peak[g]) if what == REQUANTIZE else 0
        largest = K.conv2d(
            parts[own].numpy(), w_g.reshape(outputs, -1).numpy(), bias, *w.shape[2:], *stride, *padding, *dilation,
            conv_groups, *size, what, accs[g].numpy(), shift, mode, outs[g].numpy(),
        )  # fmt: skip
        if what == REQUANTIZE:
            exponent[g] = x_exponent[own] + w_exponent[0] + shift
        else:
            peak[g] = int(largest)


def _conv2d_cuda(*args) -> None:
    from ._int8_conv2d_triton import launch_conv2d

    launch_conv2d(*args)


_conv2d = register(
    "int8_conv2d",
    "(Tensor x, Tensor w, Tensor? b, Tensor x_exponent, Tensor w_exponent, Tensor? b_exponent, Tensor key, int site, "
    "int bias_site, int[2] stride, int[2] padding, int[2] dilation, int conv_groups, int[2] size, int what, str rounding, "
    f"{SCHEMA}, Tensor(a!) acc, Tensor(b!) peak, Tensor(c!) out, Tensor(d!) exponent) -> ()",
    cpu=_conv2d_cpu,
    cuda=_conv2d_cuda,
)


def int8_conv2d(
    x: Int8Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    p: IntegerPerturbation | None,
    *,
    weight_exponent: torch.Tensor,
    bias_exponent: torch.Tensor | None = None,
    site: int = 0,
    bias_site: int = 0,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    rounding: str = "nearest",
    strategy: str = "twice",
) -> Int8Tensor:
    """Integer convolution of every group; zero padding.

    Args:
        x: [groups of the pass * B, C, H, W], or of one group that all of them share.
        weight: int8 [O, C / groups, R, S]. Never written.
        stride, padding, dilation, groups: as torch's conv2d, in integers.
        Others as :func:`ezo_kernels.ops.int8_linear`.

    Returns:
        [groups of the pass * B, O, H', W'].

    Raises:
        TypeError: an argument that is not of integers.
        ValueError: shapes, an unknown name, C / groups R S past the limit of int32.
    """
    check_input(x, "int8_conv2d")
    check_weight(weight, weight_exponent, bias, bias_exponent, "int8_conv2d")
    stride, padding, dilation, size = output_size("int8_conv2d", x, weight, bias, stride, padding, dilation, groups)
    check_terms(weight[0].numel(), "int8_conv2d")
    rounding = _of_activations(rounding)
    site, bias_site = check_index(site, "site", 1 << 32), check_index(bias_site, "bias_site", 1 << 32)
    signs = (0,) if p is None else tuple(p.signs)
    own_groups = x.groups if signs == (0,) else pass_groups(x, p, "int8_conv2d", site)
    values = x.values.contiguous()
    tail = (0, 1, [0], 7, 0.0, 1) if signs == (0,) else p.schema_args()
    key = p.key if p is not None else torch.zeros(2, dtype=torch.int32, device=x.device)

    def run(what, acc, peak, out, exponent):
        _conv2d(
            values, weight, bias, x.exponent, weight_exponent, bias_exponent, key, site, bias_site, stride, padding,
            dilation, groups, size, what, rounding, *tail, acc, peak, out, exponent,
        )  # fmt: skip

    shape = (own_groups * (x.shape[0] // x.groups), weight.shape[0], *size)
    return multiply(x, shape, own_groups, strategy, rounding, weight_exponent, run)
