"""Integer updates of the head, in place, from gradients of each group.

    w <- clamp(w - round(G / 2^n), -127, 127)              G = sum over groups, exponents aligned
                                                            n = max(0, bits of max |G| - m)
    with a remainder R, int8 as well:
    256 w + R <- clamp(256 w + R - round(G / 2^(n - 8)), -127 * 256, 127 * 256), w the nearest

| tensor | shape |
|---|---|
| w, remainder | int8, of one shape |
| gradient of a group | int32, of that shape; of a bias [N] also int8 errors [rows, N], whose sum over rows it is |
| its exponents | int32 [G], and int32 [G] or [1] that are added to them, or None |
| bits m | int32 [1], on the device |
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import _cpu, _library
from ._library import launcher, register
from ._perturbation import check_devices
from .int8_pass import ROUNDINGS, check_rounding
from .int8_pointwise import rounding_lanes
from .noise import check_index, check_rounds

#: Bits of a remainder behind those of its weight.
REMAINDER_BITS = 8
#: Parameters, and elements of all, whose step is one launch: heads such as LeNet-5's fc2 and fc3.
MOST_TENSORS, MOST_ELEMENTS = 4, 1 << 14


def _sum_groups_cpu(acc, exponent, out, peak) -> None:
    K = _cpu.integers()

    flat = out.view(-1).numpy()
    peak.numpy()[0] = K.sum_aligned(acc.view(len(acc), -1).numpy(), exponent.numpy(), flat)


_sum_groups = register(
    "int8_sum_groups",
    "(Tensor acc, Tensor exponent, Tensor(a!) out, Tensor(b!) peak) -> ()",
    cpu=_sum_groups_cpu,
    cuda=launcher("_int8_head_triton", "launch_sum_groups"),
)


def sum_groups(acc: torch.Tensor, exponent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over groups of ``acc[g] * 2**exponent[g]`` in the unit of the largest exponent, and its largest magnitude.

    Args:
        acc: int32 [G, ...]; the caller sees to it that the sum fits into 32 bits.
        exponent: int32 [G].

    Returns:
        int32 [...] and int32 [1].
    """
    out = torch.empty(acc.shape[1:], dtype=torch.int32, device=acc.device)
    peak = torch.zeros(1, dtype=torch.int32, device=acc.device)
    if out.numel():
        _sum_groups(acc.contiguous(), exponent, out, peak)
    return out, peak


def _head_update_cpu(w, remainder, grad, peak, bits, key, site, rounding, rounds) -> None:
    import numpy as np

    K = _cpu.integers()

    if not int(peak):
        return
    n = max(0, int(peak).bit_length() - int(bits))
    rows, columns = w.numel() // w.shape[-1], w.shape[-1]
    lanes = np.empty((0, 0), np.uint16)
    if rounding == "stochastic":
        lanes = rounding_lanes(key, site, rows, columns, 0, rounds)
    flat, mode = w.detach().view(-1).numpy(), ROUNDINGS.index(rounding)
    if remainder is None:
        K.update(flat, 1, grad.view(rows, columns).numpy(), n, mode, lanes)
    else:
        K.update_finely(flat, remainder.view(-1).numpy(), grad.view(-1).numpy(), n - REMAINDER_BITS, mode, lanes)
    _wrote(w, remainder)


def _head_update_cuda(w, remainder, *args) -> None:
    from ._int8_head_triton import launch_head_update

    launch_head_update(w, remainder, *args)
    _wrote(w, remainder)


def _wrote(*tensors: torch.Tensor | None) -> None:
    """They were written behind torch's back."""
    torch.autograd.graph.increment_version([t for t in tensors if t is not None])


_head_update = register(
    "int8_head_update_",
    "(Tensor(a!) w, Tensor(b!)? remainder, Tensor grad, Tensor peak, Tensor bits, Tensor key, int site, str rounding, "
    "int rounds) -> ()",
    cpu=_head_update_cpu,
    cuda=_head_update_cuda,
)


@torch.no_grad()
def int8_head_update_(
    w: torch.Tensor,
    grad: torch.Tensor,
    peak: torch.Tensor,
    bits: torch.Tensor,
    *,
    key: torch.Tensor,
    site: int,
    rounding: str = "pseudo",
    rounds: int = 7,
    remainder: torch.Tensor | None = None,
) -> None:
    """NITI's update: the gradient shifted to ``bits`` bits of its own largest magnitude, and subtracted, clamped.

    With a remainder the step is rounded to 1/256 of a unit of w, and what w cannot hold of it stays in the remainder for the
    next: the weights that a forward sees are int8 as before, but a step of less than one unit is no longer a matter of chance.

    Args:
        w: int8, contiguous, written.
        grad: int32 of w's shape.
        peak: int32 [1], its largest magnitude.
        bits: int32 [1]: m, the learning rate; |step| is at most 2^m.
        key, site, rounds: of the words of ``stochastic`` rounding.
        rounding: ``nearest``, ``pseudo`` or ``stochastic``.
        remainder: int8 of w's shape, contiguous, written: 1/256 of a unit each; zeros at first.

    Raises:
        TypeError: dtypes. ValueError: shapes, an unknown rounding.
    """
    if remainder is not None:
        if remainder.dtype != torch.int8:
            raise TypeError(f"int8_head_update_: the remainder must be int8, got {remainder.dtype}")
        if remainder.shape != w.shape or not remainder.is_contiguous():
            raise ValueError(
                f"int8_head_update_: w {tuple(w.shape)} and its remainder {tuple(remainder.shape)} do not go together"
            )
    if w.dtype != torch.int8 or grad.dtype != torch.int32:
        raise TypeError(f"int8_head_update_: w must be int8 and grad int32, got {w.dtype} and {grad.dtype}")
    if w.shape != grad.shape or not w.is_contiguous() or not w.dim():
        raise ValueError(f"int8_head_update_: w {tuple(w.shape)} and grad {tuple(grad.shape)} do not go together")
    check_devices("int8_head_update_", w, grad, peak, bits, key, remainder)
    site, rounds = check_index(site, "site", 1 << 32), check_rounds(rounds)
    if w.numel():
        _head_update(w, remainder, grad.contiguous(), peak, bits, key, site, check_rounding(rounding), rounds)


# -------------------------------------------------------------------------------------------------- all parameters at once


class HeadGradient(NamedTuple):
    """A parameter's gradient of each group, as the head's backward leaves it: shapes in the table above."""

    values: torch.Tensor
    exponent: torch.Tensor
    x_exponent: torch.Tensor | None = None

    def summed(self) -> HeadGradient:
        """As int32 with one exponent a group."""
        values = self.values.sum(1, dtype=torch.int32) if self.values.dtype == torch.int8 else self.values
        return HeadGradient(values, self.exponent if self.x_exponent is None else self.exponent + self.x_exponent)

    @classmethod
    def joined(cls, parts: list[HeadGradient]) -> HeadGradient:
        """The groups of several passes, or of several calls of a layer."""
        if len(parts) == 1:
            return parts[0]
        values, exponents, _ = zip(*(part.summed() for part in parts), strict=True)
        return cls(torch.cat(values), torch.cat(exponents))


def _step_cpu(params, remainders, grads, exponents, x_exponents, ok, bits, key, sites, rounding, rounds, sums) -> None:
    if ok is not None and not bool(ok):
        return
    for i, w in enumerate(params):
        grad = HeadGradient(grads[i], exponents[i], x_exponents[i]).summed()
        total, peak = sums[: w.numel()].view(w.shape), torch.zeros(1, dtype=torch.int32)
        _sum_groups_cpu(grad.values, grad.exponent, total, peak)
        rest = remainders[i] if remainders else None
        _head_update_cpu(w, rest, total, peak, bits, key, sites[i], rounding, rounds)


def in_one_launch(params, grads) -> bool:
    """Whether one program a parameter goes through all of it."""
    few = len(params) <= MOST_TENSORS and sum(w.numel() for w in params) <= MOST_ELEMENTS
    return few and max(grad.numel() for grad in grads) < 1 << 30


def _step_cuda(params, remainders, *args) -> None:
    from ._int8_head_triton import launch_head_step

    *args, _ = args
    launch_head_step(params, remainders, *args)
    _wrote(*params, *remainders)


_step = register(
    "int8_head_step_",
    "(Tensor(a!)[] params, Tensor(b!)[] remainders, Tensor[] grads, Tensor[] exponents, Tensor?[] x_exponents, Tensor? ok, "
    "Tensor bits, Tensor key, int[] sites, str rounding, int rounds, Tensor(c!)? sums) -> ()",
    cpu=_step_cpu,
    cuda=_step_cuda,
)


@torch.no_grad()
def int8_head_step_(
    params: list[torch.Tensor],
    gradients: list[HeadGradient],
    bits: torch.Tensor,
    *,
    key: torch.Tensor,
    sites: list[int],
    rounding: str = "pseudo",
    rounds: int = 7,
    remainders: list[torch.Tensor] = (),
    ok: torch.Tensor | None = None,
) -> None:
    """The step of :func:`int8_head_update_` for all of the head's parameters, by the sum over groups of their gradients.

    Args:
        params: int8, contiguous, written.
        gradients: of each; the caller sees to it that sums fit into 32 bits.
        bits, key, rounding, rounds: as there.
        sites: of each, for ``stochastic`` rounding.
        remainders: of each, contiguous, written; or none.
        ok: bool [] on the device: nothing is written where it is false.

    Raises:
        TypeError: dtypes. ValueError: lengths or shapes, a parameter or remainder that is not contiguous, an unknown rounding.
    """
    if not len(params) == len(gradients) == len(sites) or len(remainders) not in (0, len(params)):
        raise ValueError(
            f"int8_head_step_: {len(params)} params, {len(gradients)} gradients, {len(sites)} sites and {len(remainders)} "
            "remainders"
        )
    for w, rest in zip(params, remainders or params, strict=True):
        if w.dtype != torch.int8 or rest.dtype != torch.int8:
            raise TypeError(f"int8_head_step_: parameters and remainders must be int8, got {w.dtype} and {rest.dtype}")
        if not w.is_contiguous() or not rest.is_contiguous() or rest.shape != w.shape or not w.dim():
            raise ValueError(
                f"int8_head_step_: w {tuple(w.shape)} and its remainder {tuple(rest.shape)} do not go together"
            )
    for w, (values, exponent, x_exponent) in zip(params, gradients, strict=True):
        groups = exponent.numel()
        errors = values.dtype == torch.int8
        fits = values.shape == (groups, *w.shape)
        if errors:
            fits = w.dim() == 1 and values.dim() == 3 and values.shape[::2] == (groups, *w.shape)
        if not fits or (x_exponent is not None and x_exponent.numel() not in (1, groups)):
            raise ValueError(
                f"int8_head_step_: a gradient {tuple(values.shape)} of {groups} groups for w {tuple(w.shape)}"
            )
        if values.dtype not in (torch.int32, torch.int8):
            raise TypeError(f"int8_head_step_: gradients must be int32 or int8, got {values.dtype}")
    check_rounding(rounding)
    check_rounds(rounds)
    for w, gradient in zip(params, gradients, strict=True):
        check_devices("int8_head_step_", w, *gradient, bits, key, ok)
    own = [i for i, w in enumerate(params) if w.numel()]
    if own and in_one_launch([params[i] for i in own], [gradients[i].values for i in own]):
        others, sums = [gradients[i].x_exponent for i in own], None
        if not _library.bound_by_launches(key.device):  # a GPU's programs have theirs in registers
            sums = torch.empty(max(params[i].numel() for i in own), dtype=torch.int32, device=key.device)
        _step(
            [params[i] for i in own], [remainders[i] for i in own] if remainders else [],
            [gradients[i].values.contiguous() for i in own], [gradients[i].exponent.contiguous() for i in own],
            [None if x is None else x.contiguous() for x in others], ok, bits, key, [sites[i] for i in own], rounding, rounds,
            sums,
        )  # fmt: skip
        return
    for i in own:  # one sum at a time: they are as large as the parameters, four times
        values, exponent, _ = gradients[i].summed()
        total, peak = sum_groups(values, exponent)
        if ok is not None:
            peak *= ok  # of a gradient of zero nothing is written
        int8_head_update_(
            params[i], total.view(params[i].shape), peak, bits, key=key, site=sites[i], rounding=rounding, rounds=rounds,
            remainder=remainders[i] if remainders else None,
        )  # fmt: skip
