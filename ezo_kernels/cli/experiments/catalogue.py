"""The experiments: each a pure list of trials, with the columns of its table."""

from __future__ import annotations

from dataclasses import replace

from . import regression
from .findings import CHOICE, against_full_zo, judge_cuts, place_computed, say_cuts, say_planned, say_rank
from .recipes import (
    CLOUD_BP_LRS,
    CLOUD_FROZEN_LRS,
    CLOUD_HEAD_LR,
    CLOUD_NODE_RATES,
    CLOUD_NODES,
    CLOUD_RATES,
    FROZEN_LRS,
    GRID,
    HEADS,
    clouds,
)  # fmt: skip
from .scope import Experiment, Scope
from .summary import Column
from .trial import Trial

TEST, VALID = Column("test_error", "test error, %", 100), Column("validation_error", "validation error, %", 100)
SECONDS, STEP_MS = Column("seconds", "seconds", 1, 1), Column("step_ms", "ms a step", 1, 2)
BYTES = Column("step_bytes", "bytes of a step, MB", 1e-6, 3)


#: epochs of full BP: more only overfit
BP_EPOCHS = 10


def baseline(scope: Scope) -> list[Trial]:
    """The paper's Table 1 at equal forward passes: ``epochs`` is of two an image.

    A frozen trunk has as many steps as ElasticZO with the same head. Frozen trunk and full BP take their rate from the
    validation split.
    """
    out = [scope.trial(f"{name}, fp32", scope.best(head)) for head, name in HEADS.items()]
    out += _frozen_trunks(scope, ", fp32")
    bp = scope.other("bp", epochs=min(BP_EPOCHS, scope.epochs))
    out.append(scope.trial("full BP, fp32", bp, head_lrs=scope.ends(FROZEN_LRS)))
    for head, name in HEADS.items():
        out += [
            scope.trial(f"{name}, int8, float loss", scope.best_int8(head, "float")),
            scope.trial(f"{name}, int8, integer only", scope.best_int8(head, "integer")),
        ]
    return out


def _frozen_trunks(scope: Scope, ending: str = "") -> list[Trial]:
    """As many steps as ElasticZO has with the same head, the best rate of the validation split."""
    heads = {head: scope.other("frozen", head, epochs=scope.best(head).epochs) for head in ("fc3", "fc2,fc3")}
    return [
        scope.trial(f"frozen trunk, head {head}{ending}", own, head_lrs=scope.ends(FROZEN_LRS))
        for head, own in heads.items()
    ]


def grid(scope: Scope) -> list[Trial]:
    """What ``baseline`` chose its recipes from, on the validation split alone."""
    return [
        scope.trial(f"{HEADS[head]}, {name}", scope.candidate(head, name), task="validate")
        for head, candidates in GRID.items()
        for name in candidates
    ]


def importance(scope: Scope) -> list[Trial]:
    """The recipes of ``baseline``, and the same on rows drawn by importance, at equal forwards."""
    out = []
    for head, name in HEADS.items():
        out.append(scope.trial(f"{name}, all rows", scope.best(head)))
        out.append(scope.trial(f"{name}, drawn rows", scope.drawn(head)))
    return out


def nodes(scope: Scope) -> list[Trial]:
    """The recipes of ``baseline``, and with outputs of the linear layers perturbed in place of weights, at equal forwards."""
    out = []
    for head, name in HEADS.items():
        out.append(scope.trial(f"{name}, perturbed weights", scope.best(head)))
        out.append(scope.trial(f"{name}, perturbed outputs", scope.outputs(head)))
    return out + _frozen_trunks(scope)


EPS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def epsilon(scope: Scope) -> list[Trial]:
    """Three orders of magnitude, and the eps that balances rounding against bias."""
    out = [scope.trial("sweep", scope.elastic("0", eps=eps), x=eps, probes=("g",)) for eps in scope.ends(EPS)]
    return [*out, scope.trial("computed", scope.elastic("0"), eps_rule="balance", probes=("g",))]


BATCHES = (32, 64, 128, 256, 512, 1024)


def batch(scope: Scope) -> list[Trial]:
    """One learning rate for all, so that nothing but the batch differs."""
    out = []
    steps = scope.epochs * (scope.train_rows // BATCHES[0])
    for size in scope.ends(BATCHES):
        an_epoch = scope.train_rows // size
        if not an_epoch:
            raise ValueError(f"a batch of {size} out of {scope.train_rows} images of {scope.data}: too few")
        equal = scope.elastic("0", batch=size)
        out.append(scope.trial("equal samples", equal, x=size, probes=("g",)))
        longer = replace(equal, epochs=-(-steps // an_epoch))
        out.append(scope.trial("equal steps", longer, x=size, max_steps=steps, probes=("g",)))
    return out


P_ZERO, R_MAX, BITS = (0.5, 0.9, 0.99), (3, 15, 63), (-1, 0, 1)


def noise(scope: Scope) -> list[Trial]:
    """Distributions in floats; in integers one option at a time, constant over the run."""
    out = [
        scope.trial(f"fp32 {name}", scope.elastic("0", noise=name), probes=("g",))
        for name in ("gaussian", "rademacher")
    ]
    for p in scope.ends(P_ZERO):
        own = scope.elastic("0", noise="sparse", p_zero=str(p))
        out.append(scope.trial(f"fp32 sparse, p_zero {p}", own, probes=("g",)))
    common = {"r_max": 15, "p_zero": 0.97, "bits": 0}
    for name, values in (("p_zero", (0.9, 0.97, 0.99)), ("r_max", R_MAX), ("bits", BITS)):
        for value in scope.ends(values):
            options = {k: str(v) for k, v in {**common, name: value}.items()}
            out.append(scope.trial(f"int8 {name} {value}", scope.elastic("0", "int8", **options)))
    return out


SIGN = tuple(Column(f"sign_agreement_{bits}", f"agreement, {bits} bits, %", 100) for bits in (0, 2, 4, 8))


def sign(scope: Scope) -> list[Trial]:
    """g from the float loss, from the paper's integer rule and from ours; all watch all signs."""
    out = []
    for head, name in HEADS.items():
        for what, options in (
            ("float loss", {"loss": "float"}),
            ("integer loss, the paper's rule", {"fraction_bits": 0}),
            ("integer loss, 8 fraction bits", {}),
        ):
            out.append(scope.trial(f"{name}, {what}", scope.elastic(head, "int8", **options), probes=("signs",)))
    return out


def memory(scope: Scope) -> list[Trial]:
    """No training: bytes of a step, measured, planned and by the paper's equations, groups in one pass and one by one."""
    out = []
    for size in (32,) if scope.quick else (32, 256):
        for precision in ("fp32", "int8"):
            for mode in ("sequential", "stacked"):
                for head, name in HEADS.items():
                    own = scope.elastic(head, precision, batch=size, mode=mode)
                    out.append(scope.trial(f"batch {size}: {name}, {precision}, {mode}", own, task="bytes"))
        out.append(scope.trial(f"batch {size}: full BP, fp32", scope.other("bp", batch=size), task="bytes"))
        for head in ("fc3", "fc2,fc3"):
            own = scope.other("frozen", head, batch=size)
            out.append(scope.trial(f"batch {size}: frozen trunk, head {head}, fp32", own, task="bytes"))
    return out


SHARES = {
    "share_forward": "forward", "share_loss": "loss", "share_head_backward": "head backward", "share_g": "g",
    "share_update": "update", "share_head_update": "head update",
    "share_backward_and_update": "backward and update (BP)", "share_other": "other",
}  # fmt: skip


def time(scope: Scope) -> list[Trial]:
    """Phases of a step, as the paper's Figure 7."""
    out = []
    for head, name in HEADS.items():
        for precision in ("fp32", "int8"):
            out.append(scope.trial(f"{name}, {precision}", scope.elastic(head, precision), task="phases"))
    return [*out, scope.trial("full BP, fp32", scope.other("bp"), task="phases")]


def _clouds(scope: Scope) -> dict:
    """What every recipe of PointNet has of its own."""
    return clouds(scope.data) | {"batch": 8 if scope.quick else 32}


#: weight layers of each model, so heads of 0 to as many
LAYERS = {"lenet5": 5, "mlp": 3, "pointnet": 8}


def partition(scope: Scope) -> list[Trial]:
    """Every cut of every model; x is the number of weight layers in the head. And the one that ``choose_cut`` takes.

    PointNet has a tenth of the epochs.
    """
    out = []
    for model in scope.models:
        layers = LAYERS[model]
        common = {"model": model}
        if model == "pointnet":  # its steps take ten times as long
            common = _clouds(scope) | CLOUD_RATES | {"epochs": -(-scope.epochs // 10)}
        for n in range(layers + 1):
            own = scope.elastic("all" if n == layers else str(n), **common)
            out.append(scope.trial(model, own, x=n))
        out.append(scope.trial(f"{model}, {CHOICE}", scope.elastic("0", **common), task="choice"))
    return out


#: degrees of the turned images, and epochs by backpropagation on the upright ones before
TURN, START_EPOCHS = 45.0, 3


def finetune(scope: Scope) -> list[Trial]:
    """From one start a seed, by backpropagation on upright images: each method adapts it to turned ones."""
    start = replace(scope.other("bp"), epochs=min(START_EPOCHS, scope.epochs))
    common = {"rotate": TURN, "start": start}
    out = [scope.trial(name, scope.elastic(head), **common) for head, name in HEADS.items()]
    out.append(scope.trial("full BP", scope.other("bp"), head_lrs=scope.ends(FROZEN_LRS), **common))
    for head in ("fc3", "fc2,fc3"):
        own = scope.other("frozen", head)
        out.append(scope.trial(f"frozen trunk, head {head}", own, head_lrs=scope.ends(FROZEN_LRS), **common))
    return out


def pointcloud(scope: Scope) -> list[Trial]:
    """PointNet on clouds drawn from the images' pixels."""
    common = _clouds(scope)
    out = []
    for head, name in zip(("0", "1", "2"), HEADS.values(), strict=True):
        out.append(scope.trial(name, scope.elastic(head, **common | CLOUD_RATES | {"head_lr": CLOUD_HEAD_LR})))
    for head, name in zip(CLOUD_NODES, list(HEADS.values())[1:], strict=True):
        own = scope.elastic(head, **common | CLOUD_NODE_RATES | CLOUD_NODES[head])
        out.append(scope.trial(f"{name}, perturbed outputs", own))
    out.append(scope.trial("full BP", scope.other("bp", **common), head_lrs=scope.ends(CLOUD_BP_LRS)))
    for head in ("1", "2"):
        own = scope.other("frozen", head, **common)
        out.append(scope.trial(f"frozen trunk, last {head} by BP", own, head_lrs=scope.ends(CLOUD_FROZEN_LRS)))
    return out


_ALL = (
    Experiment(
        "baseline", "Table 1 of the paper: full ZO, ElasticZO, full BP and the tuned frozen trunk; fp32 and int8",
        baseline, (VALID, TEST, SECONDS, STEP_MS, BYTES), (TEST, STEP_MS, BYTES), epochs=64,
    ),
    Experiment(
        "grid", "the candidates that the recipes of baseline are chosen from, on the validation split", grid,
        (VALID, SECONDS, STEP_MS), (VALID,), epochs=64,
    ),
    Experiment(
        "importance", "the recipes of baseline, and on rows of larger batches drawn by importance, at equal forwards",
        importance, (VALID, TEST, SECONDS, STEP_MS), (VALID, TEST), epochs=64,
    ),
    Experiment(
        "nodes", "the recipes of baseline, and with outputs perturbed in place of weights, at equal forwards", nodes,
        (VALID, TEST, SECONDS, STEP_MS, BYTES), (VALID, TEST), epochs=64,
    ),
    Experiment(
        "epsilon", "eps over three orders of magnitude, and one computed from gradient statistics", epsilon,
        (
            VALID, TEST, Column("rank", "rank in the sweep", 1, 1), Column("behind_best", "behind its best, points", 100),
            Column("converged_step", "converged after, steps", 1, 0), Column("g_variance", "variance of g", 1, 3),
            Column("skipped_steps", "skipped", 1, 0), BYTES,
        ),
        (VALID, Column("g_variance", "variance of g"), Column("converged_step", "converged after, steps")),
        "eps", place_computed, say_rank,
    ),
    Experiment(
        "batch", "32 to 1024 images a step, at equal samples and at equal steps", batch,
        (VALID, TEST, Column("steps", "steps", 1, 0), Column("g_variance", "variance of g", 1, 3), SECONDS, BYTES),
        (VALID, Column("g_variance", "variance of g"), BYTES), "batch",
    ),
    Experiment(
        "noise", "gaussian, rademacher, sparse; in integers p_zero, r_max and bits", noise,
        (VALID, TEST, Column("g_variance", "variance of g", 1, 3), STEP_MS), (VALID,),
    ),
    Experiment(
        "sign", "sign of the integer loss against the float loss's, while training on either", sign,
        (VALID, TEST, *SIGN), (VALID, SIGN[0], SIGN[-1]),
    ),
    Experiment(
        "memory", "bytes of a step: measured, planned, and by the paper's equations", memory,
        (
            BYTES, Column("planned_bytes", "planned, MB", 1e-6, 3), Column("planned_over_measured", "planned / measured", 1, 4),
            Column("allocated_bytes", "peak of torch's allocator, MB", 1e-6, 3),
            Column("paper_bytes", "the paper's equations, MB", 1e-6, 3),
            Column("step_bytes_over_full_zo", "over full ZO fp32", 1, 4),
            Column("paper_bytes_over_full_zo", "the same by the equations", 1, 4),
            Column("full_bp_over", "full BP over ElasticZO, measured", 1, 3),
            Column("allocated_full_bp_over", "by the allocator", 1, 3),
            Column("paper_full_bp_over", "by the equations", 1, 3),
        ),
        (BYTES, Column("paper_bytes", "the paper's equations, MB", 1e-6)), refine=against_full_zo, notes=say_planned,
    ),
    Experiment(
        "finetune", "trained on upright images, adapted to turned ones; BP and the frozen trunk beside",
        finetune, (Column("start_validation_error", "validation before, %", 100), VALID, TEST, SECONDS), (VALID, TEST),
    ),
    Experiment(
        "pointcloud", "PointNet on point clouds of the images: full ZO, ElasticZO, full BP and the tuned frozen trunk",
        pointcloud, (VALID, TEST, SECONDS, STEP_MS, BYTES), (TEST, STEP_MS, BYTES), epochs=1,
    ),
    Experiment(
        "time", "shares of a step in forward, loss, head and update", time,
        (STEP_MS, *(Column(name, f"{what}, %", 100, 1) for name, what in SHARES.items())),
        (STEP_MS, Column("share_forward", "share of the forwards, %", 100)),
    ),
    Experiment(
        "partition", "accuracy and memory against the cut, from pure ZO to pure BP, the elbow, and the regret of choose_cut",
        partition,
        (
            VALID, TEST, BYTES, STEP_MS, Column("elbow", "elbow", 1, 0), Column("chosen", "chosen by choose_cut, %", 100, 0),
            Column("chosen_layers", "its layers", 1, 1), Column("best_cut", "the best's", 1, 1),
            Column("beyond", "gained beyond, points", 100), Column("regret_chosen", "regret of choose_cut, points", 100),
            Column("regret_last", "of the last layer", 100), Column("regret_random", "of a random cut", 100),
        ),
        (VALID, BYTES), "weight layers by BP", judge_cuts, say_cuts,
    ),
    Experiment(
        "regression", "int8 on tables: sign agreement, variance of g, where weights and exponents go, by learning rate",
        regression.trials, regression.COLUMNS, regression.PLOTTED,
        epochs=200, tables=True,
    ),
)  # fmt: skip
EXPERIMENTS = {experiment.name: experiment for experiment in _ALL}
