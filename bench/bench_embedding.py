"""The perturbed pair of an embedding against a plain one: ``pytest bench/bench_embedding.py``.

| case | is |
|---|---|
| two plain, one plain | ``F.embedding`` of two batches of ids, and of one of twice the size |
| fused | :func:`perturbed_embedding`: noise for the rows that are read |
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.timing import devices, time_case
from ezo_kernels.ops import Noise, Perturbation, materialize, perturbed_embedding
from ezo_kernels.ops.noise import key_tensor

#: device -> ids a sign, vocabulary, width. The table of the GPU's case is 200 MB: no cache holds it.
SHAPES = {"cpu": [(64, 500, 96)], "cuda": [(8192, 50272, 2048), (1024, 50272, 2048)]}
NOISES = ["gaussian", "clt4", "hadamard", "rademacher"]
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
CASES = [pytest.param(d, *s, id=f"{d}-{'x'.join(map(str, s))}") for d in devices() for s in SHAPES[d]]
SEED, STEP, SITE = 1, 2, 3


def operands(device, rows, vocabulary, width):
    generator = torch.Generator(device).manual_seed(0)
    w = torch.randn(vocabulary, width, generator=generator, device=device).to(DTYPE[device])
    return torch.randint(0, vocabulary, (2 * rows,), generator=generator, device=device), w


@pytest.mark.parametrize("parts", [2, 1], ids=["two plain", "one plain"])
@pytest.mark.parametrize(("device", "rows", "vocabulary", "width"), CASES)
def test_plain(benchmark, device, rows, vocabulary, width, parts):
    ids, w = operands(device, rows, vocabulary, width)
    case = "two plain" if parts == 2 else "one plain"
    time_case(benchmark, lambda: [F.embedding(i, w) for i in ids.chunk(parts)], device, case=case, rows=rows)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("device", "rows", "vocabulary", "width"), CASES)
def test_fused(benchmark, device, rows, vocabulary, width, noise):
    ids, w = operands(device, rows, vocabulary, width)
    p = Perturbation(key_tensor(SEED, STEP, device), torch.tensor([1e-3], device=device), Noise(noise))

    def run():
        return perturbed_embedding(ids, w, p, site=SITE)

    z = materialize(w.shape, seed=SEED, step=STEP, site=SITE, noise=noise, device=device)
    some = [slice(0, 16), slice(rows, rows + 16)]
    ours = run()
    for part, sign in zip(some, (1, -1), strict=True):  # fp32, one rounding: nothing to be tolerant of
        want = (w[ids[part]].float() + sign * (p.eps * z[ids[part]])).to(w.dtype)
        assert torch.equal(ours[part], want)
    time_case(benchmark, run, device, case="fused", rows=rows, noise=noise)
