"""Node perturbation: noise on a layer's outputs in place of its weights, and what its losses say of the weights.

    y_g   <- y_g + (sign_g eps) z_q                           perturb_outputs; in fp32, rounded once to y's dtype
    e     =  sum over q of c[q, sample(r)] z_q[r]             output_errors; sums in the order of q, in fp32
    D     =  e^T (X X^T / R + damping tr(X X^T / R) I)^-1 X   decorrelated_gradient; X has a column of ones for a bias

With c[q, b] = (L_b(q, +) - L_b(q, -)) / (2 eps queries), L_b what row b adds to the batch's mean loss, E[e] tends to the
gradient of the loss by y (Flower and Jabri, 1992), and e^T X to that by the weight. D is that gradient times the inverse of the
inputs' second moments, from the batch alone: the input half of K-FAC (Martens and Grosse, arXiv 1503.05671), the affine
projection of adaptive filters (Ozeki and Umeda, 1984). It takes out the direction that all inputs share, in which the noise of
all rows meets (Dalm et al., arXiv 2310.00965, decorrelate for the same reason).

| tensor | shape |
|---|---|
| y | fp32, fp16 or bf16 [groups * B, ..., C] group-major, or [B, ..., C] of all groups; R = B * ... rows of a group |
| z_q | [R, C], site of the weight, layout ``matrix``: row r, column j (docs/rng.md, Noise of outputs) |
| c | fp32 [queries, B]; sample(r) = r // (R / B) |
| e | fp32 [R, C] |
| X | fp32 [R, K] |
| D | fp32 [C, K], and [C] of the bias |
"""

from __future__ import annotations

import torch

from ._library import launcher, register
from ._perturbation import FLOATS, SCHEMA, Perturbation, check_devices, scale_of
from .noise import Noise, check_index, z_cpu


def _perturb_outputs_cpu(y, key, eps, site, shared, query, queries, signs, noise, rounds, p_zero, out) -> None:
    spec, scale, groups = Noise(noise, rounds, p_zero), scale_of(eps), queries * len(signs)
    shape = out.flatten(0, -2).shape[0] // groups, out.shape[-1]
    own, source = out.view(groups, *shape), y.reshape(1 if shared else groups, *shape)
    for q in range(queries):
        z = None if tuple(signs) == (0,) else z_cpu(shape, key, site, query + q, spec, "matrix")
        for s, sign in enumerate(signs):
            g = q * len(signs) + s
            part = source[0 if shared else g]
            own[g].copy_(part if z is None else part.float() + z * (sign * scale))


_perturb_outputs = register(
    "perturb_outputs",
    f"(Tensor y, Tensor key, Tensor eps, int site, bool shared, {SCHEMA}, Tensor(a!) out) -> ()",
    cpu=_perturb_outputs_cpu,
    cuda=launcher("_node_triton", "launch_perturb_outputs"),
)


def perturb_outputs(y: torch.Tensor, p: Perturbation, *, site: int, shared: bool = False) -> torch.Tensor:
    """The outputs of a layer, each group's with its own noise.

    Args:
        y: [groups * B, ..., C], group-major, or [B, ..., C] with ``shared``; fp32, fp16 or bf16.
        p: the pass.
        site: id of the layer's weight.
        shared: y is every group's.

    Returns:
        [groups * B, ..., C] in y's dtype, in new memory.

    Raises:
        TypeError: a dtype that is no float of the three.
        ValueError: fewer than two dimensions, rows that are no multiple of the groups, a site out of range, devices that
            differ.
    """
    if y.dtype not in FLOATS:
        raise TypeError(f"perturb_outputs takes float32, float16 or bfloat16, got {y.dtype}")
    if y.dim() < 2 or (not shared and y.shape[0] % p.groups):
        raise ValueError(f"perturb_outputs: y {tuple(y.shape)} does not hold {p.groups} groups along dimension 0")
    check_devices("perturb_outputs", y, p.key, p.eps)
    site = check_index(site, "site", 1 << 32)
    out = y.new_empty((y.shape[0] * (p.groups if shared else 1), *y.shape[1:]))
    if out.numel():
        _perturb_outputs(y.contiguous(), p.key, p.eps, site, shared, *p.schema_args(), out)
    return out


def _output_errors_cpu(coef, key, site, query, noise, rounds, p_zero, out) -> None:
    spec, times = Noise(noise, rounds, p_zero), out.shape[0] // coef.shape[1]
    out.zero_()
    for q, own in enumerate(coef):
        out += z_cpu(out.shape, key, site, query + q, spec, "matrix") * own.repeat_interleave(times)[:, None]


_output_errors = register(
    "output_errors",
    "(Tensor coef, Tensor key, int site, int query, str noise, int rounds, float p_zero, Tensor(a!) out) -> ()",
    cpu=_output_errors_cpu,
    cuda=launcher("_node_triton", "launch_output_errors"),
)


def output_errors(
    coef: torch.Tensor, key: torch.Tensor, shape, *, site: int, noise: Noise, query: int = 0
) -> torch.Tensor:
    """e: the noise of :func:`perturb_outputs`, made again, weighed by what each row's loss did.

    Args:
        coef: fp32 [queries, B].
        key: int32 [2], of the step.
        shape: (R, C); R is a multiple of B.
        site, noise, query: as in the pass.

    Raises:
        TypeError: a coef that is not fp32.
        ValueError: rows that are no multiple of the samples, a site or query out of range, devices that differ.
    """
    if coef.dtype != torch.float32:
        raise TypeError(f"output_errors: coef must be float32, got {coef.dtype}")
    rows, columns = shape
    if coef.dim() != 2 or not coef.numel() or rows % coef.shape[1]:
        raise ValueError(f"output_errors: {rows} rows are no multiple of the samples of coef {tuple(coef.shape)}")
    check_devices("output_errors", coef, key)
    site, query = check_index(site, "site", 1 << 32), check_index(query, "query", (1 << 24) - coef.shape[0] + 1)
    out = coef.new_empty((rows, columns))
    if out.numel():
        _output_errors(coef.contiguous(), key, site, query, noise.name, noise.rounds, noise.p_zero, out)
    return out


def decorrelated_gradient(
    x: torch.Tensor, error: torch.Tensor, damping: float | None, bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """D of a weight and of its bias, or e^T X, the plain gradient, where ``damping`` is None.

    The system is solved by a Cholesky factor of R or K + 1 rows, whichever is less: both forms are one number.

    Args:
        x: fp32 [R, K].
        error: fp32 [R, C].
        damping: above 0; a share of the sum of the inputs' squares.
        bias: whether the layer has one; None is returned for it where not.

    Returns:
        fp32 [C, K], and [C] or None. NaN where a factor does not exist; nothing waits to see that.
    """
    with torch.autocast(x.device.type, enabled=False):  # else it would multiply 16 bits
        return _decorrelated(x, error, damping, bias)


def _decorrelated(x, error, damping, bias):
    if bias:
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    if damping is None:
        d = error.T @ x
    else:
        rows = len(x)
        few = rows <= x.shape[1]
        moments = (x @ x.T if few else x.T @ x) / rows
        diagonal = moments.diagonal()
        total = diagonal.sum()
        diagonal.add_(torch.where(total > 0, damping * total, 1.0))  # inputs that are all 0 have a gradient of 0
        factor, info = torch.linalg.cholesky_ex(moments)
        if few:
            d = torch.cholesky_solve(error, factor).T @ x
        else:
            d = torch.cholesky_solve(x.T @ error, factor).T
        d = torch.where(info == 0, d, float("nan"))  # of a factor that does not exist LAPACK leaves numbers
    return (d[:, :-1], d[:, -1]) if bias else (d, None)
