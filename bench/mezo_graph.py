"""MeZO as it could be run in one CUDA graph: what is left when Python and its launches are taken from the eager loop.

z comes from the noise contract with a key on the device, because a torch generator cannot go back inside a graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ezo_kernels.nn.plan import make_plan
from ezo_kernels.ops import Noise, Perturbation, perturb
from ezo_kernels.ops.noise import fold_key


class GraphMeZO:
    """Weights += eps z, forward, -= 2 eps z, forward, += eps z, -= lr g z; every scalar on the device.

    Args:
        model: plain torch; all of its parameters are trained.
        lr, eps, seed, noise, clip: as in :class:`ezo_kernels.ElasticZO`.
        keep_z: z is made once a step and kept, which costs as much memory as the weights; otherwise four times.
        loss_fn: ``loss_fn(output, y)``.
    """

    def __init__(
        self, model, lr=1e-4, eps=1e-3, seed=0, noise="gaussian", clip=None, keep_z=False, loss_fn=F.cross_entropy
    ) -> None:
        named = dict(model.named_parameters(remove_duplicate=False))
        self.model, self.sites, self.loss_fn = model, make_plan(model, 0).sites, loss_fn
        self.params = [named[s.names[0]].detach() for s in self.sites]
        self.device, self.lr, self.eps, self.clip, self.keep_z = self.params[0].device, lr, eps, clip, keep_z
        self.zeros = [torch.zeros_like(p) for p in self.params]
        self.seed = torch.tensor([seed], device=self.device)
        self.steps = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.key = torch.zeros(2, dtype=torch.int32, device=self.device)
        self.one = torch.ones(1, device=self.device)
        self.noise, self._z = Noise(noise), None

    def _directions(self) -> list[torch.Tensor]:
        if self._z is not None:
            return self._z
        p = Perturbation(self.key, self.one, self.noise, signs=(1,))
        z = [perturb(zero, p, site=s.site, layout=s.layout)[0] for zero, s in zip(self.zeros, self.sites, strict=True)]
        if self.keep_z:
            self._z = z
        return z

    def _sweep(self, scale: float) -> None:
        torch._foreach_add_(self.params, self._directions(), alpha=scale)

    @torch.no_grad()
    def train_step(self, x, y) -> torch.Tensor:
        """One step; the mean of its two losses. Nothing waits for the device, so it can be captured."""
        self._z = None
        fold_key(self.seed, self.steps, self.key)
        self._sweep(self.eps)
        plus = self.loss_fn(self.model(x), y)
        self._sweep(-2 * self.eps)
        minus = self.loss_fn(self.model(x), y)
        self._sweep(self.eps)
        g = (plus - minus) / (2 * self.eps)
        if self.clip is not None:
            g = g.clamp(-self.clip, self.clip)
        scale = -self.lr * g
        torch._foreach_add_(self.params, torch._foreach_mul(self._directions(), scale))
        self.steps += 1
        self._z = None
        return (plus + minus) / 2
