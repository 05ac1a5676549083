"""Bugs in noise and in the update."""

from __future__ import annotations

from .mutant import Mutant

_OPS = "ezo_kernels/ops/"
_CPU = "ezo_kernels/ops/_noise_cpu.py"
_NN = "ezo_kernels/nn/"
_UPDATES = "ezo_kernels/optim/updates.py"
_NOISE = "tests/test_noise.py"
_UPDATE = "tests/test_update.py"
_ROUNDED = "tests/test_rounded_z.py"
_MASK = "tests/test_noise.py -k 'mask or sparse'"

MUTANTS = (
    # noise
    Mutant("rounds off by one", _CPU, "for _ in range(4):", "for _ in range(3):", "tests/test_noise.py -k philox"),
    Mutant("columns of a long row begin again", _CPU, "u32(a ^ u32(first + b))", "u32(a ^ u32(b))", _NOISE),
    Mutant(
        "the row where the column belongs",
        _CPU,
        "u32(u32(p0 >> u64(32)) ^ c3 ^ k1)",
        "u32(u32(p0 >> u64(32)) ^ c0 ^ k1)",
        _NOISE,
    ),
    Mutant(
        "mask compared with a normal",
        _CPU,
        "line[8 * b + j] * scale if lane >= least else",
        "line[8 * b + j] * scale if line[8 * b + j] >= f32(least) * f32(2.0**-16) else",
        _MASK,
    ),
    Mutant(
        "product rounded before the sum",
        _CPU,
        "return builder.fma(*args)",
        "return builder.fadd(builder.fmul(args[0], args[1]), args[2])",
        _NOISE,
    ),
    Mutant(
        "one site for all layers",
        _OPS + "noise.py",
        "return np.uint32(site), np.uint32(query",
        "return np.uint32(0), np.uint32(query",
        _NOISE,
    ),
    Mutant(
        "streams overlap queries",
        _OPS + "noise.py",
        "np.uint32(query << 8 | stream)",
        "np.uint32(query + stream)",
        _NOISE,
    ),
    Mutant("sparse not rescaled", _OPS + "noise.py", "np.float32(noise.scale))", "np.float32(1.0))", _MASK),
    Mutant(
        "step cut to 32 bits",
        _OPS + "noise.py",
        "step >> 32 & 0xFFFFFFFF",
        "0",
        "tests/test_noise.py -k key_is_folded",
    ),
    # update
    Mutant(
        "sign of the update",
        _OPS + "update.py",
        "shift([acc], [-one]",
        "shift([acc], [one]",
        _UPDATE,
    ),
    Mutant("z of the wrong query", _OPS + "update.py", "[-one], query + q)", "[-one], query)", _UPDATE),
    Mutant(
        "stochastic rounding truncates",
        _OPS + "update.py",
        "round_stochastic(acc, lanes, w.dtype)",
        "round_stochastic(acc, lanes * 0, w.dtype)",
        _UPDATE,
    ),
    Mutant(
        "rounding words are the noise's",
        _OPS + "update.py",
        "np.uint32(C.STREAM_ROUNDING)",
        "np.uint32(C.STREAM_GAUSSIAN)",
        "tests/test_noise.py -k lanes",
    ),
    Mutant(
        "a layout refused after the first write",
        _OPS + "update.py",
        "grid(w.shape, layout, noise.segment)  # refuses",
        "pass  # refuses",
        _UPDATE,
    ),
    # z of 16 bits
    Mutant(
        "the update makes z in fp32 where the forward rounded it",
        _UPDATES,
        "self.noise, z_dtypes=z_dtypes, scales=scales",
        "self.noise, scales=scales",
        _ROUNDED,
    ),
    Mutant(
        "the forward makes z in fp32 where the update rounds it",
        _NN + "linear.py",
        "z_dtype=self.zo.z_dtype(self.site, self.weight)",
        'z_dtype="float32"',
        _ROUNDED,
    ),
    Mutant(
        "a tied embedding's z is rounded",
        _NN + "plan.py",
        "known.linear = known.linear and linear",
        "known.linear = linear",
        _ROUNDED,
    ),
    Mutant(
        "z is rounded whatever the strategy",
        _NN + "plan.py",
        'z_dtype = "weight" if uses[p].linear and strategy in _TWO_PRODUCTS else "float32"',
        'z_dtype = "weight" if uses[p].linear else "float32"',
        _ROUNDED,
    ),
    Mutant(
        "a cast model is updated by the plan it had",
        _OPS + "update.py",
        "pointer(p) if p.is_cuda else 0, p.dtype, *p.shape",
        "pointer(p) if p.is_cuda else 0, *p.shape",
        _ROUNDED,
    ),
    Mutant(
        "a graph is replayed on the bits of another dtype",
        "ezo_kernels/optim/capture.py",
        "(t.data_ptr(), t.dtype) for get",
        "t.data_ptr() for get",
        _ROUNDED,
    ),
    Mutant(
        "CUDA C++ truncates z to bf16",
        _OPS + "csrc/ezo_update.cuh",
        "(a + 0x7fffu + ((a >> 16) & 1u)) >> 16",
        "a >> 16",
        "tests/test_csrc.py -k weights_dtype",
    ),
    Mutant(
        "every slab of a convolution has the noise of the first",
        _OPS + "_conv2d_slab.py",
        "fill(room, w[slab], first, q)",
        "fill(room, w[slab], 0, q)",
        "tests/test_slab_conv.py -k contract",
    ),
    Mutant(
        "a slab of a conv group reads the inputs of the first",
        _OPS + "_conv2d_slab.py",
        "inputs = slice(first // own * channels, (first // own + count) * channels)",
        "inputs = slice(0, count * channels)",
        "tests/test_slab_conv.py -k products",
    ),
    Mutant(
        "cuDNN is given a group that begins anywhere",
        _OPS + "_conv2d_slab.py",
        "y if dense and y.data_ptr() % 64 == 0 else",
        "y if dense else",
        "tests/test_slab_conv.py -k cudnn",
    ),
    Mutant(
        "a convolution chooses by the stacked batch",
        _OPS + "conv2d.py",
        "positions = out.shape[0] // groups * ",
        "positions = out.shape[0] * ",
        "tests/test_strategy.py -k one_group",
    ),
    Mutant(
        "other rules have the hash of these",
        _OPS + "_strategy.py",
        '_TABLE.read_bytes() + f"choice {VERSION}".encode()',
        "_TABLE.read_bytes()",
        "tests/test_strategy.py -k hash",
    ),
    Mutant(
        "the summary asks for another z than the layer has",
        _NN + "summary.py",
        '"float32" if transposed else zo.z_dtype(module.site, w)',
        '"float32"',
        "tests/test_strategy.py -k summary",
    ),
    Mutant(
        "each group of a head that runs once a group counts its dropouts on",
        "ezo_kernels/nn/context.py",
        "                self.calls = calls",
        "                pass",
        "tests/test_head.py -k one_mask",
    ),
)
