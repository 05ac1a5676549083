"""What follows from several rows of a table: ratios, the place of a computed eps, the elbow, the regret of a chosen cut.

A ``refine`` takes the table and the finished trials and gives a new table; a ``notes`` gives sentences about it. What can be
told of each seed by itself is, so that it has a spread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ...planning import regret
from .summary import mean_spread
from .trial import Finished

#: What larger heads take off the validation error of the last two layers, as a share of it: below it, little.
LITTLE = 0.1
#: A run has converged when its validation error stays within so much of the last one: a point.
NEAR = 0.01
#: the arm of a choice beside the sweep of a model
CHOICE = "choose_cut"


def _by_seed(done: list[Finished], data: str, select: Callable[[Finished], bool]) -> Iterator[list[Finished]]:
    """Trials of a data set that are selected, a list a seed."""
    own = [one for one in done if one.trial.recipe.data == data and select(one)]
    for seed in dict.fromkeys(one.trial.recipe.seed for one in own):
        yield [one for one in own if one.trial.recipe.seed == seed]


def _copy(table: list[dict]) -> list[dict]:
    return [{**row, "metrics": {**row["metrics"]}} for row in table]


def _data(table: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["data"] for row in table))


# ------------------------------------------------------------------------------------------------------------- epsilon


def converged_step(curve: list[dict], steps: int) -> int:
    """The step from which on the validation error is within :data:`NEAR` of the last one; of no whole epoch all ``steps``."""
    found = steps
    for row in reversed(curve):
        if curve[-1]["validation_accuracy"] - row["validation_accuracy"] > NEAR:
            break
        found = row["step"]
    return found


def place_computed(table: list[dict], done: list[Finished]) -> list[dict]:
    """The computed eps, known when its trials are done, is put where the curve has it, and held against the sweep.

    On the validation split, a seed at a time: ``rank`` is 1 + how many other values of the sweep did better, ``behind_best``
    the error less that of the sweep's best. The computed one also has ``eps_of_best``. ``converged_step`` says how long each
    took.
    """
    out = _copy(table)
    for name in _data(table):
        found: dict[tuple, list] = {}
        best_eps = []
        for ones in _by_seed(done, name, lambda one: one.values.get("validation_error") is not None):
            errors = {one.trial.x: one.values["validation_error"] for one in ones if one.trial.arm == "sweep"}
            if not errors:
                continue
            least = min(errors, key=errors.get)
            for one in ones:
                own = one.values["validation_error"]
                others = [e for x, e in errors.items() if one.trial.arm != "sweep" or x != one.trial.x]
                entry = found.setdefault((one.trial.arm, one.trial.x), [])
                entry.append((1 + sum(e < own for e in others), own - errors[least]))
                if one.trial.arm == "computed":
                    best_eps.append(least)
        steps: dict[tuple, list] = {}
        for one in done:
            if one.trial.recipe.data == name and {"curve", "steps"} <= one.result.keys():
                took = converged_step(one.result["curve"], one.result["steps"])
                steps.setdefault((one.trial.arm, one.trial.x), []).append(float(took))
        for row in out:
            if row["data"] == name and (own := steps.get((row["arm"], row["x"]))):
                row["metrics"]["converged_step"] = mean_spread(own)
            places = found.get((row["arm"], row["x"]), []) if row["data"] == name else []
            if places:
                row["metrics"]["rank"] = mean_spread([float(rank) for rank, _ in places])
                row["metrics"]["behind_best"] = mean_spread([behind for _, behind in places])
            if row["data"] == name and row["arm"] == "computed":
                row["x"] = row["metrics"]["eps"]["mean"]
                if best_eps:
                    row["metrics"]["eps_of_best"] = mean_spread(best_eps)
    return out


def say_rank(table: list[dict]) -> list[str]:
    """One sentence a data set: where the computed eps lies in the sweep."""
    said = []
    for row in table:
        if row["arm"] == "computed" and "rank" in row["metrics"]:
            m = row["metrics"]
            sweep = [r for r in table if r["data"] == row["data"] and r["arm"] == "sweep"]
            said.append(
                f"{row['data']}: the computed eps, {row['x']:.2g}, has rank {m['rank']['mean']:.1f} of {len(sweep) + 1}, the "
                f"sweep's and its own, {100 * m['behind_best']['mean']:.2f} points of validation error from the best of each "
                f"seed (eps {m['eps_of_best']['mean']:.2g} on average)"
            )
    return said


# -------------------------------------------------------------------------------------------------------------- memory


#: bytes of an arm -> name of full BP's over them
FULL_BP_OVER = {
    "step_bytes": "full_bp_over", "allocated_bytes": "allocated_full_bp_over", "paper_bytes": "paper_full_bp_over",
}  # fmt: skip


def against_full_zo(table: list[dict], done: list[Finished]) -> list[dict]:
    """Bytes over those of sequential full ZO in fp32 at the same batch, measured and by the equations, where it is there.

    Of ElasticZO in fp32 also full BP's over its own.
    """

    def group(row: dict) -> tuple:
        return row["data"], row["arm"].partition(":")[0]

    bases = {group(row): row["metrics"] for row in table if row["arm"].endswith(": full ZO, fp32, sequential")}
    backprop = {group(row): row["metrics"] for row in table if ": full BP" in row["arm"]}
    out = []
    for row in table:
        own = row["metrics"]
        base = bases.get(group(row), {})
        over = {
            f"{name}_over_full_zo": {
                "mean": own[name]["mean"] / base[name]["mean"],
                "spread": None,
                "n": own[name]["n"],
            }
            for name in ("step_bytes", "allocated_bytes", "paper_bytes")
            if name in own and name in base
        }
        if ": ElasticZO" in row["arm"] and ", fp32" in row["arm"] and group(row) in backprop:
            for name, over_own in FULL_BP_OVER.items():
                if name not in own:
                    continue
                ratio = backprop[group(row)][name]["mean"] / own[name]["mean"]
                over[over_own] = {"mean": ratio, "spread": None, "n": own[name]["n"]}
        out.append({**row, "metrics": {**own, **over}})
    return out


def say_planned(table: list[dict]) -> list[str]:
    """One sentence: how far planned bytes are from measured ones."""
    ratios = [row["metrics"]["planned_over_measured"]["mean"] for row in table]
    if not ratios:
        return []
    worst = max(abs(ratio - 1) for ratio in ratios)
    return [f"planned over measured bytes, {len(ratios)} arms: within {100 * worst:.3f}% of 1"]


# ----------------------------------------------------------------------------------------------------------- partition


def mark_elbow(table: list[dict]) -> list[dict]:
    """``elbow`` is 1 at the cut farthest below the chord of (bytes, validation error), both scaled to [0, 1].

    Of fewer than three cuts there is none. The validation split decides, not the test set.
    """
    out = _copy(table)
    for name, arm in dict.fromkeys((row["data"], row["arm"]) for row in out if row["x"] is not None):
        own = sorted((row for row in out if (row["data"], row["arm"]) == (name, arm)), key=lambda row: row["x"])
        if len(own) < 3:
            continue
        points = [(r["metrics"]["step_bytes"]["mean"], r["metrics"]["validation_error"]["mean"]) for r in own]
        (x0, y0), (x1, y1) = points[0], points[-1]
        if x0 == x1 or y0 == y1:
            continue
        # On the chord x' + y' = 1, below it less.
        gains = [1 - (x - x0) / (x1 - x0) - (y - y1) / (y0 - y1) for x, y in points]
        best = gains.index(max(gains))
        for i, row in enumerate(own):
            row["metrics"]["elbow"] = {"mean": float(i == best), "spread": None, "n": len(row["seeds"])}
    return out


def judge_cuts(table: list[dict], done: list[Finished]) -> list[dict]:
    """The elbow, what is gained beyond the last two layers, and what the cut of ``choose_cut`` loses against the best.

    Of each seed by itself. The row of two layers gets ``beyond``, the validation error that the best larger head has less, and
    ``beyond_share``, that as a share of its own. Each cut gets ``chosen``, the share of seeds in which it was chosen. The row
    of the choice gets ``regret_chosen``, ``regret_last`` and ``regret_random`` in test accuracy, by which nothing was chosen
    (:func:`ezo_kernels.planning.regret`).
    """
    out = mark_elbow(table)
    for row in out:
        model = row["arm"].partition(", ")[0]
        ones = list(_by_seed(done, row["data"], lambda one, model=model: one.trial.arm.partition(", ")[0] == model))
        cuts = [{int(o.trial.x): o.values for o in own if o.trial.x is not None} for own in ones]
        chosen = [[int(o.values["chosen_layers"]) for o in own if o.trial.task == "choice"] for own in ones]
        if row["x"] == 2:
            lost = [c for c in cuts if 2 in c and max(c) > 2]
            beyond = [c[2]["validation_error"] - min(c[n]["validation_error"] for n in c if n > 2) for c in lost]
            left = sum(c[2]["validation_error"] for c in lost)
            if beyond:
                row["metrics"]["beyond"] = mean_spread(beyond)
            if beyond and left > 0:
                row["metrics"]["beyond_share"] = {"mean": sum(beyond) / left, "spread": None, "n": len(beyond)}
        picks = [pick[0] for pick in chosen if pick]
        if row["x"] is not None and picks:
            share = sum(pick == row["x"] for pick in picks) / len(picks)
            row["metrics"]["chosen"] = {"mean": share, "spread": None, "n": len(picks)}
        if row["arm"].endswith(CHOICE):
            judged = [
                regret({n: 1 - values["test_error"] for n, values in c.items()}, pick[0])
                for c, pick in zip(cuts, chosen, strict=True)
                if pick and pick[0] in c
            ]
            names = {
                "regret_chosen": "chosen",
                "regret_last": "last_one",
                "regret_random": "random",
                "best_cut": "best",
            }
            for name, attribute in names.items():
                values = [float(getattr(one, attribute)) for one in judged if getattr(one, attribute) is not None]
                if values:
                    row["metrics"][name] = mean_spread(values)
    return out


def say_cuts(table: list[dict]) -> list[str]:
    """A sentence or two a model and data set: the elbow, whether little is gained beyond the last two layers, the regret."""
    said = []
    for row in table:
        m, name = row["metrics"], f"{row['data']}, {row['arm'].partition(', ')[0]}"
        if m.get("elbow", {}).get("mean") == 1:
            said.append(f"{name}: the elbow is at {row['x']:g} weight layers by BP")
        if "beyond_share" in m:
            share = m["beyond_share"]["mean"]
            said.append(
                f"{name}: {'little' if share < LITTLE else 'more than a little'} is gained beyond the last two layers: "
                f"{100 * m['beyond']['mean']:.2f} points of validation error, {100 * share:.1f}% of the error that they leave "
                f"(little: below {100 * LITTLE:g}%)"
            )
        if "regret_chosen" in m:
            last = f"always the last layer {100 * m['regret_last']['mean']:.2f}, " if "regret_last" in m else ""
            said.append(
                f"{name}: regret in points of test accuracy: choose_cut {100 * m['regret_chosen']['mean']:.2f}, {last}"
                f"a random cut {100 * m['regret_random']['mean']:.2f}"
            )
    return said
