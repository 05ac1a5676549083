"""Launches on a GPU that is not there: what the launchers pass binds, specialises, compiles for sm_90 and fits.

A driver that says it has an H100 takes every launch up to the point where the machine code would be loaded. The
interpreter does not see what this sees: arguments that are one become constants, options that do not exist, types.
"""

from __future__ import annotations

import types
import warnings
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

import ezo_kernels as ezo  # noqa: E402
from bench import static  # noqa: E402
from ezo_kernels import ops  # noqa: E402
from ezo_kernels.ops import _library  # noqa: E402
from ezo_kernels.ops._update_triton import update_table  # noqa: E402
from ezo_kernels.ops.batch_norm import batch_norm, move_running_statistics  # noqa: E402
from ezo_kernels.ops.cross_entropy import cross_entropy_and_gradient  # noqa: E402
from ezo_kernels.ops.dropout import dropout_mask  # noqa: E402
from ezo_kernels.ops.grouped_linear import grouped_linear  # noqa: E402
from ezo_kernels.ops.importance import importance_rows  # noqa: E402
from ezo_kernels.ops.noise import fold_key, key_tensor  # noqa: E402

pytestmark = pytest.mark.compile
H100 = {"max_shared_mem": 232448, "multiprocessor_count": 132}


class AbsentDriver:
    """As much of a CUDA driver as a launch asks for."""

    #: One list for all: a kernel that was compiled once keeps the launcher that it was given then.
    launches: list[types.SimpleNamespace] = []

    def __init__(self):
        self.launcher_cls = self._launcher
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda device: H100,
            load_binary=self._load,
        )

    @classmethod
    def _launcher(cls, source, metadata):
        def launch(x, y, z, *rest):
            cls.launches.append(types.SimpleNamespace(name=source.fn.__name__, grid=(x, y, z)))

        return launch

    @staticmethod
    def _load(name, code, shared, device):
        usage, sass = static.disassemble(code)
        opcodes = [opcode for opcode, _ in static.parse(sass)[0]]
        assert " STACK:0 " in usage and not any(o.startswith("STL") for o in opcodes), f"{name} spills: {usage}"
        return "module", "function", 0, 0, 1024

    def get_current_device(self):
        return 1 << 20  # no number that a GPU of this machine has

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def launches(monkeypatch):
    """Launches made by the public functions on CPU tensors, through the CUDA launchers."""
    config = triton.runtime.driver
    before = config._active
    config.set_active(AbsentDriver())
    for name, key in list(_library.implementations):
        if key == "CPU":
            monkeypatch.setitem(_library.implementations, (name, "CPU"), _library.implementations[name, "CUDA"])
    AbsentDriver.launches.clear()
    yield AbsentDriver.launches
    config._active = before


def pass_of(noise="gaussian", **kwargs):
    return ops.Perturbation(key_tensor(1, 2), torch.ones(1), ops.Noise(noise), **kwargs)


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize("noise", ["gaussian", "hadamard"])
def test_lenet(launches, noise):
    """The shapes that training begins with."""
    p = pass_of(noise)
    site = dict(site=1, bias_site=2)
    conv1 = torch.ones(6, 1, 5, 5), torch.ones(6), p
    ops.perturbed_conv2d(torch.ones(64, 1, 28, 28), *conv1, padding=2, **site)
    ops.perturbed_conv2d(torch.ones(32, 1, 28, 28), *conv1, shared=True, **site)
    ops.perturbed_conv2d(torch.ones(32, 1, 28, 28), *conv1, shared=True, relu=True, pool=2, **site)
    ops.perturbed_conv2d(torch.ones(64, 6, 14, 14), torch.ones(16, 6, 5, 5), torch.ones(16), p, **site)
    ops.perturbed_linear(torch.ones(64, 400), torch.ones(120, 400), torch.ones(120), p, **site)
    ops.perturbed_linear(torch.ones(64, 84), torch.ones(10, 84), torch.ones(10), p, **site)
    names = [launch.name for launch in launches]
    assert names == 4 * ["conv2d_kernel"] + ["linear_kernel", "sum_parts_kernel", "linear_kernel"]  # fc1 in parts


@pytest.mark.parametrize(("x", "w"), [(BF16, BF16), (F16, F32), (F32, F32)])
def test_dtypes(launches, x, w):
    site = dict(site=0xFFFFFFFF, bias_site=16)
    p = pass_of("hadamard", queries=2, query=16)
    ops.perturbed_linear(torch.ones(8, 64, dtype=x), torch.ones(48, 64, dtype=w), torch.ones(48, dtype=w), p, **site)
    images = torch.ones(8, 32, 9, 9, dtype=x).to(memory_format=torch.channels_last)
    weight = torch.ones(64, 32, 3, 3, dtype=w).to(memory_format=torch.channels_last)
    ops.perturbed_conv2d(images, weight, None, p, precision="tf32", **site)
    ops.perturbed_embedding(torch.zeros(8, 3, dtype=torch.int64), torch.ones(9, 64, dtype=w), p, site=3)
    assert len(launches) == 3


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 1, 1), (64, 48, 128), (64, 130, 70)])
@pytest.mark.parametrize("noise", ["clt4", "rademacher"])
def test_two_products(launches, rows, n, k, noise):
    x, w = torch.ones(2 * rows, k, dtype=BF16), torch.ones(n, k, dtype=BF16)
    site = dict(site=0xFFFFFFFF, bias_site=1, z_dtype="bfloat16")
    ops.perturbed_linear(x, w, w[:, 0], pass_of(noise), strategy="auto" if k % 8 == 0 else "two_products", **site)
    ops.perturbed_linear(x, w, None, pass_of(noise, signs=(-1,)), shared=True, strategy="two_products", **site)
    assert [launch.name for launch in launches] == ["linear_small_kernel"] * 2


@pytest.mark.parametrize("strategy", ["fused", "two_products"])
def test_relu_of_lenets_layers_is_in_the_kernel(launches, strategy):
    for n, k in ((120, 784), (84, 120)):
        how = dict(site=1, bias_site=2, relu=True, strategy=strategy)
        ops.perturbed_linear(torch.ones(64, k), torch.ones(n, k), torch.ones(n), pass_of(), **how)
    assert len(launches) == 2


@pytest.mark.parametrize(("rows", "n", "k"), [(128, 84, 120), (128, 10, 84), (64, 84, 120), (1, 130, 72)])
@pytest.mark.parametrize("strategy", ["fused", "two_products"])
def test_rows_that_begin_anywhere(launches, strategy, rows, n, k):
    """LeNet's layers in bf16: rows of multiples of 8, and of 4; and an x that begins at two bytes. Nothing spills."""
    x, w = torch.ones(2 * rows * k + 1, dtype=BF16), torch.ones(n, k, dtype=BF16)
    site = dict(site=7, bias_site=1, z_dtype="bfloat16", strategy=strategy)
    ops.perturbed_linear(x[:-1].view(2 * rows, k), w, w[:, 0], pass_of("clt4"), **site)
    if rows == 64:
        ops.perturbed_linear(x[1:].view(2 * rows, k), w, w[:, 0], pass_of("clt4"), **site)
    kernel = "linear_kernel" if strategy == "fused" else "linear_small_kernel"
    assert {launch.name for launch in launches} == {kernel}


@pytest.mark.parametrize(
    ("noise", "rows", "n", "k"), [("clt4", 1, 1, 8), ("hadamard", 300, 130, 72), ("gaussian", 512, 130, 72)]
)
def test_specialized_warps(launches, rows, n, k, noise):
    x, w = torch.ones(2 * rows, k, dtype=BF16), torch.ones(n, k, dtype=BF16)
    site = dict(site=0xFFFFFFFF, bias_site=1, strategy="specialized")
    ops.perturbed_linear(x, w, w[:, 0], pass_of(noise), **site)
    ops.perturbed_linear(x, w, None, pass_of(noise, signs=(-1,)), z_dtype="bfloat16", **site)
    ops.perturbed_linear(x[:rows].half(), w.half(), None, pass_of(noise), shared=True, **site)
    assert [launch.name for launch in launches] == ["linear_specialized_kernel"] * 3
    assert launches[0].grid == launches[2].grid and launches[0].grid[1:] == (1, 1)


def test_slabs(launches):
    """auto takes them for many rows; the kernel starts at a slab's first row."""
    x, w = torch.ones(2 * 1300, 1024, dtype=BF16), torch.ones(1024, 1024, dtype=BF16)
    ops.perturbed_linear(x, w, w[0], pass_of("clt4"), site=1, bias_site=2)
    ops.perturbed_linear(x[:1300], w, None, pass_of("clt4", signs=(-1,)), site=1)
    ops.perturbed_linear(x, w, None, pass_of("clt4"), site=1, z_dtype="bfloat16")
    assert [launch.name for launch in launches] == ["perturb_kernel"] * 7


@pytest.mark.parametrize(
    ("channels", "memory"), [(64, torch.channels_last), (64, torch.contiguous_format), (3, torch.channels_last)]
)
def test_slabs_of_a_convolution(launches, channels, memory):
    """auto takes them for many products; the writer is told where 16 bytes lie together."""
    x = torch.ones(32, channels, 32, 32, dtype=BF16).contiguous(memory_format=memory)
    w = torch.ones(64, channels, 3, 3, dtype=BF16).contiguous(memory_format=memory)
    how = dict(site=1, bias_site=2, padding=1)
    chosen = "auto" if channels == 64 else "slab"
    ops.perturbed_conv2d(x, w, w[:, 0, 0, 0], pass_of("clt4"), strategy=chosen, **how)
    ops.perturbed_conv2d(x[:16], w, None, pass_of("clt4", signs=(0,)), strategy=chosen, **how)
    assert [launch.name for launch in launches] == ["perturb_kernel"] * 3


def test_z_of_sixteen_bits_in_the_fused_kernel(launches):
    x, w = torch.ones(256, 128, dtype=BF16), torch.ones(48, 128, dtype=BF16)
    ops.perturbed_linear(x, w, None, pass_of("clt4"), site=1, z_dtype="bfloat16")
    assert [launch.name for launch in launches] == ["linear_kernel"]


@pytest.mark.parametrize(("signs", "shared"), [((1, -1), False), ((1, -1), True), ((0,), False)])
def test_everything_is_one(launches, signs, shared):
    """Arguments that are one are constants of the kernel."""
    p = pass_of(signs=signs)
    n = 1 if shared else p.groups
    one = torch.ones(1)
    ops.perturbed_linear(torch.ones(n, 1), torch.ones(1, 1), one, p, site=1, bias_site=1, shared=shared)
    ops.perturbed_linear(
        torch.ones(n, 1), torch.ones(1, 1), None, p, site=1, bias_site=1, shared=shared, transposed=True
    )
    ops.perturbed_conv2d(torch.ones(n, 1, 1, 1), torch.ones(1, 1, 1, 1), one, p, site=1, bias_site=1, shared=shared)
    ops.perturbed_conv1d(torch.ones(n, 1, 3), torch.ones(1, 1, 2), one, p, site=1, bias_site=1, shared=shared)
    ops.perturbed_embedding(torch.zeros(n, dtype=torch.int32), torch.ones(1, 1), p, site=1, shared=shared)
    ops.perturb(one, p, site=1)
    assert len(launches) == 6


def test_depthwise_strided(launches):
    x, w = torch.ones(4, 24, 30, 30, dtype=BF16)[:, :, ::2, ::2], torch.ones(24, 1, 3, 3, dtype=BF16)
    ops.perturbed_conv2d(x, w, None, pass_of("clt4"), site=1, groups=24, stride=2, padding=1)
    assert [launch.name for launch in launches] == ["conv2d_kernel"]
    assert launches[0].grid[0] >= 24


def test_update_and_noise(launches):
    params = [torch.ones(5, 7), torch.ones(8, 8, 3, 3, dtype=BF16), torch.ones(1, dtype=F16)]
    key = key_tensor(1, 2)
    layouts = ["matrix", "conv", "matrix"]
    table = update_table(params, [1, 2, 3], layouts, ops.Noise())
    plan = ops.UpdatePlan((1, 2, 3), tuple(layouts), tuple(map(ops.UpdatePlan._address, params)), table)
    versions = [w._version for w in params]
    for coef in (torch.ones(1), torch.ones(2)):
        ops.update_(params, key, coef, sites=[1, 2, 3], plan=plan)
    assert all(w._version > v for w, v in zip(params, versions, strict=True)), "autograd must hear of it"
    ops.update_(params, key.repeat(2, 1), torch.ones(2, 1), sites=[1, 2, 3], plan=plan)
    rounded = (False, True, True)
    plan = replace(plan, table=update_table(params, [1, 2, 3], layouts, ops.Noise(), rounded=rounded), rounded=rounded)
    ops.update_(params, key, torch.ones(1), sites=[1, 2, 3], plan=plan)
    fold_key(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), key)
    ops.materialize((3, 5), seed=1, step=2, site=3, noise="sparse", p_zero=0.5)
    ops.materialize((1,), seed=1, step=2, site=3, noise="sparse_int8")
    assert [launch.name for launch in launches] == ["update_kernel"] * 4 + ["fold_key_kernel"] + ["noise_kernel"] * 2


@pytest.mark.parametrize("integer", [False, True])
def test_tables_of_fake_parameters_ask_for_no_address(integer):
    """As plans of memory make them of a model on a GPU: torch warns where a fake tensor is asked where it is."""
    from ezo_kernels.ops.int8_update import Int8UpdatePlan
    from ezo_kernels.ops.update import UpdatePlan

    with warnings.catch_warnings(), FakeTensorMode():
        warnings.simplefilter("error")
        params = [torch.empty(6, 16, dtype=torch.int8 if integer else torch.float32, device="cuda")]
        if integer:
            plan = Int8UpdatePlan.build(params, [1], ["matrix"])
        else:
            plan = UpdatePlan.build(params, [1], ["matrix"], ops.Noise("gaussian"))
        assert plan.fits(params)


@pytest.mark.parametrize(("dtype", "bias"), [(F32, True), (F32, False), (F16, True), (BF16, False)], ids=str)
def test_the_heads_layer_of_all_groups(launches, dtype, bias):
    """Without noise the kernel is given no key and no eps."""
    for rows, n, k in ((33, 84, 120), (5, 3, 7)):
        x, w = torch.ones(4 * rows, k, dtype=dtype), torch.ones(n, k, dtype=dtype)
        grouped_linear(x, w, w[:, 0].contiguous() if bias else None, 4)
    assert [launch.name for launch in launches] == ["linear_kernel"] * 2


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_batch_norm(launches, dtype):
    for shape in ((4, 64, 16, 16), (2, 1, 1, 2)):
        x, affine = torch.ones(shape, dtype=dtype), torch.ones(2, shape[1], dtype=dtype)
        batch_norm(x, affine, affine[0], 2, 1e-5)
        _, mean, var = batch_norm(x, None, None, 1, 1e-5)
        running = torch.zeros(shape[1]), torch.ones(shape[1])
        move_running_statistics(*running, mean, var, torch.tensor(True), 0.1)
    pair = ["batch_norm_parts_kernel", "batch_norm_kernel"]
    assert [launch.name for launch in launches] == 2 * [*pair, *pair, "running_statistics_kernel"]


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_cross_entropy(launches, dtype):
    for rows, classes in ((32, 10), (1, 1), (300, 1000)):
        logits = torch.ones(2 * rows, classes, dtype=dtype, requires_grad=True)
        ops.grouped_cross_entropy(logits, torch.zeros(rows, dtype=torch.int64), 2).sum().backward()
    one, many = ["cross_entropy_kernel"], ["cross_entropy_kernel", "cross_entropy_mean_kernel"]
    backward = ["cross_entropy_backward_kernel"]
    assert [launch.name for launch in launches] == 2 * (one + backward) + many + backward


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_rows_drawn_by_importance(launches, dtype):
    for rows, classes in ((128, 10), (4096, 3)):
        logits, target = torch.ones(rows, classes, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
        drawn, weight = importance_rows(logits, target, 16, key_tensor(0, 0))
        cross_entropy_and_gradient(logits[:16], target[:16], torch.ones(1), weight=weight)
    names = ["importance_score_kernel", "importance_draw_kernel", "cross_entropy_kernel"]
    assert [launch.name for launch in launches] == 2 * names


@pytest.mark.parametrize(
    ("noise", "dtype"), [("gaussian", F32), ("gaussian", BF16), ("hadamard", F32), ("sparse", F32)]
)
def test_noise_of_outputs(launches, noise, dtype):
    for rows, columns in ((32, 120), (3, 1)):
        for signs, shared in (((1, -1), False), ((1,), True)):
            p = pass_of(noise, queries=2, signs=signs)
            y = torch.ones((1 if shared else p.groups) * rows, columns, dtype=dtype)
            ops.perturb_outputs(y, p, site=1, shared=shared)
        ops.output_errors(torch.ones(2, rows), p.key, (rows, columns), site=1, noise=p.noise)
    assert [launch.name for launch in launches] == 2 * [*2 * ["perturb_outputs_kernel"], "output_errors_kernel"]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("head", [["fc3"], ["fc2", "fc3"]], ids=str)
def test_a_whole_step_with_a_head(launches, monkeypatch, head, dtype):
    """LeNet-5 as a GPU takes it; but for the trunk's update, whose table holds addresses of a GPU."""
    monkeypatch.setattr(_library, "bound_by_launches", lambda device: True)
    opt = ezo.ElasticZO(ezo.convert_(ezo.models.LeNet5().to(dtype), head=head))
    opt._checks.off = True  # nothing runs that could be looked at
    versions = [p._version for p in opt.head]
    opt.train_step(torch.ones(32, 1, 28, 28, dtype=dtype), torch.arange(32) % 10)
    names = [launch.name for launch in launches]
    backward = ["grouped_linear_backward_kernel"] * len(head)
    layers = [name for name in names if name in ("conv2d_kernel", "linear_kernel", "linear_small_kernel")]
    assert names[0] == "fold_key_kernel" and len(layers) == 5
    assert names[names.index("cross_entropy_kernel") :] == ["cross_entropy_kernel", *backward, "coefficients_kernel"]
    assert all(p._version > version for p, version in zip(opt.head, versions, strict=True)), "autograd must hear of it"


def test_a_grid_of_one_axis_for_rows_of_any_length(launches):
    """64 channels of 512 x 512 are 65,536 blocks of columns, and CUDA's second axis ends at 65,535."""
    dropout_mask(1, 64 * 512 * 512, 0.5, key_tensor(1, 2), site=1 << 31)
    assert launches[0].grid == (65536, 1, 1)


def test_too_many_queries_for_an_axis_are_refused(launches):
    p = pass_of("clt4", queries=1 << 16)
    with pytest.raises(NotImplementedError, match="perturbed_embedding: 65536"):
        ops.perturbed_embedding(torch.zeros(1, 1, dtype=torch.int64), torch.ones(9, 8), p, site=3, shared=True)
    with pytest.raises(NotImplementedError, match="perturbed_conv2d: 65536"):
        ops.perturbed_conv2d(
            torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), None, p, site=3, shared=True, strategy="fused"
        )
