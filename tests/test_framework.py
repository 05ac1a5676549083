"""The operators as torch sees them: opcheck, torch.compile, fake and meta tensors, autocast, inference mode."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from ezo_kernels import ops
from ezo_kernels.ops import Noise, Perturbation
from ezo_kernels.ops.noise import fold_key, key_tensor
from tests.materialised import Pass, randn
from tests.tolerance import assert_bitwise_equal, error

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TAIL = (0, 2, [1, -1], "gaussian", 7, 0.0)  # query, queries, signs, noise, rounds, p_zero


def permuted(t):
    """The same values with the strides of the reversed dimensions."""
    return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))


def tensors(op, dtype, rows, alter):
    """Arguments of one operator with its out last; ``alter`` rearranges the memory of matrices and larger tensors."""
    key, eps = key_tensor(1, 2), torch.tensor([0.1])
    w, b = alter(randn(7, 5, seed=1, dtype=dtype)), randn(7, seed=2, dtype=dtype)
    if op == "noise":
        return (alter(torch.empty(7 if rows else 0, 5)), key, 1, 2, "matrix", "gaussian", 7, 0.0, 15)
    if op == "dropout_mask":
        return (alter(torch.empty(rows, 5, dtype=torch.bool)), key, 1, 2, 7, 6554)
    if op == "fold_key":
        zeros = torch.ones(rows, dtype=torch.int32) if rows else None
        return (torch.tensor([1]), torch.tensor([2]), torch.empty(2, dtype=torch.int32), zeros)
    if op == "perturb":
        return (w[:rows], key, eps, 1, "matrix", *TAIL, torch.empty(4, *w[:rows].shape, dtype=dtype))
    if op == "linear":
        out = torch.empty(4 * rows, 3, 7, dtype=dtype)
        how = (False, False, "", "auto", "float32", True)
        return (alter(randn(4 * rows, 3, 5, dtype=dtype)), w, b, key, eps, 1, 2, *how, *TAIL, out)
    if op == "conv2d":
        w = alter(randn(6, 2, 3, 3, seed=1, dtype=dtype))
        out = torch.empty(4 * rows, 6, 3, 4, dtype=dtype)
        where = (key, eps, 1, 2, False, [2, 1], [1, 0], [1, 1], 2, "", "auto", True, 1)
        return (alter(randn(4 * rows, 4, 6, 6, dtype=dtype)), w, b[:6], *where, *TAIL, out)
    if op == "embedding":
        ids = alter(torch.arange(4 * rows * 2).view(4 * rows, 2) % 7)
        return (ids, w, key, eps, 1, False, *TAIL, torch.empty(4 * rows, 2, 5, dtype=dtype))
    if op == "coefficients":
        # no groups, as no rows, is a step without a trunk
        counts = torch.tensor([3]), torch.tensor(2)
        losses, outs = randn(max(1, 2 * rows), seed=3), (torch.empty(rows), torch.empty(rows))
        flags = torch.empty((), dtype=torch.bool), torch.empty(()), torch.empty(())
        head = [alter(randn(2, 3, dtype=dtype))] if rows else [], torch.tensor(0.1) if rows else None
        bad, weights = torch.zeros(1) if rows else None, [torch.ones_like(grad) for grad in head[0]]
        return (losses, torch.tensor([0.1]), eps, *head, True, 0.5, bad, weights, *outs, *flags, *counts)
    if op.startswith("cross_entropy"):
        logits, target = alter(randn(2 * rows, 5, dtype=dtype)), torch.arange(rows) % 5
        common = (logits, target, randn(rows, seed=3) if dtype == torch.bfloat16 else None, -100)
        if op == "cross_entropy":
            now = (randn(2), alter(torch.empty_like(logits))) if rows else (None, None)
            return (*common, now[0], torch.empty(2), torch.empty(1), now[1])
        return (*common, randn(2), torch.full((1,), float(rows)), alter(torch.empty_like(logits)))
    if op == "importance_rows":
        logits = alter(randn(max(1, 3 * rows), 5, dtype=dtype))
        return (
            logits,
            torch.arange(len(logits)) % 5,
            key,
            -100,
            1,
            7,
            torch.empty(rows, dtype=torch.int64),
            torch.empty(rows),
        )
    if op == "perturb_outputs":
        y = alter(randn(4 * rows, 3, 7, dtype=dtype))
        return (y, key, eps, 1, False, *TAIL, torch.empty(4 * rows, 3, 7, dtype=dtype))
    if op == "output_errors":
        return (alter(randn(3, 2)), key, 1, 2, "gaussian", 7, 0.0, torch.empty(2 * rows, 5))
    if op == "batch_norm":
        x, affine = alter(randn(4, 3, 5, dtype=dtype)), randn(2, 3, seed=3, dtype=dtype)
        return (x, affine, affine[0], 2, 1e-5, alter(torch.empty_like(x)), torch.empty(2, 3), torch.empty(2, 3))
    if op == "running_statistics":
        stats = randn(2, 5, seed=1), randn(2, 5, seed=2)
        return (torch.zeros(5, dtype=dtype), torch.ones(5, dtype=dtype), *stats, torch.tensor(rows > 0), 0.1)
    if op.startswith("grouped_linear"):
        x, y = alter(randn(2 * rows, 5, dtype=dtype)), alter(randn(2 * rows, 7, seed=4, dtype=dtype))
        if op == "grouped_linear":
            return (x, w, b, 2, rows > 0, y)
        return (
            y,
            x,
            w,
            y.clone() if rows else None,
            2,
            alter(torch.empty_like(x)),
            alter(torch.empty_like(w)),
            torch.empty_like(b),
        )
    assert op == "update_", op
    table = torch.empty(0, dtype=torch.int64)
    sites = ([1, 2], [0, 0], [w.dtype != torch.float32, False], [0.5, 1.0])
    return ([w[:rows], b], key[None], torch.tensor([[0.1, 0.2]]), table, *sites, 0, True, "gaussian", 7, 0.0)


OPERATORS = ["noise", "dropout_mask", "fold_key", "perturb", "linear", "conv2d", "embedding", "coefficients", "update_"]
OPERATORS += ["cross_entropy", "cross_entropy_backward", "grouped_linear", "grouped_linear_backward"]
OPERATORS += ["batch_norm", "running_statistics", "importance_rows", "perturb_outputs", "output_errors"]


def overload(op):
    return getattr(torch.ops.ezo, op).default


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize(
    ("dtype", "rows", "alter"),
    [(d, 2, torch.clone) for d in DTYPES] + [(torch.float32, 2, permuted), (torch.float32, 0, torch.clone)],
    ids=["fp32", "fp16", "bf16", "permuted", "empty"],
)
def test_opcheck(op, dtype, rows, alter):
    result = torch.library.opcheck(overload(op), tensors(op, dtype, rows, alter))
    assert set(result.values()) == {"SUCCESS"} and len(result) == 4


def test_every_operator_is_listed_here():
    from ezo_kernels.ops import _library

    named = {name for name, _ in _library.implementations}
    assert {name for name in named if not name.startswith("int8")} == set(OPERATORS)  # integer ones have their own


# ---- torch.compile


def trunk(x, ids, p: Perturbation, w):
    """Every perturbed operator once."""
    h = ops.perturbed_conv2d(x, w["conv"], w["bias"], p, site=1, bias_site=2, padding=1)
    h = h.flatten(1).clone() + ops.perturbed_embedding(ids, w["table"], p, site=3)
    norm = ops.perturb(w["scale"], p, site=6)
    h = (h.view(p.groups, -1, h.shape[1]) * norm[:, None]).flatten(0, 1)
    return ops.perturbed_linear(h, w["linear"], None, p, site=4)


def trunk_inputs(rows):
    ids = torch.arange(2 * rows) % 5
    return randn(2 * rows, 2, 4, 4, seed=rows), ids


def trunk_weights():
    shapes = dict(conv=(3, 2, 3, 3), bias=(3,), table=(5, 48), scale=(48,), linear=(6, 48))
    return {name: randn(*s, seed=i) for i, (name, s) in enumerate(shapes.items())}


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_without_a_graph_break(backend, fresh_dynamo):
    """Bitwise eager; a new key or eps recompiles nothing, and batch sizes at most once more (then they are symbols)."""
    w, key, eps = trunk_weights(), key_tensor(1, 0), torch.tensor([0.1])
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(trunk, fullgraph=True, backend=counter)
    for step in range(4):
        fold_key(torch.tensor([1]), torch.tensor([step]), key)
        eps.fill_(0.1 / (1 + step))
        p = Perturbation(key, eps)  # a new object each step, as the optimiser makes it
        x, ids = trunk_inputs(3)
        assert_bitwise_equal(compiled(x, ids, p, w), trunk(x, ids, p, w), f"step {step}")
    assert counter.frame_count == 1, "a new key, eps or Perturbation recompiled"
    for rows in (5, 4, 9):
        x, ids = trunk_inputs(rows)
        assert_bitwise_equal(compiled(x, ids, p, w), trunk(x, ids, p, w), f"{rows} rows")
    assert counter.frame_count == 2, "a batch size recompiled"


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_the_update(backend, fresh_dynamo):
    """In place through functionalisation: the parameters themselves change, by the same bits."""

    def step(w, b, key, coef):
        ops.update_([w, b], key, coef, sites=[1, 2])
        return w @ w.t()  # reads what was written

    compiled = torch.compile(step, fullgraph=True, backend=CompileCounterWithBackend(backend))
    for i in range(3):
        key, coef = key_tensor(i, i), torch.tensor([0.1, 0.2 * i])
        ours, theirs = [[randn(6, 5), randn(9, dtype=torch.bfloat16)] for _ in range(2)]
        assert_bitwise_equal(compiled(*ours, key, coef), step(*theirs, key, coef))
        for a, b in zip(ours, theirs, strict=True):
            assert_bitwise_equal(a, b)


def test_a_convolution_by_slabs(fresh_dynamo):
    """The strategy is a constant of the graph; opcheck and torch.compile see the same operator."""
    args = list(tensors("conv2d", torch.float32, 2, torch.clone))
    args[args.index("auto")] = "slab"
    assert set(torch.library.opcheck(overload("conv2d"), tuple(args)).values()) == {"SUCCESS"}

    def run(x, w, b, p):
        return ops.perturbed_conv2d(x, w, b, p, site=1, bias_site=2, padding=1, strategy="slab").relu()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    w, b = randn(5, 3, 3, 3, seed=1), randn(5, seed=2)
    for step in range(2):
        x, p = randn(4, 3, 6, 6, seed=step), Pass(step=step).p
        assert_bitwise_equal(compiled(x, w, b, p), run(x, w, b, p))


def test_compile_with_inductor(fresh_dynamo):
    """Operators alone, so that no C++ is compiled: what is tested is how Inductor lays out and reuses their memory."""

    def two(x, p, w):
        return ops.perturbed_linear(
            ops.perturbed_linear(x, w["a"], None, p, site=1), w["b"], w["c"], p, site=2, bias_site=3
        )

    w = {"a": randn(9, 7, seed=1), "b": randn(4, 9, seed=2), "c": randn(4, seed=3)}
    compiled = torch.compile(two, fullgraph=True, backend="inductor")
    for step in range(3):
        p = Pass(step=step).p
        for x in (randn(6, 7), randn(7, 6).t()):
            assert_bitwise_equal(compiled(x, p, w), two(x, p, w))


# ---- tensors without data


def cases():
    x, ids = trunk_inputs(3)
    w = trunk_weights()
    return [
        ("trunk", lambda t, p: trunk(t[0], t[1], p, dict(zip(w, t[2:], strict=True))), [x, ids, *w.values()]),
        ("shared", lambda t, p: ops.perturbed_linear(*t, p, site=1, shared=True), [randn(3, 5), randn(4, 5), randn(4)]),
        ("half", lambda t, p: ops.perturb(t[0], p, site=1, dtype=torch.float32), [randn(3, 5).half()]),
        ("update", lambda t, p: ops.update_([t[0]], p.key, p.eps, sites=[1]), [randn(3, 5)]),
        ("last", lambda t, p: ops.perturbed_conv2d(t[0].to(memory_format=torch.channels_last), t[1], None, p, site=1),
         [randn(4, 3, 8, 8), randn(5, 3, 3, 3)]),
    ]  # fmt: skip


@pytest.mark.parametrize("case", cases(), ids=lambda c: c[0])
def test_fake_tensors(case):
    """No operator looks at data on the host, which a fake tensor would refuse; shapes, dtypes, strides are real."""
    _, run, inputs = case
    real = run([t.clone() for t in inputs], Pass().p)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in inputs]
        p = Perturbation(*(mode.from_tensor(t) for t in (key_tensor(1, 2), torch.tensor([0.1]))))
        fake = run(fakes, p)
        fold_key(mode.from_tensor(torch.tensor([1])), mode.from_tensor(torch.tensor([1])), p.key)
    if real is not None:
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("case", cases(), ids=lambda c: c[0])
def test_meta_tensors(case):
    _, run, inputs = case
    real = run([t.clone() for t in inputs], Pass().p)
    meta = run([t.to("meta") for t in inputs], Perturbation(key_tensor(1, 2).to("meta"), torch.ones(1, device="meta")))
    if real is not None:
        assert meta.device.type == "meta" and (meta.shape, meta.dtype) == (real.shape, real.dtype)


# ---- modes


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_perturbs_the_fp32_weight(half):
    """x in 16 bits, W in fp32: W + eps z is rounded once, closer to the truth than perturbing a W already rounded."""
    x, w, b = torch.eye(256), randn(96, 256, seed=1), randn(96, seed=2)
    p = Pass(eps=1e-2)
    with torch.autocast("cpu", dtype=half):
        y = ops.perturbed_linear(x, w, None, p.p, site=1, shared=True)  # the perturbed weight itself
        with_bias = ops.perturbed_linear(x, w, b, p.p, site=1, bias_site=2)
        image = ops.perturbed_conv2d(randn(4, 3, 8, 8), randn(5, 3, 3, 3), None, p.p, site=1)
    assert y.dtype == with_bias.dtype == image.dtype == half
    assert_bitwise_equal(y, torch.cat([w_g.t() for w_g in p.weights(w, 1, dtype=half)]))
    exact = torch.cat([w_g.t() for w_g in p.weights(w, 1, exact=True)])
    cast = ops.perturbed_linear(x.to(half), w.to(half), None, p.p, site=1, shared=True)
    ours, theirs = ((t.double() - exact).square().mean().sqrt() for t in (y, cast))
    assert ours < 0.9 * theirs
    assert (
        error(with_bias, ops.perturbed_linear(x, w, b, p.p, site=1, bias_site=2).double()) < 2 * torch.finfo(half).eps
    )


def test_autocast_leaves_other_dtypes_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ids = torch.arange(4)
        assert ops.perturbed_embedding(ids, randn(5, 3), Pass().p, site=1).dtype == torch.float32
        with pytest.raises(TypeError, match="float64"):
            ops.perturbed_linear(randn(4, 3).double(), randn(5, 3), None, Pass().p, site=1)


def test_inference_mode_and_no_grad():
    x, ids = trunk_inputs(2)
    w, p = trunk_weights(), Pass().p
    want = trunk(x, ids, p, w)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert_bitwise_equal(trunk(x, ids, p, w), want)
            for t in w.values():
                t.requires_grad_()
            assert not trunk(x, ids, p, w).requires_grad
            for t in w.values():
                t.requires_grad_(False)
    with torch.inference_mode():
        v = randn(3, 4)
        ops.update_([v], p.key, torch.tensor([0.1]), sites=[1])
    u = randn(3, 4)
    ops.update_([u], p.key, torch.tensor([0.1]), sites=[1])
    assert_bitwise_equal(u, v.clone())


def test_no_autograd_through_the_weights():
    """Weights that require grad (they are Parameters) need no graph: the output never carries one."""
    w = randn(6, 5).requires_grad_()
    y = ops.perturbed_linear(randn(4, 5), w, None, Pass().p, site=1)
    assert not y.requires_grad and w.grad is None


def test_noise_objects_are_values():
    """Equal specifications are equal and hash alike, so that caches and guards may hold them."""
    assert Noise() == Noise("gaussian", 7) and hash(Noise()) == hash(Noise("gaussian"))
    assert Noise("sparse", p_zero=0.5) != Noise("sparse", p_zero=0.25)
