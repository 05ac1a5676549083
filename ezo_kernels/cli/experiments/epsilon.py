"""An eps from statistics of the gradient, instead of a search.

Along a direction z, with D and T the first and third derivatives of the loss and r the rounding error of l+ - l-,

    (l+ - l-) / (2 eps) = D + eps^2 T / 6 + r / (2 eps) + ...

so the mean square error over directions is eps^4 T2 / 36 + R2 / (4 eps^2), with T2 and R2 the mean squares of T and r. It is
least where its derivative is zero:

    eps = (9 R2 / (2 T2))^(1/6)

Both are measured on one batch at the initial weights, with 2 x 3 forwards a direction in fp64 and fp32: r is the difference of
l+ - l- between the two, and T follows from the quotients at h and 2 h in fp64, which differ by h^2 T / 2. A ReLU network
has kinds of kinks that no third derivative has, so T is that of its steps of h.
"""

from __future__ import annotations

import copy
import math

import torch

from ...data import Batches, Dataset
from ...nn.plan import make_plan
from ...ops import materialize
from ..recipe import Recipe
from ..run import build_model, inputs, loss_fn

DIRECTIONS = 16
#: scale of the perturbations that T is measured with
H = 1e-2
#: step counter of the directions: far beyond any run's, so that none of its words is spent
FIRST_STEP = 1 << 40


@torch.no_grad()
def balanced_eps(recipe: Recipe, data: Dataset, device: torch.device) -> dict[str, float]:
    """eps, and the root mean squares it comes from: D (``slope_rms``), T (``third_rms``) and r (``rounding_rms``).

    Args:
        recipe: with a trunk, in fp32; its first batch, weights and noise are used.
        data, device: of the run.

    Raises:
        ValueError: no trunk, or a loss without any rounding error or curvature: nothing to balance.
    """
    model = build_model(recipe, device)
    x, y = inputs(data.x_train, data.name, "fp32"), torch.from_numpy(data.y_train)
    x, y = (t.to(device) for t in next(Batches(x, y, recipe.batch, recipe.seed).epoch(0)))
    sites = make_plan(model, recipe.head_argument).sites
    if not sites:
        raise ValueError(f"head {recipe.head} leaves no trunk: there is no eps")
    precise = copy.deepcopy(model).double()
    own = dict(model.named_parameters(remove_duplicate=False))
    doubles = dict(precise.named_parameters(remove_duplicate=False))
    start = {site.names[0]: own[site.names[0]].clone() for site in sites}

    def losses(z: dict, scale: float) -> tuple[float, float]:
        for name, w in start.items():
            own[name].copy_(w.double().add(z[name], alpha=scale))
            doubles[name].copy_(w.double().add(z[name], alpha=scale))
        # the loss of fp32 logits is taken in fp32, as in a step
        return loss_fn(model(x), y).item(), torch.nn.functional.cross_entropy(precise(x.double()), y).item()

    slopes, thirds, errors = [], [], []
    for k in range(DIRECTIONS):
        z = {}
        for site in sites:
            draw = materialize(
                start[site.names[0]].shape, seed=recipe.seed, step=FIRST_STEP + k, site=site.site, query=0,
                noise=recipe.noise, device=device, layout=site.layout, rounds=recipe.rounds,
                **({"p_zero": recipe.zeros} if recipe.noise == "sparse" else {}),
            )  # fmt: skip
            z[site.names[0]] = draw.double()
        quotients = []
        for h in (H, 2 * H):
            plus, minus = losses(z, h), losses(z, -h)
            quotients.append((plus[1] - minus[1]) / (2 * h))
        near = losses(z, recipe.eps), losses(z, -recipe.eps)
        errors.append((near[0][0] - near[1][0]) - (near[0][1] - near[1][1]))
        slopes.append((near[0][1] - near[1][1]) / (2 * recipe.eps))
        thirds.append(2 * (quotients[1] - quotients[0]) / H**2)

    def rms(values: list[float]) -> float:
        return math.sqrt(math.fsum(v * v for v in values) / len(values))

    slope, third, rounding = rms(slopes), rms(thirds), rms(errors)
    if not (third > 0 and rounding > 0 and math.isfinite(third) and math.isfinite(rounding)):
        raise ValueError(f"no eps follows from a third derivative of {third} and a rounding error of {rounding}")
    eps = balance(rounding, third)
    return {"eps": eps, "slope_rms": slope, "third_rms": third, "rounding_rms": rounding}


def balance(rounding_rms: float, third_rms: float) -> float:
    """The eps at which eps^4 T2 / 36 + R2 / (4 eps^2) is least."""
    return (4.5 * (rounding_rms / third_rms) ** 2) ** (1 / 6)
