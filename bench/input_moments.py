"""How much of a layer's inputs is common to all of them: what node perturbation is worth (docs/method.md)."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import ezo_kernels as ezo
from ezo_kernels.data import load, standardize

LAYERS = ("fc1", "fc2", "fc3")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", type=Path, help="folder with the files of MNIST and Fashion-MNIST")
    parser.add_argument("--damping", type=float, default=ezo.NodePerturbation.damping)
    parser.add_argument("--rows", type=int, default=4000)


def common_share(x: torch.Tensor, damping: float) -> tuple[float, float]:
    """rho = tr(M^2) / tr(M)^2 of inputs [rows, K] and a bias's one, and rho where M is taken out with this damping."""
    x = torch.cat([x, x.new_ones(len(x), 1)], 1).double()
    eigenvalues = torch.linalg.eigvalsh(x.T @ x / len(x)).clamp(min=0)
    white = eigenvalues / (eigenvalues + damping * eigenvalues.sum())
    return tuple((e.square().sum() / e.sum() ** 2).item() for e in (eigenvalues, white))


def inputs_of(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the linear layers of LeNet-5 are given, as it is initialised."""
    model, inputs = ezo.models.LeNet5(generator=torch.Generator().manual_seed(0)), {}
    for name in LAYERS:
        model.get_submodule(name).register_forward_pre_hook(lambda _, own, name=name: inputs.update({name: own[0]}))
    with torch.no_grad():
        model(images)
    return inputs


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    for data in ("mnist", "fashion_mnist"):
        images = standardize(load(data, args.data_dir).x_train[: args.rows], data)
        for name, x in inputs_of(images).items():
            plain, white = common_share(x, args.damping)
            print(f"{data} {name}: rho {plain:.3f}, {white:.3f} at a damping of {args.damping:g}")
    return 0
