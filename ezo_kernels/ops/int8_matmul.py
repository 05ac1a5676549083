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
from ._layout import grid
from ._library import launcher, register
from ._perturbation import check_devices
from .int8_pass import ROUNDINGS, STRATEGIES, check_rounding, check_terms
from .int8_tensor import Int8Tensor, counters, new, scratch
from .noise import Noise, filler_cpu, row_ids

#: What a product leaves behind: its accumulators, nothing but their largest magnitude, or requantised values; TWICE is the
#: second, then the third, and ONCE the first and the third in one launch.
STORE, PEAK, REQUANTIZE, TWICE, ONCE = 0, 1, 2, 3, 5
#: Accumulators of a pair, or of a group by itself, up to which one program rounds them all: another launch takes longer.
MOST_ONCE = 1 << 13


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
CHUNK_BYTES = 1 << 21


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


def _whole(a: torch.Tensor) -> torch.Tensor:
    """``a`` in memory of its own, by rows or by columns: of elements that share theirs torch._int_mm reads beyond them."""
    return a if a.is_contiguous() or a.t().is_contiguous() else a.contiguous()


def product_cpu(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out int32 [M, N] = a int8 [M, K] b int8 [K, N], exactly; out contiguous."""
    # torch._int_mm takes a matrix of one row or column for its transpose
    if library_multiplies() and 1 not in (*a.shape, *b.shape):
        torch._int_mm(_whole(a), _whole(b), out=out)
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


def launch_phases(launch, args, at: int) -> None:
    """Launch a product once, or for TWICE as PEAK and as REQUANTIZE; ``at`` is the place of ``what`` in ``args``."""
    for phase in (PEAK, REQUANTIZE) if args[at] == TWICE else (args[at],):
        launch(*args[:at], phase, *args[at + 1 :])


def _requantize_cpu(acc, peak, x_exponent, w_exponent, rounding, relu, gate, out, exponent) -> None:
    K = _cpu.integers()

    groups = peak.numel()
    x_exponents, w_scale, exponents = x_exponent.tolist(), int(w_exponent), exponent.numpy()
    accs, outs = acc.view(groups, -1).numpy(), out.view(groups, -1).numpy()
    for g, largest in enumerate(peak.tolist()):
        shift = shift_of(largest)
        K.requantize(accs[g], shift, ROUNDINGS.index(rounding), relu, outs[g])
        exponents[g] = x_exponents[min(g, len(x_exponents) - 1)] + w_scale + shift
    if gate is not None:
        out.view(groups, -1).masked_fill_(gate <= 0, 0)


requantize_into = register(
    "int8_requantize",
    "(Tensor acc, Tensor peak, Tensor x_exponent, Tensor w_exponent, str rounding, bool relu, Tensor? gate, Tensor(a!) out, "
    "Tensor(b!) exponent) -> ()",
    cpu=_requantize_cpu,
    cuda=launcher("_int8_pointwise_triton", "launch_requantize"),
)


def requantize(acc, peak, x_exponent, w_exponent, rounding: str, gate: torch.Tensor | None = None) -> Int8Tensor:
    """Accumulators [G * rows, ...] int32 of largest magnitudes ``peak`` [G], as int8 with an exponent a group.

    ``gate``: int8 of as many elements, or of one group's; results are 0 where it is not above 0, as an error of a relu is.
    """
    y = Int8Tensor(torch.empty(acc.shape, dtype=torch.int8, device=acc.device), torch.empty_like(peak))
    if acc.numel():
        gate = None if gate is None else gate.reshape(-1, acc.numel() // peak.numel())
        requantize_into(acc, peak, x_exponent, w_exponent, of_activations(rounding), False, gate, y.values, y.exponent)
    return y


def multiply(
    x: Int8Tensor, shape, groups: int, strategy: str, rounding: str, relu: bool, w_exponent, run, run_once=None
) -> Int8Tensor:
    """The two halves of a product: ``run(what, acc, peak, out, exponent)``, once or twice, and the requantisation.

    Args:
        x: whose memory the result lives in.
        shape: of the result. relu: of what ``buffer`` rounds; ``run`` sees to it otherwise.
        run_once: both halves of ``buffer``, with a counter a group; None where outputs are too many for one launch.
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
    arrived = None if run_once is None else counters(x, groups)
    if arrived is not None and y.values.numel() and not x.values.is_meta:
        run_once(acc, peak, y.values, y.exponent, arrived)
    elif y.values.numel() and not x.values.is_meta:
        run(STORE, acc, peak, y.values, y.exponent)
        requantize_into(acc, peak, x.exponent, w_exponent, rounding, relu, None, y.values, y.exponent)
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
    x.require_unspent(name)


def of_activations(rounding: str) -> str:
    if check_rounding(rounding) == "stochastic":
        raise ValueError("activations are rounded to nearest or pseudo-stochastically, not stochastically")
    return rounding


# ----------------------------------------------------------------------------------------------- the head's backward


def _gemm_cpu(x, w, acc, peak) -> None:
    K = _cpu.integers()

    for g, own in enumerate(acc):
        product_cpu(x[g], w[min(g, len(w) - 1)].t(), own)
        if peak is not None:
            peak.numpy()[g] = K.largest(own.view(-1).numpy())


def _gemm_cuda(x, w, acc, peak) -> None:
    from ._int8_matmul_triton import launch_gemm

    launch_gemm(x, w, acc, peak)


_gemm = register(
    "int8_gemm", "(Tensor x, Tensor w, Tensor(a!) acc, Tensor(b!)? peak) -> ()", cpu=_gemm_cpu, cuda=_gemm_cuda
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
    peak = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    return gemm(x, w, peak), peak


def gemm(x: torch.Tensor, w: torch.Tensor, peak: torch.Tensor | None) -> torch.Tensor:
    """The accumulators of :func:`int8_gemm`; its magnitudes go into ``peak``, zeros at first, if they are wanted."""
    if x.dtype != torch.int8 or w.dtype != torch.int8:
        raise TypeError(f"int8_gemm takes int8, got {x.dtype} and {w.dtype}")
    if x.dim() != 3 or w.dim() != 3 or x.shape[2] != w.shape[2] or w.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"int8_gemm: {tuple(x.shape)} does not fit {tuple(w.shape)}")
    check_terms(x.shape[2], "int8_gemm")
    check_devices("int8_gemm", x, w)
    acc = torch.empty((*x.shape[:2], w.shape[1]), dtype=torch.int32, device=x.device)
    if acc.numel():
        _gemm(x, w, acc, peak)
    return acc
