"""Bugs in data, models, experiments, diagnostics and measurements."""

from __future__ import annotations

from .mutant import Mutant

_OPS = "ezo_kernels/ops/"
_NN = "ezo_kernels/nn/"
_WATCH = "ezo_kernels/optim/diagnostics.py"
_DATA = "ezo_kernels/data/"

MUTANTS = (
    # experiments
    Mutant(
        "trials of any recipe are one",
        "ezo_kernels/cli/experiments/trial.py",
        'for label in ("arm", "x"):',
        'for label in ("arm", "x", "recipe"):',
        "tests/test_experiments.py -k key",
    ),
    Mutant(
        "the rate that the validation split likes least",
        "ezo_kernels/cli/experiments/tasks.py",
        "valid > best[1]",
        "valid < best[1]",
        "tests/test_experiments.py -k rates",
    ),
    Mutant(
        "a trial filed after the next one began",
        "ezo_kernels/cli/experiments/store.py",
        "outputs.jsonable(record)\n        self.write()",
        "outputs.jsonable(record)",
        "tests/test_experiments.py -k restarted",
    ),
    # baselines
    Mutant(
        "MeZO makes a full step of a loss that is not finite",
        "ezo_kernels/optim/baselines.py",
        "if all(map(math.isfinite, gs)):",
        "if gs:",
        "tests/test_baselines.py -k finite",
    ),
    Mutant(
        "MeZO leaves its weights perturbed when the loss raises",
        "ezo_kernels/optim/baselines.py",
        "            self._sweep(query, -eps)\n            raise",
        "            raise",
        "tests/test_baselines.py -k perturbation",
    ),
    # diagnostics
    Mutant(
        "a finding is told at every reading",
        _WATCH,
        "new = [finding for kind, finding in found.items() if kind not in self.active]",
        "new = list(found.values())",
        "tests/test_diagnostics.py -k noisy",
    ),
    Mutant(
        "what has converged is a plateau",
        _WATCH,
        "(promised < PROMISED * level and not (diverged or dead))",
        "(promised < 0 and not (diverged or dead))",
        "tests/test_diagnostics.py -k converged",
    ),
    Mutant(
        "evaluations count as activations of a step",
        "ezo_kernels/optim/activations.py",
        "self.optimizer.zo.p is not None if self.zeroth",
        "True if self.zeroth",
        "tests/test_diagnostics.py -k evaluation",
    ),
    # data and PointNet
    Mutant(
        "images turned clockwise",
        _DATA + "rotate.py",
        "np.deg2rad(angles % 360)",
        "np.deg2rad(-angles % 360)",
        "tests/test_data_more.py -k quarter",
    ),
    Mutant(
        "height and width confused by a rotation",
        _DATA + "rotate.py",
        "-sin * (height / width)",
        "-sin * (width / height)",
        "tests/test_data_more.py -k bilinear",
    ),
    Mutant(
        "a column is told constant by its rounded deviation",
        _DATA + "regression.py",
        "still = least == values[train].max(0)",
        "still = std == 0",
        "tests/test_data_more.py -k never_changes",
    ),
    Mutant(
        "pixels drawn whatever their ink",
        _DATA + "pointcloud.py",
        "ink = np.cumsum(images.reshape(n, height * width), axis=1",
        "ink = np.cumsum(images.reshape(n, height * width) > 0, axis=1",
        "tests/test_pointcloud.py -k ink",
    ),
    Mutant(
        "points crowd in a corner of their triangle",
        _DATA + "modelnet.py",
        "u = np.sqrt(u)",
        "u = u * 1.0",
        "tests/test_pointcloud.py -k uniform",
    ),
    Mutant(
        "every epoch augments alike",
        _DATA + "pointcloud.py",
        'words(1, seed, "turn", epoch, index)',
        'words(1, seed, "turn", 0, index)',
        "tests/test_cloud_augmentation.py -k rotation",
    ),
    Mutant(
        "standardised by all rows",
        _DATA + "regression.py",
        "values[train].mean(0), values[train].std(0)",
        "values.mean(0), values.std(0)",
        "tests/test_data_more.py -k diabetes",
    ),
    Mutant(
        "a weight written in place passes as a view",
        "ezo_kernels/optim/check.py",
        "and out is not of\n",
        "\n",
        "tests/test_pointnet.py -k writes",
    ),
    Mutant(
        "the update of a Conv1d makes another z",
        _NN + "int8_convert.py",
        "conv = type(modules[owner]) in _CONVOLUTIONS and",
        "conv = type(modules[owner]) is nn.Conv2d and",
        "tests/test_int8_conv1d.py -k steps",
    ),
    Mutant(
        "a freed storage stays counted",
        "ezo_kernels/planning/live.py",
        "self.now -= size",
        "self.now -= 0",
        "tests/test_memory_plan.py -k live",
    ),
    Mutant(
        "G with the noise of its own micro-batch",
        "ezo_kernels/planning/signal.py",
        "(self.true.sum() - norms.sum()) / (k * (k - 1))",
        "self.true.sum() / (k * k)",
        "tests/test_choose_cut.py -k whole",
    ),
    Mutant(
        "a budget of bytes that rules nothing out",
        "ezo_kernels/planning/choice.py",
        "total <= memory_budget",
        "total > 0",
        "tests/test_choose_cut.py -k memory_budget",
    ),
    Mutant(
        "a budget that only stacked steps may meet",
        "ezo_kernels/planning/choice.py",
        "total, how = next(fit, min(ways))",
        "total, how = ways[0]",
        "tests/test_choose_cut.py -k one_by_one",
    ),
    Mutant(
        "gains of a batch of the wrong size",
        "ezo_kernels/planning/signal.py",
        "G + of_rows / self.batch",
        "G + of_rows / (k * self.rows)",
        "tests/test_choose_cut.py -k asked_for",
    ),
    Mutant(
        "a curvature at the ends of its line alone",
        "ezo_kernels/planning/signal.py",
        "share = max((k - 1) * self.rows / self.batch - 1, 0.0) / max(k - 2, 1)",
        "share = float((k - 1) * self.rows > self.batch)",
        "tests/test_choose_cut.py -k asked_for",
    ),
    Mutant(
        "the first group's output kept beside the whole",
        "ezo_kernels/nn/grouped.py",
        "        del first\n",
        "",
        "tests/test_grouped_memory.py -k beside",
    ),
    Mutant(
        "a group's pointwise convolution where its rows lie",
        _OPS + "conv2d.py",
        "y if y.data_ptr() % 64 == 0 else torch.empty_like(y)",
        "y",
        "tests/test_ops_contract.py -k pointwise",
    ),
    Mutant(
        "bytes of a first integer step, with its arena's making",
        "ezo_kernels/planning/integers.py",
        "        live.restart()\n        optimizer.train_step(x, y)\n",
        "",
        "tests/test_memory_plan.py -k 'integer_head or regression_in or takes_what'",
    ),
    Mutant(
        "a tie of the integers agrees with a tie of the floats",
        "ezo_kernels/cli/experiments/probes.py",
        '"sign_agreement": ((ours == floats) & (ours != 0))',
        '"sign_agreement": (ours == floats)',
        "tests/test_regression_experiment.py -k ties",
    ),
    Mutant(
        "the float network of unperturbed weights",
        "ezo_kernels/cli/experiments/probes.py",
        "(values + sign * own).clamp(-127, 127)",
        "values.clamp(-127, 127)",
        "tests/test_regression_experiment.py -k very_weights",
    ),
    Mutant(
        "the computed eps ranked by what did worse",
        "ezo_kernels/cli/experiments/findings.py",
        "sum(e < own for e in others)",
        "sum(e > own for e in others)",
        "tests/test_experiment_findings.py -k rank",
    ),
    Mutant(
        "the regret of errors instead of accuracies",
        "ezo_kernels/cli/experiments/findings.py",
        '{n: 1 - values["test_error"] for n',
        '{n: values["test_error"] for n',
        "tests/test_experiment_findings.py -k regret",
    ),
    # measurements
    Mutant(
        "figures of other sources are taken for ours",
        "bench/gpu.py",
        "return record if same ==",
        "return record if same or same ==",
        "tests/test_bench.py -k measures_nothing_again",
    ),
    Mutant(
        "red tests do not stop the benchmarks",
        "bench/gpu.py",
        "if not args.keep_going:\n                    return 1",
        "if not args.keep_going:\n                    pass",
        "tests/test_bench.py -k red_tests",
    ),
    Mutant(
        "the table of targets shows the best figure",
        "bench/targets.py",
        "(max(found), min(found)) if target.lower else (min(found), max(found))",
        "(min(found), max(found)) if target.lower else (max(found), min(found))",
        "tests/test_report.py -k worst_figure",
    ),
)
