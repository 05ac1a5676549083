"""The key of a step on the device: seed and step are tensors, so that a captured step goes on by itself (docs/rng.md).

    key = words 0 and 1 of philox10(step low, step high, 0, KEY_TAG; seed low, seed high)

| tensor | shape |
|---|---|
| seed, step | int64 [1] |
| key | int32 [2] |
"""

from __future__ import annotations

import torch

from ._noise_triton import _KEY_TAG, ASM, philox
from ._triton import jit, require, tl
from ._variants import Variant


@jit
def fold_key_kernel(seed_ptr, step_ptr, key_ptr, ASM: tl.constexpr):
    seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    step = tl.load(step_ptr).to(tl.uint64, bitcast=True)
    zero = step.to(tl.uint32) * 0
    w0, w1, _, _ = philox(
        step.to(tl.uint32), (step >> 32).to(tl.uint32), zero, zero + _KEY_TAG,
        seed.to(tl.uint32), (seed >> 32).to(tl.uint32), 10, ASM,
    )  # fmt: skip
    tl.store(key_ptr, w0.to(tl.int32, bitcast=True))
    tl.store(key_ptr + 1, w1.to(tl.int32, bitcast=True))


def launch_fold_key(seed: torch.Tensor, step: torch.Tensor, key: torch.Tensor) -> None:
    """The step's key, on the device.

    Args:
        seed, step: int64 [1].
        key: int32 [2], overwritten.
    """
    require()
    with torch.cuda.device_of(key):
        fold_key_kernel[(1,)](seed, step, key, ASM=ASM, num_warps=1, enable_fp_fusion=False)


def variants():
    """For the static report and the compile tests."""
    yield Variant(
        kernel=fold_key_kernel,
        name="fold_key",
        signature={"seed_ptr": "*i64", "step_ptr": "*i64", "key_ptr": "*i32"},
        constexprs={"ASM": True},
        num_warps=1,
        num_stages=3,
    )
