"""Bugs in the log of a run's seeds."""

from __future__ import annotations

from .mutant import Mutant

_LOG, _REPLAY = "ezo_kernels/optim/seed_log.py", "ezo_kernels/optim/replay.py"
_TEST = "tests/test_seed_log.py"

MUTANTS = (
    Mutant(
        "a replayed step has the key of the next one",
        _REPLAY,
        '["begin"]["step"] + at, device)',
        '["begin"]["step"] + at + 1, device)',
        f"{_TEST} -k 'every_step or integers'",
    ),
    Mutant(
        "a log keeps the rate that a schedule has moved to",
        _LOG,
        'own["lr"][at : at + 1].copy_(opt._lr)',
        'own["lr"][at] = opt.param_groups[0]["lr"]',
        f"{_TEST} -k every_step",
    ),
    Mutant(
        "steps that were skipped stay in the log",
        _LOG,
        "t[moved == 1] for name",
        "t[moved >= 0] for name",
        f"{_TEST} -k every_step",
    ),
    Mutant(
        "a step that was not observed goes unnoticed",
        _LOG,
        "((moved != 0) & (moved != 1))",
        "(moved < 0)",
        f"{_TEST} -k not_observed",
    ),
    Mutant(
        "weights are written before they are compared",
        _LOG,
        "p.detach().clone(memory_format=torch.contiguous_format) for p in params",
        "p.detach() for p in params",
        f"{_TEST} -k writes_nothing",
    ),
    Mutant(
        "a replay forgets that parameters were perturbed by scales",
        _REPLAY,
        'scales=[header["scales"].get(row[0], 1.0) for row in rows]',
        "scales=None",
        f"{_TEST} -k scales",
    ),
)
