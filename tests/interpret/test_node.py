"""Noise of outputs: the kernels against the CPU reference."""

from __future__ import annotations

import pytest
import torch

from ezo_kernels import ops

SITE = 0x80000007


def close(ours, theirs, spec):
    if spec.name in ("gaussian", "sparse"):  # the interpreter has no fma
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("signs", [(1, -1), (1,), (-1,), (0,)], ids=str)
def test_perturb_outputs(on_cpu, noise, key, signs, shared):
    spec, _ = noise
    p = ops.Perturbation(key, torch.tensor([0.3]), spec, query=2, queries=2, signs=signs)
    for rows, columns in ((6, 5), (40, 300)):
        y = torch.randn((1 if shared else p.groups) * rows, columns)
        ours = ops.perturb_outputs(y, p, site=SITE, shared=shared)
        close(ours, on_cpu(ops.perturb_outputs, y, p, site=SITE, shared=shared), spec)


def test_perturb_outputs_of_tokens_in_half(on_cpu, key):
    p = ops.Perturbation(key, torch.tensor([0.3]), ops.Noise("clt4"))
    y = torch.randn(4, 3, 5, dtype=torch.float16).transpose(1, 2)
    assert torch.equal(ops.perturb_outputs(y, p, site=1), on_cpu(ops.perturb_outputs, y, p, site=1))


def test_output_errors(on_cpu, noise, key):
    spec, _ = noise
    for shape, samples in (((6, 5), 2), ((40, 300), 40)):
        coef = torch.randn(3, samples)
        args = {"site": SITE, "noise": spec, "query": 2}
        close(ops.output_errors(coef, key, shape, **args), on_cpu(ops.output_errors, coef, key, shape, **args), spec)
