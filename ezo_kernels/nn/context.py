"""What the converted layers of one model are told during a pass.

One :class:`ZOContext` is shared by all converted layers of a model. Outside a pass it says nothing and every layer is the
original. It holds no parameter, and nothing of it enters a state_dict.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from ..ops import Perturbation
from ..ops._perturbation import NotStackedError, aligned


@dataclass(frozen=True)
class Site:
    """One trunk parameter: the manifest's row.

    ``names`` are all its qualified names, the first one the site's own (more than one: tied). ``kind`` is how the forward
    perturbs it: ``fused`` (inside a kernel) or ``workspace`` (a copy a group). ``z_dtype`` is the dtype z is rounded to
    before it meets the weight, the same in forward and update: its name, or ``weight``, the weight's own where that has 16
    bits and float32 where not, asked whenever z is made, so that a model may be cast after its conversion (docs/rng.md).
    """

    site: int
    names: tuple[str, ...]
    shape: tuple[int, ...]
    layout: str
    kind: str
    z_dtype: str = "float32"

    def z_dtype_for(self, weight: torch.Tensor) -> str:
        """Name of the dtype of z for this weight."""
        return self.z_dtype if self.z_dtype != "weight" else _SIXTEEN.get(weight.dtype, "float32")


_SIXTEEN = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass
class ZOContext:
    """State of the current pass.

    Attributes:
        p: the pass, or None outside one.
        own: fields of the pass that a site has of its own, by site: the eps, or the noise, of an optimizer's scales.
        rows: rows of the whole stacked batch, or None when groups run one by one.
        shared_rows: rows of the batch that all groups are given as one, until a layer that is perturbed makes each its own;
            None where each has its copy of it.
        asked: (rows, whether they are shared) of what layers asked about, in order, where a batch is shared.
        unheard: compiled code asked, which does not fill ``asked``.
        provenance: in a first pass of one batch, what tells whose a tensor is (``optim.provenance.Own``).
        common: in a first pass of copies, what watches embeddings of positions (``optim.provenance.OfEveryRow``).
        lengths: second dimensions of what the batch holds: the tokens of a sequence.
        manifest: every trunk parameter, by site.
        visited: sites that the last pass perturbed.
        traced: part of the last pass was compiled code, which does not fill ``visited`` (its contents would be guarded).
        batch_stats: batch-norm module -> (mean, unbiased variance), each [groups, channels], of every call of the step.
        micro: number of the micro-batch under gradient accumulation.
        undropped: dropouts let everything through, for a check that compares rows.
        one_mask: a dropout draws one mask for all queries: their losses are compared with each other.
        calls: site -> how often a dropout ran in this pass.
        strategy: of linear layers and convolutions, as in :func:`ezo_kernels.ops.perturbed_linear`.
        tape: what records an integer head for its backward, while a step runs.
        nodes: sites of the weights of layers whose outputs are perturbed in their place.
        node_forward: what such a layer runs, as plain Python in compiled code, too.
        inputs: what keeps the inputs of these layers, while a step runs (``optim.nodes.Inputs``).
    """

    p: Perturbation | None = None
    own: dict[int, dict] = field(default_factory=dict)
    rows: int | None = None
    shared_rows: int | None = None
    asked: list = field(default_factory=list)
    unheard: bool = False
    provenance: object = None
    common: object = None
    lengths: frozenset[int] = frozenset()
    manifest: tuple[Site, ...] = ()
    visited: set[int] | None = None
    traced: bool = False
    batch_stats: dict = field(default_factory=dict)
    micro: int = 0
    undropped: bool = False
    one_mask: bool = False
    calls: dict = field(default_factory=dict)
    strategy: str = "auto"
    tape: object = None
    nodes: frozenset[int] = frozenset()
    node_forward: object = None
    inputs: object = None

    def __post_init__(self) -> None:
        self._sites = {s.site: s for s in self.manifest}
        self._scaled: dict[int, Perturbation] = {}

    def z_dtype(self, site: int, weight: torch.Tensor) -> str:
        """:meth:`Site.z_dtype_for` of a site of the manifest; float32 for one that is not in it."""
        known = self._sites.get(site)
        return "float32" if known is None else known.z_dtype_for(weight)

    @property
    def stacked(self) -> bool:
        """Whether several groups lie along dimension 0."""
        return self.p is not None and self.p.groups > 1

    def of(self, site: int) -> Perturbation:
        """The pass as this site sees it: with what it has of its own."""
        return self._scaled.get(site, self.p)

    def _enter(self, p: Perturbation | None, rows: int | None, shared_rows: int | None = None) -> None:
        self.p, self.rows, self.shared_rows = p, rows, shared_rows
        self._scaled = {site: replace(p, **own) for site, own in self.own.items()} if p is not None else {}

    def visit(self, *sites: int | None) -> None:
        """Note that the forward perturbed these sites."""
        if torch.compiler.is_compiling():
            self.traced = True
        elif self.visited is not None:
            for site in sites:
                if site is not None:
                    self.visited.add(site)

    def is_shared(self, x) -> bool:
        """Whether ``x`` is of all groups: no layer before has perturbed it.

        By its rows alone. A first pass knows better (:meth:`_ask`), and later ones have to ask what it asked.
        """
        if self.shared_rows is None or not isinstance(x, torch.Tensor) or not x.dim():
            return False
        shared = x.shape[0] % self.shared_rows == 0 and x.shape[0] % self.rows != 0
        self._ask(x, shared)
        return shared

    def _ask(self, x: torch.Tensor, shared: bool) -> None:
        """Note what a layer is told of its input; in a first pass refuse a guess that is wrong."""
        if self.shared_rows is None:
            return
        if torch.compiler.is_compiling():
            self.unheard = True
            return
        self.asked.append((x.shape[0], shared))
        if self.provenance is not None and not (self.provenance.is_of_batch(x) if shared else self.provenance.holds(x)):
            raise NotStackedError(f"the rows of x {tuple(x.shape)} do not show whose they are")

    def made(self, y):
        """``y``, noted as each group's own in a first pass."""
        if self.provenance is not None and not torch.compiler.is_compiling():
            self.provenance.mark(y)
        return y

    def is_common(self, ids: torch.Tensor) -> bool:
        """Whether every row of a stacked batch has these ``ids``, as positions: [1, T], or [T] where the batch is [B, T]."""
        if self.rows is None or not ids.dim() or self.is_shared(ids):
            return False
        if ids.dim() > 1:
            return ids.shape[0] == 1 < self.rows
        return ids.shape[0] in self.lengths and ids.shape[0] != self.rows

    def require_rows(self, x: torch.Tensor, name: str, site: int) -> bool:
        """Whether all groups share ``x`` (:meth:`is_shared`).

        Refuses rows that were chosen among those of a stacked batch: whose they are, nobody knows.

        A mixture of experts sends as many rows of each group to an expert as its perturbed gate says; what has whole batches as
        rows (pixels, tokens, windows of them) lies group by group. Two rows joined to one cannot be told from half of them
        chosen: a batch of pairs is [B, 2, ...].
        """
        if self.is_shared(x):
            return True
        if self.rows is None or torch.compiler.is_compiling() or not x.dim() or x.shape[0] % self.rows == 0:
            return False
        raise NotStackedError(
            f"{name}: x {tuple(x.shape)} has {x.shape[0]} rows in its first dimension, no multiple of the {self.rows} of all "
            f"{self.p.groups} groups (rows chosen or joined, or no batch?): run them one by one (mode='sequential')",
            site,
        )

    @contextlib.contextmanager
    def running(self, p: Perturbation, rows: int | None = None, shared_rows: int | None = None) -> Iterator[None]:
        """Run the model as the pass ``p``."""
        if self.p is not None:
            raise RuntimeError("a zeroth-order pass is already running on this model")
        self._enter(p, rows, shared_rows)
        self.calls, self.asked, self.unheard = {}, [], False
        self.traced = False
        if self.visited is not None:
            self.visited = set()
        # torch's fused encoder layer reads the weights of its linear layers instead of calling them
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            self._enter(None, None)

    @contextlib.contextmanager
    def backward(self, p: Perturbation, rows: int | None = None, shared_rows: int | None = None) -> Iterator[None]:
        """The backward of the pass ``p``: what torch.utils.checkpoint runs again in it runs as then, and is noted once."""
        held = {module: list(stats) for module, stats in self.batch_stats.items()}
        inputs, self.inputs = self.inputs, None
        try:
            with self.running(p, rows, shared_rows):
                yield
        finally:
            self.batch_stats, self.inputs = held, inputs

    @contextlib.contextmanager
    def one_group(self, group: int) -> Iterator[None]:
        """Narrow a stacked pass to one of its groups, for a module that runs once a group; all count their dropouts alike."""
        p, rows, calls = self.p, (self.rows, self.shared_rows), dict(self.calls)
        self._enter(group_pass(p, group), None)
        try:
            yield
        finally:
            self._enter(p, *rows)
            if group + 1 < p.groups:
                self.calls = calls

    def is_stacked(self, value) -> bool:
        """Whether ``value`` is a tensor whose first dimension holds all groups."""
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return False
        unit = self.rows if self.rows is not None else self.p.groups
        stacked = value.shape[0] > 0 and value.shape[0] % unit == 0
        if stacked:
            self._ask(value, False)
        return stacked

    def parts(self, value: torch.Tensor):
        """The rows of each group of a stacked tensor, in order, aligned so that every group runs alike."""
        return map(aligned, value.chunk(self.p.groups))


def group_pass(p: Perturbation, group: int) -> Perturbation:
    """The single-group pass that is group ``group`` of ``p``."""
    query, sign = divmod(group, len(p.signs))
    return replace(p, query=p.query + query, queries=1, signs=(p.signs[sign],))
