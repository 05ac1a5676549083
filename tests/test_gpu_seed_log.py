"""A run on a GPU, its weights made again on either device. Marked ``gpu``."""

from __future__ import annotations

import pytest
import torch

import ezo_kernels as ezo
from tests.test_gpu import batch, bits, lenet, same

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("noise", ["gaussian", "clt4", "hadamard", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capture", [False, True])
def test_a_run_of_the_gpu_is_made_again_bit_for_bit(capture, dtype, noise, tmp_path):
    def start(device):
        return ezo.convert_(lenet().to(device, dtype), head=0)

    opt = ezo.ElasticZO(start("cuda"), lr=1e-3, eps=1e-2, noise=noise, queries=2, capture=capture)
    log = ezo.SeedLog(opt)
    x, y = batch(8)
    x, y = x.to("cuda", dtype), y.to("cuda")
    for _ in range(8):
        opt.train_step(x, y)
        log.observe()
    log.save(tmp_path / "log")
    for device in ("cuda", "cpu"):
        again = start(device)
        ezo.SeedLog.load(tmp_path / "log").replay_(again)
        assert same({n: t.cpu() for n, t in bits(again).items()}, {n: t.cpu() for n, t in bits(opt.model).items()})
