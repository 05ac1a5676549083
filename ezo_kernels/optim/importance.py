"""Importance sampling of rows: a step on those of a batch that are still wrong, as an unbiased estimate of the whole of it.

One plain forward of all P rows says how much each adds to the gradient; ``importance_rows`` of them are drawn by that, and
the step's groups run on these alone, with a cross-entropy that weighs them (:mod:`ezo_kernels.ops.importance`). So a direction
costs a forward of ``importance_rows`` rows in place of P, at a little more noise (docs/recipes.md, Rows that matter).
"""

from __future__ import annotations

import torch

from ..nn.grouped import batch_statistics
from ..ops import Perturbation
from ..ops.importance import MOST_ROWS, importance_rows
from ..ops.noise import check_index
from .batches import call, picked, rows_of
from .check import unwritten
from .compare import differ, largest
from .losses import WeightedCrossEntropy, ignored_by

#: Of the plain forward's dropouts and of the draw: no direction has it, whose number is below.
_QUERY = (1 << 12) - 1


def check_importance_rows(rows, trunk: bool) -> int | None:
    """TypeError or ValueError for what cannot be drawn."""
    if rows is None:
        return None
    rows = check_index(rows, "importance_rows", MOST_ROWS + 1)
    if rows < 1:
        raise ValueError(f"importance_rows must be at least 1, got {rows}; None takes all rows")
    if not trunk:
        raise ValueError("importance_rows spares forwards of directions, and no parameter is trained by zeroth order")
    return rows


class ImportanceRows:
    """Draws the rows of a step of :class:`ezo_kernels.ElasticZO`."""

    def _draw(self, x, y, loss_fn, kwargs: dict) -> tuple:
        """The batch, its loss function and keyword arguments as the groups take them: drawn from a larger one."""
        taken = rows_of(x)
        if self.importance_rows is None or taken <= self.importance_rows:
            return x, y, loss_fn, kwargs
        ignored = ignored_by(loss_fn)
        self._require_drawable(ignored)
        self._checks.drawn((x, kwargs))
        p = Perturbation(self._key, self._eps, self.noise, _QUERY, 1, (0,))
        with torch.no_grad(), self._phase("rows"):
            logits = self._unperturbed(p, x, kwargs)
            if logits.dim() != 2 or logits.shape[0] != taken:
                raise ValueError(
                    f"importance_rows needs logits [{taken}, classes] of a batch of {taken} rows, got {tuple(logits.shape)}"
                )
            drawing = {"ignore_index": ignored, "draw": self._micro, "rounds": self.noise.rounds}
            rows, weight = importance_rows(logits, y, self.importance_rows, self._key, **drawing)

            own_x, own_kwargs = picked((x, kwargs), rows, taken)
            drawn = own_x, y.index_select(0, rows), WeightedCrossEntropy(ignored, weight), own_kwargs
            if self._must_check_draws:
                self._require_apart(p, (x, kwargs), (drawn[0], drawn[3]), rows)
                if not bool(weight.isnan().any()):  # a step that is skipped has shown nothing
                    self._checks.draws_passed()
        return drawn

    @property
    def _must_check_draws(self) -> bool:
        """Whether no rows have been drawn yet of such a batch, of a model whose values can be looked at."""
        return self._checks.draws_are_new and not self._is_fake

    def _require_drawable(self, ignored: int | None) -> None:
        problems = []
        if ignored is None:
            problems.append(
                "the loss must be plain cross-entropy of class indices: F.cross_entropy, or nn.CrossEntropyLoss with its "
                "defaults but ignore_index"
            )
        norms = batch_statistics(self.model)
        if norms:
            problems.append(f"{', '.join(map(repr, norms))} would take batch statistics of the drawn rows: eval() them")
        if problems:
            raise NotImplementedError("importance_rows: " + "; ".join(problems))

    def _unperturbed(self, p: Perturbation, x, kwargs: dict) -> torch.Tensor:
        one_mask, self.zo.one_mask = self.zo.one_mask, False  # its dropouts are none of the directions'
        try:
            with unwritten(self.model, self._must_check), self.zo.running(p):
                logits = call(self.model, x, kwargs)
        finally:
            self.zo.one_mask = one_mask
        if not isinstance(logits, torch.Tensor):
            raise TypeError(f"importance_rows: the model must return its logits, got {type(logits).__name__}")
        return logits

    def _require_apart(self, p: Perturbation, whole: tuple, drawn: tuple, rows: torch.Tensor) -> None:
        """Refuse a model whose rows depend on the others, or an argument that is as long as the batch by chance."""
        self.zo.undropped = True  # a row has another mask in another place
        try:
            among, alone = (self._unperturbed(p, *batch) for batch in (whole, drawn))
        finally:
            self.zo.undropped = False
        among = among.index_select(0, rows)
        if alone.shape != among.shape or bool(
            differ(alone, among) > self._rounding(among.dtype) ** 0.5 * largest(among)
        ):
            raise ValueError(
                "importance_rows: a row's logits are others when it is drawn: the model does not treat the rows of a batch "
                "apart, or an argument that is no batch has as many rows"
            )

    def _rounding(self, dtype: torch.dtype) -> float:
        """The largest of what the model's products may be rounded by; on CUDA, fp32 ones to tf32."""
        dtypes = {dtype, *(p.dtype for p in self.trunk)}
        if torch.is_autocast_enabled(self.device.type):
            dtypes.add(torch.get_autocast_dtype(self.device.type))
        return max(2.0**-10 if self.device.type == "cuda" else 0.0, *(torch.finfo(d).eps for d in dtypes))
