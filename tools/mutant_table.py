"""The bugs that tests must notice: a name, the file, a text that occurs in it once, what it becomes, and the tests to run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    tests: str  # files, then perhaps -k and an expression, as for pytest


_OPS, _CPU = "ezo_kernels/ops/", "ezo_kernels/ops/_noise_cpu.py"
_STEP, _NN = "ezo_kernels/optim/elastic_zo.py", "ezo_kernels/nn/"
_NOISE = "tests/test_noise.py"
_WATCH = "ezo_kernels/optim/diagnostics.py"
_UPDATE = "tests/test_update.py"
_ROUNDED = "tests/test_rounded_z.py"
_GRADIENT = "tests/test_gradient.py"
_LINEAR = "tests/test_ops.py -k linear"
_DATA = "ezo_kernels/data/"
_INT8_STEP = "tests/test_int8_step.py -k oracle"
_MASK = "tests/test_noise.py -k 'mask or sparse'"

MUTANTS = (
    # noise
    Mutant("rounds off by one", _CPU, "for _ in range(7):", "for _ in range(6):", "tests/test_noise.py -k philox"),
    Mutant(
        "rows and columns swapped",
        _CPU,
        "philox(c0, u32(first + b), c2, c3, k0, k1)",
        "philox(c0, c3, c2, u32(first + b), k0, k1)",
        _NOISE,
    ),
    Mutant(
        "mask compared with a normal",
        _CPU,
        "line[8 * b + j] * scale if lane >= t else",
        "line[8 * b + j] * scale if line[8 * b + j] >= f32(t) * f32(2.0**-16) else",
        _MASK,
    ),
    Mutant(
        "product rounded before the sum",
        _CPU,
        "return builder.fma(*args)",
        "return builder.fadd(builder.fmul(args[0], args[1]), args[2])",
        _NOISE,
    ),
    Mutant(
        "one site for all layers",
        _OPS + "noise.py",
        "return np.uint32(site), np.uint32(query",
        "return np.uint32(0), np.uint32(query",
        _NOISE,
    ),
    Mutant(
        "streams overlap queries",
        _OPS + "noise.py",
        "np.uint32(query << 8 | stream)",
        "np.uint32(query + stream)",
        _NOISE,
    ),
    Mutant("sparse not rescaled", _OPS + "noise.py", "np.float32(noise.scale))", "np.float32(1.0))", _MASK),
    Mutant(
        "step cut to 32 bits",
        _OPS + "noise.py",
        "step >> 32 & 0xFFFFFFFF",
        "0",
        "tests/test_noise.py -k key_is_folded",
    ),
    # forward
    Mutant("eps doubled", _OPS + "perturb.py", "scale = eps.item()", "scale = 2 * eps.item()", _LINEAR),
    Mutant(
        "minus is plus",
        _OPS + "perturb.py",
        "[sign * scale for sign in signs]",
        "[scale for sign in signs]",
        _GRADIENT,
    ),
    Mutant(
        "perturbing writes the weight",
        _OPS + "perturb.py",
        "for part in moved:",
        "for part in (w.copy_(moved[0]), *moved[1:]):",
        _LINEAR,
    ),
    Mutant(
        "bias not perturbed",
        _OPS + "linear.py",
        'biases = [None] * groups if b is None else perturbed_cpu(b, *head, bias_site, "matrix", *tail)',
        "biases = [None if b is None else b.to(x.dtype)] * groups",
        _LINEAR,
    ),
    Mutant(
        "every group reads the rows of the first",
        _OPS + "_perturbation.py",
        "[aligned(part) for part in parts]",
        "[aligned(parts[0]) for part in parts]",
        _LINEAR,
    ),
    Mutant(
        "groups of other strides",
        _OPS + "_perturbation.py",
        "return part if dense and (",
        "return part if (",
        "tests/test_ops_contract.py",
    ),
    Mutant(
        "conv noise across taps",
        _OPS + "conv2d.py",
        'perturbed_cpu(w, key, eps, site, "conv", *tail)',
        'perturbed_cpu(w, key, eps, site, "matrix", *tail)',
        "tests/test_ops.py -k conv",
    ),
    Mutant(
        "shared ids read from an offset",
        _OPS + "embedding.py",
        "parts = [ids] * groups if shared",
        "parts = [ids.roll(g, 0) for g in range(groups)] if shared",
        "tests/test_ops.py -k embedding",
    ),
    # update
    Mutant(
        "sign of the update",
        _OPS + "update.py",
        "[-scale], key",
        "[scale], key",
        _UPDATE,
    ),
    Mutant("z of the wrong query", _OPS + "update.py", "site, query + q, spec", "site, query, spec", _UPDATE),
    Mutant(
        "stochastic rounding truncates",
        _OPS + "update.py",
        "round_stochastic(acc, lanes, w.dtype)",
        "round_stochastic(acc, lanes * 0, w.dtype)",
        _UPDATE,
    ),
    Mutant(
        "rounding words are the noise's",
        _OPS + "update.py",
        "np.uint32(C.STREAM_ROUNDING)",
        "np.uint32(C.STREAM_GAUSSIAN)",
        "tests/test_noise.py -k lanes",
    ),
    Mutant(
        "a layout refused after the first write",
        _OPS + "update.py",
        "grid(w.shape, layout, noise.segment)  # refuses",
        "pass  # refuses",
        _UPDATE,
    ),
    # layers and the step
    Mutant(
        "z of the step before",
        _STEP,
        "                self._update(coef)",
        "                fold_key(self._seed, self._step - 1, self._key), self._update(coef)",
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
    Mutant("clip ignored", _STEP, "g if clip is None else g.clamp(-clip, clip)", "g", "tests/test_step.py -k clip"),
    Mutant(
        "a step that is not finite is applied",
        _STEP,
        "torch.where(ok, self._lr * self.g / self.queries, torch.zeros_like(g))",
        "self._lr * self.g / self.queries",
        "tests/test_step.py -k non_finite",
    ),
    Mutant(
        "lr read once",
        _STEP,
        "if value != self._filled[name]:",
        "if self._filled[name] is None:",
        "tests/test_step.py -k schedulers",
    ),
    Mutant(
        "groups mixed in a norm",
        _NN + "grouped.py",
        "        if self.zo.p is None:\n            return super().forward",
        "        if self.zo.p is None or isinstance(self, GroupedBatchNorm):\n            return super().forward",
        "tests/test_others.py -k 'losses_equal or batch_norm'",
    ),
    # integers
    Mutant(
        "bit width by a logarithm",
        _OPS + "int8_matmul.py",
        "return max(0, int(peak).bit_length() - 7)",
        "return max(0, (int(peak) - 1).bit_length() - 7)",
        "tests/test_int8_ops.py -k power_of_two",
    ),
    Mutant(
        "an integer weight saturates at its own rail",
        _OPS + "_int8_cpu.py",
        "out[at + c] = i8(min(max(i32(w[at + c]) + k * i32(flat[from_z + c]), i32(-127)), i32(127)))",
        "out[at + c] = i8(w[at + c] + k * i32(flat[from_z + c]))",
        _INT8_STEP,
    ),
    Mutant(
        "sign of the integer update",
        _OPS + "_int8_cpu.py",
        "w[i] = i8(clamp8(i64(w[i]) - round_shift(",
        "w[i] = i8(clamp8(i64(w[i]) + round_shift(",
        _INT8_STEP,
    ),
    Mutant(
        "pseudo-stochastic rounding without the odd bit",
        _OPS + "_int8_cpu.py",
        "if n & 1:",
        "if n < 0:",
        "tests/test_int8_arithmetic.py -k 'pseudo or golden'",
    ),
    Mutant(
        "all groups at the first one's exponent",
        _OPS + "int8_matmul.py",
        "exponents[g] = x_exponents[own] + w_scale + shift",
        "exponents[g] = x_exponents[0] + w_scale + shift",
        "tests/test_int8_step.py tests/test_int8_ops.py -k 'oracle or linear'",
    ),
    Mutant(
        "the bias in the weight's unit",
        _OPS + "_int8_cpu.py",
        "k = exponent - x_exponent - w_exponent",
        "k = exponent - w_exponent",
        _INT8_STEP,
    ),
    Mutant(
        "the label's logit added",
        _OPS + "_int8_loss_cpu.py",
        "top - _logit(logits[r, labels[r]]",
        "top + _logit(logits[r, labels[r]]",
        "tests/test_int8_arithmetic.py -k entropy",
    ),
    Mutant(
        "the head's error through a dead unit",
        _NN + "tape.py",
        "note.y.groups, used) <= 0",
        "note.y.groups, used) < 0",
        _INT8_STEP,
    ),
    Mutant(
        "intermediates that overlap",
        _NN + "arena.py",
        "apart = other.end <= i.start or i.end <= other.start",
        "apart = True",
        "tests/test_int8_memory.py",
    ),
    Mutant(
        "one key for all integer steps",
        "ezo_kernels/optim/elastic_zo_int8.py",
        "fold_key(self._seed, self._step, self._key)",
        "fold_key(self._seed, self._step * 0, self._key)",
        _INT8_STEP,
    ),
    Mutant(
        "a frozen layer of the integer head ends the error",
        _NN + "int8_layers.py",
        "(self.head_names or input.tape is not None)",
        "self.head_names",
        "tests/test_int8_head.py -k frozen",
    ),
    Mutant(
        "the terms of the last call alone",
        _NN + "tape.py",
        "self._terms[name] += of_y",
        "self._terms[name] = of_y",
        "tests/test_int8_head.py -k twice",
    ),
    Mutant(
        "g by a difference that wraps",
        "ezo_kernels/optim/int8_passes.py",
        "return (plus > minus).to(torch.int32) - (plus < minus).to(torch.int32)",
        "return torch.sign(plus - minus).to(torch.int32)",
        "tests/test_int8_limits.py -k comparison",
    ),
    Mutant(
        "the integer head learns from a loss that is not finite",
        "ezo_kernels/optim/elastic_zo_int8.py",
        "peak *= ok",
        "peak *= 1",
        "tests/test_int8_limits.py -k finite",
    ),
    Mutant(
        "an integer step whose loss is not finite counts",
        "ezo_kernels/optim/elastic_zo_int8.py",
        "self._step += ok",
        "self._step += 1",
        "tests/test_int8_limits.py -k finite",
    ),
    Mutant(
        "floats loaded into int8",
        _NN + "int8_layers.py",
        "if not problems:",
        "if True:",
        "tests/test_int8_limits.py -k float_state",
    ),
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
        "(promised < PROMISED * level and not diverged)",
        "(promised < 0 and not diverged)",
        "tests/test_diagnostics.py -k converged",
    ),
    Mutant(
        "evaluations count as activations of a step",
        _WATCH,
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
        "pixels drawn whatever their ink",
        _DATA + "pointcloud.py",
        "ink = np.cumsum(images.reshape(n, -1), axis=1",
        "ink = np.cumsum(images.reshape(n, -1) > 0, axis=1",
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
        "tests/test_pointcloud.py -k rotation",
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
        "0 if t is None else (t.data_ptr(), t.dtype) for t in tensors",
        "t is None or t.dtype for t in tensors",
        "tests/test_capture.py -k 'moved or assigned'",
    ),
    Mutant(
        "a schedule does not reach a captured head",
        "ezo_kernels/optim/head.py",
        'self._lrs[i].fill_(group["lr"])',
        "self._lrs[i].fill_(self._lrs[i] or 0.05)",
        "tests/test_capture.py -k 'schedules or load_state'",
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
        'print("the tests are not green: nothing is timed", file=sys.stderr)\n                return 1',
        'print("the tests are not green: nothing is timed", file=sys.stderr)',
        "tests/test_bench.py -k red_tests",
    ),
    Mutant(
        "the table of targets shows the best figure",
        "bench/targets.py",
        "(max(found), min(found)) if target.lower else (min(found), max(found))",
        "(min(found), max(found)) if target.lower else (max(found), min(found))",
        "tests/test_report.py -k worst_figure",
    ),
    # strategies of a linear layer
    Mutant(
        "two products with a z that the tensor core rounds",
        _OPS + "_strategy.py",
        "    if not exact:\n",
        "    if False:\n",
        "tests/test_strategy.py",
    ),
    Mutant(
        "every slab has the noise of the first",
        _OPS + "noise.py",
        "rows + N.u32(first_row) if first_row else rows",
        "rows",
        "tests/test_slab.py -k contract",
    ),
    Mutant(
        "the second sign of a slab is the first",
        _OPS + "_slab.py",
        "y[i].copy_(F.linear(x[i], room[i],",
        "y[i].copy_(F.linear(x[i], room[0],",
        "tests/test_slab.py -k contract",
    ),
    Mutant(
        "z keeps more bits than its site has",
        _OPS + "noise.py",
        'if z_dtype != "float32":',
        "if False:",
        "tests/test_strategy.py",
    ),
    # One sign a query
    Mutant(
        "the baseline holds the query's own loss",
        "ezo_kernels/optim/estimate.py",
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
    # z of 16 bits
    Mutant(
        "the update makes z in fp32 where the forward rounded it",
        _STEP,
        "self.noise, z_dtypes=z_dtypes)",
        "self.noise)",
        _ROUNDED,
    ),
    Mutant(
        "the forward makes z in fp32 where the update rounds it",
        _NN + "linear.py",
        "z_dtype=self.zo.z_dtype(self.site, self.weight)",
        'z_dtype="float32"',
        _ROUNDED,
    ),
    Mutant(
        "a tied embedding's z is rounded",
        _NN + "plan.py",
        "known.linear = known.linear and linear",
        "known.linear = linear",
        _ROUNDED,
    ),
    Mutant(
        "z is rounded whatever the strategy",
        _NN + "plan.py",
        'z_dtype = "weight" if uses[p].linear and strategy in _TWO_PRODUCTS else "float32"',
        'z_dtype = "weight" if uses[p].linear else "float32"',
        _ROUNDED,
    ),
    Mutant(
        "a cast model is updated by the plan it had",
        _OPS + "update.py",
        "p.data_ptr() if p.is_cuda else 0, p.dtype, *p.shape",
        "p.data_ptr() if p.is_cuda else 0, *p.shape",
        _ROUNDED,
    ),
    Mutant(
        "a graph is replayed on the bits of another dtype",
        "ezo_kernels/optim/capture.py",
        "(t.data_ptr(), t.dtype) for t in tensors",
        "t.data_ptr() for t in tensors",
        _ROUNDED,
    ),
    Mutant(
        "CUDA C++ truncates z to bf16",
        _OPS + "csrc/ezo_update.cuh",
        "(a + 0x7fffu + ((a >> 16) & 1u)) >> 16",
        "a >> 16",
        "tests/test_csrc.py -k weights_dtype",
    ),
    Mutant(
        "every slab of a convolution has the noise of the first",
        _OPS + "_conv2d_slab.py",
        "fill(room, w[slab], first, q)",
        "fill(room, w[slab], 0, q)",
        "tests/test_slab_conv.py -k contract",
    ),
    Mutant(
        "a slab of a conv group reads the inputs of the first",
        _OPS + "_conv2d_slab.py",
        "inputs = slice(first // own * channels, (first // own + count) * channels)",
        "inputs = slice(0, count * channels)",
        "tests/test_slab_conv.py -k products",
    ),
    Mutant(
        "cuDNN is given a group that begins anywhere",
        _OPS + "_conv2d_slab.py",
        "y if dense and y.data_ptr() % 64 == 0 else",
        "y if dense else",
        "tests/test_slab_conv.py -k cudnn",
    ),
    Mutant(
        "a convolution chooses by the stacked batch",
        _OPS + "conv2d.py",
        "positions = out.shape[0] // groups * ",
        "positions = out.shape[0] * ",
        "tests/test_strategy.py -k one_group",
    ),
    # CUDA C++
    Mutant(
        "the root's first guess shifts a zero's sign in as a bit",
        _OPS + "csrc/ezo_noise.cuh",
        "(u32)((int)bits(v) >> 1)",
        "(bits(v) >> 1)",
        "tests/test_csrc.py -k ends_of_the_gaussian",
    ),
)
