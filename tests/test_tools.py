"""The tests' own tools can fail: poison shows, comparisons reject, and the table of mutants fits the code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from ezo_kernels import ops
from ezo_kernels.ops import _library
from tests.materialised import Pass, randn
from tests.tolerance import assert_bitwise_equal, assert_within_torch_error, error

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import mutants  # noqa: E402


def test_an_operator_that_writes_nothing_leaves_poison(poisoned_empty, monkeypatch):
    monkeypatch.setitem(_library.implementations, ("linear", "CPU"), lambda *args: None)
    y = ops.perturbed_linear(randn(4, 5), randn(3, 5), None, Pass().p, site=1)
    assert bool(y.isnan().all())
    assert error(y, torch.zeros_like(y, dtype=torch.float64)) == float("inf")
    monkeypatch.setitem(_library.implementations, ("noise", "CPU"), lambda *args: None)
    z = ops.materialize((2, 3), seed=0, step=0, site=0, noise="sparse_int8")
    assert bool((z == 0x7F).all())


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.tensor([1.0, -0.0]), torch.tensor([1.0, 0.0]), "element 1 at .1,.: -0.0 != 0.0"),
        (torch.eye(3), torch.eye(3).roll(1, 0), r"6 of 9 elements differ, the first is element 0 at .0, 0."),
        (torch.ones(2), torch.ones(2).double(), "float32"),
        (torch.ones(2), torch.ones(1, 2), "1, 2"),
        (torch.tensor(1.0), torch.tensor(2.0), "1.0 != 2.0"),
    ],
)
def test_bitwise_comparison_rejects(a, b, message):
    assert_bitwise_equal(a, a.clone())
    with pytest.raises(AssertionError, match=message):
        assert_bitwise_equal(a, b)


def test_nan_is_bitwise_itself():
    assert_bitwise_equal(torch.tensor([float("nan")]), torch.tensor([float("nan")]))


def test_error_rule_rejects_one_wrong_element():
    truth = randn(50, 50).double()
    same = truth.half()
    assert_within_torch_error(same, same, truth)
    wrong = same.clone()
    wrong[3, 4] += 0.02
    with pytest.raises(AssertionError, match="above 2"):
        assert_within_torch_error(wrong, same, truth)
    with pytest.raises(AssertionError, match="float32"):
        assert_within_torch_error(same.float(), same, truth)


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.name)
def test_every_mutant_still_finds_its_line(mutant):
    """Whoever changes such a line changes tools/mutant_table with it."""
    assert mutants.mutated(mutant).count(mutant.new) >= 1


def test_a_mutant_without_its_line_is_an_error(capsys, monkeypatch):
    lost = mutants.Mutant("lost", "ezo_kernels/ops/update.py", "no such line", "other", "tests/test_update.py")
    monkeypatch.setattr(mutants, "MUTANTS", (lost,))
    assert mutants.main([]) == 2
    assert "found 0 times" in capsys.readouterr().err
    twice = mutants.Mutant("twice", "ezo_kernels/ops/update.py", "import", "other", "tests/test_update.py")
    with pytest.raises(mutants.TableError, match="not once"):
        mutants.mutated(twice)
