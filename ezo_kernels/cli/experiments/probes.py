"""What is watched while a trial runs: g, the sign of the integer loss, where weights and exponents go, seconds by phase."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ...nn.int8_layers import _Int8Layer
from ...ops import int8_cross_entropy, materialize
from ...ops.int8_signs import ternary_gradient
from ...ops.int8_tensor import Int8Tensor, least_exponent
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

    def _losses_of(self, out, y, loss_fn, signs):
        self.calls += 1
        if self.calls % self.EVERY == 0:
            exact = [
                F.cross_entropy(part, y, reduction="sum") for part in out.dequantize(torch.float64).chunk(out.groups)
            ]
            sign = ternary_gradient(torch.stack(exact), self.antithetic)
            self.pairs += len(sign)
            for bits in self.KINDS:
                own = int8_cross_entropy(out, y, fraction_bits=bits)
                ours = ternary_gradient(own, self.antithetic)
                self.agreed[bits] += int(((ours == sign) & (ours != 0)).sum())
        return super()._losses_of(out, y, loss_fn, signs)


class GradientTrace:
    """The projected gradient of every step of a float run, before it is clipped. Called with the run after each step."""

    def __init__(self) -> None:
        self.pairs: list[torch.Tensor] = []

    def __call__(self, run) -> None:
        if not run.optimizer.antithetic:
            raise ValueError("g is traced of pairs of signs: the recipe must be antithetic")
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


def allocated_peak(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes that torch's allocator gave out during ``step`` above those before it.

    Unlike storages that operators return (:class:`ezo_kernels.planning.live.LiveBytes`) it sees what a kernel of torch's takes
    and gives back inside of one call, such as a convolution's layouts; of a CPU not what numpy and numba take.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    # Read when the profiler first runs; below it the profiler writes lines of its own to stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    now = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


class SquaredErrorWatch(ElasticZOInt8):
    """Training on integer squared errors, with their signs held against those of two losses in floats.

    - of the same int8 outputs and targets, in fp64: what the integer loss itself costs;
    - of the float network with the very weights of the group, clamp(w +- z) 2^s, float activations and targets that were
      never rounded: what integers cost in all. Of every :attr:`EVERY`-th step; :meth:`watch` is told its batch before it.

    A tie of the integers counts as disagreement, and by itself.

    Args:
        args, options: of :class:`ezo_kernels.ElasticZOInt8`.
        float_loss: g is the sign of the float loss of the outputs, instead of the integer one.
    """

    EVERY = 8

    def __init__(self, *args, float_loss: bool = False, **options) -> None:
        super().__init__(*args, **options)
        self.float_loss = float_loss
        self.pairs: list[torch.Tensor] = []
        self.signs: list[torch.Tensor] = []
        self.integer_signs: list[torch.Tensor] = []
        self.exact_signs: list[torch.Tensor] = []
        self.own_signs: list[torch.Tensor] = []
        self.batches = 0
        self._exact: torch.Tensor | None = None

    @torch.no_grad()
    def watch(self, x: Int8Tensor, y: torch.Tensor) -> None:
        """The batch of the next step, y in floats [B, 1]."""
        if self.trunk and self.batches % self.EVERY == 0:
            self._exact = torch.cat([self._signs_in_floats(x, y, q) for q in range(self.queries)])
        self.batches += 1

    def _signs_in_floats(self, x: Int8Tensor, y: torch.Tensor, query: int) -> torch.Tensor:
        trunk = self.param_groups[0]
        z = {
            site.names[0]: materialize(
                site.shape, seed=self._seed.item() % (1 << 64), step=self._step.item(), site=site.site, query=query,
                noise="sparse_int8", r_max=trunk["r_max"], p_zero=trunk["p_zero"], device=self.device,
                layout=site.layout, rounds=self.rounds,
            ).long()
            for site in self.zo.manifest
        }  # fmt: skip
        losses = []
        for sign in (1, -1):
            out = x.dequantize(torch.float64).flatten(1)
            layers = [(n, m) for n, m in self.model.named_modules() if isinstance(m, _Int8Layer)]
            for i, (name, layer) in enumerate(layers):
                w = self._moved(layer, name, "weight", z, sign)
                out = F.linear(F.relu(out) if i else out, w, self._moved(layer, name, "bias", z, sign))
            losses.append(F.mse_loss(out, y.double()))
        return torch.sign(losses[0] - losses[1]).reshape(1)

    @staticmethod
    def _moved(layer, name: str, leaf: str, z: dict, sign: int) -> torch.Tensor:
        values, exponent = getattr(layer, leaf).long(), getattr(layer, f"{leaf}_exponent")
        own = z.get(f"{name}.{leaf}")
        if own is not None:
            values = (values + sign * own).clamp(-127, 127)
        return values.double() * 2.0 ** exponent.item()

    def _makes_signs(self, p) -> bool:
        return not self.float_loss and super()._makes_signs(p)  # g is then of floats, made after the integer losses

    def _losses_of(self, out, y, loss_fn, signs):
        losses, error = super()._losses_of(out, y, loss_fn, signs)
        exact = y.dequantize(torch.float64)
        floats = torch.stack([F.mse_loss(part, exact) for part in out.dequantize(torch.float64).chunk(out.groups)])
        if out.groups == 1:  # nothing is perturbed: no sign
            return losses, error
        self.pairs.append(floats.view(-1, 2))
        self.signs.append(torch.sign(floats[0::2] - floats[1::2]))
        self.integer_signs.append(torch.sign(losses[0::2] - losses[1::2]))
        if self._exact is not None:
            self.exact_signs.append(self._exact)
            self.own_signs.append(self.integer_signs[-1])
            self._exact = None
        return (floats if self.float_loss else losses), error

    def statistics(self) -> dict[str, float]:
        """Shares of all pairs; variance of g, and rms of L+ - L- over their mean, of the second half of the run."""
        if not self.pairs:
            return {}
        ours, floats = torch.cat(self.integer_signs), torch.cat(self.signs)
        g = floats if self.float_loss else ours.double()
        late, pairs = g[len(g) // 2 :].double(), torch.cat(self.pairs)[len(g) // 2 :]
        found = {
            "sign_agreement": ((ours == floats) & (ours != 0)).double().mean().item(),
            "ties": (ours == 0).double().mean().item(),
            "difference_rms": relative_difference(pairs),
        }
        if self.exact_signs:
            exact, own = torch.cat(self.exact_signs), torch.cat(self.own_signs)
            found["sign_agreement_float"] = ((own == exact) & (own != 0)).double().mean().item()
        if len(late) > 1:
            found["g_variance"] = late.var().item()
        return found


def relative_difference(pairs: torch.Tensor) -> float:
    """Root mean square of (L+ - L-) over the mean of the two; pairs is [n, 2]."""
    return ((pairs[:, 0] - pairs[:, 1]) / pairs.mean(1)).square().mean().sqrt().item()


class Trajectory:
    """Weights and exponents of a model's layers on the way, at :meth:`read`, on fixed rows.

    Of every weight layer: the root mean square of its weights in units of the function it computes, of int8 the share of them
    at +-127, and the exponent of its output: of int8 its own, in floats the one that int8 would take.
    """

    def __init__(self, model: torch.nn.Module, x, y: torch.Tensor) -> None:
        self.model, self.x, self.readings = model, x, []

    @torch.no_grad()
    def read(self, step: int, error: float) -> None:
        """Of this step, with the validation error that was found there."""
        weights, rails, exponents = {}, {}, {}
        layers = {n: m for n, m in self.model.named_modules() if isinstance(getattr(m, "weight", None), torch.Tensor)}

        def note(name):
            def hook(module, args, out):
                if isinstance(out, Int8Tensor):
                    exponents[name] = out.exponent.max().item()
                else:
                    largest = out.abs().max().item()
                    exponents[name] = least_exponent(largest) if math.isfinite(largest) else None

            return hook

        hooks = [m.register_forward_hook(note(n)) for n, m in layers.items()]
        try:
            self.model(self.x)
        finally:
            for handle in hooks:
                handle.remove()
        for name, layer in layers.items():
            w = layer.weight.detach()
            if w.dtype == torch.int8:
                rails[name] = (w.abs() == 127).double().mean().item()
                w = w.double() * 2.0 ** layer.weight_exponent.item()
            weights[name] = w.double().square().mean().sqrt().item()
        self.readings.append(
            {"step": step, "validation_mse": error, "weights": weights, "at_rails": rails, "exponents": exponents}
        )

    @staticmethod
    def summary(readings: list[dict]) -> dict[str, float]:
        """Of the layer that has most of it: growth of the weights, share at the rails at the end, drift of the exponent."""
        first, last = readings[0], readings[-1]
        found = {"weight_growth": max(last["weights"][n] / first["weights"][n] for n in first["weights"])}
        if last["at_rails"]:
            found["at_rails"] = max(last["at_rails"].values())
        drifts = [
            abs(r["exponents"][n] - e)
            for r in readings
            for n, e in first["exponents"].items()
            if r["exponents"][n] is not None
        ]
        found["exponent_drift"] = float(max(drifts))
        return found
