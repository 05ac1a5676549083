"""Integer losses and the head's first error on the GPU; formulas in :mod:`.int8_loss`, integers as in :mod:`._int8_cpu`.

| tensor | shape |
|---|---|
| logits, out | int8 [groups, rows, classes], contiguous |
| exponent | int32 [groups] |
| labels | int64 [rows] |
| losses | int64 [groups], zero at first |
| g, total, arrived | int32 [queries], int64 [], int32 [1], zero at first; or nothing |
| y, error; target | int8 [groups, size]; [size] |

A program takes R rows of one group and goes over their classes in blocks of C, once a sum that it needs. The largest
logit is found before it is scaled, which keeps the order. Sums over rows are int64 atomic additions: exact in any order.
With g the last program to have added makes g and the sum of all groups (:mod:`._int8_signs_triton`).
"""

from __future__ import annotations

import torch

from . import _constants as K
from ._int8_pointwise_triton import _variant, rounding_lanes
from ._int8_signs_triton import form_of, signs_by_the_last
from ._int8_triton import STOCHASTIC, bit_length, check_grid, clamp8, round_shift, shifted
from ._noise_triton import ASM, signed32
from ._tiles import one_program
from ._triton import constexpr, jit, require, tl
from .int8_pass import GRADIENT_SITE

_LOG2_E, _LOG2_E_BITS, _LOGIT_SHIFT = map(constexpr, (K.LOG2_E, K.LOG2_E_BITS, K.LOGIT_SHIFT))
_R1, _R2, _R3, _R4, _R5, _R6, _R7, _R8 = map(constexpr, K.ROOTS[1:])
_WARPS, _BLOCK = 4, 1024


@jit
def _logit(v, exponent, FRACTION: tl.constexpr):
    """log2(e) v 2^exponent with FRACTION bits behind the point, rounded down, int64; v int32."""
    k = exponent + (FRACTION - _LOG2_E_BITS)
    t = (v * _LOG2_E).to(tl.int64) << tl.minimum(tl.maximum(k, 0), _LOGIT_SHIFT)
    return t >> tl.minimum(tl.maximum(-k, 0), 62)


@jit
def _factor(e, f, BIT: tl.constexpr, ROOT: tl.constexpr):
    """e times 2^-30 ROOT if bit BIT of f is set; uint32."""
    if BIT >= 0:
        e = tl.where(((f >> BIT) & 1) != 0, ((e.to(tl.uint64) * ROOT) >> 30).to(tl.uint32), e)
    return e


@jit
def exp2_fraction(f, FRACTION: tl.constexpr):
    """2^(30 - f / 2^FRACTION) as uint32 for int32 0 <= f < 2^FRACTION: a product over the bits of f."""
    e = (f * 0 + (1 << 30)).to(tl.uint32)
    e = _factor(e, f, FRACTION - 1, _R1)
    e = _factor(e, f, FRACTION - 2, _R2)
    e = _factor(e, f, FRACTION - 3, _R3)
    e = _factor(e, f, FRACTION - 4, _R4)
    e = _factor(e, f, FRACTION - 5, _R5)
    e = _factor(e, f, FRACTION - 6, _R6)
    e = _factor(e, f, FRACTION - 7, _R7)
    return _factor(e, f, FRACTION - 8, _R8)


@jit
def log2_fraction(s, FRACTION: tl.constexpr):
    """floor(2^FRACTION log2(s)) of int64 s >= 1, by repeated squaring of a 31-bit mantissa."""
    n = bit_length(s) - 1
    m = (s >> tl.maximum(n - 30, 0)) << tl.maximum(30 - n, 0)
    out = n.to(tl.int64)
    for _ in tl.static_range(FRACTION):
        m = (m * m) >> 30
        carry = m >> 31
        m = m >> carry
        out = out * 2 + carry
    return out


@jit
def _top(at, inside_r, classes, C: tl.constexpr):
    """The largest logit of each row, int32 [R, 1]; ``at`` [R, 1] points to the rows' first."""
    c = tl.arange(0, C)[None, :]
    top = tl.load(at, mask=inside_r, other=0).to(tl.int32)
    for first in range(0, classes, C):
        v = tl.load(at + (first + c), mask=inside_r & (first + c < classes), other=-128).to(tl.int32)
        top = tl.maximum(top, tl.max(v, axis=1)[:, None])
    return top


@jit
def int8_cross_entropy_kernel(
    logits_ptr, exponent_ptr, labels_ptr, losses_ptr, arrived_ptr, g_ptr, total_ptr, rows, classes,
    FRACTION: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FORM: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The grid is (blocks of rows, groups)."""
    group = tl.program_id(1)
    r = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    c = tl.arange(0, C)[None, :]
    inside_r = r < rows
    at = logits_ptr + (group.to(tl.int64) * rows + r) * classes
    exponent = tl.load(exponent_ptr + group)
    top = _logit(_top(at, inside_r, classes, C), exponent, FRACTION)
    s = tl.zeros((R, 1), tl.int64)
    for first in range(0, classes, C):
        inside = inside_r & (first + c < classes)
        v = tl.load(at + (first + c), mask=inside, other=0).to(tl.int32)
        below = top - _logit(v, exponent, FRACTION)
        whole = below >> FRACTION
        inside = inside & (whole < 31)
        # a shift by more bits than there are is left to no instruction
        e = exp2_fraction((below & ((1 << FRACTION) - 1)).to(tl.int32), FRACTION) >> tl.where(inside, whole, 0).to(
            tl.uint32
        )
        s += tl.sum(tl.where(inside, e, 0).to(tl.int64), axis=1)[:, None]
    label = tl.load(labels_ptr + r, mask=inside_r, other=0)
    # a label that is no class reads the logit of one: what that gives is undefined, where it reads is not
    label = tl.minimum(tl.maximum(label, 0), classes - 1)
    own = _logit(tl.load(at + label, mask=inside_r, other=0).to(tl.int32), exponent, FRACTION)
    loss = top - own + (log2_fraction(tl.where(inside_r, s, 1), FRACTION) - (30 << FRACTION))
    tl.atomic_add(losses_ptr + group, tl.sum(tl.where(inside_r, loss, 0)), sem="relaxed")
    signs_by_the_last(losses_ptr, arrived_ptr, g_ptr, total_ptr, FORM, GROUPS)


@jit
def int8_squared_error_kernel(
    y_ptr, exponent_ptr, target_ptr, target_exponent_ptr, losses_ptr, arrived_ptr, g_ptr, total_ptr, error_ptr, size,
    FRACTION: tl.constexpr, ERROR: tl.constexpr, BLOCK: tl.constexpr, FORM: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The grid is (blocks of a group, groups). int64 wherever a clamp is yet to come."""
    group = tl.program_id(1)
    within = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = within < size
    at = group.to(tl.int64) * size + within
    y = tl.load(y_ptr + at, mask=inside, other=0).to(tl.int64)
    target = tl.load(target_ptr + within, mask=inside, other=0).to(tl.int64)
    k = tl.load(exponent_ptr + group) - tl.load(target_exponent_ptr) + FRACTION
    d = shifted(y, k, 24, 62) - (target << FRACTION)
    d = tl.minimum(tl.maximum(d, -(1 << 20)), 1 << 20)
    tl.atomic_add(losses_ptr + group, tl.sum(tl.where(inside, d * d, 0)), sem="relaxed")
    if ERROR:
        d = d.to(tl.int32)
        magnitude = (tl.abs(d) + ((1 << FRACTION) >> 1)) >> FRACTION
        tl.store(error_ptr + at, clamp8(tl.where(d < 0, -magnitude, magnitude)).to(tl.int8), mask=inside)
    signs_by_the_last(losses_ptr, arrived_ptr, g_ptr, total_ptr, FORM, GROUPS)


@jit
def _toward_zero(t, n):
    magnitude = tl.abs(t) >> n
    return tl.where(t < 0, -magnitude, magnitude)


@jit
def _niti_logit(v, exponent):
    """NITI's scaled logit where exponents are large: every step rounds towards zero. int64, in v's order."""
    t = _toward_zero(v * _LOG2_E, _LOG2_E_BITS).to(tl.int64)
    return _toward_zero(t << tl.minimum(tl.maximum(exponent, 0), 32), tl.maximum(-exponent, 0))


@jit
def _niti_weights(v, top, exponent):
    """Unnormalised softmax weights, int64; v int32 logits, ``top`` int64 of :func:`_niti_logit`."""
    if exponent > -7:
        bits = tl.maximum(_niti_logit(v, exponent) - (top - 10), 0)
        w = (tl.full((), 1, tl.int64) << bits) - 1
    else:
        s = tl.maximum(exponent, -24)
        t = (v >> tl.minimum(s - exponent, 31)).to(tl.int64)
        w = (t << (1 - s)) + t * t + (tl.full((), 1, tl.int64) << (1 - 2 * s))
    return w


@jit
def _quotient(w, total):
    """(w << 11) // total as int32 for 0 <= w <= total: twelve steps of a long division."""
    q = (w * 0).to(tl.int32)
    for _ in tl.static_range(12):
        fits = w >= total
        q = q * 2 + fits.to(tl.int32)
        w = tl.where(fits, w - total, w) * 2
    return q


@jit(do_not_specialize=["site", "query"])
def int8_gradient_kernel(
    logits_ptr, exponent_ptr, labels_ptr, key_ptr, out_ptr, site, query, rows, classes,
    R: tl.constexpr, C: tl.constexpr, ROUNDS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The grid is (blocks of rows, groups); a group is a query of the rounding words, the first one ``query``."""
    group = tl.program_id(1)
    r = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    c = tl.arange(0, C)[None, :]
    inside_r = r < rows
    row_at = (group.to(tl.int64) * rows + r) * classes
    at = logits_ptr + row_at
    exponent = tl.load(exponent_ptr + group)
    # the other branch needs no largest logit, and shifts by these exponents mean nothing there
    top = _niti_logit(_top(at, inside_r, classes, C), tl.maximum(exponent, -7))
    total = tl.zeros((R, 1), tl.int64)
    for first in range(0, classes, C):
        inside = inside_r & (first + c < classes)
        v = tl.load(at + (first + c), mask=inside, other=0).to(tl.int32)
        total += tl.sum(tl.where(inside, _niti_weights(v, top, exponent), 0), axis=1)[:, None]
    total = tl.where(inside_r, total, 1)
    given = tl.zeros((R, 1), tl.int32)
    for first in range(0, classes, C):
        inside = inside_r & (first + c < classes)
        v = tl.load(at + (first + c), mask=inside, other=0).to(tl.int32)
        q = _quotient(_niti_weights(v, top, exponent), total)
        given += tl.sum(tl.where(inside, q, 0), axis=1)[:, None]
    label = tl.load(labels_ptr + r, mask=inside_r, other=0)
    for first in range(0, classes, C):
        inside = inside_r & (first + c < classes)
        v = tl.load(at + (first + c), mask=inside, other=0).to(tl.int32)
        q = _quotient(_niti_weights(v, top, exponent), total)
        q = tl.where(label == first + c, q - given, q)
        lanes = rounding_lanes(key_ptr, site, query + group, r, first, C, ROUNDS, ASM)
        y = clamp8(round_shift(q, tl.full((), 4, tl.int32), lanes, STOCHASTIC)).to(tl.int8)
        tl.store(out_ptr + row_at + (first + c), y, mask=inside)


# ---------------------------------------------------------------------------------------------------------- launchers


def loss_tile(classes: int) -> tuple[int, int]:
    """Rows and classes of a program's block, 1024 values together; at least 8 classes, a block of rounding words."""
    columns = min(1024, max(8, 1 << (classes - 1).bit_length()))
    return 1024 // columns, columns


def _grid(name: str, logits, groups: int) -> tuple[int, int, int, int]:
    """Rows of a group, blocks of them, and the block."""
    rows = logits.shape[0] // groups
    block = loss_tile(logits.shape[1])
    if max(rows + block[0], logits.shape[1] + block[1]) >= 1 << 31:
        raise NotImplementedError(f"{name}: {rows} rows of {logits.shape[1]} classes: 2^31 is the limit")
    check_grid(name, groups)
    return rows, -(-rows // block[0]), *block


def _signs(groups: int, antithetic: bool, g) -> dict:
    """What :func:`signs_by_the_last` is compiled for."""
    form = form_of(g, antithetic)
    return {"FORM": form, "GROUPS": one_program(groups)[0] if form else 0}


def launch_cross_entropy(logits, exponent, labels, fraction, losses, antithetic, g, total, arrived) -> None:
    """Add each group's loss to ``losses``, and write ``g`` and ``total`` if there is a g; contiguous tensors."""
    require()
    groups = losses.numel()
    rows, blocks, r, c = _grid("int8_cross_entropy", logits, groups)
    with torch.cuda.device_of(logits):
        int8_cross_entropy_kernel[(blocks, groups)](
            logits, exponent, labels, losses, arrived, g, total, rows, logits.shape[1], FRACTION=fraction, R=r, C=c,
            **_signs(groups, antithetic, g), num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def launch_squared_error(
    y, exponent, target, target_exponent, fraction, losses, antithetic, g, total, arrived, error
) -> None:
    """Add each group's loss to ``losses``, write ``g`` and ``total`` if there is a g, and ``error`` unless it is empty;
    contiguous tensors.
    """
    require()
    groups, size = losses.numel(), target.numel()
    check_grid("int8_squared_error", groups)
    with torch.cuda.device_of(y):
        # of no values, too: their g is zero
        int8_squared_error_kernel[(max(1, -(-size // _BLOCK)), groups)](
            y, exponent, target, target_exponent, losses, arrived, g, total, error, size, FRACTION=fraction,
            ERROR=error.numel() > 0, BLOCK=_BLOCK, **_signs(groups, antithetic, g), num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def launch_gradient(logits, exponent, labels, key, query, rounds, out) -> None:
    """Write NITI's error of every group, the first of which rounds by the words of ``query``; contiguous tensors."""
    require()
    groups = exponent.numel()
    rows, blocks, r, c = _grid("int8_cross_entropy_gradient", logits, groups)
    with torch.cuda.device_of(logits):
        int8_gradient_kernel[(blocks, groups)](
            logits, exponent, labels, key, out, signed32(GRADIENT_SITE), query, rows, logits.shape[1], R=r, C=c,
            ROUNDS=rounds, ASM=ASM, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- variants


def variants():
    """Ten classes and a thousand, with g of a pair or of one sign, too; for the static report and the compile tests."""
    require()
    results = {"arrived_ptr": "i32", "g_ptr": "i32", "total_ptr": "i64"}
    without = {**dict.fromkeys(results), "FORM": 0, "GROUPS": 0}
    steps = {"pair": {"FORM": 2, "GROUPS": one_program(2)[0]}, "one_sign": {"FORM": 1, "GROUPS": one_program(64)[0]}}
    kinds = {"logits_ptr": "i8", "exponent_ptr": "i32", "labels_ptr": "i64"}
    for classes in (10, 1000):
        block = dict(zip("RC", loss_tile(classes), strict=True))
        for fraction in (0, 8):
            yield _variant(
                int8_cross_entropy_kernel, f"int8_cross_entropy/{classes}/{fraction}", {**kinds, "losses_ptr": "i64"},
                ("rows", "classes"), {"FRACTION": fraction, **block, **without}, representative=fraction == 8,
            )  # fmt: skip
        for how, form in steps.items() if classes == 10 else ():
            yield _variant(
                int8_cross_entropy_kernel, f"int8_cross_entropy/10/8/{how}", {**kinds, "losses_ptr": "i64", **results},
                ("rows", "classes"), {"FRACTION": 8, **block, **form},
            )  # fmt: skip
        yield _variant(
            int8_gradient_kernel, f"int8_gradient/{classes}", {**kinds, "key_ptr": "i32", "out_ptr": "i8"},
            ("site", "query", "rows", "classes"), {**block, "ROUNDS": 7, "ASM": True}, expects=("multiply",),
        )  # fmt: skip
    for gradient, how in ((False, ""), (True, ""), (True, "/pair")):
        kinds = {
            **dict.fromkeys(("y_ptr", "target_ptr", "error_ptr"), "i8"),
            **dict.fromkeys(("exponent_ptr", "target_exponent_ptr"), "i32"),
            "losses_ptr": "i64",
        }
        yield _variant(
            int8_squared_error_kernel, f"int8_squared_error/{'gradient' if gradient else 'loss'}{how}",
            {**kinds, **(results if how else {})}, ("size",),
            {"FRACTION": 8, "ERROR": gradient, "BLOCK": _BLOCK, **(steps["pair"] if how else without)},
        )  # fmt: skip
