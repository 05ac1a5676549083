"""The recipes of the experiments: chosen on the validation split (docs/recipes.md)."""

from __future__ import annotations

from ..recipe import Recipe

#: rates of a frozen trunk's head, of which the validation split takes the best, each seed on its own
FROZEN_LRS = (0.02, 0.05, 0.1, 0.2, 0.4)
#: PointNet's clouds: points of an image, and of a shape, as the field takes them
CLOUDS = {"model": "pointnet", "points": 64}
SHAPE_POINTS = {"modelnet40": 1024}
#: its rates: lr is G / (G_B T) of the trunk below fc3 (docs/cut.md), 3.8e-5 to 6.9e-5 over three seeds; head_lr serves every
#: cut, from fc3 alone to all by backpropagation
CLOUD_RATES = {"lr": 5e-5, "head_lr": 0.2}
#: the head's rate of ElasticZO with PointNet's last layers, by the validation split (docs/recipes.md)
CLOUD_HEAD_LR = 0.4
#: its rates of a frozen trunk's head, and of full BP
CLOUD_FROZEN_LRS, CLOUD_BP_LRS = (0.1, 0.2, 0.4, 0.8, 1.6), (0.05, 0.1, 0.2, 0.4)
#: head as ``Recipe.head`` has it -> what the table calls it; the paper's names are our reading of them
HEADS = {
    "0": "full ZO",
    "fc3": "ElasticZO, last layer by BP (ZO-Feat-Cls2)",
    "fc2,fc3": "ElasticZO, last two layers by BP (ZO-Feat-Cls1)",
}
#: options of integers with no head in runs of about ten epochs: steps of one unit, at first many, then few; p_zero is the
#: learning rate
PURE_INT8 = {"r_max": "15,31@0.3,63@0.6,127@0.85", "p_zero": "0.9,0.97@0.3,0.99@0.6,0.9975@0.85", "bits": "0"}

#: epochs from which on a run is long
LONG_EPOCHS = 32
#: data -> the same of long runs, and of any with a head: those of ``bench/int8_training.py``, which came of the validation
#: split
LONG_INT8 = {
    "mnist": {"r_max": "15,127@0.006,63@0.1,127@0.8", "p_zero": "0.9,0.997@0.006,0.9985@0.4,0.9993@0.6,0.9997@0.8"},
    "fashion_mnist": {"r_max": "15,63@0.01,127@0.3", "p_zero": "0.9,0.99@0.01,0.996@0.3,0.9985@0.65,0.9994@0.87"},
}
HEAD_INT8 = {
    "r_max": "15,31@0.1,63@0.6,127@0.8",
    "p_zero": "0.95,0.97@0.1,0.98@0.3,0.99@0.6,0.9975@0.8,0.9993@0.92",
    "head_bits": "2,1@0.2,0@0.4,-1@0.6,-2@0.8,-3@0.92",
}

_COMMON = {"eps": 3e-3}
#: head -> name -> a candidate of ``ezo experiment grid``: as many for each head. One sign a query; many directions a step for
#: the trunk alone, many steps where a head learns; one rate for all layers, or three times it and distances in proportion to
#: the weights.
GRID = {
    "0": {
        "one rate": {"queries": 16, "lr": 7e-4, **_COMMON},
        "a scale a layer": {"queries": 16, "lr": 2e-3, "scales": "conv1=2,fc1=0.4,fc2=0.7,fc3=1.3", **_COMMON},
    },
    "fc3": {
        "one rate": {"queries": 8, "lr": 3.5e-4, **_COMMON},
        "a scale a layer": {"queries": 8, "lr": 1e-3, "scales": "conv1=2,fc1=0.4,fc2=0.7", **_COMMON},
    },
    "fc2,fc3": {
        "one rate": {"queries": 8, "lr": 3.5e-4, "head_lr": 0.1, **_COMMON},
        "a scale a layer": {"queries": 8, "lr": 1e-3, "scales": "conv1=2,fc1=0.4", "head_lr": 0.1, **_COMMON},
    },
}
#: head -> the candidate that left the least error on the validation split, both data sets, seed 0.
BEST = {"0": "one rate", "fc3": "a scale a layer", "fc2,fc3": "a scale a layer"}

#: Rows that ``ezo experiment importance`` draws, and out of how many.
DRAWN_ROWS, DRAWN_FROM = 16, 128
#: head -> its recipe there: directions and rates by the model of docs/recipes.md, the rest as the best candidate has it.
DRAWN = {
    "0": {"queries": 32, "lr": 1.4e-3},
    "fc3": {"queries": 16, "lr": 2e-3},
    "fc2,fc3": {"queries": 16, "lr": 2e-3},
}


def clouds(data: str) -> dict:
    """What every recipe of PointNet has of its own, by what it sees."""
    return CLOUDS | {"points": SHAPE_POINTS.get(data, CLOUDS["points"])}


def drawn(data: str, head: str, seed: int, epochs: int) -> Recipe:
    """Rows drawn by importance, at the forwards of ``epochs`` epochs with two an image: each image has one more an epoch."""
    own = {**GRID[head][BEST[head]], **DRAWN[head]}
    an_epoch = 1 + own["queries"] * DRAWN_ROWS / DRAWN_FROM
    size = {"batch": DRAWN_FROM, "importance_rows": DRAWN_ROWS, "epochs": max(1, int(2 * epochs / an_epoch))}
    return Recipe(data=data, head=head, seed=seed, antithetic=False, **size, **own)


#: head -> how ``ezo experiment nodes`` trains below it: outputs perturbed in place of weights (docs/recipes.md). Where there is
#: a head, the convolutions stay as they were initialised.
_HELD = {"queries": 8, "node_lr": 0.3, "freeze": "conv1,conv2"}
NODES = {
    "0": {"queries": 8, "node_lr": 0.1, "nodes": "fc1,fc2,fc3", "lr": 3e-4, "scales": "conv1=2", **_COMMON},
    "fc3": {**_HELD, "nodes": "fc1,fc2"},
    "fc2,fc3": {**_HELD, "nodes": "fc1", "head_lr": 0.1},
}
#: head -> the same of PointNet; its shared MLP and its batch norms stay as they were initialised
_BELOW = ",".join(f"{layer}{i}" for layer in ("conv", "bn") for i in range(1, 6))
CLOUD_NODES = {
    "1": {"nodes": "fc1,fc2", "freeze": f"{_BELOW},bn6,bn7"},
    "2": {"nodes": "fc1", "freeze": f"{_BELOW},bn6"},
}
CLOUD_NODE_RATES = {"queries": 32, "antithetic": False, "node_lr": 0.2, "head_lr": 0.4}


def outputs(data: str, head: str, seed: int, epochs: int) -> Recipe:
    """Perturbed outputs, at the forward passes of ``epochs`` epochs with two a step."""
    own = NODES[head]
    return Recipe(data=data, head=head, seed=seed, epochs=max(1, 2 * epochs // own["queries"]), antithetic=False, **own)


def candidate(data: str, head: str, seed: int, epochs: int, name: str) -> Recipe:
    """A candidate of :data:`GRID` on LeNet-5, at the forward passes of ``epochs`` epochs with two a step."""
    own = GRID[head][name]
    return Recipe(data=data, head=head, seed=seed, epochs=max(1, 2 * epochs // own["queries"]), antithetic=False, **own)


def best(data: str, head: str, seed: int, epochs: int) -> Recipe:
    """The best candidate of a head."""
    return candidate(data, head, seed, epochs, BEST[head])


def best_int8(data: str, head: str, seed: int, epochs: int, loss: str) -> Recipe:
    """The integers' own, at the forward passes of ``epochs`` epochs with two a step."""
    pure = LONG_INT8.get(data, LONG_INT8["mnist"]) if epochs >= LONG_EPOCHS else PURE_INT8
    own = {"bits": "0", **(pure if head == "0" else HEAD_INT8)}
    return Recipe(data=data, head=head, seed=seed, epochs=epochs, precision="int8", loss=loss, **own)


def recipe(data: str, head: str, seed: int, epochs: int, precision: str = "fp32", **options) -> Recipe:
    """ElasticZO on LeNet-5 with both signs of one query a step, so that arms may differ in one option; or in integers."""
    own = PURE_INT8 if precision == "int8" and head == "0" else {}
    return Recipe(data=data, head=head, seed=seed, epochs=epochs, precision=precision, **{**own, **options})
