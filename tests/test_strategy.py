"""The strategy of a linear layer or a convolution: a pure function, its table, and what each strategy computes on a CPU."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import warnings
from collections import UserDict

import pytest
import torch

import ezo_kernels as ezo
from ezo_kernels import ops
from ezo_kernels.ops import _strategy
from ezo_kernels.ops._strategy import choose, choose_conv
from ezo_kernels.ops.noise import NOISES, key_tensor

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SITE = {"site": 5, "bias_site": 6}


def name(rows=16, shape=(4096, 4096), x=BF16, w=BF16, noise="clt4", arch=90, z_dtype="bfloat16", **options):
    return choose(rows, shape, x, w, noise, arch=arch, z_dtype=z_dtype, **options).name


def test_regimes():
    assert [name(rows) for rows in (1, 64, 65, 285)] == ["two_products", "two_products", "fused", "fused"]
    assert [name(rows) for rows in (286, 512, 8192)] == ["slab"] * 3
    assert [name(rows, noise="gaussian", z_dtype="float32") for rows in (16, 167, 168)] == ["fused", "fused", "slab"]
    assert [name(rows, (1024, 1024)) for rows in (512, 732, 733)] == ["fused", "fused", "slab"]
    whole = {"x": F32, "w": F32, "z_dtype": "float32"}
    assert [name(rows, **whole) for rows in (16, 139, 140)] == ["fused", "fused", "slab"]
    tf32 = {**whole, "precision": "tf32", "torch_precision": "tf32"}
    assert [name(rows, **tf32) for rows in (16, 343, 344)] == ["fused", "fused", "slab"]
    assert name(8192, **{**tf32, "torch_precision": "ieee"}) == "fused"
    assert [name(rows, arch=80) for rows in (32, 33)] == ["two_products", "fused"]
    assert [name(rows, arch=80, noise="gaussian") for rows in (16, 17)] == ["two_products", "fused"]


def test_two_products_only_with_the_z_of_the_update():
    assert name(z_dtype="float32") == "fused" and name(z_dtype="float16") == "fused"
    assert name(z_dtype="float32", noise="rademacher") == "two_products"
    assert name(w=F32) == "fused" and name(transposed=True) == "fused"
    assert name(regular=False) == "fused" and name(regular=False, asked="two_products") == "two_products"
    assert name(signs=(0,)) == "fused" and name(signs=(1,)) == "two_products"
    with pytest.raises(NotImplementedError, match=r"stored \[K, N\].*would be rounded.*z of this site"):
        name(w=F32, transposed=True, z_dtype="float32", asked="two_products")
    with pytest.raises(NotImplementedError, match="round it to tf32"):
        name(x=F32, w=F32, z_dtype="float32", precision="tf32", asked="two_products")
    assert name(x=F32, w=F32, z_dtype="float32", asked="two_products") == "two_products"


@pytest.mark.parametrize("arch", [70, 80, 86, 89, 90, 100, 103, 120, 130])
@pytest.mark.parametrize("noise", [n for n in NOISES if n != "sparse_int8"])
def test_unseen_shapes_get_a_sound_choice(arch, noise):
    for rows in (1, 7, 63, 100, 1 << 20):
        chosen = choose(rows, (4096, 4096), BF16, BF16, noise, arch=arch, z_dtype="bfloat16")
        assert chosen.name in (("fused", "two_products") if rows < 64 else ("slab",) if rows > 100 else ("fused",))
        parts = chosen.workspace_bytes / (4 * 2 * rows * 4096)  # of both signs, in fp32
        of_parts = chosen.name != "slab" and parts in (0, 2, 3, 4, 5, 6, 7, 8)
        assert of_parts or chosen.workspace_bytes == (32 << 20 if chosen.name == "slab" else 0)
        with pytest.raises(dataclasses.FrozenInstanceError):
            chosen.name = "other"


def test_a_cpu_takes_the_reference_unless_asked():
    assert name(arch=0) == "fused" and name(arch=0, asked="two_products") == "two_products"
    assert name(1 << 20, arch=0) == "fused" and name(arch=0, asked="slab") == "slab"


def test_regular():
    x, w = torch.ones(4, 24), torch.ones(6, 24)
    assert _strategy.regular(x, w) and _strategy.regular(torch.ones(2, 3, 24), w)
    assert not _strategy.regular(x[:, :20], w[:, :20]) and not _strategy.regular(torch.ones(24, 4).t(), w)
    assert not _strategy.regular(x, torch.ones(6, 25)[:, :24])


def test_the_hash_is_of_the_shipped_file_and_of_the_rules(monkeypatch):
    file = pathlib.Path(_strategy.__file__).with_name("strategies.json")
    whole = file.read_bytes() + f"choice {_strategy.VERSION}".encode()
    assert _strategy.strategy_hash() == hashlib.sha256(whole).hexdigest()[:16]
    monkeypatch.setattr(_strategy, "VERSION", _strategy.VERSION + 1)
    assert _strategy.strategy_hash.__wrapped__() != _strategy.strategy_hash()


def conv(positions=128 * 32 * 32, shape=(64, 64, 3, 3), groups=1, x=BF16, noise="clt4", arch=90, **options):
    return choose_conv(positions, shape, groups, x, noise, arch=arch, **options)


def test_regimes_of_convolutions():
    assert conv().name == "slab" and conv(x=F32, noise="gaussian").name == "slab"
    lenet = ((32 * 24 * 24, (6, 1, 5, 5)), (32 * 8 * 8, (16, 6, 5, 5)))
    assert [conv(*layer).name for layer in lenet] == ["fused", "fused"]
    products = 340_000_000  # of clt4: padded to 16 outputs a conv group and 4 channels
    assert [conv(n, (1, 1, 5, 5)).name for n in (products // 1600, products // 1600 - 1)] == ["slab", "fused"]
    assert [conv(n, (32, 1, 5, 5), 32).name for n in (products // 51200 + 1, products // 51200)] == ["slab", "fused"]
    at = [conv(4000, (100, 100, 3, 3), noise=noise).name for noise in ("gaussian", "clt4", "rademacher")]
    assert at == ["slab", "slab", "fused"]
    assert conv(signs=(0,)).name == "slab", "a plain pass has the bits of eps = 0"
    assert conv(asked="fused").name == "fused" and conv(1, asked="slab").name == "slab"


@pytest.mark.parametrize(("queries", "signs"), [(1, (1, -1)), (3, (1, -1)), (1, (-1,))])
def test_positions_are_those_of_one_group(monkeypatch, queries, signs):
    seen, of = [], _strategy.choose_conv
    monkeypatch.setattr(_strategy, "choose_conv", lambda *a, **k: (seen.append((*a, k["signs"])), of(*a, **k))[1])
    p = ops.Perturbation(key_tensor(1, 2), torch.ones(1), queries=queries, signs=signs)
    x, w = torch.ones(3 * p.groups, 4, 7, 8), torch.ones(6, 2, 3, 3)
    ops.perturbed_conv2d(x, w, None, p, groups=2, stride=2, **SITE)
    assert seen == [(3 * 3 * 3, (6, 2, 3, 3), 2, F32, "gaussian", signs)]


def test_workspace_of_convolutions():
    weight = 64 * 64 * 9 * 2
    assert conv().workspace_bytes == 2 * weight and conv(signs=(-1,)).workspace_bytes == weight
    assert conv(shape=(1024, 1024, 3, 3)).workspace_bytes == 2 * 512 * 9216 * 2 <= 32 << 20
    assert conv(asked="fused").workspace_bytes == 0


@pytest.mark.parametrize("arch", [70, 80, 86, 89, 90, 100, 103, 120, 130])
@pytest.mark.parametrize("noise", [n for n in NOISES if n != "sparse_int8"])
def test_unseen_convolutions_get_a_sound_choice(arch, noise):
    for positions, shape, groups in ((1, (1, 1, 1, 1), 1), (1 << 30, (3, 7, 11, 2), 1), (7, (4096, 4096, 7, 7), 1)):
        for x in (F32, F16, BF16):
            chosen = conv(positions, shape, groups, x, noise, arch)
            assert chosen.name in ("fused", "slab") and chosen.reason
            assert 0 <= chosen.workspace_bytes <= 32 << 20
            assert bool(chosen.workspace_bytes) == (chosen.name == "slab")


def test_convolutions_refuse_what_they_have_not():
    with pytest.raises(NotImplementedError, match="linear layers alone have a kernel of two products"):
        conv(asked="two_products")
    with pytest.raises(ValueError, match="strategy must be one of"):
        conv(asked="fast")
    with pytest.raises(NotImplementedError, match="torch's, which is ieee now, not tf32"):
        conv(x=F32, precision="tf32", asked="slab")
    assert "torch's, which is ieee" in conv(x=F32, precision="tf32").reason
    assert conv(arch=0).name == "fused" and conv(arch=0, asked="slab").name == "slab"


def test_reasons_say_why():
    def why(*args, **options):
        return choose(*args, BF16, BF16, "clt4", arch=90, **options).reason

    square = (4096, 4096)
    assert why(16, square, z_dtype="bfloat16") == "16 rows a sign, at most 64"
    assert "z of this site is float32" in why(16, square)
    assert why(100, square) == "100 rows a sign: more than 64, fewer than 256"
    assert why(1300, square) == "1300 rows a sign, at least 256; beyond those 1.8e+10 products, at least 5.0e+08"
    assert why(1300, (120, 84)) == "no slab: 1.1e+07 products beyond those of 256 rows, fewer than 5.0e+08"
    assert choose(100, square, F32, F32, "clt4", arch=90).reason == "100 rows a sign: fewer than 128"
    assert why(1300, square, transposed=True) == "no slab: the weight is stored [K, N]"
    assert why(16, square, asked="fused") == why(16, square, asked="slab") == "asked for by name"
    assert why(16, square, signs=(0,)) == "no sign is perturbed"
    assert choose(16, square, BF16, BF16, "clt4", arch=0).reason == "the reference of a CPU"
    assert conv().reason == "4.8e+09 products a sign, at least 3.4e+08"


def test_unknown_names():
    x, w = torch.ones(2, 3), torch.ones(4, 3)
    p = ops.Perturbation(key_tensor(1, 2), torch.ones(1))
    with pytest.raises(ValueError, match="strategy must be one of auto, fused"):
        ops.perturbed_linear(x, w, None, p, strategy="fast", **SITE)
    with pytest.raises(ValueError, match="strategy must be one of"):
        name(asked="fast")
    with pytest.raises(TypeError, match="z_dtype must be 'float32' or x's own"):
        ops.perturbed_linear(x, w, None, p, z_dtype="bfloat16", **SITE)


def _layer(dtype, noise, eps, strategy, shared=False, signs=(1, -1), bias=True):
    generator = torch.Generator().manual_seed(1)
    p = ops.Perturbation(key_tensor(1, 2), torch.tensor([eps]), ops.Noise(noise), queries=2, signs=signs)
    x = torch.randn(5 if shared else 5 * p.groups, 70, generator=generator).to(dtype)
    w = torch.randn(40, 70, generator=generator).to(dtype)
    b = torch.randn(40, generator=generator).to(dtype) if bias else None
    z_dtype = "float32" if dtype == F32 else str(dtype).removeprefix("torch.")
    y = ops.perturbed_linear(x, w, b, p, shared=shared, strategy=strategy, z_dtype=z_dtype, precision="ieee", **SITE)
    return x, w, b, p, y.double()


def _exact(x, w, b, p, z_dtype, shared):
    """fp64, with the z of the contract rounded as the site says."""
    out = []
    for g in range(p.groups):
        q, sign = g // len(p.signs), p.signs[g % len(p.signs)]
        rows = x if shared else x.chunk(p.groups)[g]
        z = ops.materialize(w.shape, seed=1, step=2, site=5, query=q, noise=p.noise.name).to(z_dtype).double()
        y = rows.double() @ (w.double() + sign * p.eps.double() * z).T
        if b is not None:
            y += b.double() + sign * p.eps.double() * ops.materialize(
                b.shape, seed=1, step=2, site=6, query=q, noise=p.noise.name
            ).double()  # fmt: skip
        out.append(y)
    return torch.cat(out)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("signs", [(1, -1), (1,), (-1,)], ids=str)
@pytest.mark.parametrize("strategy", ["fused", "two_products", "slab"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_strategies_compute_the_contract(dtype, strategy, signs, shared):
    for noise in ("gaussian", "hadamard"):
        x, w, b, p, y = _layer(dtype, noise, 0.3, strategy, shared, signs, bias=noise == "gaussian")
        want = _exact(x, w, b, p, dtype, shared)
        # fused and slab round W + eps z (and on a CPU the bias), two_products nothing but the output
        limit = {F32: 1e-6, BF16: 2**-8, F16: 2**-11}[dtype] * (1.01 if strategy == "two_products" else 4)
        size = (x.double().abs() @ w.double().abs().T).max() if strategy != "two_products" else want.abs().max()
        floor = 1e-5 if dtype == F32 else 0.0
        assert (y - want).abs().max() <= limit * size + floor


@pytest.mark.parametrize("strategy", ["fused", "two_products", "slab"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_eps_zero_gives_equal_groups(dtype, strategy):
    x, w, b, p, _ = _layer(dtype, "clt4", 0.0, strategy)
    rows = x.chunk(p.groups)[0].repeat(p.groups, 1)
    z_dtype = "float32" if dtype == F32 else "bfloat16"
    y = ops.perturbed_linear(rows, w, b, p, strategy=strategy, z_dtype=z_dtype, precision="ieee", **SITE).chunk(
        p.groups
    )
    assert all(torch.equal(y[0], part) for part in y)


def test_z_is_rounded_where_the_site_says():
    """x = identity shows W + eps z itself: at eps = 1 and W = 0 it is z."""
    p = ops.Perturbation(key_tensor(1, 2), torch.ones(1), signs=(1,))
    w = torch.zeros(24, 16, dtype=BF16)
    z = ops.materialize(w.shape, seed=1, step=2, site=5)
    for strategy in ("fused", "two_products", "slab"):
        y = ops.perturbed_linear(torch.eye(16, dtype=BF16), w, None, p, strategy=strategy, z_dtype="bfloat16", **SITE)
        assert torch.equal(y.T, z.to(BF16))


def test_converted_layers_take_the_strategy(monkeypatch):
    count, of = [], ops.linear._two_products_cpu
    monkeypatch.setattr(ops.linear, "_two_products_cpu", lambda *args: (count.append(1), of(*args)))
    x, y = torch.randn(8, 6), torch.zeros(8, dtype=torch.long)
    losses = {}
    for strategy in ("fused", "two_products"):
        torch.manual_seed(0)
        model = ezo.convert_(
            torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3)), head=0, strategy=strategy
        )
        opt = ezo.ElasticZO(model, eps=0.1, seed=3)
        opt.train_step(x, y)
        losses[strategy] = opt.losses.clone()
        assert bool(count) == (strategy == "two_products")
    torch.testing.assert_close(losses["fused"], losses["two_products"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="strategy must be one of"):
        ezo.convert_(torch.nn.Linear(2, 2), strategy="fast")
    with pytest.raises(ValueError, match="integer layers"):
        ezo.convert_(torch.nn.Linear(2, 2), precision="int8", strategy="fused")


def test_a_layer_that_cannot_take_it_says_why():
    model = ezo.convert_(torch.nn.Linear(6, 3), strategy="two_products")
    opt = ezo.ElasticZO(model, eps=0.1, noise="clt4")
    with (
        torch.autocast("cpu", BF16),
        pytest.raises(NotImplementedError, match="weight is torch.float32.*z of this site is float32"),
    ):
        opt.train_step(torch.randn(8, 6), torch.zeros(8, dtype=torch.long))


def test_fused_rounds_z_before_it_meets_the_weight():
    p = ops.Perturbation(key_tensor(1, 2), torch.tensor([0.3]), signs=(1,))
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(BF16)
    z = ops.materialize(w.shape, seed=1, step=2, site=5)
    y = ops.perturbed_linear(torch.eye(64, dtype=BF16), w, None, p, strategy="fused", z_dtype="bfloat16", **SITE)
    rounded, whole = ((w.float() + of * p.eps).to(BF16) for of in (z.to(BF16).float(), z))
    assert torch.equal(y.T, rounded) and not torch.equal(rounded, whole)


# ---- what is reported


def test_a_state_says_by_which_strategies_it_was_made(monkeypatch):
    def optimizer():
        return ezo.ElasticZO(ezo.convert_(torch.nn.Linear(6, 3)))

    state = optimizer().state_dict()
    assert state["strategies"] == _strategy.strategy_hash()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer().load_state_dict(state)
        optimizer().load_state_dict({k: v for k, v in state.items() if k != "strategies"})
    with pytest.warns(RuntimeWarning, match="made with the strategies 0123"):
        optimizer().load_state_dict({**state, "strategies": "0123"})


class Mixed(torch.nn.Module):
    """A convolution, batch norm, two linear layers and one that is called twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(32, 64, 3, padding=1), torch.nn.BatchNorm2d(64)
        self.line, self.wide = torch.nn.Conv1d(64, 8, 3), torch.nn.Linear(1024, 1024)
        self.twice, self.head = torch.nn.Linear(1024, 1024), torch.nn.Linear(1024, 5)

    def forward(self, x):
        y = self.norm(self.conv(x)).flatten(2)
        y = self.wide(self.line(y)[..., :1024])
        return self.head(self.twice(self.twice(y.mean(1)).repeat(1, 1)))


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_summary_shows_what_a_pass_takes(noise, monkeypatch):
    """The same names as the operators choose for, seen from inside a pass with a GPU's architecture."""
    model = Mixed().bfloat16()
    model.norm.float()
    ezo.convert_(model, head=["head"])
    x = torch.randn(6, 32, 64, 64).bfloat16()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    table = ezo.summary(model, x, noise=noise, arch=90)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "batch norm's statistics moved"
    assert not any(m._forward_hooks for m in model.modules())
    shown = {row.name: (row.strategy, row.workspace_bytes) for row in table.rows if row.strategy}
    taken = []
    for module in (ops.linear, ops.conv2d):
        of = module.strategy_for

        def asked(*args, _of=of):
            taken.append(_of(*args[:4], 90, *args[5:]))
            return _of(*args)

        monkeypatch.setattr(module, "strategy_for", asked)
    opt = ezo.ElasticZO(model, noise=noise, mode="stacked")
    opt._checks.off = True  # one pass and no check
    opt.train_step(x, torch.zeros(6, dtype=torch.long))
    names = ["conv", "line", "wide", "twice"]
    assert [(t.name, t.workspace_bytes) for t in taken[:4]] == [shown[name] for name in names]
    assert list(shown) == names and len(taken) == 5
    assert {t.name for t in taken} == {"fused", "slab", "two_products"} or noise == "gaussian"
    text = str(table)
    assert f"workspace of perturbed weights, or of a query's parts: {table.workspace_bytes:,} bytes at most" in text
    assert "rows a sign" in text and "products a sign" in text
    assert table.workspace_bytes == max(held for _, held in shown.values())


def test_summary_of_other_samples_and_refusals():
    model = ezo.convert_(torch.nn.Linear(64, 32), strategy="slab")
    for sample in (torch.ones(4, 64), (torch.ones(4, 64),), {"input": torch.ones(4, 64)}):
        (row,) = ezo.summary(model, sample).rows
        assert (row.strategy, row.workspace_bytes) == ("slab", 2 * 16 * 64 * 4) and "by name" in row.reason
    assert [row.strategy for row in ezo.summary(model).rows] == [""] and "workspace" not in str(ezo.summary(model))
    mixed = ezo.convert_(torch.nn.Linear(64, 32), strategy="two_products")
    with torch.autocast("cpu", dtype=BF16):
        (row,) = ezo.summary(mixed, torch.ones(4, 64), arch=90).rows
    assert row.strategy == "refused" and "the weight is torch.float32 and x torch.bfloat16" in row.reason
    with pytest.raises(ValueError, match="leave the sample out"):
        ezo.summary(ezo.convert_(torch.nn.Linear(64, 32), precision="int8"), torch.ones(4, 64))
    with pytest.raises(ValueError, match="noise"):
        ezo.summary(model, noise="normal")
    with pytest.raises(NotImplementedError, match="integer layers"):
        ezo.summary(model, noise="sparse_int8")


@pytest.mark.parametrize("sample, key", [([torch.ones(4, 64), None], 0), (UserDict(x=torch.ones(4, 64)), "x")])
def test_summary_of_a_list_or_a_mapping_that_is_the_one_argument(sample, key):
    class Net(torch.nn.Sequential):
        def forward(self, batch):
            return self[0](batch[key])

    (row,) = ezo.summary(ezo.convert_(Net(torch.nn.Linear(64, 32)), strategy="slab"), sample).rows
    assert (row.strategy, row.workspace_bytes) == ("slab", 2 * 16 * 64 * 4)


@pytest.mark.parametrize(
    "arguments, error, said",
    [
        (dict(sample=[torch.zeros(2, 3)]), TypeError, "sample must be .*, got list"),
        (dict(sample=torch.zeros(2, 3).numpy()), TypeError, "sample must be .*, got ndarray"),
        (dict(sample=ezo.quantize(torch.zeros(2, 3))), TypeError, "sample must be .*, got Int8Tensor"),
        (dict(sample=[torch.zeros(2, 3), torch.zeros(2, 3).numpy()]), TypeError, "got list with ndarray in it"),
        (dict(sample=UserDict(x=[torch.zeros(2, 3), 3])), TypeError, "got UserDict with int in it"),
        (dict(sample=torch.zeros(2, 3), arch="90"), TypeError, "arch must be an int, got str"),
        (dict(sample=torch.zeros(2, 3), arch=-1), ValueError, "arch must be in"),
    ],
)
def test_summary_refuses(arguments, error, said):
    model = ezo.convert_(torch.nn.Sequential(torch.nn.Linear(3, 4)), head=0)
    with pytest.raises(error, match=said):
        ezo.summary(model, **arguments)
