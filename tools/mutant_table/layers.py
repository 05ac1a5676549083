"""Bugs in layers of floats and in what chooses how they multiply."""

from __future__ import annotations

from .mutant import Mutant

_OPS = "ezo_kernels/ops/"
_GRADIENT = "tests/test_gradient.py"
_LINEAR = "tests/test_ops.py -k linear"

MUTANTS = (
    # what follows a convolution
    Mutant(
        "the largest of a window's upper half",
        _OPS + "_conv_cpu.py",
        "                p = p if (p > r or p != p) else r\n",
        "",
        "tests/test_conv_epilogue.py",
    ),
    # forward
    Mutant("eps doubled", _OPS + "perturb.py", "scale = scale_of(eps)", "scale = 2 * scale_of(eps)", _LINEAR),
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
        "        yield from moved if",
        "        w.copy_(moved[0])\n        yield from moved if",
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
        "return part if dense and not apart",
        "return part if not apart",
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
        'None if z_dtype == "float32" else getattr(torch, z_dtype)',
        "None",
        "tests/test_strategy.py",
    ),
    Mutant(
        "a model that differs from forward to forward is trained",
        "ezo_kernels/optim/passes.py",
        "if not rows_apart(again, first):",
        "if False:",
        "tests/test_checks.py -k runs_again_is_refused",
    ),
    Mutant(
        "a pruned layer of the trunk goes on learning",
        "ezo_kernels/optim/check.py",
        "if read[leaf] < reads[leaf]:",
        "if False:",
        "tests/test_converted_models.py",
    ),
    Mutant(
        "a tie that was lost since is not seen",
        "ezo_kernels/nn/convert.py",
        "if not _is_one(parameters[name], parameters[other]):",
        "if False:",
        "tests/test_converted_models.py",
    ),
    Mutant(
        "a state that is refused leaves the head's optimizer broken",
        "ezo_kernels/optim/head.py",
        "optimizer.__dict__.update(held)",
        "pass",
        "tests/test_state.py -k head",
    ),
    Mutant(
        "a plan has cuts below which the model is random",
        "ezo_kernels/planning/live.py",
        "self.draws.append(func._schema.name",
        "str(func._schema.name",
        "tests/test_memory_plan_checks.py",
    ),
)
