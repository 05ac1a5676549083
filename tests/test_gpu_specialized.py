"""The kernel of specialised warps on a GPU of sm_90: numbers, bits, and that no order of its warps shows. Marked ``gpu``.

Each kind of launch is compiled, seconds each: few kinds, and every noise in one alone.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from ezo_kernels import ops
from ezo_kernels.ops import _gluon
from ezo_kernels.ops.noise import NOISES
from tests.test_gpu import error_rule, groups_of, pass_

pytestmark = pytest.mark.gpu
FLOAT = [name for name in NOISES if name != "sparse_int8"]
SITE = dict(site=3, bias_site=4, strategy="specialized")
BF16, F16 = torch.bfloat16, torch.float16
#: Rows, outputs, inputs: one tile and many, ragged and not, one pass of the ring of buffers and many.
SHAPES = [(1, 8, 8), (128, 128, 64), (129, 130, 72), (300, 1000, 1032), (512, 256, 4096), (1299, 384, 512)]


@pytest.fixture(autouse=True)
def sm_90():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel of specialised warps needs an sm_90")
    if _gluon.MISSING:
        pytest.skip(_gluon.MISSING)


def make(rows, n, k, dtype=BF16, groups=2):
    torch.manual_seed(rows + n + k)
    x, w, b = torch.randn(groups * rows, k), torch.randn(n, k) / k**0.5, torch.randn(n)
    return [t.cuda().to(dtype) for t in (x, w, b)]


@pytest.mark.parametrize(("noise", "dtype"), [*((name, BF16) for name in FLOAT), ("clt4", F16)], ids=str)
def test_identity_shows_the_perturbed_weights_bit_for_bit(noise, dtype):
    p = pass_(noise)
    w = make(1, 1000, 520, dtype)[1]
    y = ops.perturbed_linear(torch.eye(520, device="cuda", dtype=dtype), w, None, p, shared=True, **SITE)
    assert torch.equal(y.view(p.groups, 520, 1000).mT, ops.perturb(w, p, site=3))


def check(rows, n, k, noise, dtype=BF16, signs=(1, -1), shared=False):
    p = pass_(noise, signs)
    x, w, b = make(rows, n, k, dtype, 1 if shared else p.groups)
    y = ops.perturbed_linear(x, w, b, p, shared=shared, **SITE).view(p.groups, rows, n)
    for g, (w_g, b_g) in enumerate(zip(groups_of(w, p, 3), groups_of(b, p, 4), strict=True)):
        own = x if shared else x[g * rows : (g + 1) * rows]
        exact = F.linear(own.double(), w_g, b_g)
        error_rule(y[g], F.linear(own, w_g.to(dtype), b_g.to(dtype)), exact)


@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
@pytest.mark.parametrize("noise", ["clt4", "gaussian"])
def test_shapes(poisoned_empty, rows, n, k, noise):
    check(rows, n, k, noise)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("signs", [(1, -1), (1,), (-1,)], ids=str)
def test_signs_and_shared_rows(poisoned_empty, signs, shared):
    check(300, 1000, 1032, "clt4", F16, signs, shared)


@pytest.mark.parametrize("noise", ["clt4", "gaussian"])
def test_a_pair_is_its_two_signs_and_eps_zero_gives_equal_groups(noise):
    one = functools.partial(pass_, noise, queries=1)
    for shape in SHAPES[2:]:
        x, w, b = make(*shape)
        both = ops.perturbed_linear(x, w, b, one(), **SITE).chunk(2)
        for sign, part, y in zip((1, -1), x.chunk(2), both, strict=True):
            assert torch.equal(ops.perturbed_linear(part, w, b, one((sign,)), **SITE), y)
        assert torch.equal(*ops.perturbed_linear(x[: shape[0]].repeat(2, 1), w, b, one(eps=0.0), **SITE).chunk(2))


@pytest.mark.parametrize("noise", ["gaussian", "clt4", "rademacher"])
def test_a_thousand_runs_are_one(noise):
    """Cheap and dear noise: the warps that multiply wait for those that make z, or the other way round. One race would show."""
    x, w, b = make(700, 1000, 1032)
    p = pass_(noise, queries=1)
    first = ops.perturbed_linear(x, w, b, p, **SITE)
    differ = torch.zeros((), dtype=torch.long, device="cuda")
    for _ in range(1000):
        differ += (ops.perturbed_linear(x, w, b, p, **SITE) != first).sum()
    assert differ.item() == 0 and first.isfinite().all()


def test_rows_of_the_other_group_do_no_harm():
    x, w, b = make(100, 200, 136)
    alone = ops.perturbed_linear(x[:100], w, b, pass_("clt4", (1,), 1), **SITE)
    x[100:] = float("nan")
    assert torch.equal(ops.perturbed_linear(x, w, b, pass_("clt4", queries=1), **SITE)[:100], alone)


def test_a_captured_launch_is_an_eager_one():
    x, w, b = make(300, 256, 512)
    p = pass_("clt4", queries=1)
    want = ops.perturbed_linear(x, w, b, p, **SITE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.perturbed_linear(x, w, b, p, **SITE)
    y.zero_()
    graph.replay()
    assert torch.equal(y, want)


def test_another_rounding_of_z():
    x, w, _ = make(200, 136, 264)
    p = pass_("clt4", queries=1)
    y = ops.perturbed_linear(
        torch.eye(264, device="cuda", dtype=BF16), w, None, p, shared=True, z_dtype="bfloat16", **SITE
    )
    z = ops.materialize(w.shape, seed=1, step=2, site=3, noise="clt4", device="cuda").bfloat16().float()
    for sign, part in zip((1, -1), y.chunk(2), strict=True):
        assert torch.equal(part.T, (w.float() + sign * (p.eps * z)).bfloat16())
