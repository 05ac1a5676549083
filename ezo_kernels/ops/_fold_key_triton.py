"""The key of a step on the device: seed and step are tensors, so that a captured step goes on by itself (docs/rng.md).

The same launch clears what an integer step counts in; a float one has nothing of the kind, and no instruction for it.

    key = words 0 and 1 of philox10(step low, step high, 0, KEY_TAG; seed low, seed high)

| tensor | shape |
|---|---|
| seed, step | int64 [1] |
| key | int32 [2] |
| zeros | int32 [count], or nothing |
"""

from __future__ import annotations

import torch

from ._noise_triton import _KEY_TAG, ASM, philox
from ._triton import jit, require, tl
from ._variants import Variant

#: Words that a program clears.
_BLOCK = 256


@jit
def _fold(seed_ptr, step_ptr, key_ptr, ASM: tl.constexpr):
    seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    step = tl.load(step_ptr).to(tl.uint64, bitcast=True)
    zero = step.to(tl.uint32) * 0
    w0, w1, _, _ = philox(
        step.to(tl.uint32), (step >> 32).to(tl.uint32), zero, zero + _KEY_TAG,
        seed.to(tl.uint32), (seed >> 32).to(tl.uint32), 10, ASM,
    )  # fmt: skip
    tl.store(key_ptr, w0.to(tl.int32, bitcast=True))
    tl.store(key_ptr + 1, w1.to(tl.int32, bitcast=True))


@jit(do_not_specialize=["count"])
def fold_key_kernel(seed_ptr, step_ptr, key_ptr, zeros_ptr, count, ASM: tl.constexpr, BLOCK: tl.constexpr):
    """The first program folds the key, each clears BLOCK words."""
    if zeros_ptr is None:
        _fold(seed_ptr, step_ptr, key_ptr, ASM)
    else:
        if tl.program_id(0) == 0:
            _fold(seed_ptr, step_ptr, key_ptr, ASM)
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(zeros_ptr + at, tl.zeros((BLOCK,), tl.int32), mask=at < count)


def launch_fold_key(seed: torch.Tensor, step: torch.Tensor, key: torch.Tensor, zeros=None) -> None:
    """The step's key, on the device.

    Args:
        seed, step: int64 [1].
        key: int32 [2], overwritten.
        zeros: int32, contiguous, cleared; or None.
    """
    require()
    count = 0 if zeros is None else zeros.numel()
    with torch.cuda.device_of(key):
        fold_key_kernel[(max(1, -(-count // _BLOCK)),)](
            seed, step, key, zeros, count, ASM=ASM, BLOCK=_BLOCK, num_warps=1, enable_fp_fusion=False
        )


def variants():
    """Of float and of integer steps, for the static report and the compile tests."""
    pointers = {"seed_ptr": "*i64", "step_ptr": "*i64", "key_ptr": "*i32"}
    for zeros in (False, True):
        yield Variant(
            kernel=fold_key_kernel,
            name="fold_key/zeros" if zeros else "fold_key",
            signature={**pointers, **({"zeros_ptr": "*i32"} if zeros else {}), "count": "i32"},
            constexprs={**({} if zeros else {"zeros_ptr": None}), "ASM": True, "BLOCK": _BLOCK},
            num_warps=1,
            num_stages=3,
        )
