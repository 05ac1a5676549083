"""Integer products: a linear layer of every group of a pass, and the batched product of the head's backward.

| tensor | shape |
|---|---|
| x | int8 [groups * B, ..., K], or [B, ..., K] of one group shared by all |
| W, b | int8 [N, K], [N]; one exponent each |
| acc | int32 [groups * B, ..., N] = x clamp(W + sign z)^T + clamp(b + sign z') 2^(s_b - s_x - s_W) |
| y | int8 of the same shape: acc / 2^shift of the group, rounded, then a relu if asked for; exponent s_x + s_W + shift |

shift = max(0, bits of the largest |acc| of the group - 7), so a group's values are known only when all its accumulators are.
Strategy ``buffer`` keeps them in an int32 buffer; ``twice`` multiplies twice, first for the maximum alone. Same bits.
"""

from __future__ import annotations

import functools

import torch

from . import _cpu
from ._int8_slab import check_way, choose, pitch_of, reserve
from ._layout import grid
from ._library import launcher, register
from .int8_pass import ROUNDINGS, SCHEMA, STRATEGIES, IntegerPerturbation, check_rounding, check_terms, pass_groups
from .int8_tensor import Int8Tensor, counters, new, scratch
from .noise import Noise, check_index, filler_cpu, row_ids

#: What a product leaves behind: its accumulators, nothing but their largest magnitude, or requantised values; TWICE is the
#: second, then the third.
STORE, PEAK, REQUANTIZE, TWICE = 0, 1, 2, 3


def perturbed_weights(w, key, site: int, layout: str, groups: int, query, signs, noise: Noise):
    """Yield the int8 weight of each group, contiguous, in order (CPU)."""
    K = _cpu.integers()

    w = w.detach().contiguous()
    if tuple(signs) == (0,):
        yield from [w] * groups
        return
    where = grid(w.shape, layout, noise.segment)
    flat = w.view(-1).numpy()
    make = filler_cpu(key, site, where.columns, noise, row_ids(where.rows))
    for q in range(groups // len(signs)):
        z = make(query + q)
        for sign in signs:
            moved = torch.empty_like(w)
            K.perturb(flat, where.taps, z, sign, moved.view(-1).numpy())
            yield moved


def aligned_bias(b, b_exponent, x_exponent, w_exponent, outputs: int):
    """A bias in the unit of the accumulators, numpy int32 [outputs]; zeros without one."""
    import numpy as np

    K = _cpu.integers()

    if b is None:
        return np.zeros(outputs, np.int32)
    out = np.empty(outputs, np.int32)
    K.align_bias(b.numpy(), int(b_exponent), int(x_exponent), int(w_exponent), out)
    return out


#: Bytes of what the CPU unfolds or sums at a time: they stay in the second-level cache.
_CHUNK_BYTES = 1 << 21


@functools.cache
def library_is_exact() -> bool:
    """Whether torch's own int8 product (oneDNN's) is exact on this CPU.

    Without VNNI some add pairs of products in 16 bits, which saturates: asked of the values where it would.
    """
    product = getattr(torch, "_int_mm", None)
    if product is None:
        return False
    for a, b in ((-128, -127), (-128, 127), (127, 127)):
        x = torch.full((17, 150), a, dtype=torch.int8)
        try:
            y = product(x, torch.full((150, 40), b, dtype=torch.int8))
        except RuntimeError:
            return False
        if not bool((y == 150 * a * b).all()):
            return False
    return True


@functools.cache
def library_multiplies() -> bool:
    """Whether torch's own int8 product is taken: it is exact here, and faster than ours.

    It has a kernel where there is AVX-512; elsewhere a reference, 20 to 50 times slower than ours. The bits are the same.
    """
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") and library_is_exact()


def product_cpu(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out int32 [M, N] = a int8 [M, K] b int8 [K, N], exactly; out contiguous."""
    # torch._int_mm takes a matrix of one row or column for its transpose
    if library_multiplies() and 1 not in (*a.shape, *b.shape):
        torch._int_mm(a, b, out=out)
        return
    products, workspace = _cpu.integer_products(), _cpu.integers().workspace
    a = a.contiguous().numpy()
    if b.t().is_contiguous():
        products.dots_product(workspace, a, b.t().numpy(), out.numpy())
    else:
        (k, n), flat = b.shape, b.contiguous().view(-1).numpy()
        products.planes_product(workspace, a, flat, *products.rows_of(k, n), n, out.numpy())


def shift_of(peak: int) -> int:
    """How far accumulators of this largest magnitude are shifted to the right."""
    return max(0, int(peak).bit_length() - 7)


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
    most = rows if what == STORE else max(1, _CHUNK_BYTES // (4 * n))
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


def launch_phases(launch, args, at: int) -> None:
    """Launch a product once, or for TWICE as PEAK and as REQUANTIZE; ``at`` is the place of ``what`` in ``args``."""
    for phase in (PEAK, REQUANTIZE) if args[at] == TWICE else (args[at],):
        launch(*args[:at], phase, *args[at + 1 :])


def _linear_cuda(*args) -> None:
    from ._int8_matmul_triton import launch_linear

    (*plain, weights, relu), tail = args[:13], args[13:]
    x, w, x_exponent, signs = args[0], args[1], args[3], tail[2]
    n, k = w.shape
    way = choose(x.numel() // (k * x_exponent.numel()), n, k, tuple(signs), conv=False, asked=weights)
    memory = reserve(way, x, len(signs) * pitch_of(k), "int8_linear") if way.name == "slab" else None
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


def _requantize_cpu(acc, peak, x_exponent, w_exponent, rounding, relu, out, exponent) -> None:
    K = _cpu.integers()

    groups = peak.numel()
    x_exponents, w_scale, exponents = x_exponent.tolist(), int(w_exponent), exponent.numpy()
    accs, outs = acc.view(groups, -1).numpy(), out.view(groups, -1).numpy()
    for g, largest in enumerate(peak.tolist()):
        shift = shift_of(largest)
        K.requantize(accs[g], shift, ROUNDINGS.index(rounding), relu, outs[g])
        exponents[g] = x_exponents[min(g, len(x_exponents) - 1)] + w_scale + shift


_requantize = register(
    "int8_requantize",
    "(Tensor acc, Tensor peak, Tensor x_exponent, Tensor w_exponent, str rounding, bool relu, Tensor(a!) out, "
    "Tensor(b!) exponent) -> ()",
    cpu=_requantize_cpu,
    cuda=launcher("_int8_pointwise_triton", "launch_requantize"),
)


def requantize(acc, peak, x_exponent, w_exponent, rounding: str) -> Int8Tensor:
    """Accumulators [G * rows, ...] int32 of largest magnitudes ``peak`` [G], as int8 with an exponent a group."""
    y = Int8Tensor(torch.empty(acc.shape, dtype=torch.int8, device=acc.device), torch.empty_like(peak))
    if acc.numel():
        _requantize(acc, peak, x_exponent, w_exponent, _of_activations(rounding), False, y.values, y.exponent)
    return y


def multiply(
    x: Int8Tensor, shape, groups: int, strategy: str, rounding: str, relu: bool, w_exponent, run
) -> Int8Tensor:
    """The two halves of a product: ``run(what, acc, peak, out, exponent)``, once or twice, and the requantisation.

    Args:
        x: whose memory the result lives in.
        shape: of the result. relu: of what ``buffer`` rounds; ``run`` sees to it otherwise.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    peak = counters(x, groups)
    if strategy == "twice":
        y = new(x, shape, groups)
        if y.values.numel() and not x.values.is_meta:
            run(TWICE, torch.empty(0, dtype=torch.int32, device=x.device), peak, y.values, y.exponent)
        return y
    acc, block = scratch(x, shape, torch.int32)
    y = new(x, shape, groups)
    if y.values.numel() and not x.values.is_meta:
        run(STORE, acc, peak, y.values, y.exponent)
        _requantize(acc, peak, x.exponent, w_exponent, rounding, relu, y.values, y.exponent)
    del acc, block
    return y


def check_weight(w, w_exponent, b, b_exponent, name: str) -> None:
    """Dtypes and shapes of a layer's integer parameters."""
    for what, values, exponent in (("weight", w, w_exponent), ("bias", b, b_exponent)):
        if values is None:
            continue
        if values.dtype != torch.int8:
            raise TypeError(
                f"{name}: {what} must be int8, got {values.dtype}; convert_(model, precision='int8') makes it"
            )
        if exponent is None or exponent.dtype != torch.int32 or exponent.numel() != 1:
            raise TypeError(f"{name}: the {what}'s exponent must be int32 [1]")


def check_input(x, name: str) -> None:
    if not isinstance(x, Int8Tensor):
        raise TypeError(
            f"{name} takes an Int8Tensor, got {getattr(x, 'dtype', type(x).__name__)}: quantise the input with "
            "ezo_kernels.quantize(x)"
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
        ValueError: shapes, an unknown name, K past the limit of int32.
    """
    check_input(x, "int8_linear")
    check_weight(weight, weight_exponent, bias, bias_exponent, "int8_linear")
    if weight.dim() != 2 or x.dim() < 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"int8_linear: x {tuple(x.shape)} does not fit the weight {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"int8_linear: bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    check_terms(weight.shape[1], "int8_linear")
    rounding, weights = _of_activations(rounding), check_way(weights)
    site, bias_site = check_index(site, "site", 1 << 32), check_index(bias_site, "bias_site", 1 << 32)
    signs = (0,) if p is None else tuple(p.signs)
    groups = x.groups if signs == (0,) else pass_groups(x, p, "int8_linear", site)
    rows = x.shape[0] // x.groups
    values = x.values.contiguous()
    tail = (0, 1, [0], 7, 0.0, 1) if signs == (0,) else p.schema_args()
    key = p.key if p is not None else torch.zeros(2, dtype=torch.int32, device=x.device)

    def run(what, acc, peak, out, exponent):
        _linear(
            values, weight, bias, x.exponent, weight_exponent, bias_exponent, key, site, bias_site, what, rounding, weights,
            relu, *tail, acc, peak, out, exponent,
        )  # fmt: skip

    shape = (groups * rows, *x.shape[1:-1], weight.shape[0])
    return multiply(x, shape, groups, strategy, rounding, relu, weight_exponent, run)


def _of_activations(rounding: str) -> str:
    if check_rounding(rounding) == "stochastic":
        raise ValueError("activations are rounded to nearest or pseudo-stochastically, not stochastically")
    return rounding


# ----------------------------------------------------------------------------------------------- the head's backward


def _gemm_cpu(x, w, acc, peak) -> None:
    K = _cpu.integers()

    peaks = peak.numpy()
    for g, own in enumerate(acc):
        product_cpu(x[g], w[min(g, len(w) - 1)].t(), own)
        peaks[g] = K.largest(own.view(-1).numpy())


def _gemm_cuda(x, w, acc, peak) -> None:
    from ._int8_matmul_triton import launch_gemm

    launch_gemm(x, w, acc, peak)


_gemm = register(
    "int8_gemm", "(Tensor x, Tensor w, Tensor(a!) acc, Tensor(b!) peak) -> ()", cpu=_gemm_cpu, cuda=_gemm_cuda
)


def int8_gemm(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """acc[g] = x[g] w[g]^T in int32, and its largest magnitude.

    Args:
        x: int8 [G, M, K], any strides.
        w: int8 [G, N, K], or [1, N, K] for all, any strides.

    Returns:
        int32 [G, M, N] and int32 [G].

    Raises:
        TypeError: other dtypes. ValueError: shapes, K past the limit of int32.
    """
    if x.dtype != torch.int8 or w.dtype != torch.int8:
        raise TypeError(f"int8_gemm takes int8, got {x.dtype} and {w.dtype}")
    if x.dim() != 3 or w.dim() != 3 or x.shape[2] != w.shape[2] or w.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"int8_gemm: {tuple(x.shape)} does not fit {tuple(w.shape)}")
    check_terms(x.shape[2], "int8_gemm")
    acc = torch.empty((*x.shape[:2], w.shape[1]), dtype=torch.int32, device=x.device)
    peak = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    if acc.numel():
        _gemm(x, w, acc, peak)
    return acc, peak
