"""How well the sign of an integer step follows the derivative along its z, by r_max and p_zero: LeNet-5 on MNIST.

    python -m bench int8-signal --data-dir DIR --json bench/results/int8_signal.json

At one state, some steps of backpropagation from the start, g of many batches is held against two numbers of the same batch in
floats, from the dequantised weights: the difference of the losses of w + z and w - z, from which the integers differ by their
rounding, and the derivative along z, from which that differs by the size of z. A sign is worth (2 share - 1)^2 of a right
one. The training split alone is read.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F

import ezo_kernels as ezo
from bench.frozen_trunk import _lenet
from ezo_kernels.data import Batches, load, quantize_images, standardize
from ezo_kernels.ops import Int8Tensor, materialize

#: (r_max, p_zero): dense and small to sparse and large
SETTINGS = (
    (3, 0.5), (7, 0.5), (15, 0.5), (7, 0.97), (15, 0.9), (31, 0.97), (15, 0.99), (31, 0.99), (15, 0.9975), (31, 0.9975),
    (63, 0.9975), (127, 0.9975), (31, 0.9995), (63, 0.9995), (127, 0.9995), (127, 0.9998),
)  # fmt: skip


def start(x: torch.Tensor, y: torch.Tensor, steps: int) -> torch.nn.Module:
    """LeNet-5 after a few steps of backpropagation."""
    model = _lenet(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-3)
    for (a, b), _ in zip(Batches(x, y, 32, 0), range(steps), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(model(a), b).backward()
        optimizer.step()
    return model


def shares(integer, floats, images: Int8Tensor, x, y, r_max: int, p_zero: float, batches: int, rows: int) -> dict:
    """How often g has the sign of the difference, and of the derivative, over ``batches`` random batches.

    Args:
        integer, floats: the converted model, and a plain one with its dequantised weights.
        images, x, y: the training split: quantised, standardised, its labels.
    """
    units = {n: 2.0 ** float(b) for n, b in integer.named_buffers() if n.endswith("_exponent")}
    values = {n: p.float() for n, p in integer.named_parameters()}
    kept = copy.deepcopy(integer.state_dict())
    opt = ezo.ElasticZOInt8(integer, r_max=r_max, p_zero=p_zero, bits=0, seed=3)
    generator = torch.Generator().manual_seed(5)
    difference = derivative = 0
    for step in range(batches):
        rows_of = torch.randint(0, len(y), (rows,), generator=generator)
        opt.train_step(Int8Tensor(images.values[rows_of], images.exponent), y[rows_of])
        integer.load_state_dict(kept)
        own = {"noise": "sparse_int8", "p_zero": p_zero, "r_max": r_max}
        z = {
            s.names[0]: materialize(s.shape, seed=3, step=step, site=s.site, layout=s.layout, **own).float()
            for s in integer._ezo.manifest
        }
        floats.zero_grad()
        F.cross_entropy(floats(x[rows_of]), y[rows_of]).backward()
        slope = sum((p.grad * z[n]).sum().item() * units[n + "_exponent"] for n, p in floats.named_parameters())
        losses = []
        for sign in (1, -1):
            moved = {n: (v + sign * z[n]).clamp(-127, 127) * units[n + "_exponent"] for n, v in values.items()}
            with torch.no_grad():
                losses.append(
                    F.cross_entropy(torch.func.functional_call(floats, moved, (x[rows_of],)), y[rows_of]).item()
                )
        g = int(opt.g)
        difference += g * (losses[0] - losses[1]) > 0
        derivative += g * slope > 0
    return {"r_max": r_max, "p_zero": p_zero, "difference": difference / batches, "derivative": derivative / batches}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=160)
    parser.add_argument("--steps", type=int, default=500, help="of backpropagation, before")


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    data = load("mnist", args.data_dir)
    if not data.genuine:
        raise SystemExit(f"mnist from {data.source} is not the genuine set: no evidence is made of it")
    x, y = standardize(data.x_train, "mnist"), torch.from_numpy(data.y_train)
    floats = start(x, y, args.steps)
    integer = ezo.convert_(copy.deepcopy(floats), head=0, precision="int8")
    exponents = dict(integer.named_buffers())
    with torch.no_grad():
        for (name, p), v in zip(floats.named_parameters(), integer.parameters(), strict=True):
            p.copy_(v.float() * 2.0 ** exponents[name + "_exponent"].float())
    images, rows = quantize_images(data.x_train, "mnist"), []
    for r_max, p_zero in SETTINGS:
        rows.append(shares(integer, floats, images, x, y, r_max, p_zero, args.batches, 32))
        found = rows[-1]
        print(
            f"r_max {r_max}, p_zero {p_zero}: sign of the difference {found['difference']:.2f}, "
            f"of the derivative {found['derivative']:.2f}",
            flush=True,
        )
    record = {"environment": {"torch": torch.__version__}, "batches": args.batches, "steps": args.steps, "rows": rows}
    temporary = args.json.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, args.json)
    return 0
