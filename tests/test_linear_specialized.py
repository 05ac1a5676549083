"""The kernel of specialised warps, run on a CPU by tests/gluon_emulator.py: what it computes, and that its barriers hold."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys
import types

import pytest
import torch

pytest.importorskip("triton")

import ezo_kernels as ezo  # noqa: E402
from ezo_kernels import ops  # noqa: E402
from ezo_kernels.ops import _gluon, _library, _strategy  # noqa: E402
from ezo_kernels.ops.noise import NOISES, key_tensor  # noqa: E402
from tests import gluon_emulator  # noqa: E402
from tests.tolerance import assert_bitwise_equal, assert_within_torch_error  # noqa: E402

if _gluon.MISSING:
    pytest.skip(_gluon.MISSING, allow_module_level=True)

from ezo_kernels.ops import _linear_specialized_gluon as specialized  # noqa: E402
from ezo_kernels.ops._tiles import SpecializedTile  # noqa: E402

BF16, F16 = torch.bfloat16, torch.float16
SITE = {"site": 0xFEDCBA98, "bias_site": 7}
#: ``gaussian_fast`` is of the GPU's own sine: it is compared on one.
EXACT = [name for name in NOISES if name not in ("sparse_int8", "gaussian_fast")]


def emulated(monkeypatch, module=specialized, seed=0, tile=None):
    """The public operator takes the CUDA launcher, and this the emulator; returns that, which counts programs."""
    run = gluon_emulator.launcher(module.linear_specialized_kernel, seed)
    monkeypatch.setitem(sys.modules, specialized.__name__, module)
    monkeypatch.setattr(module, "linear_specialized_kernel", run)
    monkeypatch.setitem(_library.implementations, ("linear", "CPU"), _library.implementations["linear", "CUDA"])
    if tile is not None:
        monkeypatch.setattr(module, "specialized_tile", lambda *_: tile)
    return run


def make(rows, n, k, dtype=BF16, groups=2):
    draw = torch.Generator().manual_seed(rows * n + k)
    x, w, b = (torch.randn(s, generator=draw) for s in ((groups * rows, k), (n, k), (n,)))
    return x.to(dtype), (w * k**-0.5).to(dtype), b.to(dtype)


def pass_of(name="clt4", eps=0.4, **options):
    noise = ops.Noise(name, p_zero=0.7 if name == "sparse" else 0.0)
    return ops.Perturbation(key_tensor(0x0123456789ABCDEF, 77), torch.tensor([eps]), noise, **options)


def check(monkeypatch, x, w, b, p, tile=None, seed=0, **options):
    """Against fp64 with the perturbed weights of the contract, as the reference of the fused strategy is."""
    theirs = ops.perturbed_linear(x, w, b, p, strategy="fused", **SITE, **options)
    z_dtype = options.get("z_dtype", "float32")
    truth, rows = [], x.chunk(1 if options.get("shared") else p.groups)
    for g in range(p.groups):
        q, sign = p.query + g // len(p.signs), p.signs[g % len(p.signs)]
        draw = dict(seed=0x0123456789ABCDEF, step=77, query=q, noise=p.noise.name, p_zero=p.noise.p_zero)
        z = ops.materialize(w.shape, site=SITE["site"], **draw).to(getattr(torch, z_dtype)).double()
        y = rows[g % len(rows)].double() @ (w.double() + sign * p.eps.double() * z).T
        if b is not None:
            y += b.double() + sign * p.eps.double() * ops.materialize(b.shape, site=SITE["bias_site"], **draw).double()
        truth.append(y.flatten(0, -2))
    with monkeypatch.context() as patch:
        run = emulated(patch, seed=seed, tile=tile)
        ours = ops.perturbed_linear(x, w, b, p, strategy="specialized", **SITE, **options)
        assert run.programs
    assert_within_torch_error(ours.flatten(0, -2), theirs.flatten(0, -2), torch.cat(truth))


SMALL = SpecializedTile(64, 64, 32, 2, 3, 4, bk=32)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_identity_shows_the_perturbed_weights_bit_for_bit(monkeypatch, name, dtype):
    """x = identity, in every group of two queries: what comes out is W + sign eps z as it is multiplied."""
    p = pass_of(name, queries=2, query=3)
    _, w, _ = make(1, 130, 72, dtype)
    want = ops.perturb(w, p, **{"site": SITE["site"]})
    emulated(monkeypatch)
    y = ops.perturbed_linear(torch.eye(72, dtype=dtype), w, None, p, shared=True, strategy="specialized", **SITE)
    assert_bitwise_equal(y.view(4, 72, 130).mT.contiguous(), want.contiguous())


@pytest.mark.parametrize("name", EXACT)
def test_noises(monkeypatch, name):
    p = pass_of(name)
    check(monkeypatch, *make(20, 70, 136), p)
    check(monkeypatch, *make(20, 70, 72, F16), p, z_dtype="float16")


@pytest.mark.parametrize("name", ["clt4", "gaussian"])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 1, 8), (129, 130, 264), (300, 64, 64), (128, 256, 72)])
def test_shapes(monkeypatch, rows, n, k, name):
    check(monkeypatch, *make(rows, n, k), pass_of(name), seed=rows)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("signs", [(1, -1), (1,), (-1,)], ids=str)
def test_queries_signs_and_shared_rows(monkeypatch, signs, shared):
    p = pass_of(signs=signs, queries=3, query=9)
    x, w, b = make(70, 100, 104, groups=1 if shared else p.groups)
    check(monkeypatch, x, w, b, p, SMALL, shared=shared)
    check(monkeypatch, x, w, None, p, SMALL, shared=shared)


def test_rows_and_strides(monkeypatch):
    x, w, b = make(64, 80, 64)
    check(monkeypatch, x.view(8, 16, 64), w, b, pass_of(), SMALL)
    check(monkeypatch, x[:, 8:48], w[:, 16:56], b.repeat_interleave(2)[::2], pass_of(), SMALL)


def test_rows_of_others_in_a_tile_do_no_harm(monkeypatch):
    """Rows of the second group are not finite, and lie in the tiles of the first."""
    x, w, b = make(20, 30, 40)
    emulated(monkeypatch)
    one = ops.perturbed_linear(x[:20], w, b, pass_of(signs=(1,)), strategy="specialized", **SITE)
    x[20:] = float("nan")
    both = ops.perturbed_linear(x, w, b, pass_of(), strategy="specialized", **SITE).chunk(2)
    assert torch.equal(both[0], one) and both[1].isnan().all()


def whole(rows, n, k):
    """Inputs whose sums are exact: rows of a BLAS may be summed in different orders."""
    return [torch.round(4 * t) for t in make(rows, n, k, groups=1)]


@pytest.mark.parametrize("shared", [False, True])
def test_eps_zero_gives_equal_groups(monkeypatch, shared):
    x, w, b = whole(70, 80, 136)
    emulated(monkeypatch)
    p = pass_of(eps=0.0, queries=2)
    y = ops.perturbed_linear(x if shared else x.repeat(4, 1), w, b, p, shared=shared, strategy="specialized", **SITE)
    assert all(torch.equal(y.chunk(4)[0], part) for part in y.chunk(4))


def test_the_pair_is_its_two_signs(monkeypatch):
    x, w, b = whole(70, 80, 136)
    emulated(monkeypatch)

    def run(x, signs):
        return ops.perturbed_linear(x, w, b, pass_of("rademacher", 0.5, signs=signs), strategy="specialized", **SITE)

    both = run(x.repeat(2, 1), (1, -1)).chunk(2)
    assert not torch.equal(*both)
    assert all(torch.equal(run(x, (sign,)), y) for sign, y in zip((1, -1), both, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_the_partitions(monkeypatch, seed):
    check(monkeypatch, *make(10, 20, 304), pass_of(), SMALL, seed)


#: What is written instead of what, and what becomes of it.
BROKEN = {
    "a buffer that is never freed": ("mbarrier.arrive(p_empty.index(before), pred=k > 0)", "pass", "deadlock"),
    "a buffer of W that is never freed": ("mbarrier.arrive(w_empty.index(w_stage))", "pass", "deadlock"),
    "a loader that waits for the first use": (
        "mbarrier.wait(empty.index(stage), phase ^ 1)", "mbarrier.wait(empty.index(stage), phase)", "deadlock",
    ),
    "weights that are multiplied before they are there": (
        "mbarrier.wait(p_full.index(stage), phase)", "mbarrier.wait(p_full.index(stage), phase ^ 1)", "",
    ),
    "x that is read before it is there": ("mbarrier.wait(x_full.index(x_stage), x_phase)", "pass", ""),
    "W that is read before it is there": ("mbarrier.wait(w_full.index(w_stage), w_phase)", "pass", ""),
    "weights that are overwritten while they are multiplied": (
        "hopper.warpgroup_mma_wait(1, deps", "hopper.warpgroup_mma_wait(2, deps", "",
    ),
    "one sign that frees what the other multiplies": (
        "mbarrier.init(p_empty.index(i), count=COPIES)", "mbarrier.init(p_empty.index(i), count=1)", "",
    ),
    "no fence": ("        hopper.fence_async_shared()\n        mbarrier", "        mbarrier", "no fence has passed"),
    "a parity that never turns": ("phase ^= 1", "pass", ""),
    "bytes of one tile for two": ("COPIES * desc.block_type.nbytes", "desc.block_type.nbytes", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_protocol_is_found(monkeypatch, tmp_path, name):
    old, new, message = BROKEN[name]
    source = pathlib.Path(specialized.__file__).read_text()
    assert source.count(old) == 1
    path = tmp_path / "broken.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("ezo_kernels.ops._broken", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    x, w, b = make(10, 20, 504)
    p, found = pass_of(), []
    want = ops.perturbed_linear(x, w, b, p, **SITE)
    for seed in range(4):
        with monkeypatch.context() as patch:
            emulated(patch, module, seed, SMALL)
            try:
                y = ops.perturbed_linear(x, w, b, p, strategy="specialized", **SITE)
                found.append("" if torch.allclose(y.float(), want.float(), atol=0.1) else "wrong")
            except gluon_emulator.Fault as fault:
                found.append(str(fault))
    assert any(message in f and f for f in found), found


def test_a_converted_model_takes_it(monkeypatch):
    """A step of a model in bf16 by specialised warps and by the fused reference: the same z, losses alike to rounding."""
    losses = {}
    x, y = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.arange(8) % 4
    for strategy in ("fused", "specialized"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 8)).bfloat16()
        opt = ezo.ElasticZO(ezo.convert_(model, head=0, strategy=strategy), eps=0.1, seed=3, noise="clt4")
        with monkeypatch.context() as patch:
            run = emulated(patch) if strategy == "specialized" else None
            opt.train_step(x, y, lambda out, y: torch.nn.functional.cross_entropy(out.float(), y))
        assert run is None or run.programs
        losses[strategy] = opt.losses.clone()
    assert losses["fused"][0] != losses["fused"][1]
    torch.testing.assert_close(losses["specialized"], losses["fused"], rtol=0.02, atol=0.02)


# ---- when it can be taken


def choose(x=BF16, w=BF16, noise="clt4", arch=90, **options):
    return _strategy.choose(512, (4096, 4096), x, w, noise, arch=arch, asked="specialized", **options).name


def test_it_is_taken_by_name_alone():
    assert choose() == choose(F16, F16) == choose(arch=0, missing="no Gluon") == "specialized"
    for rows in (64, 128, 512, 1299, 4096):
        assert _strategy.choose(rows, (4096, 4096), BF16, BF16, "clt4", arch=90).name != "specialized"
    assert choose(signs=(0,)) == "fused"


@pytest.mark.parametrize("shared", [False, True])
def test_a_cpu_computes_what_the_fused_kernel_does(shared):
    x, w, b = make(20, 30, 40)
    one, other = (
        ops.perturbed_linear(x, w, b, pass_of(), shared=shared, strategy=name, **SITE)
        for name in ("specialized", "fused")
    )
    assert torch.equal(one, other)
    with pytest.raises(NotImplementedError, match="float32"):
        ops.perturbed_linear(x.float(), w.float(), b.float(), pass_of(), strategy="specialized", **SITE)


def test_every_reason_is_given():
    with pytest.raises(NotImplementedError) as error:
        choose(
            torch.float32,
            BF16,
            "sparse_int8",
            100,
            transposed=True,
            regular=False,
            one_stride=False,
            missing="no Gluon",
        )
    for reason in (
        "this GPU is sm_100", "no Gluon", "x is torch.float32", "would be rounded", "stored [K, N]", "runs of 16 bytes",
        "not at one stride", "sparse_int8",
    ):  # fmt: skip
        assert reason in str(error.value)
    with pytest.raises(NotImplementedError, match="linear layers alone"):
        _strategy.choose_conv(1 << 20, (64, 64, 3, 3), 1, BF16, "clt4", arch=90, asked="specialized")


def test_another_gluon_is_refused_by_its_names(monkeypatch):
    names = {module: object() for module in ("gl", "mbarrier", "taken", "hopper")}
    assert "mbarrier.expect" in _gluon._absent(names) and "taken.copy_tile" in _gluon._absent(names)
    old, new = (
        types.SimpleNamespace(thread_barrier=1, async_copy_global_to_shared=2),
        types.SimpleNamespace(async_load=3),
    )
    assert _gluon._taken(old, old) == {"barrier": 1, "copy_tile": 2} and _gluon._taken(new, new) == {"copy_tile": 3}
    monkeypatch.setattr(_gluon, "MISSING", "no such names")
    monkeypatch.setitem(_library.implementations, ("linear", "CPU"), _library.implementations["linear", "CUDA"])
    x, w, b = make(2, 8, 8)
    with pytest.raises(NotImplementedError, match="'specialized': no such names"):
        ops.perturbed_linear(x, w, b, pass_of(), strategy="specialized", **SITE)


def test_without_gluon_the_source_imports_and_nothing_is_launched():
    """As under a triton that has none, or none at all."""
    code = """
import sys
sys.modules["triton.experimental"] = None
from ezo_kernels.ops import _gluon, _linear_specialized_gluon as module
assert "no Gluon" in _gluon.MISSING, _gluon.MISSING
assert list(module.variants()) == []
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_one_stride():
    x = torch.ones(4, 6, 24)
    assert (
        _strategy.rows_at_one_stride(x)
        and _strategy.rows_at_one_stride(x[:, :1])
        and _strategy.rows_at_one_stride(x[0])
    )
    assert not _strategy.rows_at_one_stride(x[:, :3]) and not _strategy.rows_at_one_stride(x.transpose(0, 1))
    assert not _strategy.rows_at_one_stride(torch.ones(1, 24).expand(4, 24))
    assert _strategy.rows_at_one_stride(torch.ones(1, 1, 24))


def test_an_address_inside_16_bytes_is_refused(monkeypatch):
    emulated(monkeypatch)
    x, w, b = make(2, 8, 8)
    with pytest.raises(NotImplementedError, match="no multiple of 16 bytes"):
        ops.perturbed_linear(
            torch.ones(40, dtype=BF16)[1:33].view(4, 8), w, b, pass_of(), strategy="specialized", **SITE
        )
