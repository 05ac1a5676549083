"""Node perturbation: the operators against z in memory, and the gradient against an inverse in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from materialised import NOISES, Pass, randn

from bench.input_moments import common_share
from ezo_kernels.ops import Noise, decorrelated_gradient, materialize, output_errors, perturb_outputs
from ezo_kernels.ops.noise import key_tensor


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("signs", [(1, -1), (1,), (-1,), (0,)], ids=str)
@pytest.mark.parametrize(("noise", "params"), NOISES)
def test_perturbed_outputs_are_y_plus_eps_z(noise, params, signs, shared):
    own = Pass(noise=noise, params=params, query=2, queries=3, signs=signs)
    p = own.p
    y = randn((1 if shared else p.groups) * 4, 3, 5)
    got = perturb_outputs(y, p, site=9, shared=shared).view(p.groups, 12, 5)
    rows = y.view(-1, 12, 5).expand(p.groups, 12, 5)
    for g in range(p.groups):
        query, sign = divmod(g, len(signs))
        z = materialize((12, 5), seed=3, step=5, site=9, query=2 + query, noise=noise, **params)
        assert torch.equal(got[g], rows[g] + z * (signs[sign] * 0.5))


def test_perturbed_outputs_of_16_bits_are_rounded_once():
    p = Pass().p
    y = randn(8, 5, dtype=torch.bfloat16)
    want = perturb_outputs(y.float(), p, site=1).bfloat16()
    assert torch.equal(perturb_outputs(y, p, site=1), want)


def test_noise_of_a_row_does_not_depend_on_how_many_there_are():
    p = Pass(signs=(1,)).p
    assert torch.equal(perturb_outputs(torch.zeros(9, 5), p, site=1)[:4], perturb_outputs(torch.zeros(4, 5), p, site=1))


@pytest.mark.parametrize(("noise", "params"), NOISES)
def test_output_errors_are_the_weighed_noise(noise, params):
    coef = randn(3, 4, seed=2)
    got = output_errors(coef, key_tensor(3, 5), (12, 5), site=9, noise=Noise(noise, **params), query=2)
    want = torch.zeros(12, 5, dtype=torch.float64)
    for q in range(3):
        z = materialize((12, 5), seed=3, step=5, site=9, query=2 + q, noise=noise, **params)
        want += coef[q].double().repeat_interleave(3)[:, None] * z.double()
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "inputs"), [(6, 40), (40, 6), (7, 7)])
def test_decorrelated_gradient_is_the_inverse_of_the_moments(rows, inputs, bias):
    x, e = randn(rows, inputs), randn(rows, 3, seed=1)
    weight, of_bias = decorrelated_gradient(x, e, 0.02, bias)
    wide = torch.cat([x, torch.ones(rows, int(bias))], 1).double()
    moments = wide.T @ wide / rows
    want = e.double().T @ wide @ torch.linalg.inv(moments + 0.02 * moments.trace() * torch.eye(len(moments)))
    torch.testing.assert_close(weight, want[:, :inputs].float(), rtol=1e-4, atol=1e-4)
    if bias:
        torch.testing.assert_close(of_bias, want[:, inputs].float(), rtol=1e-4, atol=1e-4)
    else:
        assert of_bias is None


def test_without_damping_it_is_the_plain_gradient():
    x, e = randn(6, 4), randn(6, 3, seed=1)
    weight, bias = decorrelated_gradient(x, e, None, True)
    torch.testing.assert_close(weight, e.T @ x)
    torch.testing.assert_close(bias, e.sum(0))


def test_the_share_that_inputs_have_in_common():
    """White inputs: one over their number; all alike: one; and a damping far below their moments leaves them white."""
    alike = torch.ones(50, 4)
    assert common_share(alike, 0.01)[0] == pytest.approx(1.0) and common_share(alike, 0.01)[1] == pytest.approx(1.0)
    spread = randn(5000, 9) * torch.logspace(0, 1, 9)
    plain, flat = common_share(spread, 1e-6)
    assert plain > 2 / 10 and flat == pytest.approx(1 / 10, rel=1e-3)


def test_what_operators_refuse():
    p, key = Pass().p, key_tensor(0, 0)
    with pytest.raises(TypeError, match="int64"):
        perturb_outputs(torch.zeros(4, 2, dtype=torch.int64), p, site=1)
    with pytest.raises(ValueError, match=r"\(3, 2\) does not hold 2 groups"):
        perturb_outputs(torch.zeros(3, 2), p, site=1)
    with pytest.raises(ValueError, match="2 groups"):
        perturb_outputs(torch.zeros(4), p, site=1)
    with pytest.raises(ValueError, match="5 rows are no multiple"):
        output_errors(torch.zeros(1, 2), key, (5, 2), site=1, noise=Noise())
    with pytest.raises(TypeError, match="float64"):
        output_errors(torch.zeros(1, 2).double(), key, (4, 2), site=1, noise=Noise())


def test_a_factor_that_does_not_exist_is_no_number():
    """LAPACK leaves numbers of one, and they are finite."""
    x, failed = randn(16, 40).repeat(2, 1), 0
    for seed in range(20):
        moments = torch.cat([x + 1e-3 * seed, torch.ones(32, 1)], 1)
        moments = moments @ moments.T / 32
        moments.diagonal().add_(1e-9 * moments.diagonal().sum())
        fails = bool(torch.linalg.cholesky_ex(moments).info > 0)
        weight, bias = decorrelated_gradient(x + 1e-3 * seed, randn(32, 3), 1e-9, True)
        assert bool(weight.isnan().all()) == bool(bias.isnan().all()) == fails
        failed += fails
    assert failed
