"""The numba kernels, imported when the first of them is called: importing the package should not wait for a compiler.

An import statement in a function costs a microsecond at each call, which a step of small layers pays a hundred times.
"""

from __future__ import annotations

import functools


@functools.cache
def _keep_pages() -> None:
    """Have freed memory kept for the next step.

    glibc hands it back, to be faulted in again page by page, until it has seen a block freed that is larger than what a step
    frees at once (mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD: it learns from blocks up to 32 MiB, and keeps twice as
    much). All groups in one batch free more at once than the same model alone: a step of four convolutions of 16 images took
    31 ms, and takes 16. An untouched block costs nothing.
    """
    import torch

    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)


@functools.cache
def noises():
    """:mod:`._noise_cpu`"""
    from . import _noise_cpu

    _keep_pages()
    return _noise_cpu


@functools.cache
def convolutions():
    """:mod:`._conv_cpu`"""
    from . import _conv_cpu

    _keep_pages()
    return _conv_cpu


@functools.cache
def integers():
    """:mod:`._int8_cpu`"""
    from . import _int8_cpu

    _keep_pages()
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
