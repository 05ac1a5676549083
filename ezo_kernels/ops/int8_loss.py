"""Integer losses and the head's first error.

    cross-entropy of a row, in bits:  log2 sum_j 2^(A_j) - A_label,   A = 47274 2^-15 logit   (47274 2^-15 = 1.44269 = log2 e)

in fixed point with ``fraction`` bits behind the point: A rounded down, sums of 2^(A_j - max) in 2^-30, log2 rounded down. With
no such bit it is the paper's rule, floor(log2 sum). The loss of a group is the sum over its rows, int64; g is the sign of the
difference of two groups, which the same launch makes where it has the losses of all.

| tensor | shape |
|---|---|
| logits | int8 [groups * B, classes], an exponent a group |
| labels | int64 [B] |
| losses | int64 [groups], zeros at first |
| g, total | int32 [queries], int64 [], or nothing (:mod:`.int8_signs`) |
| arrived | int32 [1], zero at first, with g: programs that are done |
"""

from __future__ import annotations

import torch

from . import _constants as C
from . import _cpu
from ._library import launcher, register
from ._perturbation import check_devices
from .int8_matmul import check_input
from .int8_pass import GRADIENT_SITE
from .int8_pointwise import rounding_lanes
from .int8_signs import Signs, signs_cpu
from .int8_tensor import Int8Tensor, counters
from .noise import check_index, check_rounds

#: Fraction bits of the cross-entropy unless said otherwise.
FRACTION_BITS = 8
#: Rows, and values, over all groups of a step whose losses int64 adds up: each row's is below 2^44, each square at most 2^40.
MOST_ROWS, MOST_SQUARES = 1 << 19, 1 << 22


def check_sum(count: int, most: int, what: str) -> None:
    """Refuse losses whose sum int64 could not hold.

    Raises:
        ValueError: more than the limit, which it names.
    """
    if count > most:
        raise ValueError(f"{what} over all groups are {count}; {most} is the most whose losses 64 bits hold the sum of")


def _check_labels(labels: torch.Tensor, classes: int) -> None:
    """Where it costs no wait: on a CPU."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"labels must be in [0, {classes}), got {low if low < 0 else high}")


#: What the operators of both losses end with.
_SIGNS = "bool antithetic, Tensor(b!)? g, Tensor(c!)? total, Tensor(d!)? arrived"


def _arguments(like: Int8Tensor, signs: Signs | None) -> tuple:
    """The last arguments of an operator; they are checked."""
    if signs is None:
        return False, None, None, None
    signs.check(like.groups)
    return signs.antithetic, signs.g, signs.total, counters(like, 1)


def _cross_entropy_cpu(logits, exponent, labels, fraction, losses, antithetic, g, total, arrived) -> None:
    import numpy as np

    K = _cpu.integer_losses()

    _check_labels(labels, logits.shape[1])
    roots = np.array(C.ROOTS, np.int64)
    for i, part in enumerate(logits.chunk(losses.numel())):
        losses[i] = int(K.cross_entropy(part.numpy(), int(exponent[i]), labels.numpy(), fraction, roots))
    if g is not None:
        signs_cpu(losses, antithetic, g, total)


_cross_entropy = register(
    "int8_cross_entropy",
    f"(Tensor logits, Tensor exponent, Tensor labels, int fraction, Tensor(a!) losses, {_SIGNS}) -> ()",
    cpu=_cross_entropy_cpu,
    cuda=launcher("_int8_loss_triton", "launch_cross_entropy"),
)


def _check_logits(logits: Int8Tensor, labels: torch.Tensor, name: str) -> None:
    check_input(logits, name)
    if not isinstance(labels, torch.Tensor):
        kind = type(labels)
        own = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        raise TypeError(f"{name}: labels must be a torch.Tensor, got {own}")
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}: labels must be int64, got {labels.dtype}")
    rows = logits.shape[0] // logits.groups
    if logits.dim() != 2 or labels.shape != (rows,) or not rows:
        raise ValueError(
            f"{name}: logits must be [groups * B, classes] and labels [B], got {tuple(logits.shape)} of {logits.groups} "
            f"groups and {tuple(labels.shape)}"
        )
    check_devices(name, logits.values, labels)


def int8_cross_entropy(
    logits: Int8Tensor, labels: torch.Tensor, *, fraction_bits: int = FRACTION_BITS, signs: Signs | None = None
) -> torch.Tensor:
    """Cross-entropy of each group, summed over its rows, in units of 2^-fraction_bits bits.

    Args:
        logits: [groups * B, classes].
        labels: int64 [B], each in [0, classes); looked at only on a CPU, a GPU gives an undefined loss.
        fraction_bits: 0 (the paper's rule) to 8.
        signs: written, too, in the same launch; the losses are of all groups of a step.

    Returns:
        int64 [groups].

    Raises:
        TypeError: dtypes. ValueError: shapes, fraction_bits out of range, more than 2^19 rows in all groups, signs of other
        groups.
    """
    _check_logits(logits, labels, "int8_cross_entropy")
    check_sum(logits.shape[0], MOST_ROWS, "int8_cross_entropy: rows")
    fraction_bits = check_index(fraction_bits, "fraction_bits", C.MOST_FRACTION_BITS + 1)
    more = _arguments(logits, signs)
    losses = counters(logits, logits.groups, torch.int64)
    _cross_entropy(logits.values.contiguous(), logits.exponent, labels.contiguous(), fraction_bits, losses, *more)
    return losses


def nats(losses: torch.Tensor, rows: int, fraction_bits: int = FRACTION_BITS) -> torch.Tensor:
    """Integer losses as mean cross-entropies in nats, fp64: for people; nothing in a step uses it."""
    return losses.double() * (0.6931471805599453 / (rows << fraction_bits))


# ------------------------------------------------------------------------------------------------------- squared error


def _squared_error_cpu(
    y, exponent, target, target_exponent, fraction, losses, antithetic, g, total, arrived, error
) -> None:
    import numpy as np

    K = _cpu.integer_losses()

    groups = losses.numel()
    errors = error.view(groups, -1) if error.numel() else None
    d = np.empty(target.numel(), np.int64)
    for i, part in enumerate(y.view(groups, -1)):
        K.difference(part.numpy(), int(exponent[i]), target.view(-1).numpy(), int(target_exponent[0]), fraction, d)
        losses[i] = int((d * d).sum())
        if errors is not None:
            half = 1 << (fraction - 1)
            errors[i] = torch.from_numpy(
                (np.sign(d) * ((np.abs(d) + half) >> fraction)).clip(-127, 127).astype(np.int8)
            )
    if g is not None:
        signs_cpu(losses, antithetic, g, total)


_squared_error = register(
    "int8_squared_error",
    "(Tensor y, Tensor exponent, Tensor target, Tensor target_exponent, int fraction, Tensor(a!) losses, "
    f"{_SIGNS}, Tensor(e!) error) -> ()",
    cpu=_squared_error_cpu,
    cuda=launcher("_int8_loss_triton", "launch_squared_error"),
)
#: Bits behind the point of a target's unit, in which differences are taken.
_ERROR_BITS = 8


def int8_squared_error(y: Int8Tensor, target: Int8Tensor, *, gradient: bool = False, signs: Signs | None = None):
    """Sum of squared differences of each group, in units of (2^(target's exponent - 8))^2; differences beyond 2^20 are clamped.

    Args:
        y: [groups * B, ...].
        target: [B, ...], of one group.
        gradient: also the error y - target in the target's unit, rounded and clamped.
        signs: as of :func:`int8_cross_entropy`.

    Returns:
        int64 [groups]; with ``gradient`` also int8 of y's shape.

    Raises:
        TypeError: not Int8Tensors. ValueError: shapes, more than 2^22 values in all groups, signs of other groups.
    """
    check_input(y, "int8_squared_error")
    check_input(target, "int8_squared_error: target")
    if target.groups != 1 or (y.shape[0] // y.groups, *y.shape[1:]) != tuple(target.shape):
        raise ValueError(
            f"int8_squared_error: y {tuple(y.shape)} of {y.groups} groups, target {tuple(target.shape)} of {target.groups}"
        )
    check_devices("int8_squared_error", y.values, target.values)
    check_sum(y.values.numel(), MOST_SQUARES, "int8_squared_error: values")
    more = _arguments(y, signs)
    losses = counters(y, y.groups, torch.int64)
    error = torch.empty(y.shape if gradient else (0,), dtype=torch.int8, device=y.device)
    args = (y.values.contiguous(), y.exponent, target.values.contiguous(), target.exponent)
    _squared_error(*args, _ERROR_BITS, losses, *more, error)
    return (losses, error) if gradient else losses


# --------------------------------------------------------------------------------------------------------- the gradient


def _gradient_cpu(logits, exponent, labels, key, query, rounds, out) -> None:
    import numpy as np

    K = _cpu.integer_losses()

    _check_labels(labels, logits.shape[1])
    groups = exponent.numel()
    scratch = np.empty(logits.shape[1], np.int64)
    for g, (part, to) in enumerate(zip(logits.chunk(groups), out.chunk(groups), strict=True)):
        lanes = rounding_lanes(key, GRADIENT_SITE, *part.shape, query + g, rounds)
        K.cross_entropy_gradient(part.numpy(), int(exponent[g]), labels.numpy(), lanes, to.numpy(), scratch)


_gradient = register(
    "int8_cross_entropy_gradient",
    "(Tensor logits, Tensor exponent, Tensor labels, Tensor key, int query, int rounds, Tensor(a!) out) -> ()",
    cpu=_gradient_cpu,
    cuda=launcher("_int8_loss_triton", "launch_gradient"),
)


#: Classes whose weights, below 2^50 each, add up in 64 bits with their sign and eleven bits to spare.
_MOST_CLASSES = 1 << 12


def int8_cross_entropy_gradient(
    logits: Int8Tensor, labels: torch.Tensor, key: torch.Tensor, *, query: int = 0, rounds: int = 7
) -> torch.Tensor:
    """NITI's integer softmax minus one-hot, times 2^7, stochastically rounded (arXiv 2009.13108; docs/numerics.md).

    Args:
        logits: [groups * B, classes].
        labels: int64 [B].
        key: int32[2], of the step; the words are stream 4 of the last site.
        query: number of the first group in its step: group g rounds by the words of ``query + g``.

    Raises:
        TypeError: dtypes. ValueError: shapes, more than 4096 classes; on a CPU also a label that is no class.

    Returns:
        int8 [groups * B, classes]; a row sums to about zero.
    """
    _check_logits(logits, labels, "int8_cross_entropy_gradient")
    if logits.shape[1] > _MOST_CLASSES:
        raise ValueError(f"int8_cross_entropy_gradient: {logits.shape[1]} classes, {_MOST_CLASSES} is the most")
    check_devices("int8_cross_entropy_gradient", logits.values, key)
    query, rounds = check_index(query, "query", (1 << 24) - logits.groups + 1), check_rounds(rounds)
    out = torch.empty(logits.shape, dtype=torch.int8, device=logits.device)
    _gradient(logits.values.contiguous(), logits.exponent, labels.contiguous(), key, query, rounds, out)
    return out
