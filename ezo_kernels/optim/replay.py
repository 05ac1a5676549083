"""Steps of zeroth order from a few numbers each, and what a model must be for them (:mod:`.seed_log`)."""

from __future__ import annotations

import zlib

import torch

from ..nn.convert import context_of, head_parameters, is_int8, trunk_parameters
from ..ops import Noise, update_
from ..ops.int8_pass import sparse_noise
from ..ops.int8_update import int8_update_
from ..ops.noise import key_tensor, rng_version

#: Steps that one pass over the weights makes.
_AT_ONCE = 64


def digests(tensors) -> list[int]:
    """CRC-32 of each tensor's bytes, row by row as its shape has them."""
    flat = (t.detach().cpu().contiguous().reshape(-1) for t in tensors)
    return [zlib.crc32(t.view(torch.uint8).numpy()) if t.numel() else 0 for t in flat]


def manifest(model) -> list:
    """Each parameter of the trunk: site, names, shape, layout, dtype, and the dtype of its z."""
    sites = zip(context_of(model).manifest, trunk_parameters(model), strict=True)
    return [
        [s.site, list(s.names), list(s.shape), s.layout, str(p.dtype).removeprefix("torch."), s.z_dtype_for(p)]
        for s, p in sites
    ]


def rest(model) -> dict[str, torch.Tensor]:
    """What no step says: the head's parameters and all buffers, by name."""
    heads = {id(p) for p in head_parameters(model)}
    own = [(n, p) for n, p in model.named_parameters() if id(p) in heads]
    return {name: t.detach() for name, t in (*own, *model.named_buffers())}


def require_fit(header: dict, model) -> None:
    """ValueError unless ``model`` is converted as that of the log with this header, under its contract of noise."""
    if is_int8(model) != header["integer"]:
        raise ValueError(f"the log is of {'integers' if header['integer'] else 'floats'}, and the model is not")
    ours = manifest(model)
    if [row[:4] for row in ours] != [list(row[:4]) for row in header["manifest"]]:
        raise ValueError("the log is of another model, or of one converted with another head")
    differ = [a[1][0] for a, b in zip(ours, header["manifest"], strict=True) if a[4:] != list(b[4:])]
    if differ:
        raise ValueError(f"the log has other dtypes, of weights or of their z, than {', '.join(map(repr, differ))}")
    if (mine := rng_version(header["noise"]["rounds"])) != header["rng_version"]:
        raise ValueError(f"the log is of the noise contract {header['rng_version']!r}, this is {mine!r}")


def rest_to_write(model, kept: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The model's own tensors that no step makes, each with what the log has for it."""
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    fixed = [n for n, t in own.items() if any(a > 1 and b == 0 for a, b in zip(t.shape, t.stride(), strict=True))]
    unlike = [n for n, t in kept.items() if n not in own or own[n].shape != t.shape or own[n].dtype != t.dtype]
    if unlike or set(kept) != set(rest(model)):
        raise ValueError(f"the log's head and buffers are not the model's: {', '.join(unlike) or 'other names'}")
    if differ := [name for name in fixed if name in kept and not torch.equal(own[name].cpu(), kept[name])]:
        raise ValueError(f"the elements of {', '.join(map(repr, differ))} share their memory, and the log's are others")
    return [(own[name], value) for name, value in kept.items() if name not in fixed]


def _key(header: dict, at: int, device) -> torch.Tensor:
    """Of the log's step ``at``, counted from 0."""
    return key_tensor(header["seed"] % (1 << 64), header["begin"]["step"] + at, device)


def replay_floats(header: dict, columns: dict[str, torch.Tensor], weights: list[torch.Tensor]) -> None:
    """Carry out steps on ``weights``: g fp32 [steps, queries], lr fp32 [steps]."""
    device = weights[0].device
    noise = Noise(header["noise"]["name"], header["noise"]["rounds"], header["noise"]["p_zero"])
    rows = header["manifest"]
    # as ops/coefficients.py makes it
    coef = torch.div(columns["lr"][:, None] * columns["g"], header["queries"]).to(device)
    for first in range(0, len(coef), _AT_ONCE):
        own = coef[first : first + _AT_ONCE]
        keys = torch.stack([_key(header, first + i, device) for i in range(len(own))])
        update_(
            weights, keys, own, sites=[row[0] for row in rows], layouts=[row[3] for row in rows],
            noise=noise, stochastic_rounding=header["rounding"], z_dtypes=[row[5] for row in rows],
            scales=[header["scales"].get(row[0], 1.0) for row in rows],
        )  # fmt: skip


def replay_integers(header: dict, columns: dict[str, torch.Tensor], weights: list[torch.Tensor]) -> None:
    """The same in integers: g int8 [steps, queries]; shift, p_zero and r_max [steps]."""
    device = weights[0].device
    rows = header["manifest"]
    g, shift = columns["g"].int().to(device), columns["shift"].to(device)
    for i in range(len(g)):
        noise = sparse_noise(header["noise"]["rounds"], columns["p_zero"][i].item(), int(columns["r_max"][i]))
        int8_update_(
            weights, _key(header, i, device), g[i], shift[i : i + 1], sites=[row[0] for row in rows],
            layouts=[row[3] for row in rows], noise=noise, rounding=header["rounding"],
        )  # fmt: skip
