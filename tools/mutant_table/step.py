"""Bugs in the step, captured or not."""

from __future__ import annotations

from .mutant import Mutant

_STEP = "ezo_kernels/optim/elastic_zo.py"
_NN = "ezo_kernels/nn/"
_UPDATES = "ezo_kernels/optim/updates.py"

_SHARED = "tests/test_shared_batch.py"

MUTANTS = (
    # what a step makes of its losses
    Mutant(
        "a step whose head has an infinite gradient is taken",
        _UPDATES,
        "bad=bad, step=self._step",
        "bad=None, step=self._step",
        "tests/test_step.py -k non_finite",
    ),
    Mutant(
        "a step that is skipped is counted as taken",
        "ezo_kernels/ops/coefficients.py",
        "    step += fine",
        "    step += 1",
        "tests/test_coefficients.py",
    ),
    # scales
    Mutant(
        "a scaled layer perturbed like the others",
        "ezo_kernels/nn/linear.py",
        "            input, self.weight, self.bias, self.zo.of(self.site), site=",
        "            input, self.weight, self.bias, self.zo.p, site=",
        "tests/test_scales.py",
    ),
    Mutant(
        "an update without the scale",
        _UPDATES,
        "z_dtypes=z_dtypes, scales=scales\n",
        "z_dtypes=z_dtypes\n",
        "tests/test_scales.py",
    ),
    Mutant(
        "eps moved for unscaled layers alone",
        "ezo_kernels/optim/scalars.py",
        "                    self._scaled_eps.fill(held)\n",
        "                    pass\n",
        "tests/test_scales.py",
    ),
    # layers and the step
    Mutant(
        "z of the step before",
        _UPDATES,
        "                self._update(own.coef)",
        "                torch.ops.ezo.fold_key(self._seed, self._step - 2, self._key), self._update(own.coef)",
        "tests/test_step.py -k 'forward_z or eager_mezo'",
    ),
    Mutant(
        "stale seed",
        _STEP,
        "fold_key(self._seed, self._step, self._key)",
        "fold_key(self._seed, self._step * 0, self._key)",
        "tests/test_step.py -k 'eager_mezo or schedulers'",
    ),
    Mutant(
        "torch's fused encoder layer left on",
        _NN + "context.py",
        "set_fastpath_enabled(False)",
        "set_fastpath_enabled(True)",
        "tests/test_others.py -k eval_mode",
    ),
    Mutant(
        "layers that a later step leaves out are updated",
        "ezo_kernels/optim/passes.py",
        "len(zo.visited) < len(self.trunk)",
        "len(zo.visited) < 1",
        "tests/test_others.py -k leaves_out",
    ),
    Mutant(
        "a skipped first step makes the head's state",
        "ezo_kernels/optim/head.py",
        "and not bool(ok)",
        "and bool(ok)",
        "tests/test_head.py -k first_step",
    ),
    Mutant(
        "clip ignored",
        "ezo_kernels/ops/coefficients.py",
        "own if math.isinf(clip) else own.clamp(-clip, clip)",
        "own",
        "tests/test_step.py -k clip",
    ),
    Mutant(
        "a step that is not finite is applied",
        "ezo_kernels/ops/coefficients.py",
        "            coef.zero_()",
        "            pass",
        "tests/test_step.py -k non_finite",
    ),
    Mutant(
        "lr read once",
        "ezo_kernels/optim/arguments.py",
        "    if value == filled[name]:\n",
        "    if filled[name] is not None:\n",
        "tests/test_step.py -k schedulers",
    ),
    Mutant(
        "groups mixed in a norm",
        _NN + "grouped.py",
        "        if self.zo.p is None:\n            return super().forward",
        "        if self.zo.p is None or isinstance(self, GroupedBatchNorm):\n            return super().forward",
        "tests/test_others.py -k 'losses_equal or batch_norm'",
    ),
    # captured step
    Mutant(
        "a captured step replays the old batch",
        "ezo_kernels/optim/capture.py",
        "        _copy(self._inputs, leaves)\n",
        "",
        "tests/test_capture.py -k replays_equal",
    ),
    Mutant(
        "a graph outlives the weights it reads",
        "ezo_kernels/optim/capture.py",
        "else (t.data_ptr(), t.dtype) for get",
        "else t.dtype for get",
        "tests/test_capture.py -k 'moved or assigned'",
    ),
    Mutant(
        "a schedule does not reach a captured head",
        "ezo_kernels/optim/head.py",
        'lr.fill_(group["lr"])',
        "lr.fill_(lr or 0.05)",
        "tests/test_capture.py -k 'schedules or load_state'",
    ),
    # One sign a query
    Mutant(
        "the baseline holds the query's own loss",
        "ezo_kernels/ops/coefficients.py",
        " * (n / (n - 1)) / eps",
        " / eps",
        "tests/test_estimate.py -k formula",
    ),
    Mutant(
        "each query of one sign drops other features",
        "ezo_kernels/nn/dropout.py",
        "[0] if zo.one_mask else range(",
        "range(",
        "tests/test_estimate.py -k one_mask",
    ),
    # what a step looks at
    Mutant(
        "rows compared for the first shape of batch alone",
        "ezo_kernels/optim/check.py",
        "return groups, shapes, self._modes",
        "return groups, (), self._modes",
        "tests/test_checks.py -k another_size",
    ),
    Mutant(
        "a model looked at in its first mode alone",
        "ezo_kernels/optim/check.py",
        "not self.off and self._modes not in self._forwards",
        "not self.off and not self._forwards",
        "tests/test_checks.py -k eval_to_train",
    ),
    Mutant(
        "numpy's draws not seen",
        "ezo_kernels/optim/check.py",
        "words.tolist(), place",
        "[], []",
        "tests/test_checks.py -k whatever_is_random",
    ),
    Mutant(
        "a mask of attention split as a batch",
        _NN + "grouped.py",
        "zo.parts(leaf) if leaf is not mask and zo.is_stacked(leaf)",
        "zo.parts(leaf) if zo.is_stacked(leaf)",
        "tests/test_checks.py -k mask_of_attention",
    ),
    Mutant(
        "a step that raised still counted",
        _UPDATES,
        "self._step.sub_(ok.long())",
        "self._step.sub_(0)",
        "tests/test_head_checks.py -k head_optimizer_that_raises",
    ),
    Mutant(
        "the trunk moves before code of others",
        _UPDATES,
        "        try:\n            # first,",
        "        if self.trunk:\n            self._update(own.coef)\n        try:\n            # first,",
        "tests/test_head_checks.py -k head_optimizer_that_raises",
    ),
    Mutant(
        "casts of the head's weights kept over a step",
        _UPDATES,
        "if self.head and torch.is_autocast_enabled(self.device.type):",
        "if False:",
        "tests/test_head_checks.py -k autocast",
    ),
    Mutant(
        "a graph that does not know what modules are set to",
        "ezo_kernels/optim/capture.py",
        ", _read(self._settings)",
        ", []",
        "tests/test_capture_settings.py -k set_to",
    ),
    Mutant(
        "captured while the check of rows has not passed",
        "ezo_kernels/optim/capture.py",
        "if candidate.steps < WARM_UP or opt._looks():",
        "if candidate.steps < WARM_UP:",
        "tests/test_capture_settings.py -k not_finite",
    ),
    # rows drawn by importance
    Mutant(
        "drawn rows whose losses weigh alike",
        "ezo_kernels/optim/losses.py",
        "return loss_fn.weight if type(loss_fn) is WeightedCrossEntropy else None",
        "return None",
        "tests/test_importance_step.py -k formula",
    ),
    Mutant(
        "groups compared where their outputs are numbers alone",
        "ezo_kernels/optim/compare.py",
        "torch.where(same, 0.0, a - b)",
        "(a - b)",
        "tests/test_importance_step.py -k no_batch",
    ),
    Mutant(
        "each micro-batch draws by the same word",
        "ezo_kernels/optim/importance.py",
        '"draw": self._micro',
        '"draw": 0',
        "tests/test_importance_step.py -k draws",
    ),
    Mutant(
        "rows drawn of a batch that is not looked at",
        "ezo_kernels/optim/importance.py",
        "self.zo.undropped = True",
        "return",
        "tests/test_importance_step.py -k no_batch",
    ),
    Mutant(
        "rows that do not count are drawn",
        "ezo_kernels/ops/_importance_triton.py",
        "mass = tl.where(counts, 9 * n * q + total, 0)",
        "mass = 9 * n * q + total",
        "tests/interpret/test_importance.py -k contract",
    ),
    Mutant(
        "every block of drawn rows is the first",
        "ezo_kernels/ops/_importance_triton.py",
        "j = tl.program_id(0) * J + tl.arange(0, J)",
        "j = tl.arange(0, J)",
        "tests/interpret/test_importance.py -k many_programs",
    ),
    Mutant(
        "the gradient of a weighted loss without its weight",
        "ezo_kernels/ops/_cross_entropy_triton.py",
        "    scale = scale * _weights(weight_ptr, r, counts)\n",
        "",
        "tests/interpret/test_cross_entropy.py -k weights",
    ),
    # one batch for all groups
    Mutant(
        "rows of all groups taken for the batch that they share",
        "ezo_kernels/nn/context.py",
        " and x.shape[0] % self.rows != 0",
        "",
        _SHARED,
    ),
    Mutant(
        "a dropout before the first perturbed layer has one mask for all queries",
        "ezo_kernels/nn/dropout.py",
        "if shared and len(queries) > 1:",
        "if shared and len(queries) > 99:",
        _SHARED,
    ),
    Mutant(
        "a forward that writes into its batch is given the one of all groups",
        "ezo_kernels/optim/passes.py",
        "if not unwritten.holds() or not all(",
        "if not all(",
        _SHARED,
    ),
    Mutant(
        "outputs that are of every group are taken for each one's own",
        "ezo_kernels/optim/passes.py",
        "if not unwritten.holds() or not all(map(provenance.holds, tensors)):",
        "if not unwritten.holds():",
        _SHARED,
    ),
    Mutant(
        "whose rows are whose is guessed",
        "ezo_kernels/nn/context.py",
        "if self.provenance is not None and not (",
        "if False and not (",
        _SHARED,
    ),
    Mutant(
        "a table that has the batch's rows is taken for it",
        "ezo_kernels/nn/context.py",
        "self.provenance.is_of_batch(x) if shared",
        "not self.provenance.holds(x) if shared",
        "tests/test_provenance.py",
    ),
    Mutant(
        "an error of the loss is taken for one of sharing",
        "ezo_kernels/optim/passes.py",
        "if self._in_loss and not new:",
        "if False:",
        "tests/test_provenance.py",
    ),
    Mutant(
        "compiled code, which is not heard, may take any way",
        "ezo_kernels/optim/check.py",
        "return not zo.unheard and (",
        "return zo.unheard or (",
        "tests/test_provenance.py",
    ),
    Mutant(
        "a later batch may take any way through the model",
        "ezo_kernels/optim/check.py",
        "or zo.asked == self._shared[self._batch]",
        "or True",
        _SHARED,
    ),
    Mutant(
        "a batch that lies anywhere is given to the model as it is",
        "ezo_kernels/optim/batches.py",
        "return leaf if aligned(leaf) is leaf and not elsewhere else torch.cat([leaf])",
        "return leaf",
        _SHARED,
    ),
    Mutant(
        "positions taken for rows",
        "ezo_kernels/nn/embedding.py",
        "if self.zo.is_common(input):",
        "if False:",
        "tests/test_others.py -k gpt",
    ),
)
