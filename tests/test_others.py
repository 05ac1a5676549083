"""Other people's models: fused equals materialised noise, or a refusal that says what to do."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from tests import zoo

EPS = 1e-2


def seeded(make):
    torch.manual_seed(0)
    return make()


def images(rows: int = 4):
    return torch.randn(rows, 3, 16, 16), torch.randint(0, 5, (rows,))


def materialised_losses(model, run, sites, queries, noise="gaussian", seed=3):
    """Losses of every group from plain torch: the parameters replaced by w + sign eps z, in another copy of the model."""
    names = {n: s for s in sites for n in s.names}
    state = {k: v.detach() for k, v in model.named_parameters(remove_duplicate=False)}
    losses = []
    for q in range(queries):
        for sign in (1, -1):
            moved = {}
            for n, w in state.items():
                moved[n] = w
                if n in names:
                    s = names[n]
                    z = ezo.ops.materialize(
                        s.shape, seed=seed, step=0, site=s.site, query=q, layout=s.layout, noise=noise
                    )
                    moved[n] = w + sign * EPS * z
            holder = copy.deepcopy(model)
            with torch.no_grad():
                for n, p in holder.named_parameters(remove_duplicate=False):
                    p.copy_(moved[n])
                losses.append(run(holder).float())
    return torch.stack(losses)


CASES = {
    "resnet18": (zoo.ResNet18, ["layer4", "fc"], images, "stacked"),
    "resnet18-int": (zoo.ResNet18, 2, images, "stacked"),
    "resnet18-pure": (zoo.ResNet18, 0, images, "stacked"),
    "vit": (zoo.ViT, ["heads"], images, "sequential"),
    "encoder": (zoo.Encoder, ["classify"], lambda: (torch.randn(4, 6, 16), torch.randint(0, 5, (4,))), "stacked"),
    "siamese": (zoo.Siamese, ["out"], lambda: ((torch.randn(4, 12), torch.randn(4, 12)), torch.randint(0, 2, (4,))), "stacked"),
    "gpt-ids": (
        lambda: zoo.GPT(tied=True).eval(),
        0,
        lambda: (torch.randint(0, 37, (4, 9)), torch.randint(0, 37, (4, 9))),
        "stacked",  # wpe(arange) is every row's
    ),
    "gpt-position-ids": (
        lambda: zoo.GPT(tied=False, one_row=True).eval(),
        ["lm_head"],
        lambda: (torch.randint(0, 37, (4, 8)), torch.randint(0, 37, (4, 8))),
        "stacked",
    ),
    "gpt-of-one-row": (
        lambda: zoo.GPT().eval(),
        0,
        lambda: (torch.randint(0, 37, (1, 16)), torch.randint(0, 37, (1, 16))),
        "stacked",
    ),
    "gpt-as-long-as-the-rows": (
        lambda: zoo.GPT().eval(),
        0,
        lambda: (torch.randint(0, 37, (2, 8)), torch.randint(0, 37, (2, 8))),
        "sequential",  # wpe(arange(8)) may be the 8 rows of all groups
    ),
}  # fmt: skip


def test_workspace_is_counted():
    """Norm affine of a ResNet: a copy a group when stacked, one when not; fused layers need none."""
    model = ezo.convert_(seeded(zoo.ResNet18), head=["fc"])
    affine = sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert ezo.ElasticZO(model, queries=3, mode="stacked").workspace_bytes == 6 * 4 * affine
    assert ezo.ElasticZO(model, queries=3, mode="sequential").workspace_bytes == 4 * affine
    assert ezo.ElasticZO(ezo.convert_(seeded(ezo.models.LeNet5))).workspace_bytes == 0


def per_token(out, y):
    return F.cross_entropy(out.flatten(0, -2), y.flatten())


@pytest.mark.parametrize("mode", ["auto", "sequential"])
@pytest.mark.parametrize("case", CASES)
def test_losses_equal_materialised_noise(case, mode):
    make, head, data, auto = CASES[case]
    model = seeded(make)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    plain = copy.deepcopy(model)
    x, y = data()
    ezo.convert_(model, head=head)
    assert list(model.state_dict()) == list(plain.state_dict())
    opt = ezo.ElasticZO(model, eps=EPS, seed=3, queries=2, mode=mode)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.train_step(x, y, loss_fn=per_token)
    assert [str(w.message).partition(":")[0] for w in caught] == (
        ["the model does not treat the rows of a batch apart (sequence first, or a reduction over the batch?)"]
        if (auto, mode) == ("sequential", "auto") and "gpt" in case
        else []
    )
    assert opt.mode == (auto if mode == "auto" else mode)
    run = lambda m: per_token(m(*x) if isinstance(x, tuple) else m(x), y)  # noqa: E731
    want = materialised_losses(plain, run, model._ezo.manifest, 2)
    torch.testing.assert_close(opt.losses, want, rtol=2e-5, atol=2e-6)
    assert opt.g.abs().max() > 1e-3


def test_hugging_face_style_loss_in_the_model():
    """``model(**batch)`` that returns its own loss, tied embeddings, dropout on: by closure, and stacked on the logits."""
    model = seeded(zoo.GPT)
    ids = torch.randint(0, 37, (4, 9))
    ezo.convert_(model)
    opt = ezo.ElasticZO(model, eps=EPS, seed=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    opt.step(lambda: model(ids, labels=ids)["loss"])
    assert all(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model.wte.weight, model.lm_head.weight)
    shift = lambda out, y: F.cross_entropy(out[:, :-1].flatten(0, 1), y[:, 1:].flatten())  # noqa: E731
    opt.train_step({"input_ids": ids}, ids, loss_fn=shift)
    assert opt.mode == "stacked"


def test_dropout_masks_are_the_same_for_both_signs_and_fresh_each_step():
    model = seeded(zoo.DropoutMLP)
    x, y = torch.randn(8, 12), torch.randint(0, 5, (8,))
    seen = []
    model.net[2].register_forward_hook(lambda m, a, out: seen.append((out != 0) | (a[0] == 0)))
    ezo.convert_(model, head=["net.7"])
    opt = ezo.ElasticZO(model, queries=2, mode="stacked", eps=1e-6)
    opt.train_step(x, y)
    a = seen[-1 - 4].chunk(4)  # the stacked pass; the first step's check then ran each group alone
    assert torch.equal(a[0], a[1]) and torch.equal(a[2], a[3]) and not torch.equal(a[0], a[2])
    assert 0.3 < a[0].float().mean() < 0.9
    opt.train_step(x, y)
    assert not torch.equal(seen[-1].chunk(4)[0], a[0])
    assert abs(opt.losses[0] - opt.losses[1]) < 1e-3 < abs(opt.losses[0] - opt.losses[2])
    model.eval()
    opt.train_step(x, y)
    assert seen[-1].all()


def test_sequence_first_is_found_out():
    x, y = torch.randn(4, 6, 16), torch.randint(0, 5, (4,))
    model = ezo.convert_(seeded(lambda: zoo.Encoder(batch_first=False)), head=["classify"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="mode='sequential'"):
        ezo.ElasticZO(model, mode="stacked").train_step(x, y)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    opt = ezo.ElasticZO(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.train_step(x, y)
    assert opt.mode == "sequential" and any("sequential" in str(w.message) for w in caught)


class Centred(nn.Module):
    """Takes the mean over the batch: a stacked pass would mix its groups."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.a(x)
        return self.b(h - h.mean(0, keepdim=True))


def test_a_first_step_that_is_not_finite_has_checked_nothing():
    x, y = torch.randn(4, 4), torch.randint(0, 3, (4,))
    opt = ezo.ElasticZO(ezo.convert_(seeded(Centred)), mode="stacked")
    opt.train_step(x * float("nan"), y)
    assert opt.skipped.item() == 1
    with pytest.raises(ValueError, match="mode='sequential'"):
        opt.train_step(x, y)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_rows_are_compared_where_an_output_is_no_number(value):
    """A class without a chance, or one that no target has: the losses are finite, and the groups are mixed all the same."""

    class Masked(Centred):
        def forward(self, x):
            logits = super().forward(x)
            aside = (logits * 0).detach() + torch.tensor([0.0, 0.0, -value])
            return logits[:, :2], aside

    x, y = torch.randn(4, 4), torch.randint(0, 2, (4,))
    with pytest.raises(ValueError, match="mode='sequential'"):
        opt = ezo.ElasticZO(ezo.convert_(seeded(Masked)), mode="stacked")
        opt.train_step(x, y, lambda out, y: F.cross_entropy(out[0], y))


def test_random_attention_is_refused_by_name():
    x, y = torch.randn(4, 6, 16), torch.randint(0, 5, (4,))
    model = ezo.convert_(seeded(lambda: zoo.Encoder(dropout=0.1)), head=["classify"])
    with pytest.raises(ValueError, match=r"self_attn.*MultiheadAttention"):
        ezo.ElasticZO(model).train_step(x, y)


class RawTie(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.mid, self.spare = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids):
        return F.linear(self.mid(self.emb(ids)), self.emb.weight)


def test_raw_reads_and_unvisited_parameters_are_refused_by_name():
    model = ezo.convert_(seeded(RawTie))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = torch.randint(0, 11, (4, 3))
    opt = ezo.ElasticZO(model)
    with pytest.raises(ValueError, match=r"'emb.weight' \(by linear\)") as error:
        opt.train_step(ids, ids, loss_fn=per_token)
    assert "'spare.bias', 'spare.weight'" in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert opt.step_count.item() == 0


def test_trunk_after_head_is_refused_by_name():
    model = ezo.convert_(seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))), head=["1"])
    with pytest.raises(ValueError, match="^2: .*requires grad"):
        ezo.ElasticZO(model).train_step(torch.randn(3, 4), torch.zeros(3, dtype=torch.long))


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.fc(x)


def test_written_buffers_are_refused_by_name():
    model = ezo.convert_(seeded(Stateful))
    with pytest.raises(ValueError, match="calls"):
        ezo.ElasticZO(model).train_step(torch.randn(3, 4), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_batch_norm_moves_once_by_the_mean_over_groups(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    plain = copy.deepcopy(model)
    ezo.convert_(model, head=["3"])
    x, y = torch.randn(16, 6), torch.randint(0, 3, (16,))
    opt = ezo.ElasticZO(model, eps=EPS, seed=3, mode=mode)
    opt.train_step(x, y)
    means, variances = [], []
    for sign in (1, -1):
        w, b = (
            plain[0].get_parameter(k) + sign * EPS * ezo.ops.materialize(s.shape, seed=3, step=0, site=s.site)
            for k in ("weight", "bias")
            for s in model._ezo.manifest
            if s.names[0] == f"0.{k}"
        )
        h = F.linear(x, w, b)
        means.append(h.mean(0))
        variances.append(h.var(0))
    torch.testing.assert_close(model[1].running_mean, 0.1 * torch.stack(means).mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model[1].running_var, 0.9 + 0.1 * torch.stack(variances).mean(0), rtol=1e-4, atol=1e-6)
    assert model[1].num_batches_tracked.item() == 1
    model.eval()
    held = model[1].running_mean.clone()
    opt.train_step(x, y)
    assert torch.equal(held, model[1].running_mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batch_norm_in_16_bits(dtype):
    """Weight and bias of 16 bits with fp32 statistics: torch refuses the mixture on a CPU."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    twin = copy.deepcopy(model)
    opt = ezo.ElasticZO(ezo.convert_(model, head=["3"]), eps=1e-2, lr=0.0, head_lr=0.0)
    x, y = torch.randn(16, 6, dtype=dtype), torch.randint(0, 3, (16,))
    loss = opt.train_step(x, y)
    torch.testing.assert_close(loss, F.cross_entropy(twin(x).float(), y), rtol=0.02, atol=0.02)
    torch.testing.assert_close(model[1].running_mean, twin[1].running_mean, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("mode", ["auto", "sequential"])
def test_an_encoder_in_eval_mode_is_perturbed_too(mode):
    """torch's fused encoder layer reads the weights of its linear layers instead of calling them."""
    x, y = torch.randn(4, 6, 16), torch.randint(0, 5, (4,))
    model = seeded(zoo.Encoder).eval()
    plain = copy.deepcopy(model)
    ezo.convert_(model, head=["classify"])
    opt = ezo.ElasticZO(model, lr=0.0, head_lr=0.0, eps=EPS, seed=3, mode=mode)
    opt.train_step(x, y)
    want = materialised_losses(plain, lambda m: F.cross_entropy(m(x), y), model._ezo.manifest, 1)
    torch.testing.assert_close(opt.losses, want, rtol=2e-5, atol=2e-6)
    opt.train_step(x, y)
    assert abs(opt.losses[0] - opt.losses[1]) > 1e-3 and torch.backends.mha.get_fastpath_enabled()


class Sometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.skip = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2), False

    def forward(self, x):
        x = self.a(x)
        return self.c(x if self.skip else self.b(x))


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_a_layer_that_a_later_step_leaves_out_is_refused_by_name(mode):
    model = ezo.convert_(seeded(Sometimes), head=["c"])
    opt = ezo.ElasticZO(model, mode=mode)
    x, y = torch.randn(3, 4), torch.zeros(3, dtype=torch.long)
    opt.train_step(x, y)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.skip = True
    with pytest.raises(ValueError, match="not visited.*'b.bias', 'b.weight'"):
        opt.train_step(x, y)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and opt.step_count.item() == 1
    model.skip = False
    opt.train_step(x, y)


def test_compiled_layers_are_not_taken_for_left_out_ones():
    """Compiled code does not say which sites it perturbed; the first step's check is not compiled."""
    model = ezo.convert_(seeded(Sometimes), head=["c"])
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    opt, other = ezo.ElasticZO(model), ezo.ElasticZO(twin)
    x, y = torch.randn(3, 4), torch.zeros(3, dtype=torch.long)
    for _ in range(3):
        opt.step(lambda: F.cross_entropy(compiled(x), y))
        other.step(lambda: F.cross_entropy(twin(x), y))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    with pytest.raises(ValueError, match="compile"):
        ezo.ElasticZO(compiled)


def test_a_norm_after_the_head_is_refused_by_name():
    layers = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
    model = ezo.convert_(nn.Sequential(*layers), head=["1"])
    with pytest.raises(ValueError, match="^2: LayerNorm.*requires grad"):
        ezo.ElasticZO(model).train_step(torch.randn(3, 4), torch.zeros(3, dtype=torch.long))


class Rebound(Stateful):
    def forward(self, x):
        self.calls = self.calls + 1
        return self.fc(x)


@pytest.mark.parametrize("make", [Stateful, Rebound])
def test_refused_buffers_are_put_back(make):
    model = ezo.convert_(seeded(make))
    calls = model.calls
    with pytest.raises(ValueError, match="calls"):
        ezo.ElasticZO(model).train_step(torch.randn(3, 4), torch.zeros(3, dtype=torch.long))
    assert model.calls is calls and calls.item() == 0


def test_randomness_around_the_model_is_refused():
    """A closure that draws its own batch would compare two batches."""
    model = ezo.convert_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), head=["1"])
    with pytest.raises(ValueError, match="the closure or the loss function"):
        ezo.ElasticZO(model).step(lambda: model(torch.randn(3, 4)).pow(2).sum())
    x = torch.randn(3, 4)
    noisy = lambda out, y: (out + torch.randn_like(out)).pow(2).sum()  # noqa: E731
    for mode in ("stacked", "sequential"):
        with pytest.raises(ValueError, match="the closure or the loss function"):
            ezo.ElasticZO(model, mode=mode).train_step(x, x, loss_fn=noisy)
