"""Integer steps of one sign a query (antithetic=False): g, groups, states."""

from __future__ import annotations

import pytest
import torch

import ezo_kernels as ezo
from ezo_kernels.ops.int8_signs import ternary_gradient
from tests.int8_models import tiny
from tests.test_int8_step import HEADS, oracle_of, step_as_the_oracle


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("head", "queries", "mode", "strategy"),
    [(0, 2, "stacked", "buffer"), (1, 5, "stacked", "twice"), (2, 3, "sequential", "auto")],
)
def test_one_sign_a_query_is_the_oracles(head, queries, mode, strategy):
    """antithetic=False: each loss against the mean of the others, and a group a query for the head."""
    how = dict(r_max=40, p_zero=0.3, bits=1, head_bits=4, queries=queries, antithetic=False)
    model = tiny(HEADS[head])
    opt = ezo.ElasticZOInt8(model, seed=11, mode=mode, strategy=strategy, **how)
    run = oracle_of(model, opt, 11, **how)
    for i in range(3):
        step_as_the_oracle(opt, run, i)
        assert len(run.losses) == queries and any(run.g), f"step {i}"


def test_ternary_gradient():
    """Ties are 0; the largest sums that are let in do not wrap; a NaN gives 0 for all."""
    most = (1 << 44) - 1
    for losses, antithetic, want in (
        ([5, 4, 4, 5, 3, 3], True, [1, -1, 0]),
        ([-(2**63), 2**63 - 1], True, [-1]),
        ([3, 1, 2], False, [1, -1, 0]),
        ([most << 18, 0], False, [1, -1]),
        ([most << 9] * 512 + [(most << 9) - 1] * 512, False, [1] * 512 + [-1] * 512),
    ):
        assert ternary_gradient(torch.tensor(losses), antithetic).tolist() == want
    assert ternary_gradient(torch.tensor([1.0, float("nan"), 2.0]), False).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("losses", "dtype", "want"),
    [
        ([2**30, 2**30 - 5], torch.int32, [1, -1]),
        ([100, 1, 1, 1], torch.int8, [1, -1, -1, -1]),
        ([2**62, 2**62 - 2, 2**62 - 1], torch.int64, [1, -1, 0]),
        ([9000.0, 8992.0, 9000.0, 9000.0], torch.float16, [1, -1, 1, 1]),
        ([2.0, 2.0, 2.0, 2.015625], torch.bfloat16, [-1, -1, -1, 1]),
    ],
)
def test_losses_of_a_closure_in_any_dtype(losses, dtype, want):
    assert ternary_gradient(torch.tensor(losses, dtype=dtype), False).tolist() == want


@pytest.mark.parametrize("queries", [2, 5, 6, 7, 12, 100])
def test_equal_float_losses_are_ties(queries):
    for value in torch.rand(50, generator=torch.Generator().manual_seed(0)).tolist():
        assert not ternary_gradient(torch.full((queries,), value), False).any()


def test_states_of_one_sign():
    """A state from before there was the choice is of pairs; one of the other kind is refused."""
    pairs, one = (ezo.ElasticZOInt8(tiny(()), queries=2, antithetic=a) for a in (True, False))
    old = {k: v for k, v in pairs.state_dict().items() if k != "antithetic"}
    pairs.load_state_dict(old)
    with pytest.raises(ValueError, match="antithetic differs"):
        one.load_state_dict(old)
    with pytest.raises(ValueError, match="2 queries or more"):
        ezo.ElasticZOInt8(tiny(()), antithetic=False)
    with pytest.raises(ValueError, match="plus"):
        ezo.ElasticZOInt8(tiny(("fc2",)), queries=2, antithetic=False, head_grad="plus")
    with pytest.raises(TypeError, match="antithetic"):
        ezo.ElasticZOInt8(tiny(()), antithetic=1)
