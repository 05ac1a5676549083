"""What is watched while a trial runs: the projected gradient, the sign of the integer loss, and bytes that are alive."""

from __future__ import annotations

import contextlib
import time
import weakref

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ...ops import int8_cross_entropy
from ...optim import ElasticZOInt8


class SignCounter(ElasticZOInt8):
    """Counts how often the integer loss has the sign of the float loss of the same int8 logits, by fraction bits.

    Every :attr:`EVERY`-th evaluation of the losses is counted; a tie counts as disagreement.

    Attributes:
        agreed: fraction bits -> pairs with the same sign. pairs: all that were compared.
    """

    KINDS = (0, 2, 4, 8)
    EVERY = 4

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.agreed = dict.fromkeys(self.KINDS, 0)
        self.pairs = self.calls = 0

    @property
    def agreement(self) -> dict[int, float]:
        """Fraction bits -> share of the pairs that agree."""
        return {bits: n / max(1, self.pairs) for bits, n in self.agreed.items()}

    def _losses_of(self, out, y, loss_fn):
        self.calls += 1
        if self.calls % self.EVERY == 0:
            exact = [
                F.cross_entropy(part, y, reduction="sum") for part in out.dequantize(torch.float64).chunk(out.groups)
            ]
            sign = torch.sign(torch.stack(exact[0::2]) - torch.stack(exact[1::2]))
            self.pairs += len(sign)
            for bits in self.KINDS:
                own = int8_cross_entropy(out, y, fraction_bits=bits)
                ours = torch.sign(own[0::2] - own[1::2])
                self.agreed[bits] += int(((ours == sign) & (ours != 0)).sum())
        return super()._losses_of(out, y, loss_fn)


class GradientTrace:
    """The projected gradient of every step of a float run, before it is clipped. Called with the run after each step."""

    def __init__(self) -> None:
        self.pairs: list[torch.Tensor] = []

    def __call__(self, run) -> None:
        self.pairs.append(run.optimizer.losses.view(-1, 2).clone())

    def statistics(self, eps: float) -> dict[str, float]:
        """Mean square and variance of g over the second half of the run: one z a query, one batch a step."""
        late = torch.stack(self.pairs[len(self.pairs) // 2 :]).double()
        g = ((late[..., 0] - late[..., 1]) / (2 * eps)).flatten()
        g = g[torch.isfinite(g)]
        if len(g) < 2:
            return {}
        return {"g_variance": g.var().item(), "g_mean_square": g.square().mean().item()}


class PhaseTimer:
    """Stands where a step's NVTX ranges are: ``phase(name)`` is a context manager that adds up seconds by name."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, {}

    def now(self) -> float:
        """The clock, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def layers(self, model, in_head) -> contextlib.AbstractContextManager:
        """Layers are not timed: they are inside of the phases."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def __call__(self, name: str):
        began = self.now()
        yield
        self.add(name, self.now() - began)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that were made inside and are alive: ``now``, and at most ``peak``."""

    def __init__(self, known=()) -> None:
        super().__init__()
        self.refs, self.known = {}, {t.untyped_storage()._cdata for t in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(out):
            if not isinstance(t, torch.Tensor) or t.is_meta:
                continue
            storage = t.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self.known or key in self.refs:
                continue

            def gone(_, key=key, size=size):
                self.now -= size
                del self.refs[key]

            self.refs[key] = weakref.ref(storage, gone)
            self.now += size
            self.peak = max(self.peak, self.now)
        return out
