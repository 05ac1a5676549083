"""ElasticZO-INT8 again, from docs/numerics.md (Integers) and docs/rng.md alone: Python integers and lists.

It imports nothing of the package, and no library that computes. A matrix is a list of rows, a tensor of more dimensions the
flat list of its values in row-major order, beside its shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

from tests.int8_oracle_noise import fold, lane_at, philox, places, z_at  # noqa: F401 - tests ask the oracle for them

GRADIENT_SITE = 2**32 - 1

# ---- rounding


def clamp(x):
    return max(-127, min(127, x))


def bits(m):
    n = 0
    while m >= 1 << n:
        n += 1
    return n


def round_shift(x, n, how="nearest", lane=None):
    """x / 2^n as an integer; not clamped."""
    q, p = divmod(abs(x), 1 << n)
    if how == "nearest":
        up = 2 * p >= 1 << n
    elif how == "pseudo":
        upper, lower = divmod(p, 1 << n // 2)
        up = upper > (2 * lower if n % 2 else lower)
    elif n <= 16:
        up = p > lane >> (16 - n)
    else:
        up = p >> (n - 16) > lane
    return (-1 if x < 0 else 1) * (q + up)


def at_exponent(x, shift, most=None):
    """x 2^shift: to the left by at most ``most``, to the right to nearest."""
    if shift >= 0:
        return x << (shift if most is None else min(shift, most))
    return round_shift(x, -shift)


# ---- layers: rows of one group and their exponent


def requantise(rows, exponent, how="nearest"):
    shift = max(0, bits(max(abs(v) for row in rows for v in row)) - 7)
    return [[clamp(round_shift(v, shift, how)) for v in row] for row in rows], exponent + shift


def linear(rows, w, bias):
    """w: a list of rows."""
    return [[sum(a * b for a, b in zip(x, of, strict=True)) + b0 for of, b0 in zip(w, bias, strict=True)] for x in rows]


def conv2d(rows, size, w, w_shape, bias, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """Accumulators and their size (C, H, W); ``size`` is that of a row of x."""
    (_, h, width), (outputs, inputs, kh, kw) = size, w_shape
    out_h = (h + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    out_w = (width + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1

    def value(x, o, p, q):
        total, first = bias[o], o // (outputs // groups) * inputs
        for c in range(inputs):
            for r in range(kh):
                for s in range(kw):
                    i = p * stride[0] - padding[0] + r * dilation[0]
                    j = q * stride[1] - padding[1] + s * dilation[1]
                    if 0 <= i < h and 0 <= j < width:
                        total += x[((first + c) * h + i) * width + j] * w[((o * inputs + c) * kh + r) * kw + s]
        return total

    every = [(o, p, q) for o in range(outputs) for p in range(out_h) for q in range(out_w)]
    return [[value(x, *at) for at in every] for x in rows], (outputs, out_h, out_w)


def max_pool(rows, size, k=2):
    c, h, w = size
    every = [(i, p, q) for i in range(c) for p in range(h // k) for q in range(w // k)]

    def largest(x, i, p, q):
        return max(x[(i * h + k * p + r) * w + k * q + s] for r in range(k) for s in range(k))

    return [[largest(x, *at) for at in every] for x in rows], (c, h // k, w // k)


def average(window):
    """Of a window's values, padding included."""
    total, n = sum(window), len(window)
    return (-1 if total < 0 else 1) * ((2 * abs(total) + n) // (2 * n))


def relu(rows):
    return [[max(v, 0) for v in row] for row in rows]


def add(a, s_a, b, s_b):
    low = max(min(s_a, s_b), max(s_a, s_b) - 16)
    rows = [
        [at_exponent(v, s_a - low) + at_exponent(u, s_b - low) for v, u in zip(*two, strict=True)]
        for two in zip(a, b, strict=True)
    ]
    return requantise(rows, low)


def aligned_bias(bias, s_b, s_acc):
    return [at_exponent(b, s_b - s_acc, 22) for b in bias]


# ---- losses


def root(k):
    """The integer nearest to 2^(30 - 2^-k), by square roots of integers."""
    n = 1 << k
    twice = 1 << (31 * n - 1)
    for _ in range(k):
        twice = math.isqrt(twice)
    return (twice + 1) // 2


ROOTS = [root(k) for k in range(9)]


def exp2_below(distance, fraction):
    """2^(-distance / 2^fraction) in units of 2^-30."""
    whole, f = divmod(distance, 1 << fraction)
    e = 1 << 30
    for k in range(1, fraction + 1):
        if f >> (fraction - k) & 1:
            e = e * ROOTS[k] >> 30
    return e >> whole


def log2_floor(s, fraction):
    n = bits(s) - 1
    m = s << (30 - n) if n <= 30 else s >> (n - 30)
    digits = 0
    for _ in range(fraction):
        m = m * m >> 30
        digits = 2 * digits + (m >> 31)
        m >>= m >> 31
    return (n << fraction) + digits


def cross_entropy_row(v, s, label, fraction):
    k = s - 15 + fraction
    a = [47274 * x << k if k >= 0 else 47274 * x >> -k for x in v]
    total = sum(exp2_below(max(a) - x, fraction) for x in a)
    return max(a) - a[label] + log2_floor(total, fraction) - (30 << fraction)


def cross_entropy(rows, s, labels, fraction=8):
    return sum(cross_entropy_row(v, s, y, fraction) for v, y in zip(rows, labels, strict=True))


def squared_error(rows, s, target, s_t):
    total = 0
    for v, t in ((v, t) for two in zip(rows, target, strict=True) for v, t in zip(*two, strict=True)):
        d = at_exponent(v, s - s_t + 8, 24) - (t << 8)
        total += max(-(1 << 20), min(1 << 20, d)) ** 2
    return total


def truncated(x, n):
    return (-1 if x < 0 else 1) * (abs(x) >> n)


def softmax_weights(v, s):
    """NITI's, of one row."""
    if s > -7:
        t = [truncated(47274 * x, 15) for x in v]
        t = [x << s if s >= 0 else truncated(x, -s) for x in t]
        return [(1 << max(x - max(t) + 10, 0)) - 1 for x in t]
    at = max(s, -24)
    v = [x >> (at - s) for x in v]
    return [(1 << (1 - 2 * at)) + x * (1 << (1 - at)) + x * x for x in v]


def error_before_rounding(v, s, label):
    w = softmax_weights(v, s)
    p = [(x << 11) // sum(w) for x in w]
    given = sum(p)
    p[label] -= given
    return p


def error_rows(rows, s, labels, key, query, rounds=7):
    """The head's first error of one group."""
    out = []
    for r, (v, label) in enumerate(zip(rows, labels, strict=True)):
        p = error_before_rounding(v, s, label)
        lanes = [lane_at(r, j, key=key, site=GRADIENT_SITE, query=query, rounds=rounds) for j in range(len(p))]
        out.append([clamp(round_shift(x, 4, "stochastic", lane)) for x, lane in zip(p, lanes, strict=True)])
    return out


def finer(w, rest, amount, n, how, lane):
    """A weight of the head and its remainder after a step of ``amount / 2^n`` units."""
    if not amount:
        return w, rest
    step = round_shift(amount, n - 8, how, lane) if n > 8 else amount * 2 ** (8 - n)
    fine = max(-127 * 256, min(127 * 256, 256 * w + rest - step))
    w = (fine + 128) // 256
    return w, fine - 256 * w


# ---- a run


@dataclass
class Parameter:
    """``rounding_site``: of the words that round its update; ``site``: of its z, None in the head."""

    values: list[int]
    exponent: int
    shape: tuple[int, ...]
    site: int | None
    rounding_site: int
    conv: bool = False

    def rows(self, values):
        n = self.shape[-1]
        return [values[i : i + n] for i in range(0, len(values), n)]


@dataclass
class Run:
    """A network as a list of ("conv" | "linear", name), "pool", "relu", "flatten", and what trains it.

    Names of parameters are "name.weight" and "name.bias".
    """

    layers: list
    parameters: dict[str, Parameter]
    size: tuple[int, int, int]
    seed: int
    r_max: int = 3
    p_zero: float = 0.5
    bits: int = 1
    head_bits: int = 1
    queries: int = 1
    fraction: int = 8
    head_grad: str = "mean"
    rounding: str = "stochastic"
    head_rounding: str = "stochastic"
    head_remainder: bool = False
    activation_rounding: str = "nearest"
    rounds: int = 7
    antithetic: bool = True
    step: int = 0
    remainders: dict[str, list[int]] = field(default_factory=dict)
    losses: list[int] = field(default_factory=list)
    g: list[int] = field(default_factory=list)

    def z(self, p, query):
        how = dict(key=self.key, p_zero=self.p_zero, r_max=self.r_max, rounds=self.rounds)
        return [z_at(*at, site=p.site, query=query, **how) for at in places(p.shape, p.conv)]

    def of_group(self, name, query, sign):
        p = self.parameters[name]
        if p.site is None:
            return p.values
        return [clamp(w + sign * z) for w, z in zip(p.values, self.z(p, query), strict=True)]

    def forward(self, rows, s, query, sign):
        """The output, its exponent, and (layer, its input, the input's exponent, its output) of each layer."""
        size, notes = self.size, []
        for layer in self.layers:
            x, s_x = rows, s
            if layer == "relu":
                rows = relu(rows)
            elif layer == "pool":
                rows, size = max_pool(rows, size)
            elif layer != "flatten":
                kind, name = layer
                p, b = self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]
                w = self.of_group(f"{name}.weight", query, sign)
                bias = aligned_bias(self.of_group(f"{name}.bias", query, sign), b.exponent, s + p.exponent)
                if kind == "conv":
                    acc, size = conv2d(rows, size, w, p.shape, bias)
                else:
                    acc = linear(rows, p.rows(w), bias)
                rows, s = requantise(acc, s + p.exponent, self.activation_rounding)
            notes.append((layer, x, s_x, rows))
        return rows, s, notes

    def backward(self, notes, error):
        """Gradients of the head in one group: name -> (flat values, exponent)."""
        found, e, s_e = {}, error, 0
        for layer, x, s_x, y in reversed(notes):
            if layer == "relu":
                e = [[d if v > 0 else 0 for d, v in zip(*two, strict=True)] for two in zip(e, y, strict=True)]
            elif layer not in ("pool", "flatten"):
                name = layer[1]
                p = self.parameters[f"{name}.weight"]
                if p.site is not None:
                    break
                outputs, inputs = p.shape
                pairs = list(zip(e, x, strict=True))
                weight = [sum(d[o] * v[i] for d, v in pairs) for o in range(outputs) for i in range(inputs)]
                found[f"{name}.weight"] = weight, s_e + s_x
                found[f"{name}.bias"] = [sum(d[o] for d in e) for o in range(outputs)], s_e
                w = p.rows(p.values)
                e = [[sum(d[o] * w[o][i] for o in range(outputs)) for i in range(inputs)] for d in e]
                e, s_e = requantise(e, s_e + p.exponent)
        return found

    def subtract(self, p, amounts, n, how):
        for i, (at, amount) in enumerate(zip(places(p.shape, p.conv), amounts, strict=True)):
            lane = lane_at(*at, key=self.key, site=p.rounding_site, rounds=self.rounds)
            p.values[i] = clamp(p.values[i] - round_shift(amount, n, how, lane))

    def subtract_finely(self, name, amounts, n):
        """In steps of 1/256: what a weight of whole units cannot hold is kept."""
        p = self.parameters[name]
        rest = self.remainders.setdefault(name, [0] * len(p.values))
        for i, (at, amount) in enumerate(zip(places(p.shape, p.conv), amounts, strict=True)):
            lane = lane_at(*at, key=self.key, site=p.rounding_site, rounds=self.rounds)
            p.values[i], rest[i] = finer(p.values[i], rest[i], amount, n, self.head_rounding, lane)

    def train_step(self, rows, s, labels):
        self.key = fold(self.seed, self.step)
        trunk = [p for p in self.parameters.values() if p.site is not None]
        signs = (1, -1) if self.antithetic else (1,)
        groups = [(q, sign) for q in range(self.queries) for sign in signs] if trunk else [(0, 0)]
        self.losses, gradients = [], {}
        for number, (query, sign) in enumerate(groups):
            y, s_y, notes = self.forward(rows, s, query, sign)
            self.losses.append(cross_entropy(y, s_y, labels, self.fraction))
            if sign not in {"mean": (1, 0, -1), "plus": (1, 0), "minus": (-1, 0)}[self.head_grad]:
                continue
            if len(trunk) < len(self.parameters):
                error = error_rows(y, s_y, labels, self.key, number, self.rounds)
                for name, found in self.backward(notes, error).items():
                    gradients.setdefault(name, []).append(found)
        if self.antithetic:
            against = list(zip(self.losses[::2], self.losses[1::2], strict=False))
        else:  # the own loss, and the mean of the others
            others = [sum(self.losses[:q] + self.losses[q + 1 :]) for q in range(self.queries)]
            against = [(own, Fraction(rest, self.queries - 1)) for own, rest in zip(self.losses, others, strict=True)]
        self.g = [(own > other) - (own < other) for own, other in against]
        n = max(0, bits(self.r_max) - self.bits)
        for p in trunk:
            moves = [[g * z for z in self.z(p, q)] for q, g in enumerate(self.g)]
            self.subtract(p, [sum(of) for of in zip(*moves, strict=True)], n, self.rounding)
        for name, parts in gradients.items():
            top = max(s for _, s in parts)
            shifted = [[round_shift(v, top - s) for v in values] for values, s in parts]
            total = [sum(of) for of in zip(*shifted, strict=True)]
            n = max(0, bits(max(map(abs, total))) - self.head_bits)
            if self.head_remainder:
                self.subtract_finely(name, total, n)
            else:
                self.subtract(self.parameters[name], total, n, self.head_rounding)
        self.step += 1
