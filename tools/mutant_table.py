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
_UPDATE = "tests/test_update.py"
_GRADIENT = "tests/test_gradient.py"
_LINEAR = "tests/test_ops.py -k linear"
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
    Mutant("clip ignored", _STEP, 'if group["clip"] is not None:', "if False:", "tests/test_step.py -k clip"),
    Mutant(
        "a step that is not finite is applied",
        _STEP,
        "torch.where(ok, self._lr * g / self.queries, torch.zeros_like(g))",
        "self._lr * g / self.queries",
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
)
