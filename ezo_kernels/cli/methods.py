"""The optimizer of each ``--method``. All have ``train_step(x, y, loss_fn)``, ``param_groups`` and ``state_dict``."""

from __future__ import annotations

import torch

from ..nn import convert_
from ..ops.noise import rng_version
from ..optim import ElasticZO, ElasticZOInt8
from .recipe import Recipe, names_in, parse_scales


def make_optimizer(
    recipe: Recipe, model: torch.nn.Module, int8=ElasticZOInt8, capture: bool = False
) -> torch.optim.Optimizer:
    """Convert ``model`` in place where the method asks for it, and make its optimizer.

    Args:
        recipe, model: of the run.
        int8: the class of integer optimizers.
        capture: replay steps as one CUDA graph, the head's SGD fused; a trunk's bits are the same with and without.

    Raises:
        ValueError: whatever of the recipe it cannot take: an unknown noise, a head that does not exist, eps <= 0, ...
    """
    if capture and recipe.method != "elastic":
        raise ValueError(f"--capture: no meaning with --method {recipe.method}")
    if recipe.integer:
        convert_(model, head=recipe.head_argument, precision="int8")
        trunk, head = recipe.integers_at(0, 1)
        loss = "cross_entropy" if recipe.loss == "integer" else "float_cross_entropy"
        mode = "stacked" if recipe.mode == "auto" else recipe.mode
        return int8(
            model, **trunk, head_bits=head["bits"], queries=recipe.queries, seed=recipe.seed, rounds=recipe.rounds,
            antithetic=recipe.antithetic, fraction_bits=recipe.fraction_bits, loss=loss, mode=mode, capture=capture,
            head_remainder=recipe.head_remainder,
        )  # fmt: skip
    noise = {"noise": recipe.noise, "p_zero": recipe.zeros, "rounds": recipe.rounds}
    zo = {"lr": recipe.lr, "eps": recipe.eps, "clip": recipe.clip, "queries": recipe.queries, "seed": recipe.seed}
    if recipe.method == "elastic":
        freeze_(model, names_in(recipe.freeze))
        convert_(model, head=recipe.head_argument)
        own = {"antithetic": recipe.antithetic, "mode": recipe.mode, "capture": capture}
        own |= {"scales": parse_scales(recipe.scales), "importance_rows": recipe.importance_rows or None}
        own |= {"node_perturbation": recipe.node_perturbation}
        return ElasticZO(model, **zo, **noise, head_lr=recipe.head_lr, **own)
    # What ElasticZO is held against: not imported by a run that does not compare.
    from ..optim import baselines

    if recipe.method == "mezo":
        return baselines.MeZO(model, **zo, **noise, head=recipe.head_argument, head_lr=recipe.head_lr)
    if recipe.method == "frozen":
        return baselines.FrozenTrunk(model, head=recipe.head_argument, lr=recipe.head_lr)
    return baselines.BackpropSGD(model, lr=recipe.head_lr)


def freeze_(model: torch.nn.Module, names: list[str]) -> None:
    """Leave the parameters of these layers as they are; ValueError for one that does not exist."""
    layers = dict(model.named_modules())
    for name in names:
        if not name or name not in layers:
            own = ", ".join(n for n, layer in layers.items() if n and next(layer.parameters(), None) is not None)
            raise ValueError(f"freeze: the model has no layer {name!r}; it has {own}")
        layers[name].requires_grad_(False)


def noise_version(recipe: Recipe) -> str:
    """The version string of the noise contract that a run's draws follow."""
    return rng_version(recipe.rounds)
