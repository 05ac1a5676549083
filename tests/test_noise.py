"""The noise contract, bit by bit: docs/rng.md."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numba import njit

from ezo_kernels import ops
from ezo_kernels.ops import Noise, materialize
from ezo_kernels.ops import _noise_cpu as cpu
from ezo_kernels.ops import noise as N
from ezo_kernels.ops._layout import grid
from ezo_kernels.ops.update import rounding_lanes
from tests import golden
from tests import noise_oracle as oracle
from tests.known_answers import PHILOX
from tests.tolerance import assert_bitwise_equal

PARAMS = {"sparse": {"p_zero": 0.6}, "sparse_int8": {"p_zero": 0.3}}
NAMES = ["gaussian", "clt4", "uniform", "hadamard", "rademacher", "sparse", "sparse_int8"]
AT = dict(seed=7, step=3, site=11)


def make(noise, shape, **kwargs):
    return materialize(shape, noise=noise, **{**AT, **PARAMS.get(noise, {}), **kwargs})


# ---- words


@pytest.mark.parametrize(("rounds", "counter", "key", "words"), PHILOX)
def test_philox_known_answers(rounds, counter, key, words):
    assert oracle.philox(counter, key, rounds) == words
    assert N.philox4x32(counter, key, rounds) == words
    u32 = np.uint32
    compiled = cpu.philox if rounds == 7 else cpu.philox_10
    assert tuple(map(int, compiled(*map(u32, counter), *map(u32, key)))) == words


@pytest.mark.parametrize("rounds", [7, 10])
def test_words_put_site_block_query_stream_and_row_in_the_counter(rounds):
    u32, rows = np.uint32, np.array([0, 5, 2**32 - 1], np.uint32)
    blocks = 2 * cpu._CHUNK + 3  # words are made in chunks of columns
    out = np.empty((3, 4 * blocks), np.uint32)
    cpu.words(out, u32(1), u32(2**32 - 1), u32(77), u32(9 << 8 | 4), rows, rounds)
    for r, row in enumerate(rows):
        for b in (0, 1, 2, cpu._CHUNK - 1, cpu._CHUNK, blocks - 1):
            want = oracle.philox((77, b, 9 << 8 | 4, int(row)), (1, 2**32 - 1), rounds)
            assert tuple(map(int, out[r, 4 * b : 4 * b + 4])) == want


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1])
@pytest.mark.parametrize("step", [0, 1, 2**32 - 1, 2**64 - 1])
def test_key_is_folded_from_all_bits_of_seed_and_step(seed, step):
    want = oracle.key_of(seed, step)
    assert N.fold_key_host(seed, step) == want
    as_int64 = [torch.tensor([v - 2**64 if v >= 2**63 else v]) for v in (seed, step)]
    key = torch.empty(2, dtype=torch.int32)
    N.fold_key(*as_int64, key)
    assert tuple(int(k) & 0xFFFFFFFF for k in key) == want
    assert_bitwise_equal(N.key_tensor(seed, step), key)


def test_version_string_names_the_rounds():
    assert N.rng_version() == "ezo-1/philox4x32-7"
    assert N.rng_version(10) == "ezo-1/philox4x32-10"


# ---- values of each noise


@pytest.mark.parametrize("rounds", [7, 10])
@pytest.mark.parametrize("noise", NAMES)
def test_every_noise_is_what_the_document_says(noise, rounds):
    """Bit for bit against an oracle written from docs/rng.md, at scattered coordinates."""
    at = dict(seed=2**40 + 3, step=2**33 + 1, site=2**31 + 5, query=70_000)
    z = make(noise, (41, 301), rounds=rounds, **at)
    params = PARAMS.get(noise, {})
    for row, column in [(0, c) for c in range(40)] + [(40, c) for c in (127, 128, 159, 160, 255, 256, 299, 300)]:
        want = oracle.element(noise, row, column, rounds=rounds, **at, **params)
        got = z[row, column].numpy()
        assert got.tobytes() == np.asarray(want, dtype=got.dtype).tobytes(), (row, column, got, want)


@pytest.mark.parametrize("case", golden.load()["cases"], ids=lambda c: f"{c['noise']}-{c['rounds']}-{len(c['shape'])}d")
def test_golden_values_change_only_with_the_version(case, device):
    assert golden.load()["version"] == N.rng_version().split("/")[0]
    arguments = {k: v for k, v in case.items() if k not in ("sha256", "first")}
    assert golden.frozen(arguments, device) == case


def test_golden_file_holds_every_case():
    kept = [{k: v for k, v in c.items() if k not in ("sha256", "first")} for c in golden.load()["cases"]]
    assert all(case in kept for case in golden.CASES)
    assert set(N.NOISES) - {c["noise"] for c in golden.CASES} == {"gaussian_fast"}


@njit
def _pairs(w0, w1, z0, z1):
    for i in range(w0.size):
        z0[i], z1[i] = cpu.box_muller(w0[i], w1[i])


def test_gaussian_error_against_the_fp64_transform():
    """4.2 million pairs, the first and last words among them, where u is smallest and where it rounds to 1."""
    n, edge = 1 << 22, 2000
    rng = np.random.default_rng(0)
    w0, w1 = (rng.integers(0, 2**32, n, dtype=np.uint32) for _ in range(2))
    extremes = np.concatenate([np.arange(edge), 2**32 - 1 - np.arange(edge)]).astype(np.uint32)
    middle = (np.arange(2 * edge) + 2**31 - edge).astype(np.uint32)
    w0 = np.concatenate([w0, extremes, rng.permutation(extremes), w0[: 2 * edge], extremes])
    w1 = np.concatenate([w1, extremes, middle, extremes, rng.permutation(extremes)])
    z0, z1 = np.empty(w0.size, np.float32), np.empty(w0.size, np.float32)
    _pairs(w0, w1, z0, z1)
    for got, want in zip((z0, z1), oracle.gaussian_truth(w0, w1), strict=True):
        assert np.isfinite(got).all()
        worst = np.abs(got - want).argmax()
        assert abs(got[worst] - want[worst]) < 2e-6, (hex(w0[worst]), hex(w1[worst]), got[worst], want[worst])
    one = w0 >= 0xFFFFFF80  # float(w0) is 2^32: u is 1 and the radius 0
    assert one.sum() > 100 and not z0[one].any() and not z1[one].any()
    assert 6.6 < np.abs(np.concatenate([z0, z1])).max() < 6.8


def test_gaussian_uses_a_true_fma():
    """A product rounded before the sum changes the last bit of about half of all normals: the oracle would see it."""
    a, b, c = np.float32(1 + 2**-13), np.float32(1 - 2**-13), np.float32(-1)
    assert oracle.fma(a, b, c) == np.float32(-(2.0**-26)) and a * b + c == 0

    @njit
    def f(x, y, z):
        return cpu._fma(x, y, z)

    assert f(a, b, c) == np.float32(-(2.0**-26))


# ---- what z is independent of


@pytest.mark.parametrize("noise", NAMES)
def test_corner_does_not_depend_on_the_shape(noise, device):
    whole = make(noise, (300, 777), device=device)
    for rows, columns in ((10, 20), (1, 1), (300, 1), (3, 129), (300, 776)):
        assert_bitwise_equal(whole[:rows, :columns], make(noise, (rows, columns), device=device))
    assert_bitwise_equal(whole[0], make(noise, (777,), device=device), "a 1-D tensor is row 0")
    assert_bitwise_equal(whole[0, 0], make(noise, (), device=device), "a 0-D tensor is row 0, column 0")
    assert_bitwise_equal(whole.view(3, 100, 777), make(noise, (3, 100, 777), layout="matrix", device=device))


@pytest.mark.parametrize("noise", NAMES)
def test_any_rows_and_tiles_can_be_made_alone(noise):
    spec, key = Noise(noise, **PARAMS.get(noise, {})), N.key_tensor(AT["seed"], AT["step"])
    whole = N.fill_cpu(key, AT["site"], 2, 768, spec, np.arange(64, dtype=np.uint32))
    for ids in ([0], [63], [5, 4, 5], list(range(17, 40)), [7, 60, 2]):
        part = N.fill_cpu(key, AT["site"], 2, 768, spec, np.array(ids, np.uint32))
        assert_bitwise_equal(torch.from_numpy(whole[ids]), torch.from_numpy(part))
        narrow = N.fill_cpu(key, AT["site"], 2, 256, spec, np.array(ids, np.uint32))
        assert_bitwise_equal(torch.from_numpy(whole[ids][:, :256]), torch.from_numpy(narrow))


@pytest.mark.parametrize("noise", NAMES)
@pytest.mark.parametrize("layout", ["matrix", "conv"])
def test_strides_and_memory_format_do_not_matter(noise, layout, device):
    params = PARAMS.get(noise, {})
    spec = Noise(noise, **params)
    shape = (12, 6, 3, 5)
    want = make(noise, shape, layout=layout, device=device)
    key = N.key_tensor(AT["seed"], AT["step"], device)
    for target in (
        torch.empty(shape, device=device).to(memory_format=torch.channels_last),
        torch.empty(shape[::-1], device=device).permute(3, 2, 1, 0),
        torch.empty(24, 12, 3, 10, device=device)[::2, ::2, :, ::2],
    ):
        target = target.to(want.dtype) if target.dtype != want.dtype else target
        torch.ops.ezo.noise(target, key, AT["site"], 0, layout, noise, spec.rounds, spec.p_zero, spec.r_max)
        assert_bitwise_equal(want, target)


@pytest.mark.parametrize("noise", NAMES)
def test_every_index_matters(noise):
    base = make(noise, (64, 256))
    for change in (dict(seed=8), dict(step=4), dict(site=12), dict(query=1), dict(rounds=10), dict(seed=7 + 2**32)):
        assert (make(noise, (64, 256), **change) != base).float().mean() > 0.3, change


@pytest.mark.parametrize("noise", [n for n in NAMES if n != "sparse_int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_of_the_weight_does_not_matter(noise, dtype, device):
    spec = Noise(noise, **PARAMS.get(noise, {}))
    key = N.key_tensor(AT["seed"], AT["step"], device)
    p = ops.Perturbation(key, torch.ones(1, device=device), spec, query=3, signs=(1,))
    moved = ops.perturb(torch.zeros(9, 70, dtype=dtype, device=device), p, site=11, dtype=torch.float32)[0]
    want = make(noise, (9, 70), query=3, device=device)
    assert torch.equal(moved, want)  # by value: 0 + -0 is 0


@pytest.mark.parametrize("noise", NAMES)
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (4, 1, 3, 3), (2, 33, 1, 1), (3, 130, 2, 1)])
def test_conv_layout_pads_each_tap(noise, shape, device):
    """docs/rng.md: row o, column tap * pad(I/g) + c."""
    o, c, r, s = shape
    pad = math.ceil(c / oracle.SEGMENT[noise]) * oracle.SEGMENT[noise]
    flat = make(noise, (o, r * s * pad), device=device)
    want = torch.stack([flat[:, t * pad : t * pad + c] for t in range(r * s)], dim=2).view(shape)
    assert_bitwise_equal(want, make(noise, shape, device=device))
    assert_bitwise_equal(want, make(noise, shape, layout="conv", device=device))
    assert_bitwise_equal(want[:, :, 0], make(noise, (o, c, s), layout="conv", device=device)) if r == 1 else None


def test_three_dimensions_are_a_matrix_unless_told():
    assert_bitwise_equal(make("gaussian", (4, 6, 5)), make("gaussian", (24, 5)).view(4, 6, 5))
    assert not torch.equal(make("gaussian", (4, 6, 5)), make("gaussian", (4, 6, 5), layout="conv"))


# ---- masks and rounding


@pytest.mark.parametrize("p_zero", [0.0, 1 / 65536, 0.1, 0.5, 0.9, 65535 / 65536])
@pytest.mark.parametrize("noise", ["sparse", "sparse_int8"])
def test_mask_zeroes_exactly_the_lanes_below_the_threshold(noise, p_zero):
    """Not a normal against the ratio (a peer's 0.9 zeroes 81.6%): lanes below round(65536 p), and no others."""
    at = dict(seed=1, step=2, site=3, query=4)
    z = materialize((64, 1024), noise=noise, p_zero=p_zero, r_max=127, **at).numpy()
    k0, k1 = map(np.uint32, oracle.key_of(1, 2))
    rows = np.arange(64, dtype=np.uint32)
    threshold = round(65536 * p_zero)
    assert Noise(noise, p_zero=p_zero).threshold == threshold
    if noise == "sparse":
        lanes = np.empty((64, 1024), np.uint16)
        cpu.lanes(lanes, k0, k1, np.uint32(3), np.uint32(4 << 8 | 2), rows, 7)
        assert np.array_equal(z != 0, lanes >= threshold)  # a normal is never exactly zero here
    else:
        words = np.empty((64, 1024), np.uint32)
        cpu.words(words, k0, k1, np.uint32(3), np.uint32(4 << 8 | 3), rows, 7)
        kept = (words >> 16) >= threshold
        assert not z[~kept].any()
        assert np.array_equal(z[kept], (((words & 0xFFFF) * 255 >> 16).astype(np.int32) - 127)[kept])
    sigma = math.sqrt(z.size * p_zero * (1 - p_zero))
    zeros = (z == 0).sum() if noise == "sparse" else (~kept).sum()
    assert abs(zeros - z.size * threshold / 65536) <= 5 * sigma


def test_sparse_has_variance_one_whatever_the_fraction():
    for p_zero in (0.0, 0.5, 0.9, 0.99):
        z = materialize((1024, 1024), noise="sparse", p_zero=p_zero, **AT).double()
        spread = math.sqrt((3 / (1 - p_zero) - 1) / z.numel())
        assert abs(z.square().mean() - 1) < 5 * spread, p_zero


def test_sparse_without_zeros_is_the_gaussian():
    assert_bitwise_equal(make("sparse", (20, 40), p_zero=0.0), make("gaussian", (20, 40)))


@pytest.mark.parametrize("rounds", [7, 10])
@pytest.mark.parametrize(("shape", "layout"), [((5, 37), "matrix"), ((11,), "matrix"), ((3, 5, 2, 2), "conv")])
def test_rounding_lanes_are_stream_4(shape, layout, rounds):
    key = N.key_tensor(5, 6)
    where = grid(shape, layout, 4)
    lanes = rounding_lanes(torch.Size(shape), key, 21, where, rounds)
    assert lanes.shape == shape
    folded = oracle.key_of(5, 6)
    for index in np.ndindex(*shape):
        if layout == "conv":
            row, column = index[0], (index[2] * shape[3] + index[3]) * where.padded + index[1]
        else:
            row, column = (0, *index)[-2:]
        words = oracle.philox((21, column // 8, 4, row), folded, rounds)
        assert int(lanes[index]) == oracle.lane(words, column), index


# ---- bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(noise="normal"), ValueError, "unknown noise 'normal'"),
        (dict(noise=None), TypeError, "must be a name"),
        (dict(rounds=8), ValueError, "rounds"),
        (dict(rounds=0), ValueError, "rounds"),
        (dict(noise="sparse", p_zero=1.0), ValueError, "p_zero"),
        (dict(noise="sparse", p_zero=-0.1), ValueError, "p_zero"),
        (dict(noise="sparse", p_zero=float("nan")), ValueError, "p_zero"),
        (dict(noise="sparse", p_zero=0.999999), ValueError, "p_zero"),
        (dict(noise="gaussian", p_zero=0.5), ValueError, "no meaning"),
        (dict(noise="sparse_int8", r_max=0), ValueError, "r_max"),
        (dict(noise="sparse_int8", r_max=128), ValueError, "r_max"),
        (dict(shape=(-1, 4)), ValueError, "shape"),
        (dict(site=-1), ValueError, "site"),
        (dict(site=2**32), ValueError, "site"),
        (dict(step=-1), ValueError, "step"),
        (dict(step=2**64), ValueError, "step"),
        (dict(seed=-1), ValueError, "seed"),
        (dict(seed=2**64), ValueError, "seed"),
        (dict(seed=1.0), TypeError, "seed must be an int, got float"),
        (dict(site=0.5), TypeError, "site"),
        (dict(query=-1), ValueError, "query"),
        (dict(query=2**24), ValueError, "query"),
        (dict(layout="rows"), ValueError, "layout"),
        (dict(layout="conv", shape=(4,)), ValueError, "conv"),
        (dict(colour=3), TypeError, "colour"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        materialize(**{"shape": (4, 4), "noise": "gaussian", **AT, **change})


def test_gaussian_fast_does_not_exist_on_a_cpu():
    with pytest.raises(NotImplementedError, match="CUDA only"):
        materialize((4, 4), noise="gaussian_fast", **AT)
    assert not Noise("gaussian_fast").portable and Noise("gaussian").portable


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (4, 0, 3, 3)])
def test_empty_shapes_are_empty(shape):
    assert make("gaussian", shape).shape == shape
