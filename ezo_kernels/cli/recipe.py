"""What a training run is, as data: enough to start it, to check that a checkpoint belongs to it, and to log it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

from ..ops.importance import MOST_ROWS
from ..ops.int8_pass import sparse_noise
from ..ops.int8_update import check_bits
from ..optim import NodePerturbation

MODELS = ("lenet5", "mlp", "pointnet")
DATA = ("mnist", "fashion_mnist", "digits", "modelnet40")
#: data sets that are clouds as they are, not images
CLOUD_DATA = ("modelnet40",)
METHODS = ("elastic", "mezo", "bp", "frozen")
SCHEDULES = ("cosine", "constant")
MODES = ("auto", "stacked", "sequential")
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
LOSSES = ("integer", "float")
#: options of one kind of precision that are refused with the other
_NODES = ("nodes", "node_lr", "node_eps", "node_damping", "node_clip")
FLOAT_ONLY = ("noise", "scales", "importance_rows", *_NODES, "freeze", "lr", "eps", "clip", "head_lr", "schedule")
INT8_ONLY = ("r_max", "bits", "head_bits", "head_remainder", "loss", "fraction_bits")
_OF_ZEROTH_ORDER = (
    "noise", "p_zero", "rounds", "queries", "antithetic", "scales", "importance_rows", *_NODES, "freeze", "mode", "lr", "eps",
    "clip",
)  # fmt: skip
#: options that nothing in a run of this method, with this model or with this head reads
UNREAD = {
    "method": {
        "mezo": ("antithetic", "scales", "importance_rows", *_NODES, "freeze", "mode"),
        "bp": _OF_ZEROTH_ORDER,
        "frozen": _OF_ZEROTH_ORDER,
    },
    "model": {"lenet5": ("hidden", "points"), "mlp": ("points",), "pointnet": ("hidden",)},
    "head": {"0": ("head_lr", "head_bits")},
}

#: p_zero when none is named: of int8, a rising one beside r_max's; else none
DEFAULT_P_ZERO = {True: "0.97,0.98@0.3,0.99@0.6,0.9975@0.8", False: "0"}
#: widths of an integer head's update when none are named: with a remainder, and without
DEFAULT_HEAD_BITS = {True: "2,1@0.2,0@0.4,-1@0.6,-2@0.8", False: "3,2@0.2,1@0.4,0@0.6,-1@0.8"}
#: the head when none is named, by method
DEFAULT_HEAD = {"elastic": "fc2,fc3", "mezo": "0", "bp": "all", "frozen": "fc2,fc3"}
#: what fc2,fc3 is in PointNet, whose batch norm between them is the head's, too
POINTNET_HEAD = "2"


def parse_schedule(text: str, name: str, kind: type) -> list[tuple[float, float | int]]:
    """``"1,0@0.5,-1@0.75"`` as [(0, 1), (0.5, 0), (0.75, -1)]: from which fraction of the run on a value holds.

    Raises:
        ValueError: not of that form, or the fractions do not rise from 0.
    """
    out: list[tuple[float, float | int]] = []
    try:
        for i, part in enumerate(str(text).split(",")):
            value, _, start = part.partition("@")
            out.append((float(start) if start or i else 0.0, kind(value)))
    except ValueError:
        raise ValueError(f"{name} is {text!r}: {kind.__name__}s such as 1,0@0.5 are needed") from None
    starts = [start for start, _ in out]
    # all of them, for a comparison with nan is false
    if starts[0] != 0 or starts != sorted(set(starts)) or not all(0 <= start < 1 for start in starts):
        raise ValueError(f"{name} is {text!r}: the first value starts at 0, the others at rising fractions below 1")
    return out


def parse_scales(text: str) -> dict[str, float]:
    """``"conv1=2,fc1=0.4"`` as {"conv1": 2.0, "fc1": 0.4}.

    Raises:
        ValueError: not of that form, or a name twice.
    """
    out: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        try:
            scale = float(value)
        except ValueError:
            equals = ""
        if not equals or not name.strip() or name.strip() in out:
            raise ValueError(f"scales is {text!r}: each layer once, with a number, such as conv1=2,fc1=0.4, is needed")
        out[name.strip()] = scale
    return out


def names_in(text: str) -> list[str]:
    """``"fc1, fc2"`` as ["fc1", "fc2"]."""
    return [name.strip() for name in text.split(",") if name.strip()]


@dataclass(frozen=True)
class Recipe:
    """The options that decide the bits of a run; a resumed run has to have the same.

    ``head`` is the text of the option: names with commas, a number of layers, 0 or all.
    """

    model: str = "lenet5"
    hidden: str = "256,128"
    points: int = 128
    data: str = "mnist"
    method: str = "elastic"
    head: str = ""
    precision: str = "fp32"
    noise: str = "gaussian"
    p_zero: str = ""
    rounds: int = 7
    queries: int = 1
    antithetic: bool = True
    scales: str = ""
    importance_rows: int = 0
    nodes: str = ""
    node_lr: float = NodePerturbation.lr
    node_eps: float = NodePerturbation.eps
    node_damping: float = NodePerturbation.damping
    node_clip: float = NodePerturbation.clip
    freeze: str = ""
    mode: str = "auto"
    epochs: int = 10
    batch: int = 32
    lr: float = 1e-4
    eps: float = 1e-3
    clip: float = 5.0
    head_lr: float = 0.05
    schedule: str = "cosine"
    r_max: str = "15,31@0.3,63@0.6,127@0.8"
    bits: str = "0"
    head_bits: str = ""
    head_remainder: bool | None = None
    loss: str = "integer"
    fraction_bits: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("model", MODELS),
            ("data", DATA),
            ("method", METHODS),
            ("schedule", SCHEDULES),
            ("mode", MODES),
            ("precision", PRECISIONS),
            ("loss", LOSSES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: there are {', '.join(allowed)}")
        if self.integer and self.method != "elastic":
            raise ValueError(f"precision int8 goes with method elastic, not {self.method}")
        for name in ("queries", "epochs", "batch", "points"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 is needed")
        if self.data in CLOUD_DATA and self.model != "pointnet":
            raise ValueError(f"data {self.data} is of clouds: it goes with model pointnet, not {self.model}")
        if self.points != 128 and self.model != "pointnet":
            raise ValueError(f"points goes with model pointnet, not {self.model}")
        if not self.antithetic and (self.method != "elastic" or self.queries < 2):
            raise ValueError(
                f"no-antithetic, one forward a query, goes with method elastic and 2 queries or more, not {self.method} "
                f"with {self.queries}"
            )
        scales = parse_scales(self.scales)
        object.__setattr__(self, "scales", ",".join(f"{n}={v!r}" for n, v in sorted(scales.items())))
        if scales and self.method != "elastic":
            raise ValueError(f"scales goes with method elastic, not {self.method}")
        if self.importance_rows:
            if not 0 < self.importance_rows < self.batch <= MOST_ROWS:
                raise ValueError(
                    f"importance_rows is {self.importance_rows}: 1 to {self.batch - 1} are drawn out of a batch of "
                    f"{self.batch}, which may be {MOST_ROWS} at most"
                )
            if self.method != "elastic" or self.integer or self.model == "pointnet":
                raise ValueError(
                    "importance_rows goes with method elastic, in floats, and with a model without batch norm, not "
                    f"{self.method}, {self.precision} and {self.model}"
                )
        self._check_nodes()
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}: 0 to 2^63 - 1 is possible")
        # A frozen dataclass; the default of one field depends on another.
        head = DEFAULT_HEAD[self.method]
        if self.model == "pointnet" and "," in head:
            head = POINTNET_HEAD
        object.__setattr__(self, "head", self.head or head)
        if self.head_argument == []:  # which would be a head of no layer
            raise ValueError(f"head is {self.head!r}: names with commas, a number of layers, 0 or all are possible")
        object.__setattr__(self, "p_zero", self.p_zero or DEFAULT_P_ZERO[self.precision == "int8"])
        keeps = self.integer and self.head != "0"
        if self.head_remainder and not keeps:
            raise ValueError("head_remainder is of a head of integers: precision int8, and a head other than 0")
        object.__setattr__(self, "head_remainder", keeps if self.head_remainder is None else self.head_remainder)
        object.__setattr__(self, "head_bits", self.head_bits or DEFAULT_HEAD_BITS[self.head_remainder])
        if self.method == "bp" and self.head != "all":
            raise ValueError(f"method bp trains every layer by backpropagation: --head all, not {self.head}")
        if self.method == "frozen" and self.head == "0":
            raise ValueError("method frozen with --head 0 would train nothing")
        for name, kind in (("r_max", int), ("bits", int), ("head_bits", int), ("p_zero", float)):
            values = parse_schedule(getattr(self, name), name, kind)
            if name == "p_zero" and len(values) > 1 and not self.integer:
                raise ValueError(f"p_zero is {self.p_zero!r}: a schedule of it needs precision int8")
            for _, value in values if self.integer else ():  # all of them now, not when a run comes to them
                if name in ("bits", "head_bits"):
                    check_bits(value, name)
                else:
                    sparse_noise(**{name: value})

    def _check_nodes(self) -> None:
        for name in ("nodes", "freeze"):
            names = names_in(getattr(self, name))
            if getattr(self, name) and not names:
                raise ValueError(f"{name} is {getattr(self, name)!r}: names with commas are needed, such as fc1,fc2")
            object.__setattr__(self, name, ",".join(dict.fromkeys(names)))
            if getattr(self, name) and (self.method != "elastic" or self.integer):
                raise ValueError(f"{name} goes with method elastic, in floats, not {self.method} and {self.precision}")
        if self.nodes:
            self.node_perturbation  # noqa: B018 - refuses what it cannot take
        else:
            # of a run without them, so that two recipes that are one run are equal
            for name in _NODES[1:]:
                object.__setattr__(self, name, getattr(NodePerturbation, name.removeprefix("node_")))

    @property
    def node_perturbation(self) -> NodePerturbation | None:
        """What ``nodes`` and its rates are for ElasticZO; a damping or a clip of 0 is none, PointNet has batch norms."""
        if not self.nodes:
            return None
        rates = self.node_lr, self.node_eps, self.node_damping or None
        constant = self.model == "pointnet"
        return NodePerturbation(names_in(self.nodes), *rates, constant_statistics=constant, clip=self.node_clip or None)

    def check_given(self, given) -> None:
        """Refuse options that were given and that nothing in this run reads. Recipes made by code may hold them: at defaults.

        Args:
            given: names of the options on the command line.

        Raises:
            ValueError: some are, all those that do not go with one other option are named.
        """
        unread = {"precision": FLOAT_ONLY if self.integer else INT8_ONLY}
        unread |= {name: by_value.get(getattr(self, name), ()) for name, by_value in UNREAD.items()}
        for name, names in unread.items():
            strangers = [option for option in names if option in given]
            if strangers:
                options = ", ".join("--" + option.replace("_", "-") for option in strangers)
                instead = " (its learning rate is --head-lr)" if name == "method" and "lr" in strangers else ""
                raise ValueError(f"{options}: no meaning with --{name} {getattr(self, name)}{instead}")
        strangers = ["--" + option.replace("_", "-") for option in _NODES[1:] if option in given and not self.nodes]
        if strangers:
            raise ValueError(f"{', '.join(strangers)}: no meaning without --nodes")

    @property
    def head_argument(self) -> list[str] | int | str:
        """The head as ``ezo_kernels.convert_`` takes it."""
        if self.head == "all":
            return "all"
        if self.head.removeprefix("-").isdigit():  # no layer has a negative number, which convert_ says
            return int(self.head)
        return names_in(self.head)

    @property
    def integer(self) -> bool:
        """Whether the run is in integers only."""
        return self.precision == "int8"

    @property
    def zeros(self) -> float:
        """p_zero at the first step."""
        return parse_schedule(self.p_zero, "p_zero", float)[0][1]

    def integers_at(self, step: int, steps: int) -> tuple[dict, dict]:
        """What the two parameter groups of an integer run hold at a step: a function of it, so that resuming needs no state."""

        def at(name: str, kind: type):
            schedule = parse_schedule(getattr(self, name), name, kind)
            return [value for start, value in schedule if start * steps <= step][-1]

        trunk = {"bits": at("bits", int), "r_max": at("r_max", int), "p_zero": at("p_zero", float)}
        return trunk, {"bits": at("head_bits", int)}

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
        if "p_zero" in values:  # a number in the first checkpoints
            values = {**values, "p_zero": str(values["p_zero"])}
        return cls(**{"head_remainder": False, "node_clip": 0.0, **values})  # what they were before there was one

    def difference(self, other: Recipe) -> str:
        """The options in which two recipes differ, for an error message; "" if they are equal."""
        mine, theirs = self.as_dict(), other.as_dict()
        return ", ".join(f"{name} {theirs[name]} is not {mine[name]}" for name in mine if mine[name] != theirs[name])
