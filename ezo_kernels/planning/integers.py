"""Bytes of a step in integers: the real step of :class:`ezo_kernels.ElasticZOInt8`, run on fake tensors.

The arena (:mod:`ezo_kernels.nn.arena`) holds what flows between layers. Beside it a step makes what the head's backward
needs: int32 gradients of each group, their sum, and errors. Both count here; :meth:`ezo_kernels.ElasticZOInt8.memory` is of the
arena alone.
"""

from __future__ import annotations

import copy
import gc
from dataclasses import replace

from torch import nn

from ..nn.convert import convert_
from ..ops.int8_tensor import Int8Tensor
from ..optim import ElasticZOInt8
from .fake import fake_batch, fake_mode, fake_model
from .live import LiveBytes
from .memory import Parts, check_model, parts_of, storage_bytes, tensors_of


def int8_step_bytes(optimizer: ElasticZOInt8, x: Int8Tensor, y) -> Parts:
    """Bytes of the second :meth:`ezo_kernels.ElasticZOInt8.train_step` of an optimiser, real or fake, that takes two.

    The first one checks the model and makes the arena, which counts among the activations: it lives between steps, too, but as
    room for nothing else. Remainders of the head's weights are state.
    """
    owned = [*optimizer.model.parameters(), *optimizer.model.buffers()]
    live = LiveBytes([*owned, x.values, x.exponent, *(tensors_of((y.values, y.exponent) if _integer(y) else y))])
    with live:
        optimizer.train_step(x, y)
        gc.collect()  # cycles of the first step's checks: when Python frees them is no property of a step
        live.mark_alive("state")
        live.mark([optimizer.arena.buffer], "activations")
        live.restart()
        optimizer.train_step(x, y)
    parts = parts_of(live, storage_bytes(owned))
    return replace(parts, state=parts.state + optimizer.memory()["remainder_bytes"])


def _integer(y) -> bool:
    return isinstance(y, Int8Tensor)


def plan_int8_step(
    model: nn.Module, x: Int8Tensor, y, *, head, mode: str = "stacked", queries: int = 1, **options
) -> Parts:
    """Bytes at the peak of a step in integers, planned without a step: no kernel runs and no activation is made.

    Args:
        model: a plain torch model with an integer form; not touched. A copy is converted, which takes real weights.
        x: one batch. y: int64 [B], or an Int8Tensor for ``loss="squared_error"``.
        head: as :func:`ezo_kernels.convert_` takes it.
        mode, queries, options: of :class:`ezo_kernels.ElasticZOInt8`.

    Raises:
        TypeError: x is no Int8Tensor. ValueError: what :class:`ezo_kernels.ElasticZOInt8` refuses.
        NotImplementedError: a model without an integer form, with every reason.
    """
    check_model(model)
    if not _integer(x):
        raise TypeError(
            f"x must be an Int8Tensor, got {type(x).__name__}: ezo_kernels.quantize(x) makes one; floats have memory_plan"
        )
    twin = convert_(copy.deepcopy(model), head=head, precision="int8")
    fakes = fake_mode(numbers_are_zero=True)  # the optimiser looks whether weights are within their range
    values, exponent = fake_batch((x.values, x.exponent), fakes)
    if _integer(y):
        y = Int8Tensor(*fake_batch((y.values, y.exponent), fakes))
    else:
        y = fake_batch(y, fakes)
    with fakes:
        optimizer = ElasticZOInt8(fake_model(twin, fakes), mode=mode, queries=queries, **options)
        return int8_step_bytes(optimizer, Int8Tensor(values, exponent), y)
