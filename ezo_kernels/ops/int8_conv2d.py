"""Integer convolution of every group of a pass: the linear layer's arithmetic (:mod:`.int8_matmul`) as an implicit GEMM.

| tensor | shape |
|---|---|
| x | int8 [groups * B, C, H, W], or [B, C, H, W] of one group shared by all |
| W, b | int8 [O, C / g, R, S], [O]; row o, column (r S + s) pad(C / g) + c in the noise contract |
| y | int8 [groups * B, O, H', W']; of windows of 2 x 2, each the largest of its four, [groups * B, O, H' // 2, W' // 2] |
"""

from __future__ import annotations

import dataclasses

import torch

from . import _cpu, int8_matmul
from ._int8_slab import check_way, choose, reserve
from ._library import register
from ._perturbation import check_devices
from .conv2d import output_size, pooled_size
from .int8_matmul import (
    CHUNK_BYTES,
    PEAK,
    REQUANTIZE,
    STORE,
    TWICE,
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
from .int8_pointwise import int8_pool2d
from .int8_tensor import Int8Tensor
from .noise import Noise, check_index


def _conv2d_cpu(
    x, w, b, x_exponent, w_exponent, b_exponent, key, site, bias_site, stride, padding, dilation, conv_groups, size,
    what, rounding, weights, relu, pool, query, queries, signs, rounds, p_zero, r_max, acc, peak, out, exponent,
) -> None:  # fmt: skip
    import numpy as np

    workspace, C, products = _cpu.integers().workspace, _cpu.integer_convolutions(), _cpu.integer_products()

    noise = Noise("sparse_int8", rounds, p_zero, r_max)
    groups, outputs, k = peak.numel(), w.shape[0], w[0].numel()
    parts = x.chunk(x_exponent.numel())
    tail = (groups, query, signs, noise)
    perturbed = perturbed_weights(w, key, site, "conv", *tail)
    biases = [None] * groups if b is None else perturbed_weights(b, key, bias_site, "matrix", *tail)
    per, channels, kernel, (height, width) = outputs // conv_groups, w.shape[1], w.shape[2:], size
    padded = [n + 2 * pad for n, pad in zip(x.shape[2:], padding, strict=True)]
    pitch = padded[1] if tuple(stride) == (1, 1) else width
    area = (height // pool) * (width // pool)
    accs = acc.view(groups, -1, outputs, area).numpy() if what == STORE else acc.new_empty(groups, 1, 0, 0).numpy()
    outs = out.view(groups, -1, outputs, area).numpy() if what == TWICE else out.new_empty(groups, 1, 0, 0).numpy()
    # of a stride of one our product reads the planes where they lie; torch's needs them unfolded
    direct = tuple(stride) == (1, 1) and not int8_matmul.library_multiplies()
    an_image = max(4 * per * height * pitch, channels * padded[0] * padded[1]) if direct else k * height * pitch
    most = max(1, CHUNK_BYTES // an_image)
    mode = ROUNDINGS.index(rounding)
    x_exponents, w_scale, peaks, exponents = x_exponent.tolist(), int(w_exponent), peak.numpy(), exponent.numpy()
    pairs = list(zip(perturbed, biases, strict=True))
    # groups that share x are multiplied at once: (groups, their part of x)
    together = [(range(groups), parts[0])] if len(parts) == 1 else [([g], part) for g, part in enumerate(parts)]
    for own, part in together:
        x_scale = x_exponents[min(own[0], len(parts) - 1)]
        many = [pairs[g][0].view(conv_groups, per, k) for g in own]
        stacked = many[0] if len(many) == 1 else torch.cat(many, 1)
        bias = [aligned_bias(pairs[g][1], b_exponent, x_scale, w_scale, outputs) for g in own]
        largest, shifts = [0] * len(own), [0] * len(own)
        once = len(part) <= most and conv_groups == 1  # then the second time finds the sums still there
        for phase in (PEAK, REQUANTIZE) if what == TWICE else (STORE,):
            for first in range(0, len(part), most):
                some = part[first : first + most].numpy()
                images = len(some)
                # a tap of the last plane reads beyond it
                flat = workspace("planes", images * channels * padded[0] * padded[1] + padded[1], np.int8)
                sums = workspace("sums", len(own) * per * images * height * pitch, np.int32)
                sums = sums.reshape(len(own) * per, images, -1)
                for c in range(conv_groups):
                    if not (once and phase == REQUANTIZE):
                        flat[-padded[1] :] = 0
                        C.pad(some, c * channels, *padding, flat[: -padded[1]].reshape(images, channels, *padded))
                        if direct:
                            taps = products.taps_of(images, channels, *padded, tuple(kernel), tuple(dilation))
                            products.planes_product(workspace, stacked[c].numpy(), flat, *taps, height * pitch, sums)
                        else:
                            columns = workspace("columns", k * images * height * pitch, np.int8).reshape(k, -1)
                            C.im2col(
                                flat, images, channels, *padded, *kernel, *stride, *dilation, height, pitch,
                                columns.reshape(k, images, -1),
                            )  # fmt: skip
                            product_cpu(
                                stacked[c], torch.from_numpy(columns), torch.from_numpy(sums.reshape(len(sums), -1))
                            )
                    for i, g in enumerate(own):
                        top = C.finish_conv2d(
                            sums[i * per : (i + 1) * per], bias[i][c * per : (c + 1) * per], height, width, pitch, phase,
                            accs[g, first : first + images], c * per, outputs, shifts[i], mode,
                            relu, pool, outs[g, first : first + images],
                        )  # fmt: skip
                        largest[i] = max(largest[i], int(top))
            shifts = [shift_of(v) for v in largest]
        for i, g in enumerate(own):
            peaks[g] = largest[i]
            if what == TWICE:
                exponents[g] = x_scale + w_scale + shifts[i]


def _conv2d_cuda(*args) -> None:
    from ._int8_conv2d_triton import launch_conv2d

    (*plain, weights, relu, pool), tail = args[:19], args[19:]
    x, w, x_exponent, size, signs = args[0], args[1], args[3], args[13], tail[2]
    rows, columns = x.shape[0] // x_exponent.numel() * size[0] * size[1], w[0].numel()
    way = choose(rows, len(w), columns, tuple(signs), conv=True, asked=weights)
    memory = reserve(way, x, way.workspace_bytes, "int8_conv2d") if way.name == "slab" else None
    if memory is None:
        launch_phases(launch_conv2d, (*plain, relu, pool, *tail), 14)
        return
    from ._int8_slab_triton import launch_conv2d_slab

    launch_conv2d_slab(*plain, relu, pool, *tail, memory)


_conv2d = register(
    "int8_conv2d",
    "(Tensor x, Tensor w, Tensor? b, Tensor x_exponent, Tensor w_exponent, Tensor? b_exponent, Tensor key, int site, "
    "int bias_site, int[2] stride, int[2] padding, int[2] dilation, int conv_groups, int[2] size, int what, str rounding, "
    f"str weights, bool relu, int pool, {SCHEMA}, Tensor(a!) acc, Tensor(b!) peak, Tensor(c!) out, Tensor(d!) exponent) -> ()",
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
    weights: str = "auto",
    relu: bool = False,
    pool: int = 1,
) -> Int8Tensor:
    """Integer convolution of every group; zero padding.

    Args:
        x: [groups of the pass * B, C, H, W], or of one group that all of them share.
        weight: int8 [O, C / groups, R, S]. Never written.
        stride, padding, dilation, groups: as torch's conv2d, in integers.
        relu, pool: then a max-pool of ``pool`` by ``pool`` (1 or 2) and a relu, with the bits of the three. With the strategy
            ``twice`` they are in the kernel that rounds, and what the convolution gives before them is never in memory;
            with ``buffer`` the relu is.
        Others as :func:`ezo_kernels.ops.int8_linear`.

    Returns:
        [groups of the pass * B, O, H' // pool, W' // pool].

    Raises:
        TypeError: an argument that is not of integers.
        ValueError: shapes, an unknown name, C / groups R S past the limit of int32.
    """
    check_input(x, "int8_conv2d")
    check_weight(weight, weight_exponent, bias, bias_exponent, "int8_conv2d")
    check_devices("int8_conv2d", x.values, weight, weight_exponent, bias, bias_exponent, None if p is None else p.key)
    stride, padding, dilation, size = output_size("int8_conv2d", x, weight, bias, stride, padding, dilation, groups)
    check_terms(weight[0].numel(), "int8_conv2d")
    out_size = pooled_size("int8_conv2d", size, pool)
    rounding, weights = of_activations(rounding), check_way(weights)
    site, bias_site = check_index(site, "site", 1 << 32), check_index(bias_site, "bias_site", 1 << 32)
    signs = (0,) if p is None else tuple(p.signs)
    own_groups = x.groups if signs == (0,) else pass_groups(x, p, "int8_conv2d", site)
    values = x.values.contiguous()
    tail = (0, 1, [0], 7, 0.0, 1) if signs == (0,) else p.schema_args()
    key = p.key if p is not None else torch.zeros(2, dtype=torch.int32, device=x.device)
    # accumulators in memory are rounded by a kernel of their own, which every layer shares
    fused = strategy == "twice"
    finish = (relu, pool) if fused else (False, 1)  # relu and the largest of a window commute

    def run(what, acc, peak, out, exponent):
        _conv2d(
            values, weight, bias, x.exponent, weight_exponent, bias_exponent, key, site, bias_site, stride, padding,
            dilation, groups, size, what, rounding, weights, *finish, *tail, acc, peak, out, exponent,
        )  # fmt: skip

    shape = (own_groups * (x.shape[0] // x.groups), weight.shape[0], *(out_size if fused else size))
    y = multiply(x, shape, own_groups, strategy, rounding, relu, weight_exponent, run)
    return y if fused or pool == 1 else int8_pool2d(y, "max", pool)


def int8_conv1d(
    x: Int8Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    p: IntegerPerturbation | None,
    *,
    stride=1,
    padding=0,
    dilation=1,
    **options,
) -> Int8Tensor:
    """Integer 1-D convolution of every group: :func:`int8_conv2d` with a height of one, bit for bit.

    Args:
        x: [groups of the pass * B, C, L], or of one group that all of them share.
        weight: int8 [O, C / groups, S]. Never written.
        stride, padding, dilation: an int or one of it in a tuple.
        options: as of int8_conv2d.

    Returns:
        [groups of the pass * B, O, L'].

    Raises:
        TypeError, ValueError: as int8_conv2d.
    """
    check_input(x, "int8_conv1d")
    if weight.dim() != 3 or x.dim() != 3:
        raise ValueError(f"int8_conv1d: x and weight must be 3-D, got {tuple(x.shape)} and {tuple(weight.shape)}")
    one = [v[0] if isinstance(v, (tuple, list)) and len(v) == 1 else v for v in (stride, padding, dilation)]
    if any(isinstance(v, (tuple, list)) for v in one):
        raise ValueError(f"int8_conv1d: stride, padding and dilation must be one integer each, got {one}")
    y = int8_conv2d(
        dataclasses.replace(x, values=x.values.unsqueeze(2)),
        weight.unsqueeze(2),
        bias,
        p,
        stride=(1, one[0]),
        padding=(0, one[1]),
        dilation=(1, one[2]),
        **options,
    )
    return dataclasses.replace(y, values=y.values.squeeze(2))
