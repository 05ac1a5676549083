"""The integer linear layer of every group of a pass.

    acc = x clamp(W + sign z)^T + clamp(b + sign z') 2^(s_b - s_x - s_W)

| tensor | shape |
|---|---|
| x | int8 [groups * B, ..., K], or [B, ..., K] of one group shared by all |
| W, b | int8 [N, K], [N]; one exponent each |
| acc, y | int32 and int8 [groups * B, ..., N]: y is acc, rounded as in :mod:`.int8_matmul`, perhaps with a relu |
"""

from __future__ import annotations

import math

import torch

from . import _cpu
from ._int8_slab import check_way, choose, pitch_of, reserve
from ._library import register
from ._perturbation import check_devices
from .int8_matmul import (
    CHUNK_BYTES,
    MOST_ONCE,
    ONCE,
    PEAK,
    REQUANTIZE,
    STORE,
    TWICE,
    _requantize_cpu,
    aligned_bias,
    check_input,
    check_weight,
    launch_phases,
    multiply,
    of_activations,
    perturbed_weights,
    product_cpu,
    shift_of,
)
from .int8_pass import ROUNDINGS, SCHEMA, IntegerPerturbation, check_terms, pass_groups
from .int8_tensor import Int8Tensor, counters
from .noise import Noise, check_index


def _linear_cpu(
    x, w, b, x_exponent, w_exponent, b_exponent, key, site, bias_site, what, rounding, weights, relu,
    query, queries, signs, rounds, p_zero, r_max, acc, peak, out, exponent,
) -> None:  # fmt: skip
    import numpy as np

    K = _cpu.integers()

    noise = Noise("sparse_int8", rounds, p_zero, r_max)
    groups, (n, k) = peak.numel(), w.shape
    parts = x.reshape(x_exponent.numel(), -1, k)
    tail = (groups, query, signs, noise)
    perturbed = perturbed_weights(w, key, site, "matrix", *tail)
    biases = [None] * groups if b is None else perturbed_weights(b, key, bias_site, "matrix", *tail)
    # an output that is not written still needs a shape to be compiled for
    accs = (acc.view(groups, -1, n) if what == STORE else acc.new_empty(groups, 0, 0)).numpy()
    outs = (out.view(groups, -1, n) if what == TWICE else out.new_empty(groups, 0, 0)).numpy()
    mode, rows = ROUNDINGS.index(rounding), parts.shape[1]
    x_exponents, w_scale, peaks, exponents = x_exponent.tolist(), int(w_exponent), peak.numpy(), exponent.numpy()
    most = rows if what == STORE else max(1, CHUNK_BYTES // (4 * n))
    for g, (w_g, b_g) in enumerate(zip(perturbed, biases, strict=True)):
        own = min(g, len(parts) - 1)
        bias = aligned_bias(b_g, b_exponent, x_exponents[own], w_scale, n)
        largest = shift = 0
        for phase in (PEAK, REQUANTIZE) if what == TWICE else (STORE,):
            for first in range(0, rows, most):
                some = parts[own][first : first + most]
                sums = accs[g] if what == STORE else K.workspace("rows", len(some) * n, np.int32).reshape(-1, n)
                if phase != REQUANTIZE or rows > most:  # else the sums of the first time are still there
                    product_cpu(some, w_g.t(), torch.from_numpy(sums))
                top = K.finish_linear(sums, bias, phase, accs[g], shift, mode, relu, outs[g][first : first + most])
                largest = max(largest, int(top))
            shift = shift_of(largest)
        peaks[g] = largest
        if what == TWICE:
            exponents[g] = x_exponents[own] + w_scale + shift


def _way(x, w, x_exponent, signs, weights: str):
    n, k = w.shape
    return choose(x.numel() // (k * x_exponent.numel()), n, k, tuple(signs), conv=False, asked=weights)


def _linear_cuda(*args) -> None:
    from ._int8_matmul_triton import launch_linear

    (*plain, weights, relu), tail = args[:13], args[13:]
    x, w, signs = args[0], args[1], tail[2]
    way = _way(x, w, args[3], signs, weights)
    memory = reserve(way, x, len(signs) * pitch_of(w.shape[1]), "int8_linear") if way.name == "slab" else None
    if memory is None:
        launch_phases(launch_linear, (*plain, relu, *tail), 9)
        return
    from ._int8_slab_triton import launch_linear_slab

    launch_linear_slab(*plain, relu, *tail, memory)


_linear = register(
    "int8_linear",
    "(Tensor x, Tensor w, Tensor? b, Tensor x_exponent, Tensor w_exponent, Tensor? b_exponent, Tensor key, int site, "
    f"int bias_site, int what, str rounding, str weights, bool relu, {SCHEMA}, Tensor(a!) acc, Tensor(b!) peak, "
    "Tensor(c!) out, Tensor(d!) exponent) -> ()",
    cpu=_linear_cpu,
    cuda=_linear_cuda,
)


def _once_cpu(
    x, w, b, x_exponent, w_exponent, b_exponent, key, site, bias_site, rounding, weights, relu,
    query, queries, signs, rounds, p_zero, r_max, acc, peak, out, exponent, arrived,
) -> None:  # fmt: skip
    _linear_cpu(
        x, w, b, x_exponent, w_exponent, b_exponent, key, site, bias_site, STORE, rounding, weights, relu,
        query, queries, signs, rounds, p_zero, r_max, acc, peak, out, exponent,
    )  # fmt: skip
    _requantize_cpu(acc, peak, x_exponent, w_exponent, rounding, relu, None, out, exponent)


def _once_cuda(
    x, w, b, x_exponent, w_exponent, b_exponent, key, site, bias_site, rounding, weights, relu,
    query, queries, signs, rounds, p_zero, r_max, acc, peak, out, exponent, arrived,
) -> None:  # fmt: skip
    from ._int8_matmul_triton import launch_linear
    from ._int8_pointwise_triton import launch_requantize

    first = (x, w, b, x_exponent, w_exponent, b_exponent, key, site, bias_site)
    tail = (query, queries, signs, rounds, p_zero, r_max, acc, peak, out, exponent)
    if _way(x, w, x_exponent, signs, weights).name == "fused":
        launch_linear(*first, ONCE, rounding, relu, *tail, arrived)
        return
    _linear_cuda(*first, STORE, rounding, weights, relu, *tail)
    launch_requantize(acc, peak, x_exponent, w_exponent, rounding, relu, None, out, exponent)


_once = register(
    "int8_linear_once",
    "(Tensor x, Tensor w, Tensor? b, Tensor x_exponent, Tensor w_exponent, Tensor? b_exponent, Tensor key, int site, "
    f"int bias_site, str rounding, str weights, bool relu, {SCHEMA}, Tensor(a!) acc, Tensor(b!) peak, Tensor(c!) out, "
    "Tensor(d!) exponent, Tensor(e!) arrived) -> ()",
    cpu=_once_cpu,
    cuda=_once_cuda,
)


def int8_linear(
    x: Int8Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    p: IntegerPerturbation | None,
    *,
    weight_exponent: torch.Tensor,
    bias_exponent: torch.Tensor | None = None,
    site: int = 0,
    bias_site: int = 0,
    rounding: str = "nearest",
    strategy: str = "buffer",
    weights: str = "auto",
    relu: bool = False,
) -> Int8Tensor:
    """Integer linear layer of every group.

    Args:
        x: [groups * B, ..., K], or of one group that all groups of the pass share.
        weight: int8 [N, K]. Never written.
        bias: int8 [N] or None.
        p: the pass; None, or signs (0,), leaves the weights as they are and takes x of any groups.
        weight_exponent, bias_exponent: int32 [1].
        site, bias_site: ids of weight and bias.
        rounding: ``nearest`` or ``pseudo``.
        strategy: ``buffer`` or ``twice``.
        weights: on a GPU, ``fused`` makes perturbed weights in the tile that multiplies, ``slab`` in memory (32 MB at most) for
            plain products, ``auto`` by :func:`ezo_kernels.ops._int8_slab.choose`. The bits are the same.
        relu: of the outputs, in the kernel that rounds, with the bits of the two.

    Returns:
        [groups * B, ..., N].

    Raises:
        TypeError: an argument that is not of integers.
        ValueError: shapes, devices that differ, an unknown name, K past the limit of int32.
    """
    check_input(x, "int8_linear")
    check_weight(weight, weight_exponent, bias, bias_exponent, "int8_linear")
    check_devices("int8_linear", x.values, weight, weight_exponent, bias, bias_exponent, None if p is None else p.key)
    if weight.dim() != 2 or x.dim() < 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"int8_linear: x {tuple(x.shape)} does not fit the weight {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"int8_linear: bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    check_terms(weight.shape[1], "int8_linear")
    rounding, weights = of_activations(rounding), check_way(weights)
    site, bias_site = check_index(site, "site", 1 << 32), check_index(bias_site, "bias_site", 1 << 32)
    signs = (0,) if p is None else tuple(p.signs)
    groups = x.groups if signs == (0,) else pass_groups(x, p, "int8_linear", site)
    rows = x.shape[0] // x.groups
    values = x.values.contiguous()
    tail = (0, 1, [0], 7, 0.0, 1) if signs == (0,) else p.schema_args()
    key = p.key if p is not None else counters(x, 2)

    def run(what, acc, peak, out, exponent):
        _linear(
            values, weight, bias, x.exponent, weight_exponent, bias_exponent, key, site, bias_site, what, rounding, weights,
            relu, *tail, acc, peak, out, exponent,
        )  # fmt: skip

    def run_once(acc, peak, out, exponent, arrived):
        _once(
            values, weight, bias, x.exponent, weight_exponent, bias_exponent, key, site, bias_site, rounding, weights, relu,
            *tail, acc, peak, out, exponent, arrived,
        )  # fmt: skip

    shape = (groups * rows, *x.shape[1:-1], weight.shape[0])
    few = math.prod(shape) // groups * len(signs) <= MOST_ONCE
    return multiply(x, shape, groups, strategy, rounding, relu, weight_exponent, run, run_once if few else None)
