"""What is found while a model trains, as it is told and warned of."""

from __future__ import annotations

from dataclasses import dataclass, field


class TrainingWarning(UserWarning):
    """What :class:`ezo_kernels.Diagnostics` found."""


@dataclass(frozen=True)
class Finding:
    """One thing that :class:`ezo_kernels.Diagnostics` found wrong, in numbers, and what to try.

    Attributes:
        kind: ``plateau``, ``not_finite``, ``saturated_weights``, ``exponent_drift`` or ``activation_memory``.
        step: steps observed when it was found.
        seen: what was seen, in words with numbers.
        advice: what to try.
        numbers: the same numbers by name; losses in nats (or the loss's own unit), memory in bytes.
    """

    kind: str
    step: int
    seen: str
    advice: str
    numbers: dict[str, float] = field(compare=False)

    def __str__(self) -> str:
        return f"{self.seen} (step {self.step}). Try: {self.advice}"
