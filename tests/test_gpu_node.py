"""Node perturbation on a GPU: the noise is the CPU's, a run is its own, the step is that of a CPU. Marked ``gpu``."""

from __future__ import annotations

import pytest
import torch

import ezo_kernels as ezo
from ezo_kernels.ops import Noise, Perturbation, output_errors, perturb_outputs
from ezo_kernels.ops.noise import key_tensor
from tests.test_gpu import batch, bits, lenet, same

pytestmark = pytest.mark.gpu

NOISES = [Noise(name, p_zero=0.5 if name == "sparse" else 0.0) for name in ("gaussian", "clt4", "hadamard", "sparse")]


@pytest.mark.parametrize("shape", [(6, 5), (40, 300), (257, 1025)], ids=str)
@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise.name)
def test_noise_of_outputs_is_the_cpus(noise, shape):
    def made(device):
        key, y = key_tensor(3, 5, device), torch.zeros(shape, device=device)
        p = Perturbation(key, torch.ones(1, device=device), noise, query=2, queries=3)
        e = output_errors(torch.ones(3, shape[0], device=device), key, shape, site=7, noise=noise, query=2)
        return perturb_outputs(y, p, site=7, shared=True).cpu(), e.cpu()

    assert all(map(torch.equal, made("cpu"), made("cuda")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("signs", [(1, -1), (1,), (-1,), (0,)], ids=str)
def test_perturbed_outputs_in_half(signs, dtype):
    def made(device):
        y = torch.randn(24, 3, 70, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        p = Perturbation(key_tensor(3, 5, device), torch.full((1,), 0.3, device=device), queries=3, signs=signs)
        return perturb_outputs(y, p, site=7).cpu()

    assert torch.equal(made("cpu"), made("cuda"))


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_steps_are_those_of_a_cpu(mode):
    runs = []
    for device in ("cpu", "cuda", "cuda"):
        model = ezo.convert_(lenet().to(device), head=["fc3"])
        nodes = ezo.NodePerturbation(["fc1", "fc2"])
        opt = ezo.ElasticZO(model, queries=4, antithetic=False, clip=5.0, node_perturbation=nodes, mode=mode)
        for i in range(2):
            opt.train_step(*(t.to(device) for t in batch(32, i)))
        assert opt.skipped == 0
        runs.append({name: value.cpu() for name, value in bits(model).items()})
    assert same(runs[1], runs[2])
    for name, value in runs[0].items():  # two steps, of products that round otherwise
        torch.testing.assert_close(runs[1][name], value, rtol=1e-2, atol=1e-3)
