"""z of compiled kernels has the bits of the reference, in every noise that all backends share."""

from __future__ import annotations

import pytest
import torch

from ezo_kernels import ops
from ezo_kernels.ops.noise import Noise
from tests.interpret.test_update import plan
from tests.tolerance import assert_bitwise_equal

PORTABLE = ["gaussian", "clt4", "uniform", "hadamard", "rademacher", "sparse"]
SITE = 0xFEDCBA98


def noise_of(name, rounds=7):
    return Noise(name, rounds, 0.7 if name == "sparse" else 0.0)


def z_of(key, name, shape, rounds=7, eps=1.0, **options):
    p = ops.Perturbation(key, torch.tensor([eps]), noise_of(name, rounds), query=5, queries=2)
    return ops.perturb(torch.zeros(shape), p, site=SITE, **options)


@pytest.mark.parametrize(("name", "rounds"), [*((name, 7) for name in PORTABLE), ("gaussian", 10)])
def test_bits(on_cpu, key, name, rounds):
    """The gaussian's, too: its polynomials are the fused multiply-adds that the reference has."""
    for shape in ((9, 70), (130,), (7, 3, 5, 5)):
        assert_bitwise_equal(z_of(key, name, shape, rounds), on_cpu(z_of, key, name, shape, rounds))


def test_the_fast_gaussian_is_near_the_exact_one(key):
    """The same words through the GPU's own functions; here they are exact to fp32, on a GPU to 2^-21 or so."""
    fast, exact = z_of(key, "gaussian_fast", (64, 96)), z_of(key, "gaussian", (64, 96))
    assert (fast - exact).abs().max() < 4e-6 and not torch.equal(fast, exact)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("gaussian", torch.float32),
        ("gaussian", torch.bfloat16),
        ("hadamard", torch.bfloat16),
        ("rademacher", torch.bfloat16),
        ("sparse", torch.float32),
        ("gaussian_fast", torch.float32),
    ],
    ids=str,
)
def test_the_update_moves_weights_by_the_z_of_the_forward(key, name, dtype):
    """With a weight of zeros, eps 1 and a coefficient of -1 both give z itself, rounded once."""
    noise, forward, moved = noise_of(name), torch.zeros(24, 40, dtype=dtype), torch.zeros(24, 40, dtype=dtype)
    z = ops.perturb(forward, ops.Perturbation(key, torch.tensor([1.0]), noise, signs=(1,)), site=SITE)[0]
    own = plan([moved], [SITE], ["matrix"], noise, [str(dtype).removeprefix("torch.")])
    ops.update_([moved], key, torch.tensor([-1.0]), sites=[SITE], layouts=["matrix"], noise=noise, plan=own)
    assert_bitwise_equal(moved, z)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gaussian", "clt4", "sparse"])
def test_stochastic_rounding(on_cpu, key, name, dtype):
    """Weights of 16 bits after an update: which way each was rounded is a word's business, the reference's bit for bit."""
    w, noise, coef = torch.randn(33, 72).to(dtype), noise_of(name), torch.tensor([0.01, -0.003])
    ours, theirs = w.clone(), w.clone()
    options = {"sites": [SITE], "layouts": ["matrix"], "noise": noise}
    ops.update_([ours], key, coef, plan=plan([ours], [SITE], ["matrix"], noise), **options)
    on_cpu(ops.update_, [theirs], key, coef, **options)
    assert_bitwise_equal(ours, theirs)
    assert not torch.equal(ours, w)
