"""Signal and noise of the gradient, a layer: from a few micro-batches, on a copy of the model.

With g the gradient of a set of weights over the data, Sigma its covariance over rows, F the Fisher matrix (the Gauss-Newton
form of the curvature), B rows a batch and q queries, in expectation over zeroth-order noise and batches:

    G   = |g|^2            G_B = G + tr(Sigma) / B            T = tr(F)            h = g' F g + tr(F Sigma) / B

    a step of backpropagation   changes the loss by  -lr G + lr^2 / 2 * h
    a step of zeroth order                           -lr G + lr^2 / 2 * (G_B T + (q + 1) h) / q

The second line is that of docs/recipes.md with its small term kept: E[(z'g)^2 z'Fz] = |g|^2 tr(F) + 2 g'Fg for a normal z.
Each is best at its own lr, where it gains ``G^2`` over twice its factor of lr^2 / 2. Everything comes from inner products of
micro-batch gradients: those of the true targets, and those of targets that the model draws itself, whose mean is zero and
whose second moment is F.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from ..nn.cut import in_head
from ..ops.noise import check_index
from ..optim.batches import call, rows_of
from ..optim.losses import ignored_by

#: Micro-batches that a sample is split into, at most: 120 pairs for G, at 32 backward passes. Set by hand, for that price,
#: before any sweep over cuts was run.
MICRO_BATCHES = 16
#: Elements that a layer's gradient is folded to before inner products are taken, with random signs: unbiased, with a relative
#: error of about 1/256, so that 32 gradients fit in 8 MB a layer whatever its size. Set by that error alone.
FOLD = 1 << 16


@dataclass(frozen=True)
class Moments:
    """G, G_B, T and h of a set of weights (units: loss squared, or loss, by weight units)."""

    G: float
    G_B: float
    T: float
    h: float

    def gain_backprop(self) -> float:
        """Expected fall of the loss in a step of SGD at its best learning rate."""
        return self.G**2 / (2 * self.h) if self.h > 0 else 0.0

    def gain_zeroth_order(self, queries: int) -> float:
        """Expected fall of the loss in a zeroth-order step at its best learning rate."""
        factor = (self.G_B * self.T + (queries + 1) * self.h) / queries
        return self.G**2 / (2 * factor) if factor > 0 else 0.0


@dataclass(frozen=True)
class Products:
    """Inner products of the gradients of one layer; those of several layers are their sums.

    ``true`` [K, K] between gradients of true targets, ``drawn`` [K] squared norms with drawn ones, ``cross`` [K, K] true by
    drawn, all fp64; K micro-batches of ``rows`` rows and ``targets`` targets each. ``batch``: rows of a step.
    """

    true: torch.Tensor
    drawn: torch.Tensor
    cross: torch.Tensor
    rows: int
    targets: int
    batch: int

    def __add__(self, other: Products) -> Products:
        own = (self.rows, self.targets, self.batch)
        return Products(self.true + other.true, self.drawn + other.drawn, self.cross + other.cross, *own)

    def moments(self) -> Moments:
        """The estimates; G below zero (noise larger than any signal) is zero."""
        k = len(self.drawn)
        norms = self.true.diagonal()
        pairs = float((self.true.sum() - norms.sum()) / (k * (k - 1)))
        of_rows = max(self.rows * (float(norms.mean()) - pairs), 0.0)
        G = max(pairs, 0.0)
        # g'Fg + tr(F Sigma) / B, from the true gradients of one micro-batch, and of all but the drawn one's own, whose rows
        # would count twice; from these two a line in 1 / B
        others = self.cross - torch.diag(self.cross.diagonal())
        of_one = float((others**2).sum() / (k * (k - 1)))
        of_all = float(((others.sum(0) / (k - 1)) ** 2).mean())
        share = max((k - 1) * self.rows / self.batch - 1, 0.0) / max(k - 2, 1)
        h = self.targets * (of_all + share * (of_one - of_all))
        return Moments(G, G + of_rows / self.batch, self.targets * float(self.drawn.mean()), h)


def segments(model: nn.Module, cuts: list[tuple[str, ...]]) -> list[tuple[str, list[str]]]:
    """For each weight layer in the order of a forward: its name, and the trained parameters that its cut adds to the head."""
    left = [name for name, p in model.named_parameters() if p.requires_grad]
    found = []
    for n, head in enumerate(cuts[1:], 1):
        own = [name for name in left if n == len(cuts) - 1 or in_head(name, head)]
        left = [name for name in left if name not in own]
        found.append((head[0], own))
    return found[::-1]


def draw_classes(output: torch.Tensor, y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Class ids that a classifier [B, classes, ...] draws itself; where y is -100 they stay so.

    Raises:
        ValueError: an output that is no distribution.
    """
    p = output.detach().double().softmax(1).movedim(1, -1)
    if not p.isfinite().all():
        raise ValueError("the model's output is not finite: no class can be drawn from it")
    drawn = torch.multinomial(p.reshape(-1, p.shape[-1]).cpu(), 1, generator=generator).view(p.shape[:-1])
    return torch.where(y == -100, y, drawn.to(y.device))


def draw_values(output: torch.Tensor, y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Values about a regression's output, of the variance (1/2) at which a squared error is a log-likelihood."""
    z = torch.randn(output.shape, generator=generator, dtype=torch.float64) * 0.5**0.5
    return output.detach() + z.to(output)


DRAWS = {F.cross_entropy: draw_classes, F.mse_loss: draw_values}


def _known(loss_fn):
    """How targets of a loss are drawn that is one of :data:`DRAWS`, or the module of one with torch's defaults; else None."""
    if ignored_by(loss_fn) == -100:
        return draw_classes
    if type(loss_fn) is nn.MSELoss and loss_fn.reduction == "mean":
        return draw_values
    return next((draw for own, draw in DRAWS.items() if own is loss_fn), None)


def draw_for(loss_fn, draw_target):
    """How targets are drawn for this loss.

    Raises:
        ValueError: a loss whose distribution is not known, and no ``draw_target``.
    """
    known = _known(loss_fn)
    if draw_target is None and known is None:
        raise ValueError(
            "the curvature of this loss_fn is not known: give draw_target(output, y, generator) -> targets drawn from the "
            "model's own distribution (built in for F.cross_entropy, F.mse_loss and their modules with torch's defaults)"
        )
    return draw_target or known


def _fold(gradients, generator: torch.Generator) -> torch.Tensor:
    """Gradients of one layer as one fp32 vector; a long one with random signs, folded to FOLD elements."""
    flat = [g.reshape(-1).float().cpu() for g in gradients]
    if sum(map(len, flat)) <= FOLD:
        return torch.cat(flat)
    out = torch.zeros(FOLD)
    for g in flat:
        signs = torch.randint(0, 2, g.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
        out += F.pad(g * signs, (0, -len(g) % FOLD)).view(-1, FOLD).sum(0)
    return out


def _rows(batch, rows: int, part: slice):
    def take(leaf):
        whole = isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == rows
        return leaf[part] if whole else leaf

    return pytree.tree_map(take, batch)


def check_targets(x, y, loss_fn, what: str) -> None:
    """Refuse targets that cannot be split with their rows, which a loss would broadcast or complain of, a micro-batch each.

    Raises:
        ValueError: a y of another length than x; of a loss of one's own only the caller knows.
    """
    if _known(loss_fn) is not None and isinstance(y, torch.Tensor) and y.dim() and len(y) != rows_of(x):
        raise ValueError(f"{what} has {rows_of(x)} rows in x and {len(y)} in y")


def _check_labels(output: torch.Tensor, y: torch.Tensor) -> None:
    """Refuse class ids that a classifier does not have: on a GPU cross-entropy would end the process's use of it."""
    if (
        not (isinstance(output, torch.Tensor) and output.dim() > 1 and isinstance(y, torch.Tensor))
        or y.is_floating_point()
    ):
        return
    wrong = y[(y != -100) & ((y < 0) | (y >= output.shape[1]))]
    if wrong.numel():
        raise ValueError(
            f"labels must be 0 to {output.shape[1] - 1}, or -100 for none, for a model of {output.shape[1]} classes, got "
            f"{int(wrong[0])}"
        )


def _require_finite(loss: torch.Tensor, model: nn.Module, x, y) -> None:
    """Refuse a loss that is not finite, naming what else is not."""
    if bool(torch.isfinite(loss).all()):
        return
    named = [*model.named_parameters(), *model.named_buffers()]
    named += [(what, leaf) for what, batch in (("x", x), ("y", y)) for leaf in pytree.tree_leaves(batch)]
    found = [name for name, t in named if isinstance(t, torch.Tensor) and not bool(torch.isfinite(t).all())]
    raise ValueError(
        f"the loss of these rows is {float(loss.detach().mean())}, and no gradient can be told from it; not finite are: "
        f"{', '.join(dict.fromkeys(found)) or 'none of the weights, x and y'}"
    )


def _all_left_out(y) -> bool:
    """Whether a loss of these targets counts none: torch's mean over nothing is nan, and its gradient zero."""
    leaves = pytree.tree_leaves(y)
    return bool(leaves) and all(
        isinstance(t, torch.Tensor) and not t.is_floating_point() and bool((t == -100).all()) for t in leaves
    )


def micro_batches(model: nn.Module, x) -> tuple[int, int]:
    """How many micro-batches a sample gives, and their rows.

    Raises:
        ValueError: a sample too small to tell signal from noise.
    """
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules())
    least, rows = (2 if batch_norm else 1), rows_of(x)
    k = min(MICRO_BATCHES, rows // least)
    if k < 2:
        raise ValueError(f"the sample has {rows} rows: at least {2 * least} are needed to tell signal from noise")
    return k, rows // k


def measure(
    model: nn.Module, x, y, loss_fn, cuts, *, draw_target=None, batch: int | None = None, seed: int = 0
) -> list[Products]:
    """Inner products a weight layer, in the order of :func:`segments`.

    Args:
        model: a plain torch model; a copy of it runs, in the model's own mode, two backward passes a micro-batch.
        x, y: training rows; those beyond a multiple of the micro-batches are left out.
        loss_fn: a mean over rows.
        cuts: of :func:`ezo_kernels.nn.cut.all_cuts`.
        draw_target: ``draw_target(output, y, generator)`` -> targets from the model's own distribution, every element drawn on
            its own. Known for F.cross_entropy and F.mse_loss.
        batch: rows of a step, for G_B and h, not more than those of x; all that are used if None.
        seed: of drawn targets, of folds and of random layers, [0, 2^64); torch's global state is left alone.

    Raises:
        TypeError, ValueError: a seed that is none; labels that are no class of the model; a loss that is not finite, but
            for that of rows whose labels are all -100.
    """
    seed = check_index(seed, "seed", 1 << 64)
    draw = draw_for(loss_fn, draw_target)
    count, size = micro_batches(model, x)
    twin, rows = copy.deepcopy(model), rows_of(x)
    named = dict(twin.named_parameters())
    layers = [[named[n] for n in own] for _, own in segments(twin, cuts)]
    parameters = [p for own in layers for p in own]
    generator = torch.Generator().manual_seed(seed)
    vectors = [([], []) for _ in layers]
    targets = 0
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        for k in range(count):
            part = slice(k * size, (k + 1) * size)
            own_x, own_y = _rows(x, rows, part), _rows(y, rows, part)
            output = call(twin, own_x, {})
            if draw is draw_classes:
                _check_labels(output, own_y)
            for which in range(2):
                target = draw(output, own_y, generator) if which else own_y
                loss = loss_fn(output, target)
                padding = _all_left_out(target)
                if not padding:
                    _require_finite(loss, model, own_x, target)
                grads = torch.autograd.grad(loss, parameters, retain_graph=which == 0, materialize_grads=True)
                # of rows of padding alone the gradients tell what the loss cannot
                if padding and not all(bool(g.isfinite().all()) for g in grads):
                    _require_finite(loss, model, own_x, target)
                flat = iter(grads)
                for layer, (own, into) in enumerate(zip(layers, vectors, strict=True)):
                    # the same in every micro-batch
                    signs = torch.Generator().manual_seed((seed + 1 + layer) % (1 << 64))
                    into[which].append(_fold([next(flat) for _ in own], signs) if own else torch.zeros(1))
            targets += target.numel() if target.is_floating_point() else int((target != -100).sum())
    found = []
    for true, drawn in vectors:
        a, s = torch.stack(true).double(), torch.stack(drawn).double()
        found.append(
            Products(a @ a.T, (s * s).sum(1), a @ s.T, size, targets // count, count * size if batch is None else batch)
        )
    return found
