"""Integer operators between the products: ReLU, pooling, residual addition, and the rounding operator itself.

ReLU and pooling keep the exponent. A sum aligns its summands: the one with the larger exponent is shifted left by at most 16,
the other one right by what is left, to nearest; then the sum is requantised as a product is, one shift a group.
"""

from __future__ import annotations

import torch

from . import _constants as C
from . import _cpu
from ._library import launcher, register
from ._perturbation import check_devices
from .int8_matmul import PEAK, REQUANTIZE, check_input, shift_of
from .int8_pass import ROUNDINGS, check_rounding
from .int8_tensor import Int8Tensor, counters, new
from .noise import check_index, check_rounds, key_words, row_ids


def rounding_lanes(key: torch.Tensor, site: int, rows: int, columns: int, query: int, rounds: int):
    """Stream 4 of a site as numpy uint16 [rows, columns]."""
    import numpy as np

    N = _cpu.noises()

    k0, k1 = key_words(key)
    lanes = np.empty((rows, -(-columns // 8) * 8), np.uint16)
    N.lanes(lanes, k0, k1, np.uint32(site), np.uint32(query << 8 | C.STREAM_ROUNDING), row_ids(rows), rounds)
    return np.ascontiguousarray(lanes[:, :columns])


# ---------------------------------------------------------------------------------------------------------------- rounding


def _round_cpu(x, shift, rounding, key, site, query, rounds, out) -> None:
    import numpy as np

    K = _cpu.integers()

    mode = ROUNDINGS.index(rounding)
    columns = x.shape[-1] if x.dim() else 1
    lanes = np.empty(0, np.uint16)
    if rounding == "stochastic":
        lanes = rounding_lanes(key, site, x.numel() // columns, columns, query, rounds).ravel()
    K.round_array(x.contiguous().view(-1).numpy(), shift, mode, lanes, out.view(-1).numpy())


_round = register(
    "int8_round",
    "(Tensor x, int shift, str rounding, Tensor key, int site, int query, int rounds, Tensor(a!) out) -> ()",
    cpu=_round_cpu,
    cuda=launcher("_int8_pointwise_triton", "launch_round"),
)


def round_shift(
    x: torch.Tensor, shift: int, rounding: str = "nearest", *, key=None, site: int = 0, query: int = 0, rounds: int = 7
) -> torch.Tensor:
    """NITI's rounding operators: ``clamp(round(x / 2**shift), -127, 127)`` (arXiv 2009.13108, as in its code).

    ``nearest`` takes halves away from zero. ``pseudo`` compares the upper ceil(n/2) of the n discarded bits with the lower ones
    (doubled when n is odd) and rounds away from zero if they are larger. ``stochastic`` compares them with n random bits.

    Args:
        x: int32, any shape; logical rows are its leading dimensions.
        shift: 0 to 31.
        rounding: ``nearest``, ``pseudo`` or ``stochastic``.
        key, site, query, rounds: of the noise contract's stream 4, for ``stochastic``.

    Returns:
        int8 of x's shape.

    Raises:
        TypeError: x is not int32. ValueError: a number out of range, an unknown rounding, no key, devices that differ.
    """
    if x.dtype != torch.int32:
        raise TypeError(f"round_shift takes int32, got {x.dtype}")
    check_rounding(rounding)
    shift = check_index(shift, "shift", 32)
    if key is None:
        if rounding == "stochastic":
            raise ValueError("stochastic rounding needs key=, of ezo_kernels.ops.noise.key_tensor(seed, step)")
        key = torch.zeros(2, dtype=torch.int32, device=x.device)
    check_devices("round_shift", x, key)
    site, query, rounds = check_index(site, "site", 1 << 32), check_index(query, "query", 1 << 24), check_rounds(rounds)
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if out.numel():
        _round(x.contiguous(), shift, rounding, key, site, query, rounds, out)
    return out


# -------------------------------------------------------------------------------------------------------- ReLU and pooling


def _relu_cpu(x, out) -> None:
    K = _cpu.integers()

    K.relu(x.view(-1).numpy(), out.view(-1).numpy())


def _relu_cuda(x, out) -> None:
    from ._int8_pointwise_triton import launch_relu

    launch_relu(x, out)


_relu = register("int8_relu", "(Tensor x, Tensor(a!) out) -> ()", cpu=_relu_cpu, cuda=_relu_cuda)


def int8_relu(x: Int8Tensor) -> Int8Tensor:
    """max(x, 0), the same exponents."""
    check_input(x, "int8_relu")
    y = new(x, x.shape)
    if y.values.numel() and not x.values.is_meta:
        _relu(x.values.contiguous(), y.values)
    return y


def _pool_cpu(x, kind, kernel, stride, padding, out) -> None:
    K = _cpu.integers()

    run = K.max_pool2d if kind == "max" else K.avg_pool2d
    planes = x.shape[0] * x.shape[1]
    run(x.view(planes, *x.shape[2:]).numpy(), *kernel, *stride, *padding, out.view(planes, *out.shape[2:]).numpy())


_pool = register(
    "int8_pool2d",
    "(Tensor x, str kind, int[2] kernel, int[2] stride, int[2] padding, Tensor(a!) out) -> ()",
    cpu=_pool_cpu,
    cuda=launcher("_int8_pointwise_triton", "launch_pool"),
)


def _pair(value, name: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < 0:
        raise ValueError(f"{name} must be one or two integers of at least 0, got {value}")
    return pair


def int8_pool2d(x: Int8Tensor, kind: str, kernel, stride=None, padding=0) -> Int8Tensor:
    """Max or average pooling, the same exponents; an average is over the whole window, halves away from zero.

    Args:
        x: [groups * B, C, H, W].
        kind: ``max`` or ``avg``.
        kernel, stride, padding: as torch's; the stride is the kernel by default.

    Raises:
        ValueError: a window that is larger than the padded x, a padding of more than half of it, no 4-D x.
    """
    check_input(x, "int8_pool2d")
    if kind not in ("max", "avg") or x.dim() != 4:
        raise ValueError(f"int8_pool2d: kind must be max or avg and x 4-D, got {kind!r} and {tuple(x.shape)}")
    kernel = _pair(kernel, "kernel")
    stride = kernel if stride is None or stride == [] else _pair(stride, "stride")
    padding = _pair(padding, "padding")
    if min(kernel) < 1 or min(stride) < 1 or any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        raise ValueError(f"int8_pool2d: kernel {kernel}, stride {stride}, padding {padding} make no window")
    if kind == "avg" and kernel[0] * kernel[1] > 1 << 16:
        raise ValueError(f"int8_pool2d: {kernel[0] * kernel[1]} values in a window, 65536 is the most")
    size = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(x.shape[2:], padding, kernel, stride, strict=True)]
    if min(size) < 1:
        raise ValueError(f"int8_pool2d: the window {kernel} is larger than the padded x {tuple(x.shape)}")
    y = new(x, (*x.shape[:2], *size))
    if y.values.numel() and not x.values.is_meta:
        _pool(x.values.contiguous(), kind, kernel, stride, padding, y.values)
    return y


# ---------------------------------------------------------------------------------------------------------------- addition


def add_shifts(a_exponent: int, b_exponent: int) -> tuple[int, int, int]:
    """Shifts (left if positive) of both summands, and the exponent of the sum."""
    low = max(min(a_exponent, b_exponent), max(a_exponent, b_exponent) - C.ADD_SHIFT)
    return a_exponent - low, b_exponent - low, low


def _add_cpu(a, b, a_exponent, b_exponent, what, peak, out, exponent) -> None:
    import numpy as np

    K = _cpu.integers()

    groups, none = peak.numel(), np.empty(0, np.int8)
    parts, others = a.view(a_exponent.numel(), -1), b.view(b_exponent.numel(), -1)
    peaks, exponents = peak.numpy(), exponent.numpy()
    for g in range(groups):
        i, j = min(g, len(parts) - 1), min(g, len(others) - 1)
        a_shift, b_shift, low = add_shifts(int(a_exponent[i]), int(b_exponent[j]))
        shift = shift_of(peaks[g]) if what == REQUANTIZE else 0
        to = out.view(groups, -1)[g].numpy() if what == REQUANTIZE else none
        largest = K.add(parts[i].numpy(), others[j].numpy(), a_shift, b_shift, what, shift, to)
        if what == REQUANTIZE:
            exponents[g] = low + shift
        else:
            peaks[g] = largest


_add = register(
    "int8_add",
    "(Tensor a, Tensor b, Tensor a_exponent, Tensor b_exponent, int what, Tensor(a!) peak, Tensor(b!) out, "
    "Tensor(c!) exponent) -> ()",
    cpu=_add_cpu,
    cuda=launcher("_int8_pointwise_triton", "launch_add"),
)


def int8_add(a: Int8Tensor, b: Int8Tensor) -> Int8Tensor:
    """a + b, aligned and requantised; either may have one group that all groups of the other share.

    Raises:
        TypeError: not two Int8Tensors. ValueError: shapes or groups that do not go together.
    """
    check_input(a, "int8_add")
    check_input(b, "int8_add")
    rows = [t.shape[0] // t.groups for t in (a, b)]
    groups = max(a.groups, b.groups)
    if rows[0] != rows[1] or a.shape[1:] != b.shape[1:] or min(a.groups, b.groups) not in (1, groups):
        raise ValueError(
            f"int8_add: {tuple(a.shape)} of {a.groups} groups and {tuple(b.shape)} of {b.groups} do not go together"
        )
    if not b.values.is_meta:
        check_devices("int8_add", a.values, b.values)
    # a summand that is a constant has neither the memory of the pass nor, in a trial of it, its device
    like = next((t for t in (a, b) if t.tape is not None), a if a.memory is not None else b)
    y = new(like, (groups * rows[0], *a.shape[1:]), groups)
    peak = counters(y, groups)
    if y.values.numel() and not y.values.is_meta:
        args = (a.values.contiguous(), b.values.contiguous(), a.exponent, b.exponent)
        _add(*args, PEAK, peak, y.values, y.exponent)
        _add(*args, REQUANTIZE, peak, y.values, y.exponent)
    return y
