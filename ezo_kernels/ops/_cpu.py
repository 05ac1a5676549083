"""The numba kernels, imported when the first of them is called: importing the package should not wait for a compiler.

An import statement in a function costs a microsecond at each call, which a step of small layers pays a hundred times.
"""

from __future__ import annotations

import functools


@functools.cache
def noises():
    """:mod:`._noise_cpu`"""
    from . import _noise_cpu

    return _noise_cpu


@functools.cache
def convolutions():
    """:mod:`._conv_cpu`"""
    import torch

    from . import _conv_cpu

    # What a convolution gives is freed once it is pooled. glibc hands memory back, to be faulted in page by page at the next
    # step, until it has seen a larger block freed (mallopt(3), M_TRIM_THRESHOLD): an untouched one costs nothing.
    torch.empty(16 << 20, dtype=torch.uint8)
    return _conv_cpu


@functools.cache
def integers():
    """:mod:`._int8_cpu`"""
    from . import _int8_cpu

    return _int8_cpu


@functools.cache
def integer_convolutions():
    """:mod:`._int8_conv_cpu`"""
    from . import _int8_conv_cpu

    return _int8_conv_cpu


@functools.cache
def integer_products():
    """:mod:`._int8_gemm_cpu`"""
    from . import _int8_gemm_cpu

    return _int8_gemm_cpu


@functools.cache
def integer_losses():
    """:mod:`._int8_loss_cpu`"""
    from . import _int8_loss_cpu

    return _int8_loss_cpu
