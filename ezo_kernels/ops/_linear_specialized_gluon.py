"""Perturbed linear by specialised warps: y_g = x_g (W + sign_g eps z_q)^T + (b + sign_g eps z'_q), strategy ``specialized``.

| tensor | shape |
|---|---|
| x | [groups * rows, K], or [rows, K] shared by all groups: rows at one stride, of 16-byte multiples, bf16 or fp16 |
| W | [N, K], rows of 16-byte multiples, of x's dtype |
| b | [N] |
| y | [groups * rows, N], contiguous |

For sm_90. A program makes BM rows of both groups of a pair by BN outputs. Its warps are of five kinds, which pass tiles on
through rings of buffers in shared memory, each with a barrier that says that it is full and one that says that it is empty:

    load W   -> w_ring ->  perturb (8 warps)  -> plus, minus ->  multiply +eps (4 warps), multiply -eps (4 warps)
    load x   -> x_ring, y_ring -----------------------------------------^

TMA loads W and x and fills with zeros what lies outside of them; z beyond K is not zero, but x is. W + eps z and W - eps z are
formed in fp32 (product rounded, then sum) and rounded once to x's dtype: the weights are bit for bit those of ``fused``. Tiles
never straddle two groups: rows of another group that lie in a tile are multiplied and not stored.
"""

from __future__ import annotations

import torch

from ._gluon import MISSING, TensorDescriptor, barrier, copy_tile, gl, hopper, jit, mbarrier
from ._linear_triton import perturb_tile
from ._noise_gluon import z_tile
from ._noise_triton import UNIT as UNITS
from ._noise_triton import load_key, noise_args, noise_constexprs, signed32
from ._rounding_triton import round_z
from ._tiles import specialized_tile
from ._triton import require
from ._variants import Variant
from .noise import Noise


@jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The next buffer of a ring, and the parity of its barriers there."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@jit
def load_tiles(
    desc, ring, other_ring, full, empty, row, other_row, K, BK: gl.constexpr, STAGES: gl.constexpr, COPIES: gl.constexpr,
):  # fmt: skip
    """A warp that fills a ring with tiles of BK columns from ``row`` on; two COPIES: and another from ``other_row`` on."""
    stage, phase = 0, 0
    for k in range(0, K, BK):
        mbarrier.wait(empty.index(stage), phase ^ 1)
        # a tile counts whole, whatever of it lies outside of the tensor
        mbarrier.expect(full.index(stage), COPIES * desc.block_type.nbytes)
        copy_tile(desc, [row, k], full.index(stage), ring.index(stage))
        if COPIES == 2:
            copy_tile(desc, [other_row, k], full.index(stage), other_ring.index(stage))
        stage, phase = advance(stage, phase, STAGES)


@jit
def perturb_bias(
    bias, b_ptr, key_ptr, eps_ptr, site, query, first_n, N, b_stride, threshold, scale,
    SIGN: gl.constexpr, BN: gl.constexpr, NOISE: gl.constexpr, ROUNDS: gl.constexpr, UNIT: gl.constexpr, ASM: gl.constexpr,
):  # fmt: skip
    """b + SIGN eps z of a tile's outputs, fp32 [BN], to shared memory: the row 0 of the bias's own site. By four warps."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, 4], [1, 0])
    k0, k1 = load_key(key_ptr)
    row = gl.full((1, 1), 0, gl.uint32, LAYOUT)
    units = first_n + (gl.arange(0, BN // UNIT, gl.SliceLayout(0, LAYOUT)) * UNIT)[None, :]
    z = z_tile(k0, k1, site, query, row, units.to(gl.uint32), NOISE, ROUNDS, UNIT, ASM, threshold, scale)
    z = gl.reshape(z, (BN,))
    rn = first_n + gl.arange(0, BN, z.type.layout)
    b = gl.load(b_ptr + rn.to(gl.int64) * b_stride, mask=rn < N, other=0.0)
    plus, minus = perturb_tile(b, z, gl.load(eps_ptr), gl.float32)
    bias.store(plus if SIGN == 1 else minus)


@jit
def perturb_tiles(
    w_ring, plus, minus, w_full, w_empty, p_full, p_empty, key_ptr, eps_ptr, site, query, first_n, K, threshold, scale,
    SIGNS: gl.constexpr, ROUNDED: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, CHUNK: gl.constexpr,
    STAGES: gl.constexpr, W_STAGES: gl.constexpr, WARPS: gl.constexpr,
    NOISE: gl.constexpr, ROUNDS: gl.constexpr, UNIT: gl.constexpr, ASM: gl.constexpr,
):  # fmt: skip
    """The warps that make z: W + eps z and W - eps z of every tile, CHUNK rows at a time."""
    dtype: gl.constexpr = w_ring.dtype
    # a thread makes 8 neighbouring columns at least: 16 bytes of shared memory
    PER: gl.constexpr = 8 // UNIT if UNIT < 8 else 1
    LANES: gl.constexpr = BK // UNIT // PER
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, PER], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    k0, k1 = load_key(key_ptr)
    eps = gl.load(eps_ptr)
    units = (gl.arange(0, BK // UNIT, gl.SliceLayout(0, LAYOUT)) * UNIT)[None, :]
    rows = first_n + gl.arange(0, CHUNK, gl.SliceLayout(1, LAYOUT))[:, None]
    w_stage, w_phase, stage, phase = 0, 0, 0, 0
    for k in range(0, K, BK):
        mbarrier.wait(w_full.index(w_stage), w_phase)
        mbarrier.wait(p_empty.index(stage), phase ^ 1)
        for part in gl.static_range(BN // CHUNK):
            z = z_tile(
                k0, k1, site, query, (rows + part * CHUNK).to(gl.uint32), (k + units).to(gl.uint32),
                NOISE, ROUNDS, UNIT, ASM, threshold, scale,
            )  # fmt: skip
            if ROUNDED:
                z = round_z(z, dtype, ASM)
            w = w_ring.index(w_stage).slice(part * CHUNK, CHUNK).load(z.type.layout)
            w_plus, w_minus = perturb_tile(w, z, eps, dtype)
            if SIGNS != -1:
                plus.index(stage).slice(part * CHUNK, CHUNK).store(w_plus)
            if SIGNS != 1:
                minus.index(stage).slice(part * CHUNK, CHUNK).store(w_minus)
        mbarrier.arrive(w_empty.index(w_stage))
        # the tensor core reads shared memory past the threads' own order
        hopper.fence_async_shared()
        mbarrier.arrive(p_full.index(stage))
        w_stage, w_phase = advance(w_stage, w_phase, W_STAGES)
        stage, phase = advance(stage, phase, STAGES)


@jit
def store_columns(room, out_ptr, first, rows, columns, N, BM: gl.constexpr, WIDTH: gl.constexpr):
    """Store WIDTH columns of a tile from ``first`` on, from shared memory [BM, WIDTH], as far as rows and columns go."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (WIDTH // 8), WIDTH // 8], [4, 1], [1, 0])
    rm, rn = gl.arange(0, BM, gl.SliceLayout(1, LAYOUT)), first + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    inside = (rm < rows)[:, None] & (rn < columns)[None, :]
    gl.store(out_ptr + (rm[:, None] * N + rn[None, :]), room.load(LAYOUT), mask=inside)


@jit
def multiply_tiles(
    x_ring, p_ring, room, bias, x_full, x_empty, p_full, p_empty, b_ptr, out_ptr, key_ptr, eps_ptr, bias_site, query,
    row0, first_m, first_n, rows, N, K, b_stride, threshold, scale,
    SIGN: gl.constexpr, BIAS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, X_STAGES: gl.constexpr,
    NOISE: gl.constexpr, ROUNDS: gl.constexpr, UNIT: gl.constexpr, ASM: gl.constexpr,
):  # fmt: skip
    """Four warps that multiply x by the perturbed tiles of a sign, add that sign's bias and store; SIGN 0: none.

    ``room``: where outputs pass through, BN / BK buffers [BM, BK].
    """
    if SIGN == 0:
        return
    if BIAS:
        # while there is no tile yet
        perturb_bias(
            bias, b_ptr, key_ptr, eps_ptr, bias_site, query, first_n, N, b_stride, threshold, scale,
            SIGN, BN, NOISE, ROUNDS, UNIT, ASM,
        )  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    acc = gl.zeros((BM, BN), gl.float32, LAYOUT)
    x_stage, x_phase, stage, phase = 0, 0, 0, 0
    x_before, before = 0, 0
    for k in range(0, K, BK):
        mbarrier.wait(x_full.index(x_stage), x_phase)
        mbarrier.wait(p_full.index(stage), phase)
        acc = hopper.warpgroup_mma(x_ring.index(x_stage), p_ring.index(stage).permute((1, 0)), acc, is_async=True)
        # this tile's product runs on; the one before is done, and its buffers are free
        acc = hopper.warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(x_empty.index(x_before), pred=k > 0)
        mbarrier.arrive(p_empty.index(before), pred=k > 0)
        x_before, before = x_stage, stage
        x_stage, x_phase = advance(x_stage, x_phase, X_STAGES)
        stage, phase = advance(stage, phase, STAGES)
    acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
    # each warp has waited for its own part of the product: before one overwrites what all of them read, the others
    barrier()
    if BIAS:
        acc += bias.load(gl.SliceLayout(0, LAYOUT))[None, :]
    y = acc.to(out_ptr.dtype.element_ty)
    # 64 bits for the first element alone: one address in registers, not one for each
    out_ptr += (row0 + first_m).to(gl.int64) * N + first_n
    if BN == BK:
        room.index(0).store(y)
    else:
        left, right = gl.split(gl.permute(gl.reshape(y, (BM, 2, BK)), (0, 2, 1)))
        room.index(0).store(left)
        room.index(1).store(right)
    for part in gl.static_range(BN // BK):
        store_columns(room.index(part), out_ptr, part * BK, rows - first_m, N - first_n, N, BM, BK)


@jit(do_not_specialize=["site", "bias_site", "query", "rows", "tiles_m", "tiles_n", "threshold"])
def linear_specialized_kernel(
    x_desc, w_desc, b_ptr, out_ptr, key_ptr, eps_ptr, site, bias_site, query, rows, N, K, tiles_m, tiles_n,
    b_stride, threshold, scale,
    SIGNS: gl.constexpr, SHARED: gl.constexpr, BIAS: gl.constexpr, ROUNDED: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, CHUNK: gl.constexpr,
    STAGES: gl.constexpr, X_STAGES: gl.constexpr, W_STAGES: gl.constexpr,
    WARPS: gl.constexpr, REGISTERS: gl.constexpr, OTHER_REGISTERS: gl.constexpr,
    NOISE: gl.constexpr, ROUNDS: gl.constexpr, UNIT: gl.constexpr, BIAS_UNIT: gl.constexpr, ASM: gl.constexpr,
):  # fmt: skip
    """SIGNS: 2 for the pair, else 1 or -1. WARPS, REGISTERS: of those that make z; OTHER_REGISTERS: of those that multiply.

    Programs that share a tile of W are neighbours, so that it stays in L2.
    """
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    COPIES: gl.constexpr = 2 if SIGNS == 2 else 1
    X_COPIES: gl.constexpr = 1 if SHARED else COPIES
    pid = gl.program_id(0)
    first_m = (pid % tiles_m) * BM
    pid = pid // tiles_m
    first_n = (pid % tiles_n) * BN
    q = pid // tiles_n
    row0 = q * COPIES * rows
    x_row = first_m if SHARED else row0 + first_m
    x_ring = gl.allocate_shared_memory(dtype, (X_STAGES, BM, BK), x_desc.layout)
    w_ring = gl.allocate_shared_memory(dtype, (W_STAGES, BN, BK), w_desc.layout)
    plus = gl.allocate_shared_memory(dtype, (STAGES, BN, BK), w_desc.layout)
    # buffers of their own, not more of a ring: the compiler would have threads wait between stores to what may be one place
    y_ring = x_ring if X_COPIES == 1 else gl.allocate_shared_memory(dtype, (X_STAGES, BM, BK), x_desc.layout)
    minus = plus if COPIES == 1 else gl.allocate_shared_memory(dtype, (STAGES, BN, BK), w_desc.layout)
    # outputs pass through shared memory that nothing needs any more, for stores of 16 bytes: a sign's own, as the other runs on
    if BM == BN:
        room, other_room = plus, minus
    elif X_COPIES == COPIES:
        room, other_room = x_ring, y_ring
    else:
        room = gl.allocate_shared_memory(dtype, (1, BM, BK), x_desc.layout)
        other_room = gl.allocate_shared_memory(dtype, (1, BM, BK), x_desc.layout)
    bias = gl.allocate_shared_memory(gl.float32, (COPIES, BN), gl.SwizzledSharedLayout(1, 1, 1, [0]))
    x_full = gl.allocate_shared_memory(gl.int64, (X_STAGES, 1), mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, (X_STAGES, 1), mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, (W_STAGES, 1), mbarrier.MBarrierLayout())
    w_empty = gl.allocate_shared_memory(gl.int64, (W_STAGES, 1), mbarrier.MBarrierLayout())
    p_full = gl.allocate_shared_memory(gl.int64, (STAGES, 1), mbarrier.MBarrierLayout())
    p_empty = gl.allocate_shared_memory(gl.int64, (STAGES, 1), mbarrier.MBarrierLayout())
    # an arrival is one for all warps of a kind; both signs multiply the same tiles
    for i in gl.static_range(X_STAGES):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_empty.index(i), count=COPIES)
    for i in gl.static_range(W_STAGES):
        mbarrier.init(w_full.index(i), count=1)
        mbarrier.init(w_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(p_full.index(i), count=1)
        mbarrier.init(p_empty.index(i), count=COPIES)
    # TMA counts on them past the threads' own order
    hopper.fence_async_shared()
    # a sign by itself leaves the other's warps idle, so that its code, and its bits, are those of a pair
    gl.warp_specialize(
        [
            (multiply_tiles, (
                x_ring, plus, room, bias.index(0), x_full, x_empty, p_full, p_empty, b_ptr, out_ptr, key_ptr, eps_ptr,
                bias_site, query + q, row0, first_m, first_n, rows, N, K, b_stride, threshold, scale,
                1 if SIGNS == 2 else SIGNS, BIAS, BM, BN, BK, STAGES, X_STAGES, NOISE, ROUNDS, BIAS_UNIT, ASM,
            )),
            (multiply_tiles, (
                y_ring, minus, other_room, bias.index(COPIES - 1), x_full, x_empty, p_full, p_empty, b_ptr, out_ptr, key_ptr,
                eps_ptr, bias_site, query + q, row0 + rows, first_m, first_n, rows, N, K, b_stride, threshold, scale,
                -1 if SIGNS == 2 else 0, BIAS, BM, BN, BK, STAGES, X_STAGES, NOISE, ROUNDS, BIAS_UNIT, ASM,
            )),
            (perturb_tiles, (
                w_ring, plus, minus, w_full, w_empty, p_full, p_empty, key_ptr, eps_ptr, site, query + q, first_n, K,
                threshold, scale,
                SIGNS, ROUNDED, BN, BK, CHUNK, STAGES, W_STAGES, WARPS, NOISE, ROUNDS, UNIT, ASM,
            )),
            (load_tiles, (w_desc, w_ring, w_ring, w_full, w_empty, first_n, first_n, K, BK, W_STAGES, 1)),
            (load_tiles, (x_desc, x_ring, y_ring, x_full, x_empty, x_row, x_row + rows, K, BK, X_STAGES, X_COPIES)),
        ],
        [4, WARPS, 1, 1],
        [OTHER_REGISTERS, REGISTERS, 24, 24],
    )  # fmt: skip


def constexprs(tile, noise, signs: int, shared: bool, bias: bool, rounded: bool) -> dict:
    """Everything that :func:`linear_specialized_kernel` is compiled for."""
    return {
        **{"SIGNS": signs, "SHARED": bool(shared), "BIAS": bias, "ROUNDED": rounded},
        **{"BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "CHUNK": tile.chunk},
        **{"STAGES": tile.stages, "X_STAGES": tile.x_stages, "W_STAGES": tile.w_stages},
        **{"WARPS": tile.warps, "REGISTERS": tile.registers, "OTHER_REGISTERS": tile.other_registers},
        # rademacher: a thread makes 16 columns, as 32 would not fit its registers
        **noise_constexprs(noise, 16 if noise.name == "rademacher" else tile.bk),
        "BIAS_UNIT": UNITS[noise.name],
    }


_DTYPES = {} if MISSING else {"bf16": gl.bfloat16, "fp16": gl.float16}


def shared_layout(rows: int, columns: int, dtype):
    """How a tile lies in shared memory: swizzled, as TMA writes it and wgmma reads it. ``dtype``: Gluon's."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)


def launch_linear_specialized(
    x, w, b, key, eps, site, bias_site, shared, query, queries, signs, noise, out, rounded: bool = False
) -> None:
    """Write the outputs of every group; arguments as in :func:`perturbed_linear`, all checked there.

    Args:
        signs: not (0,).
        out: contiguous.
        rounded: z of the weight is rounded to x's dtype.

    Raises:
        NotImplementedError: no Gluon, an address that is no multiple of 16 bytes, too many rows.
    """
    require()
    if MISSING:
        raise NotImplementedError(f"strategy 'specialized': {MISSING}")
    if any(t.data_ptr() % 16 for t in (x, w)):
        raise NotImplementedError("strategy 'specialized': x or the weight begins at no multiple of 16 bytes")
    n, k = w.shape
    rows = out.numel() // (n * queries * len(signs))
    tile = specialized_tile(rows, noise.name)
    tiles_m, tiles_n = -(-rows // tile.bm), -(-n // tile.bn)
    x = x.view(-1, k)
    most = max(tile.bm * (n + tile.bn), k + tile.bk, len(x) + tile.bm, out.numel() // n, tiles_m * tiles_n * queries)
    if most >= 1 << 31:
        raise NotImplementedError(f"perturbed_linear: {rows} rows, {n} outputs, {k} inputs: 2^31 is the limit")
    dtype = _DTYPES["bf16" if x.dtype == torch.bfloat16 else "fp16"]
    x_desc, w_desc = (
        TensorDescriptor.from_tensor(t, [height, tile.bk], shared_layout(height, tile.bk, dtype))
        for t, height in ((x, tile.bm), (w, tile.bn))
    )
    threshold, scale = noise_args(noise)
    with torch.cuda.device_of(x):
        linear_specialized_kernel[(tiles_m * tiles_n * queries,)](
            x_desc, w_desc, b if b is not None else w, out, key, eps, signed32(site), signed32(bias_site), query, rows, n, k,
            tiles_m, tiles_n, b_stride=b.stride(0) if b is not None else 1, threshold=threshold, scale=scale,
            **constexprs(tile, noise, 2 if len(signs) == 2 else signs[0], shared, b is not None, rounded),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- variants

#: dtype, noise, rows, how; the tests compile all.
_CASES = (
    ("bf16", "clt4", 512, "pair"), ("bf16", "gaussian", 512, "pair"), ("bf16", "gaussian", 128, "pair"),
    ("bf16", "gaussian_fast", 512, "pair"), ("bf16", "hadamard", 512, "pair"), ("bf16", "rademacher", 512, "pair"),
    ("bf16", "uniform", 512, "pair"), ("bf16", "sparse", 512, "pair"), ("fp16", "clt4", 512, "pair"),
    ("bf16", "clt4", 512, "shared"), ("bf16", "clt4", 512, "plus"), ("bf16", "clt4", 512, "ragged"),
    ("bf16", "hadamard", 512, "rounded"), ("bf16", "gaussian", 512, "rounded"), ("bf16", "sparse", 512, "rounded"),
)  # fmt: skip


def _variant(dtype: str, name: str, rows: int, how: str) -> Variant:
    noise = Noise(name, p_zero=0.5 if name == "sparse" else 0.0)
    tile = specialized_tile(rows, name)
    pointers = {"b_ptr": dtype, "out_ptr": dtype, "key_ptr": "i32", "eps_ptr": "fp32"}
    integers = ("site", "bias_site", "query", "rows", "N", "K", "tiles_m", "tiles_n", "threshold")
    return Variant(
        kernel=linear_specialized_kernel,
        name=f"linear_specialized/{dtype}/{name}/{rows}/{how}",
        signature={
            **{
                desc: f"tensordesc<{dtype}[{height}, {tile.bk}],{shared_layout(height, tile.bk, _DTYPES[dtype])!r}>"
                for desc, height in (("x_desc", tile.bm), ("w_desc", tile.bn))
            },
            **{pointer: "*" + of for pointer, of in pointers.items()},
            **dict.fromkeys(integers, "i32"),
            "scale": "fp32",
        },
        constexprs={
            "b_stride": 1,
            **constexprs(tile, noise, 1 if how == "plus" else 2, how == "shared", True, how == "rounded"),
            "ASM": True,
        },
        num_warps=4,
        num_stages=1,
        archs=(90,),
        expects=("mma", "multiply", "specialized"),
        z_per_loop=tile.bn * tile.bk,
        loop_warps=tile.warps,
        divisible=() if how == "ragged" else ("N", "K"),
    )


def variants():
    """A layer of 4096 by 4096 at 128 and 512 rows a group, for the static report and the tests; none without Gluon."""
    require()
    if not MISSING:
        yield from (_variant(*case) for case in _CASES)
