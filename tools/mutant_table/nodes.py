"""Bugs in layers whose outputs are perturbed."""

from __future__ import annotations

from .mutant import Mutant

_OPS = "ezo_kernels/ops/"
_NODES = "ezo_kernels/optim/nodes.py"
_TEST, _OPS_TEST = "tests/test_nodes.py", "tests/test_node_ops.py"
_KEPT, _REFUSED = "tests/test_nodes_kept.py", "tests/test_nodes_refusals.py"

MUTANTS = (
    Mutant(
        "noise of outputs with the sign left out",
        _OPS + "node.py",
        "z * (sign * scale)",
        "z * scale",
        f"{_OPS_TEST} -k plus_eps_z",
    ),
    Mutant(
        "errors of outputs by the noise of the first query alone",
        _OPS + "node.py",
        "z_cpu(out.shape, key, site, query + q, spec",
        "z_cpu(out.shape, key, site, query, spec",
        f"{_OPS_TEST} -k weighed_noise",
    ),
    Mutant(
        "damping by the mean of the diagonal, not its sum",
        _OPS + "node.py",
        "damping * total, 1.0",
        "damping * diagonal.mean(), 1.0",
        f"{_OPS_TEST} -k inverse_of_the_moments",
    ),
    Mutant(
        "the kernel gives every sample the first one's coefficient",
        _OPS + "_node_triton.py",
        "own = coef_ptr + r // times",
        "own = coef_ptr + r * 0",
        "tests/interpret/test_node.py -k errors",
    ),
    Mutant(
        "the minus sign of a pair moves the plus sign's outputs",
        _OPS + "_node_triton.py",
        "y = tl.load(begin + size + at",
        "y = tl.load(begin + at",
        "tests/interpret/test_node.py -k outputs",
    ),
    Mutant(
        "the clip of a row's g holds its share of the mean loss",
        _NODES,
        "(coef.shape[0] * rows)",
        "coef.shape[0]",
        f"{_TEST} -k formula",
    ),
    Mutant(
        "inputs of the last group alone",
        _NODES,
        "            total += other\n",
        "            total = other * self._groups\n",
        f"{_TEST} -k formula",
    ),
    Mutant(
        "one sign held against all queries, its own among them, without the factor",
        _NODES,
        "/ ((queries - 1) * self._eps)",
        "/ (queries * self._eps)",
        f"{_TEST} -k formula",
    ),
    Mutant(
        "a system that was not solved is applied",
        _NODES,
        "bad |= ~torch.isfinite(d.sum())",
        "bad |= False",
        f"{_KEPT} -k solved",
    ),
    Mutant(
        "a skipped step moves these layers all the same",
        _NODES,
        "torch.where(ok, d * self._lr, 0.0)",
        "d.nan_to_num(0.1) * self._lr",
        f"{_KEPT} -k skipped",
    ),
    Mutant(
        "their weights are perturbed as well",
        "ezo_kernels/nn/linear.py",
        "queries=1 if shared else p.groups, signs=(0,))",
        "queries=1 if shared else p.groups, signs=(1,))",
        f"{_TEST} -k formula",
    ),
    Mutant(
        "noise at the eps of weights",
        "ezo_kernels/optim/elastic_zo.py",
        "self.zo.own | self.nodes.own, self.nodes.weights",
        "self.zo.own, self.nodes.weights",
        f"{_TEST} -k formula",
    ),
    Mutant(
        "rows in another order are not seen",
        _NODES,
        "[*(inputs.of(own.module.site) for own in self.nodes.layers), *outputs]",
        "outputs",
        f"{_REFUSED} -k another_order",
    ),
    Mutant(
        "a recomputed forward adds its inputs again",
        "ezo_kernels/nn/context.py",
        "inputs, self.inputs = self.inputs, None\n",
        "inputs = self.inputs\n",
        f"{_KEPT} -k checkpoint",
    ),
    Mutant(
        "a token answers for its own noise alone",
        _NODES,
        "shares = shares.view(groups, self.rows, -1).sum(2)",
        "self.rows = values",
        f"{_TEST} -k answer_for_their_row",
    ),
    Mutant(
        "a factor that does not exist is used",
        _OPS + "node.py",
        'torch.where(info == 0, d, float("nan"))',
        "d",
        f"{_OPS_TEST} -k factor_that",
    ),
    Mutant(
        "moments of 16 bits under autocast",
        _OPS + "node.py",
        "enabled=False",
        "enabled=True",
        f"{_KEPT} -k autocast",
    ),
    Mutant(
        "another loss in a later step is not seen",
        _NODES,
        "bad = torch.stack(self._off).any().reshape(1)",
        "bad = torch.stack(self._off).any().reshape(1) & False",
        f"{_KEPT} -k another_loss",
    ),
    Mutant(
        "a first batch of one row shows that rows are apart",
        _NODES,
        "if not self._checks.apart_is_new:",
        "if not self._must_check:",
        f"{_REFUSED} -k one_row",
    ),
)
