"""The CUDA headers on the CPU: compiled by the host's C++ compiler and held to the contract and the reference, bit for bit.

Here runs what the kernels are made of, not their launch: tests/test_cuda.py compiles them for GPUs, tests/test_gpu_cuda.py
runs them on one.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from known_answers import PHILOX

from ezo_kernels import ops
from ezo_kernels.ops import Noise
from ezo_kernels.ops._cuda import FOLDER as CSRC
from ezo_kernels.ops._cuda import TILE
from ezo_kernels.ops._layout import default_layout, grid
from ezo_kernels.ops._noise_triton import NOISE_ID, noise_args
from ezo_kernels.ops._update_triton import FIELDS, update_table
from ezo_kernels.ops.noise import fold_key_host, key_tensor
from tests.materialised import NOISES
from tests.tolerance import bits

HERE = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler, and there is neither g++ nor clang++")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    library = tmp_path_factory.mktemp("csrc") / "host.so"
    target = ["-mfma"] if platform.machine() in ("x86_64", "AMD64") else []
    done = subprocess.run(
        [COMPILER, "-std=c++17", "-O1", *target, "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC", "-Wall",
         "-Wno-unknown-pragmas", "-Werror", f"-DEZO_R={TILE.rows}", f"-DEZO_C={TILE.columns}",
         f"-DEZO_THREADS={32 * TILE.warps}", f"-I{CSRC}", str(HERE / "csrc_host.cpp"), "-o", str(library)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.folded.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p]
    return loaded


def at(array) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def words(*values) -> np.ndarray:
    return np.array(values, np.uint32)


@pytest.mark.parametrize(("rounds", "counter", "key", "want"), PHILOX)
def test_known_answers_of_philox(host, rounds, counter, key, want):
    out = np.zeros(4, np.uint32)
    host.philox_words(at(words(*counter)), at(words(*key)), rounds, at(out))
    assert tuple(out) == want


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (1, 2), (2**64 - 1, 2**64 - 1), (2**40 + 3, 2**33)])
def test_the_key_is_the_references(host, seed, step):
    out = np.zeros(2, np.uint32)
    host.folded(seed, step, at(out))
    assert tuple(out) == fold_key_host(seed, step)


SHAPES = [(), (5,), (3, 129), (130, 31), (7, 3, 5, 5), (16, 1, 5, 5), (2, 3, 40), (0, 4)]
WHERE = [dict(seed=1, step=2, site=3), dict(seed=2**63 + 5, step=2**32 + 3, site=2**32 - 2, query=2**24 - 1)]
#: noise, its parameters, columns made at a time
FORMS = [
    *((name, {}, n) for name in ("gaussian", "clt4", "uniform") for n in (4, 8)),
    *(("rademacher", {}, n) for n in (4, 8, 32)),
    ("hadamard", {}, 32),
    ("sparse", {"p_zero": 0.75}, 8),
    ("sparse", {}, 8),
    ("sparse_int8", {"p_zero": 0.5, "r_max": 127}, 4),
]


@pytest.mark.parametrize("rounds", [7, 10])
@pytest.mark.parametrize("where", WHERE, ids=["small", "large"])
@pytest.mark.parametrize(("noise", "params", "n"), FORMS)
def test_every_noise_is_the_references_bit_for_bit(host, noise, params, n, where, rounds):
    spec = Noise(noise, rounds, **params)
    key = words(*fold_key_host(where["seed"], where["step"]))
    where = {"query": 0} | where
    for shape in SHAPES:
        layout = default_layout(shape)
        place = grid(torch.Size(shape), layout, spec.segment)
        columns = -(-place.columns // n) * n
        size = (place.rows, columns, spec.threshold)
        site, query = ctypes.c_uint32(where["site"]), where["query"]
        if noise == "sparse_int8":
            out = np.full((place.rows, columns), 99, np.int8)
            host.z_int8(at(key), rounds, site, query, *size, spec.r_max, at(out))
        else:
            out = np.full((place.rows, columns), np.nan, np.float32)
            scale = ctypes.c_float(spec.scale)
            missing = host.z_matrix(NOISE_ID[noise], rounds, n, at(key), site, query, *size, scale, at(out))
            assert not missing
        ours = place.view(torch.from_numpy(np.ascontiguousarray(out[:, : place.columns])), shape)
        want = ops.materialize(shape, noise=noise, rounds=rounds, **where, **params)
        kind = torch.int8 if noise == "sparse_int8" else torch.int32
        assert torch.equal(ours.contiguous().view(kind), want.contiguous().view(kind)), shape


def test_the_ends_of_the_gaussian(host):
    """u = 1 gives zeros of the reference's sign; the smallest u its largest value."""
    from ezo_kernels.ops._noise_cpu import box_muller

    edge = [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFF7F, 0xFFFFFF80, 0xFFFFFFFF, 0xB504F333]
    for w0 in edge:
        for w1 in edge:
            ours = np.zeros(2, np.float32)
            host.pair(ctypes.c_uint32(w0), ctypes.c_uint32(w1), at(ours))
            want = np.array(box_muller(np.uint32(w0), np.uint32(w1)), np.float32)
            assert np.array_equal(ours.view(np.int32), want.view(np.int32)), (w0, w1)


# ---- the update's kernel, thread after thread

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def run(host, params, layouts, keys, coef, noise: Noise, query=0, stochastic=True, z_dtypes=None, scales=None):
    """What the kernel does to ``params``, in place; keys [steps, 2], coef [steps, queries]."""
    sites = [0xFEDCBA98 + i for i in range(len(params))]
    rounded = z_dtypes and [name != "float32" for name in z_dtypes]
    table = update_table(params, sites, layouts, noise, TILE, rounded, scales)
    threshold, scale = noise_args(noise)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (table, keys, coef)]
    programs = table.numel() - FIELDS * len(params)
    missing = host.update(
        *pointers, len(params), programs, *coef.shape, query, threshold, ctypes.c_float(scale),
        NOISE_ID[noise.name], int(stochastic),
    )  # fmt: skip
    assert not missing
    return sites


def copies(params):
    return [torch.empty_strided(w.shape, w.stride(), dtype=w.dtype).copy_(w) for w in params]


def check(host, params, layouts, keys, coef, noise, query=0, stochastic=True, z_dtypes=None, scales=None):
    ours, theirs = copies(params), copies(params)
    sites = run(host, ours, layouts, keys, coef, noise, query, stochastic, z_dtypes, scales)
    options = dict(sites=sites, layouts=layouts, noise=noise, query=query, stochastic_rounding=stochastic)
    options |= {"z_dtypes": z_dtypes, "scales": scales}
    ops.update_(theirs, keys, coef, **options)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a.isnan(), b.isnan()), i
        assert torch.equal(bits(a.nan_to_num(nan=7.0)), bits(b.nan_to_num(nan=7.0))), i
    return ours


def _params(dtypes):
    params = [
        ("matrix", torch.randn(35, 264)),
        ("matrix", torch.randn(70, 1024)[:, :520]),
        ("matrix", torch.randn(36, 20).t()),
        ("matrix", torch.randn(20, 72).as_strided((10, 23), (144, 3))),
        ("matrix", torch.randn(())),
        ("matrix", torch.randn(300)),
        ("matrix", torch.randn(0, 4)),
        ("matrix", torch.randn(3, 2, 4, 2, 5).permute(3, 1, 0, 2, 4)),
        ("conv", torch.randn(6, 5, 3, 3)),
        ("conv", torch.randn(6, 8, 3, 3).to(memory_format=torch.channels_last)),
        ("conv", torch.randn(6, 5, 3)),
        ("conv", torch.randn(3, 9, 2, 2, 2).to(memory_format=torch.channels_last_3d)),
    ]
    out = []
    for i, (_, w) in enumerate(params):
        dtype = dtypes[i % len(dtypes)]
        out.append(torch.empty_strided(w.shape, w.stride(), dtype=dtype).copy_(w))
    return [layout for layout, _ in params], out


KEYS = [key_tensor(5, 6), key_tensor(2**63, 2**40), key_tensor(5, 7)]


@pytest.mark.parametrize("coef", [[[0.01]], [[0.5, 0.0, -0.25]], [[0.1, -0.2], [0.0, 0.0], [0.3, 0.0]]], ids=str)
@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), (F16,), (F32, F16, BF16)], ids=str)
@pytest.mark.parametrize(("noise", "params"), NOISES)
def test_the_update_is_the_references_bit_for_bit(host, noise, params, dtypes, coef):
    torch.manual_seed(0)
    layouts, weights = _params(dtypes)
    keys, coef = torch.stack(KEYS[: len(coef)]), torch.tensor(coef)
    for stochastic in (True, False) if noise == "gaussian" else (True,):
        check(host, weights, layouts, keys, coef, Noise(noise, **params), query=2**24 - 3, stochastic=stochastic)


@pytest.mark.parametrize("dtypes", [(F32,), (F32, F16, BF16)], ids=str)
def test_scales(host, dtypes):
    torch.manual_seed(0)
    layouts, weights = _params(dtypes)
    keys, coef = torch.stack(KEYS[:2]), torch.tensor([[0.1, -0.2], [0.3, 0.0]])
    scales = [(1.0, 0.3, 2.7)[i % 3] for i in range(len(weights))]
    scaled = check(host, weights, layouts, keys, coef, Noise("clt4"), scales=scales)
    plain = check(host, weights, layouts, keys, coef, Noise("clt4"))
    alike = {scale for a, b, scale in zip(scaled, plain, scales, strict=True) if a.numel() and torch.equal(a, b)}
    assert alike == {1.0}


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("coef", [[[0.01]], [[0.1, -0.2], [0.3, 0.0]]], ids=str)
@pytest.mark.parametrize(("noise", "params"), NOISES)
def test_z_of_the_weights_dtype(host, noise, params, coef, stochastic):
    """Rounded before its product, beside parameters whose z is fp32."""
    torch.manual_seed(0)
    layouts, weights = _params((BF16, F16, BF16, F32, F16))
    names = ["float32" if i % 5 in (2, 3) else str(w.dtype).removeprefix("torch.") for i, w in enumerate(weights)]
    keys, coef = torch.stack(KEYS[: len(coef)]), torch.tensor(coef)
    how = dict(query=5, stochastic=stochastic)
    rounded = check(host, weights, layouts, keys, coef, Noise(noise, **params), z_dtypes=names, **how)
    plain = check(host, weights, layouts, keys, coef, Noise(noise, **params), **how)
    differ = {name for a, b, name in zip(rounded, plain, names, strict=True) if not torch.equal(a, b)}
    assert differ == (set() if noise == "rademacher" else {"bfloat16", "float16"})


@pytest.mark.parametrize("columns", [8, 40, 248, 256, 264])
@pytest.mark.parametrize("noise", ["gaussian", "hadamard", "rademacher"])
def test_the_update_ends_where_the_weight_ends(host, noise, columns):
    """Rows of 16-byte accesses inside of a wider tensor: what lies beside them stays."""
    wide = torch.full((67, 512), 3.0, dtype=BF16)
    w = wide[1:66, :columns]
    assert w.data_ptr() % 16 == 0
    run(host, [w], ["matrix"], KEYS[0][None], torch.tensor([[0.5]]), Noise(noise))
    assert (wide[1:66, :columns] != 3).float().mean() > 0.9
    assert bool((wide[0] == 3).all() and (wide[66] == 3).all() and (wide[:, columns:] == 3).all())


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("shape", [(16, 80), (16, 10)], ids=["16 bytes", "strided"])
def test_rounding_of_special_values(host, dtype, stochastic, shape):
    """Infinities, NaN, both zeros, subnormals and the largest number."""
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    row = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), largest, -largest, tiny, -tiny, tiny / 8])
    w = row.repeat(16, shape[1] // 10).to(dtype)
    check(host, [w], ["matrix"], KEYS[0][None], torch.tensor([[1e-6]]), Noise("clt4"), stochastic=stochastic)


def test_a_subnormal_coefficient_is_no_skipped_step(host):
    w = torch.full((8, 64), 3e-39)
    check(host, [w], ["matrix"], KEYS[0][None], torch.tensor([[1e-40]]), Noise("rademacher"))
    before = w.clone()
    run(host, [w], ["matrix"], KEYS[0][None], torch.tensor([[1e-40]]), Noise("rademacher"))
    assert bool((w != before).all())


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_a_skipped_step_leaves_every_bit_alone(host, dtype):
    w = torch.tensor([0.0, -0.0, 1.0, float("nan")]).repeat(8, 8).to(dtype)
    before = bits(w).clone()
    for coef in (torch.zeros(1, 1), -torch.zeros(2, 2)):
        run(host, [w], ["matrix"], torch.stack(KEYS[: len(coef)]), coef, Noise("clt4"))
        assert torch.equal(bits(w), before)
