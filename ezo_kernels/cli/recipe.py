"""What a training run is, as data: enough to start it, to check that a checkpoint belongs to it, and to log it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

MODELS = ("lenet5", "mlp")
DATA = ("mnist", "fashion_mnist", "digits")
METHODS = ("elastic", "mezo", "bp", "frozen")
SCHEDULES = ("cosine", "constant")
MODES = ("auto", "stacked", "sequential")
PRECISIONS = ("fp32", "bf16", "fp16")

#: the head when none is named, by method
DEFAULT_HEAD = {"elastic": "fc2,fc3", "mezo": "0", "bp": "all", "frozen": "fc2,fc3"}


@dataclass(frozen=True)
class Recipe:
    """The options that decide the bits of a run; a resumed run has to have the same.

    ``head`` is the text of the option: names with commas, a number of layers, 0 or all.
    """

    model: str = "lenet5"
    hidden: str = "256,128"
    data: str = "mnist"
    method: str = "elastic"
    head: str = ""
    precision: str = "fp32"
    noise: str = "gaussian"
    p_zero: float = 0.0
    rounds: int = 7
    queries: int = 1
    mode: str = "auto"
    epochs: int = 10
    batch: int = 32
    lr: float = 1e-4
    eps: float = 1e-3
    clip: float = 5.0
    head_lr: float = 0.05
    schedule: str = "cosine"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("model", MODELS),
            ("data", DATA),
            ("method", METHODS),
            ("schedule", SCHEDULES),
            ("mode", MODES),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: there are {', '.join(allowed)}")
        for name in ("queries", "epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 is needed")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}: 0 to 2^63 - 1 is possible")
        # A frozen dataclass; the default of one field depends on another.
        object.__setattr__(self, "head", self.head or DEFAULT_HEAD[self.method])
        if self.method == "bp" and self.head != "all":
            raise ValueError(f"method bp trains every layer by backpropagation: --head all, not {self.head}")
        if self.method == "frozen" and self.head == "0":
            raise ValueError("method frozen with --head 0 would train nothing")

    @property
    def head_argument(self) -> list[str] | int | str:
        """The head as ``ezo_kernels.convert_`` takes it."""
        if self.head == "all":
            return "all"
        if self.head.isdigit():
            return int(self.head)
        return [name.strip() for name in self.head.split(",") if name.strip()]

    @property
    def hidden_widths(self) -> list[int]:
        """Widths of the MLP's hidden layers."""
        try:
            return [int(width) for width in self.hidden.split(",") if width.strip()]
        except ValueError:
            raise ValueError(f"hidden is {self.hidden!r}: widths with commas are needed, such as 256,128") from None

    def lr_factor(self, step: int, steps: int) -> float:
        """What both learning rates are multiplied by at a step: a function of it, so that resuming needs no state."""
        return 0.5 * (1 + math.cos(math.pi * step / steps)) if self.schedule == "cosine" else 1.0

    def as_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Recipe:
        """The recipe in a checkpoint.

        Raises:
            ValueError: options that this version does not know.
        """
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"options that this version does not know: {', '.join(sorted(unknown))}")
        return cls(**values)

    def difference(self, other: Recipe) -> str:
        """The options in which two recipes differ, for an error message; "" if they are equal."""
        mine, theirs = self.as_dict(), other.as_dict()
        return ", ".join(f"{name} {theirs[name]} is not {mine[name]}" for name in mine if mine[name] != theirs[name])
