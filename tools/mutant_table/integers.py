"""Bugs in integers: layers, losses, the head and the step."""

from __future__ import annotations

from .mutant import Mutant

_OPS = "ezo_kernels/ops/"
_NN = "ezo_kernels/nn/"
_INT8_STEP = "tests/test_int8_step.py -k oracle"

MUTANTS = (
    # one sign a query, in integers
    Mutant(
        "a query held against the mean, its own loss not multiplied",
        _OPS + "int8_signs.py",
        "own, other = losses * losses.numel(), losses.sum()",
        "own, other = losses, losses.sum() // losses.numel()",
        "tests/test_int8_one_sign.py",
    ),
    Mutant(
        "rounding of the head's error by the query of pairs",
        "ezo_kernels/optim/int8_passes.py",
        "p.query * (1 + self.antithetic)",
        "p.query * 2",
        "tests/test_int8_one_sign.py",
    ),
    Mutant(
        "ties of floats decided by their rounding",
        _OPS + "int8_signs.py",
        "losses.double() if losses.is_floating_point() else losses.long()",
        "losses",
        "tests/test_int8_one_sign.py",
    ),
    # what the head's weights cannot hold of an update
    Mutant(
        "a remainder thrown away",
        _OPS + "_int8_cpu.py",
        "remainder[i] = i8(fine - i64(w[i]) * 256)",
        "remainder[i] = i8(0)",
        "tests/test_int8_remainder.py",
    ),
    Mutant(
        "a weight with a remainder rounded down",
        _OPS + "_int8_cpu.py",
        "w[i] = i8((fine + 128) >> 8)",
        "w[i] = i8(fine >> 8)",
        "tests/test_int8_remainder.py",
    ),
    Mutant(
        "remainders lost when a run is resumed",
        "ezo_kernels/optim/int8_state.py",
        "self._remainders[name].copy_(value)",
        "pass",
        "tests/test_int8_remainder.py -k resume",
    ),
    Mutant(
        "g of one sign against the sum, its own loss once",
        _OPS + "int8_signs.py",
        "pairs = [(len(values) * own, sum(values)) for own in values]",
        "pairs = [(own, sum(values)) for own in values]",
        "tests/test_int8_signs.py tests/test_int8_one_sign.py",
    ),
    Mutant(
        "zeros of a pass that the next one takes again",
        "ezo_kernels/optim/int8_passes.py",
        "zeros = torch.empty(plan.counters, dtype=torch.int32, device=self.device)",
        "zeros = self.__dict__.setdefault('_kept', torch.empty(plan.counters, dtype=torch.int32, device=self.device))",
        "tests/test_int8_signs.py -k kept",
    ),
    Mutant(
        "a step whose head raises is counted with its losses",
        "ezo_kernels/optim/int8_passes.py",
        "losses, error = self._losses_of(out, y, loss_fn, signs)",
        "losses, error = self._losses_of(out, y, loss_fn, signs); self._step += signs is not None",
        "tests/test_int8_signs.py -k raises",
    ),
    Mutant(
        "groups of one sign count in the memory of parts as two",
        _OPS + "_strategy.py",
        "return 4 * parts * len(signs) * rows * n if parts > 1 else 0",
        "return 4 * parts * 2 * rows * n if parts > 1 else 0",
        "tests/test_parts.py -k memory_of_a_query",
    ),
    Mutant(
        "a part of K that is empty",
        _OPS + "_tiles.py",
        "return -(-steps // own), own",
        "return parts, own",
        "tests/test_parts.py -k parts_of_k",
    ),
    Mutant(
        "more parts of K than a multiprocessor has warps for",
        _OPS + "_tiles.py",
        "tile.bn * tile.bk, 8 // tile.warps, arch",
        "tile.bn * tile.bk, 2, arch",
        "tests/test_parts.py -k parts_of_k_of_integers",
    ),
    # PTX that no GPU has run
    Mutant(
        "two perturbed bytes in each other's places",
        _OPS + "_int8_triton.py",
        "cvt.pack.sat.s8.s32.b32 t, v3, v2, 0;",
        "cvt.pack.sat.s8.s32.b32 t, v2, v3, 0;",
        "tests/test_ptx.py",
    ),
    Mutant(
        "a value of sparse_int8 from the wrong unit",
        _OPS + "_noise_triton.py",
        "dp2a.lo.u32.u32 $0, $1, $2, $3;",
        "dp2a.lo.u32.u32 $0, $2, $1, $3;",
        "tests/test_ptx.py",
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
        _OPS + "int8_linear.py",
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
        "tests/test_int8_losses.py -k entropy",
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
        "ezo_kernels/optim/int8_passes.py",
        "fold_key(self._seed, self._step, self._key, zeros)",
        "fold_key(self._seed, self._step * 0, self._key, zeros)",
        _INT8_STEP,
    ),
    Mutant(
        "a frozen layer of the integer head ends the error",
        _NN + "int8_layers.py",
        "if zo.tape is not None and (self.head_names or input.tape is not None)",
        "if zo.tape is not None and self.head_names",
        "tests/test_int8_head.py -k frozen",
    ),
    Mutant(
        "a pooled integer is never below zero",
        _OPS + "_int8_conv_cpu.py",
        "least = i8(0) if relu else i8(-127)",
        "least = i8(0)",
        "tests/test_int8_conv_epilogue.py",
    ),
    Mutant(
        "the largest magnitude counts what lies between the lines",
        _OPS + "_int8_conv_cpu.py",
        "abs(sums[at + x] + bias) & counts[x])",
        "abs(sums[at + x] + bias))",
        "tests/test_int8_conv_epilogue.py tests/test_int8_ops.py -k conv",
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
        _OPS + "int8_signs.py",
        "return (own > other).to(torch.int32) - (own < other).to(torch.int32)",
        "return torch.sign(own - other).to(torch.int32)",
        "tests/test_int8_limits.py -k comparison",
    ),
    Mutant(
        "the integer head learns from a loss that is not finite",
        "ezo_kernels/optim/elastic_zo_int8.py",
        "rounding=self.head_rounding, rounds=self.rounds, ok=ok,",
        "rounding=self.head_rounding, rounds=self.rounds, ok=None,",
        "tests/test_int8_limits.py -k finite",
    ),
    Mutant(
        "an integer step whose loss is not finite counts",
        "ezo_kernels/optim/int8_passes.py",
        "self._step += 1 if ok is None else ok",
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
    Mutant(
        "integer slabs chosen by the stacked rows",
        _OPS + "int8_linear.py",
        "choose(x.numel() // (k * x_exponent.numel()), n, k,",
        "choose(x.numel() // k, n, k,",
        "tests/test_launch_int8.py -k one_group",
    ),
)
