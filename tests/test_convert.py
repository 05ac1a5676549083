"""Conversion: what becomes what, what is refused, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import ezo_kernels as ezo
from ezo_kernels.nn.cut import all_cuts
from tests import zoo


def seeded(make):
    torch.manual_seed(0)
    return make()


MODELS = {
    "lenet": (ezo.models.LeNet5, lambda: torch.randn(2, 1, 28, 28), ["fc3"]),
    "resnet": (lambda: zoo.ResNet18().eval(), lambda: torch.randn(2, 3, 16, 16), ["fc"]),
    "vit": (lambda: zoo.ViT().eval(), lambda: torch.randn(2, 3, 16, 16), ["heads"]),
    "gpt": (lambda: zoo.GPT().eval(), lambda: torch.randint(0, 37, (2, 5)), 0),
    "mlp": (lambda: zoo.DropoutMLP().eval(), lambda: torch.randn(2, 12), ["net.7"]),
}


@torch.no_grad()  # with autograd torch's attention takes another path where parameters require grad
@pytest.mark.parametrize("name", MODELS)
def test_outside_a_step_nothing_changes_and_back_again(name):
    make, data, head = MODELS[name]
    model = seeded(make)
    plain, x = copy.deepcopy(model), data()
    parameters = {id(p) for p in model.parameters()}
    assert ezo.convert_(model, head=head) is model
    assert {id(p) for p in model.parameters()} == parameters
    assert torch.equal(model(x), plain(x))
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), plain(x))
        assert len({id(m.__dict__["zo"]) for m in other.modules() if "zo" in m.__dict__} | {id(other._ezo)}) == 1
        assert other._ezo is not model._ezo
    ezo.unconvert_(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert [m.__dict__.keys() for m in model.modules()] == [m.__dict__.keys() for m in plain.modules()]
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(x), plain(x))
    ezo.convert_(model, head=head)


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_of_a_converted_model_trains_like_the_original(name):
    make, data, head = MODELS[name]
    model = ezo.convert_(seeded(make), head=head)
    x = data()
    target = torch.zeros(x.shape[0], dtype=torch.long)

    def train(m):
        ezo.ElasticZO(m, lr=1e-2, mode="sequential").train_step(
            x, target, loss_fn=lambda o, y: o.float().square().mean()
        )
        return [p.clone() for p in m.parameters()]

    other = pickle.loads(pickle.dumps(model))
    for a, b in zip(train(model), train(other), strict=True):
        assert torch.equal(a, b)


def test_roles_and_summary():
    model = seeded(zoo.ViT)
    model.conv_proj.requires_grad_(False)
    ezo.convert_(model, head=["heads"], filter_fn=lambda m, n: not n.startswith("layers.1"))
    rows = {r.name: r for r in ezo.summary(model).rows}
    assert rows["conv_proj"].trained == "frozen" and "requires_grad" in rows["conv_proj"].reason
    assert rows["layers.1.mlp.0"].trained == "frozen" and "filter_fn" in rows["layers.1.mlp.0"].reason
    assert rows["layers.0.mlp.0"].trained == "ZO" and rows["layers.0.mlp.0"].type == "Linear"
    assert "workspace" in rows["layers.0.self_attention"].backend
    assert rows["heads.0"].trained == "BP" and rows["(model)"].trained == "ZO"
    total = ezo.summary(model)
    assert sum(total.total(t) for t in ("ZO", "BP", "frozen")) == sum(p.numel() for p in model.parameters())
    assert "layers.0.self_attention" in str(total)
    trunk, head = ezo.trunk_parameters(model), ezo.head_parameters(model)
    assert not any(p.requires_grad for p in trunk) and all(p.requires_grad for p in head)
    assert {id(p) for p in head} == {id(p) for p in model.heads.parameters()}


def test_sites_do_not_depend_on_the_cut():
    def sites(head):
        model = ezo.convert_(seeded(ezo.models.LeNet5), head=head)
        return {s.names[0]: s.site for s in model._ezo.manifest}

    assert sites(["fc3"]).items() <= sites(0).items()
    assert len(set(sites(0).values())) == 10


@pytest.mark.parametrize(
    ("head", "names"),
    [
        (1, ["fc3"]),
        (2, ["fc2", "fc3"]),
        (5, ["conv1", "conv2", "fc1", "fc2", "fc3"]),
        ("fc3", ["fc3"]),
        (["fc2", "fc3"], ["fc2", "fc3"]),
        (0, []),
    ],
)
def test_head_by_number_or_name(head, names):
    model = ezo.convert_(seeded(ezo.models.LeNet5), head=head)
    assert {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad} == set(names)


def test_integer_head_follows_the_forward_not_the_registration():
    """The last weight layers of a ResNet by execution: fc, layer4.1.conv2 with its norm, layer4.1.conv1 ..."""
    model = ezo.convert_(seeded(zoo.ResNet18), head=2)
    owners = {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert owners == {"fc", "layer4.1.conv2", "layer4.1.bn2"}
    with pytest.raises(ValueError, match="sample"):
        ezo.convert_(seeded(lambda: zoo.GPT(tied=False)), head=1)
    model = ezo.convert_(seeded(lambda: zoo.GPT(tied=False)), head=1, sample=torch.zeros(1, 4, dtype=torch.long))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"lm_head.weight"}
    assert model.training


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.gain


class Product(nn.Module):
    """A linear layer of a user's own."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return x @ self.w.t()


def test_layers_of_a_users_own_have_their_place_before_an_integer_head():
    """A trace goes into them, where torch's are calls."""
    x, y = torch.randn(4, 4), torch.tensor([0, 1, 2, 0])
    for head, names in ((1, {"3"}), (2, {"1", "2", "3"}), (3, {"0", "1", "2", "3"})):
        for sample in (None, x):
            model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Gain(), Product()))
            ezo.convert_(model, head=head, sample=sample)
            assert {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad} == names
            ezo.ElasticZO(model).train_step(x, y)


def test_a_weight_that_is_read_once_more_has_the_place_of_its_layers_call():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.a = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, x):
            return nn.functional.linear(self.a(self.e(x)), self.e.weight)

    for sample in (None, torch.arange(3)):
        assert all_cuts(Tied(), sample) == [(), ("a",), ("e", "a")]


def orthogonal(model):
    nn.utils.parametrizations.orthogonal(model[0])


def replaced(model):
    model[0] = nn.Identity()


@pytest.mark.parametrize("change", [orthogonal, replaced, lambda m: prune.l1_unstructured(m[0], "weight", 0.5)])
def test_a_trunk_that_has_lost_a_parameter_is_refused_by_name(change):
    model = ezo.convert_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), head=["1"])
    change(model)
    with pytest.raises(ValueError, match=r"has no .*'0\.weight' any more.*since convert_"):
        ezo.ElasticZO(model)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_parametrization_is_not_taken_away(layer):
    """Of a head's layer from before the conversion it is kept, of one since then unconvert_ says what to do."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    nn.utils.parametrizations.weight_norm(model[2])
    ezo.convert_(model, head=["1", "2"])
    if layer < 2:
        nn.utils.parametrizations.orthogonal(model[layer])
        want = model(x)
        with pytest.raises(ValueError, match=rf"'{layer}' got a parametrization since convert_"):
            ezo.unconvert_(model)
        assert torch.equal(want, model(x))
        nn.utils.parametrize.remove_parametrizations(model[layer], "weight")
    want = model(x)
    ezo.unconvert_(model)
    assert torch.equal(want, model(x)) and type(model[0]) is type(model[1]) is nn.Linear
    assert nn.utils.parametrize.is_parametrized(model[2]) and not hasattr(model[2], "zo")


def scripted():
    return torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


def traced():
    return torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))


def pruned(name):
    return prune.l1_unstructured(nn.Linear(4, 2), name, 0.5)


@pytest.mark.parametrize(
    ("make", "kwargs", "error", "match"),
    [
        (ezo.models.LeNet5, {"head": "fc9"}, ValueError, "fc9"),
        (ezo.models.LeNet5, {"head": ["fc3", 3]}, TypeError, "string"),
        (ezo.models.LeNet5, {"head": 6}, ValueError, r"0\.\.5"),
        (ezo.models.LeNet5, {"head": -1}, ValueError, "-1"),
        (ezo.models.LeNet5, {"head": None}, TypeError, "NoneType"),
        (ezo.models.LeNet5, {"head": True}, TypeError, "bool"),
        (zoo.GPT, {"head": "lm_head"}, ValueError, "wte.weight.*lm_head.weight|lm_head.weight.*wte.weight"),
        (lambda: nn.DataParallel(nn.Linear(2, 2)), {}, NotImplementedError, "DataParallel"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2)), {}, NotImplementedError, "SyncBatchNorm"),
        (scripted, {}, NotImplementedError, r"^ScriptModule \(the model\) is refused: .*the module that was scripted"),
        (scripted, {"head": 1}, NotImplementedError, r"ScriptModule \(the model\)"),
        (scripted, {"head": "all"}, NotImplementedError, r"ScriptModule \(the model\)"),
        (scripted, {"precision": "int8"}, NotImplementedError, r"ScriptModule \(the model\)"),
        (traced, {}, NotImplementedError, r"ScriptModule \(the model\)"),
        (lambda: nn.Sequential(nn.Linear(2, 2), scripted()), {"head": ["1"]}, NotImplementedError, r"ScriptModule \(1\)"),
        (lambda: nn.Sequential(nn.LSTM(2, 2)), {}, NotImplementedError, "LSTM"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), {}, ValueError, "lazy"),
        (lambda: nn.Linear(2, 2).double(), {}, TypeError, "float64"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), {}, NotImplementedError, "parametrization"),
        (lambda: nn.Sequential(pruned("weight")), {}, NotImplementedError, "'0' computes its 'weight'"),
        (lambda: nn.Sequential(pruned("bias")), {}, NotImplementedError, "'0' computes its 'bias'"),
        (lambda: nn.utils.spectral_norm(nn.Conv2d(2, 2, 3)), {}, NotImplementedError, "spectral_norm"),
    ],
)  # fmt: skip
def test_refusals_change_nothing(make, kwargs, error, match):
    model = seeded(make)
    types, grads = [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=match):
        ezo.convert_(model, **kwargs)
    assert [type(m) for m in model.modules()] == types
    assert [p.requires_grad for p in model.parameters()] == grads
    assert "_ezo" not in model.__dict__


def test_transposed_tie_is_refused():
    model = nn.ModuleDict({"a": nn.Linear(3, 5, bias=False), "b": nn.Linear(5, 3, bias=False)})
    model["b"].weight = nn.Parameter(model["a"].weight.detach().t())
    with pytest.raises(ValueError, match="same memory"):
        ezo.convert_(model)


def test_converted_twice_and_not_converted():
    model = ezo.convert_(seeded(ezo.models.LeNet5))
    with pytest.raises(ValueError, match="already"):
        ezo.convert_(model)
    with pytest.raises(ValueError, match="already"):
        ezo.convert_(nn.Sequential(model))
    plain = seeded(ezo.models.LeNet5)
    for call in (ezo.unconvert_, ezo.summary, ezo.trunk_parameters, ezo.ElasticZO):
        with pytest.raises(ValueError, match="convert_"):
            call(plain)


def test_what_is_no_model_is_refused():
    for call in (ezo.convert_, ezo.unconvert_, ezo.summary, ezo.ElasticZO):
        for model in (None, [nn.Linear(2, 2)], nn.Linear):
            with pytest.raises(TypeError, match="torch.nn.Module"):
                call(model)
    with pytest.raises(TypeError, match="filter_fn"):
        ezo.convert_(nn.Linear(2, 2), filter_fn=3)
    with pytest.raises(NotImplementedError, match="DataParallel"):
        ezo.ElasticZO(nn.DataParallel(ezo.convert_(seeded(ezo.models.LeNet5))))
    with pytest.raises(NotImplementedError, match="ScriptModule is refused"):
        ezo.ElasticZO(scripted())


def test_root_module_and_shared_module_convert():
    linear = ezo.convert_(seeded(lambda: nn.Linear(3, 2)))
    assert type(linear) is ezo.nn.ZOLinear
    shared = nn.Linear(3, 3)
    model = ezo.convert_(nn.Sequential(shared, nn.ReLU(), shared))
    assert len(model._ezo.manifest) == 2
    opt = ezo.ElasticZO(model, lr=0.1)
    opt.train_step(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))


def test_hooks_and_padding_modes_survive():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 4, 4, padding="same"),
        nn.Flatten(), nn.Linear(4 * 36, 3),
    )  # fmt: skip
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    plain, x = copy.deepcopy(model), torch.randn(2, 2, 6, 6)
    ezo.convert_(model, head=["3"])
    opt = ezo.ElasticZO(model, mode="sequential")
    opt._eps.zero_()
    opt.train_step(x, torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(opt.losses[0], nn.functional.cross_entropy(plain(x), torch.zeros(2, dtype=torch.long)))
    assert calls


def test_layers_under_torch_compile():
    model = ezo.convert_(seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))), head=["2"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 6)
    torch.testing.assert_close(compiled(x), model(x))
    zo, eps = model._ezo, torch.tensor([0.1])
    p = ezo.ops.Perturbation(ezo.ops.noise.key_tensor(1, 2), eps)
    stacked = torch.cat([x, x])
    with torch.no_grad(), zo.running(p, 8):
        want = model(stacked)
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(stacked), want)


def test_neighbours_in_one_buffer_are_no_tie():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    flat = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    nn.utils.vector_to_parameters(flat, model.parameters())
    ezo.convert_(model, head=["1"])
    ezo.ElasticZO(model, lr=0.1).train_step(torch.randn(5, 4), torch.zeros(5, dtype=torch.long))
    overlap = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    rows = torch.randn(5, 3)
    overlap["a"].weight, overlap["b"].weight = nn.Parameter(rows[:3]), nn.Parameter(rows[2:])
    with pytest.raises(ValueError, match="'a.weight' and 'b.weight'.*same memory"):
        ezo.convert_(overlap)
    ezo.convert_(overlap, head=["a", "b"])  # what autograd does with it is torch's


def test_a_shared_module_has_all_its_names():
    shared = nn.Linear(3, 3)
    model = nn.Sequential(nn.Linear(3, 3), shared, shared)
    with pytest.raises(ValueError, match=r"1\.\w+' \(trunk\) and '2\.\w+' \(head\)"):
        ezo.convert_(model, head=["2"])
    ezo.convert_(model, head=["1", "2"])
    assert {id(p) for p in ezo.head_parameters(model)} == {id(p) for p in shared.parameters()}


def test_a_model_of_one_layer_has_a_last_layer():
    linear = ezo.convert_(nn.Linear(3, 2), head=1)
    assert len(ezo.head_parameters(linear)) == 2
    with pytest.raises(ValueError, match=r"head=2 is outside 0\.\.1"):
        ezo.convert_(nn.Linear(3, 2), head=2)
