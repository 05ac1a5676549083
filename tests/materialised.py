"""The operators again with z in memory and torch's own functions: what every fused operator is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ezo_kernels.ops import Noise, Perturbation, materialize
from ezo_kernels.ops.noise import key_tensor

#: Every noise that a float weight takes on a CPU, with its parameters.
NOISES = [
    ("gaussian", {}),
    ("clt4", {}),
    ("uniform", {}),
    ("hadamard", {}),
    ("rademacher", {}),
    ("sparse", {"p_zero": 0.4}),
]


def randn(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@dataclass(frozen=True)
class Pass:
    """A perturbation in Python numbers; eps is large, so that a wrong z cannot hide behind rounding."""

    device: torch.device = torch.device("cpu")
    seed: int = 3
    step: int = 5
    eps: float = 0.5
    noise: str = "gaussian"
    params: dict = field(default_factory=dict)
    query: int = 0
    queries: int = 1
    signs: tuple = (1, -1)

    @property
    def p(self) -> Perturbation:
        return Perturbation(
            key_tensor(self.seed, self.step, self.device),
            torch.tensor([self.eps], device=self.device),
            Noise(self.noise, **self.params),
            query=self.query,
            queries=self.queries,
            signs=self.signs,
        )

    def z(self, shape, site: int, query: int = 0, layout: str | None = None) -> torch.Tensor:
        return materialize(
            shape, seed=self.seed, step=self.step, site=site, query=self.query + query, noise=self.noise,
            layout=layout, **self.params,
        )  # fmt: skip

    def weights(self, w, site, layout=None, dtype=None, exact=False, z_dtype=torch.float32):
        """The perturbed weight of each group: in ``dtype`` through fp32, or in fp64; z rounded to ``z_dtype`` first."""
        if w is None:
            return [None] * (self.queries * len(self.signs))
        out, w = [], w.detach().cpu()
        for q in range(self.queries):
            z = self.z(w.shape, site, q, layout).to(z_dtype).float()
            for sign in self.signs:
                if exact:
                    out.append(w.double() + sign * float(torch.tensor(self.eps)) * z.double())
                else:
                    out.append((w.float() + sign * (torch.tensor(self.eps) * z)).to(dtype or w.dtype))
        return out


def _grouped(run, x, p: Pass, w, b, site, bias_site, layout, shared, exact, device="cpu"):
    groups = p.queries * len(p.signs)
    x = x.detach().to(device)
    parts = [x] * groups if shared else x.chunk(groups)
    args = (x.dtype, exact)
    weights, biases = p.weights(w, site, layout, *args), p.weights(b, bias_site, "matrix", *args)
    return torch.cat([
        run(part.double() if exact else part, *(None if t is None else t.to(device) for t in (w_g, b_g)))
        for part, w_g, b_g in zip(parts, weights, biases, strict=True)
    ])  # fmt: skip


def linear(x, w, b, p: Pass, *, site, bias_site=0, shared=False, transposed=False, exact=False):
    def run(x, w, b):
        return F.linear(x, w.t() if transposed else w, b)

    # Beside torch on the same device: over a long K a CPU's BLAS sums in many parts, which is three times as near.
    return _grouped(run, x, p, w, b, site, bias_site, "matrix", shared, exact, "cpu" if exact else x.device)


def conv(x, w, b, p: Pass, *, site, bias_site=0, shared=False, exact=False, **how):
    run = F.conv2d if x.dim() == 4 else F.conv1d
    return _grouped(lambda x, w, b: run(x, w, b, **how), x, p, w, b, site, bias_site, "conv", shared, exact)


def embedding(ids, w, p: Pass, *, site, shared=False):
    parts = [ids.cpu()] * (p.queries * len(p.signs)) if shared else ids.cpu().chunk(p.queries * len(p.signs))
    return torch.cat([t[i.long()] for i, t in zip(parts, p.weights(w, site, "matrix"), strict=True)])


def update(w, coefs, p: Pass, *, site, layout=None, z_dtype=torch.float32):
    """w - coef_0 z_0 - coef_1 z_1 ..., z of ``z_dtype``, fp32, each product rounded; not yet rounded to the dtype of w."""
    acc = w.detach().cpu().float()
    for q, coef in enumerate(coefs):
        acc = acc - torch.tensor(coef, dtype=torch.float32) * p.z(w.shape, site, q, layout).to(z_dtype).float()
    return acc
