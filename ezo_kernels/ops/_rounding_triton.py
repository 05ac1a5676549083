"""Rounding inside a kernel: of z to 16 bits where its site says so, of operands and sums of products, and the stochastic one of
updated weights."""

from __future__ import annotations

from ._triton import constexpr, jit, tl

_SMALLEST_NORMAL, _ULP, _ULPS, _TWO_M16 = map(constexpr, (2.0**-14, 2.0**-24, 2.0**24, 2.0**-16))


@jit
def of_precision(w, PRECISION: tl.constexpr, ASM: tl.constexpr):
    """A weight as the tensor core shall read it: of fp32 it drops the last 13 bits, which would shrink every product."""
    if ASM and PRECISION == "tf32":
        w = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [w], dtype=tl.float32, is_pure=True, pack=1)
    return w


@jit
def add_product(acc, a, b, PRECISION: tl.constexpr):
    """acc + a b in fp32. Without the tensor core a b has a sum of its own, which is then added: one sum over all of K, term by
    term, would round as often as it has terms."""
    if a.dtype == tl.float32 and PRECISION == "ieee":
        # the last argument means something for fp8 alone: here it keeps the compiler from starting the sum at acc
        acc += tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@jit
def round_z(z, dtype: tl.constexpr, ASM: tl.constexpr):
    """fp32 z rounded to nearest even in ``dtype``, bf16 or fp16, as fp32 again; z is finite."""
    if dtype == tl.bfloat16 and not ASM:
        # the interpreter's own cast truncates
        bits = z.to(tl.int32, bitcast=True)
        out = ((bits + 32767 + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    else:
        out = z.to(dtype).to(tl.float32)
    return out


@jit
def round_stochastic(v, lanes, CODE: tl.constexpr):
    """fp32 rounded to bf16 (CODE 1, as int16) or fp16 (CODE 2), up with the probability of the discarded part."""
    # a NaN may have all bits set: adding to it would make it a number
    lanes = tl.where(v == v, lanes, 0)
    bits = v.to(tl.int32, bitcast=True)
    if CODE == 1:
        out = ((bits + lanes) >> 16).to(tl.int16)
    else:
        normal = ((bits + (lanes >> 3)) & -8192).to(tl.float32, bitcast=True)
        ulps = tl.abs(v) * _ULPS
        whole = tl.floor(ulps)
        small = (whole + tl.floor((ulps - whole) + lanes.to(tl.float32) * _TWO_M16)) * _ULP
        small = (small.to(tl.int32, bitcast=True) | (bits & -2147483648)).to(tl.float32, bitcast=True)
        out = tl.where(tl.abs(v) < _SMALLEST_NORMAL, small, normal).to(tl.float16)
    return out
