"""Bugs that the tests must notice, by what they are in."""

from . import integers, kernels, layers, nodes, noise, programs, seed_log, step
from .mutant import Mutant

MUTANTS = tuple(
    mutant for part in (integers, kernels, layers, nodes, noise, programs, seed_log, step) for mutant in part.MUTANTS
)

__all__ = ["MUTANTS", "Mutant"]
