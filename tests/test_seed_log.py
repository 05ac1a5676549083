"""A run's seed log: the same weights again, from any step, on any optimizer that it is of; and what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from materialised import randn
from recording_graphs import RecordingGraphs
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.optim import IntegerSchedule, replay, seed_log
from tests import int8_models
from tests.test_step import batch, bits, lenet, same


@pytest.fixture(autouse=True)
def few_steps_on_the_device(monkeypatch):
    monkeypatch.setattr(seed_log, "_HELD", 4)
    monkeypatch.setattr(replay, "_AT_ONCE", 3)


class Normed(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm = nn.Linear(12, 16), nn.BatchNorm1d(16)
        self.b, self.o = nn.Linear(16, 16, bias=False), nn.Linear(16, 3)
        self.to(dtype)

    def forward(self, x):
        return self.o(torch.relu(self.b(torch.relu(self.norm(self.a(x))))))


def made(dtype=torch.float32, head=("o",), strategy="auto", **kwargs):
    model = ezo.convert_(Normed(dtype), head=list(head) or 0, strategy=strategy)
    return ezo.ElasticZO(model, **{"lr": 1e-3, "clip": 5.0, "seed": 2**64 - 3, **kwargs})


def run(opt, log, steps, first=0, dtype=torch.float32, spoilt=(), after=lambda: None):
    """Weights after each step that counted."""
    seen = {opt.step_count.item(): bits(opt.model)}
    for i in range(first, first + steps):
        x = randn(6, 12, seed=i).to(dtype)
        if i in spoilt:
            x = x * float("nan")
        opt.train_step(x, torch.arange(6) % 3)
        after()
        log.observe()
        seen[opt.step_count.item()] = bits(opt.model)
    return seen


RUNS = {
    "plain": {},
    "no head": {"head": ()},
    "one sign": {"antithetic": False, "queries": 3, "noise": "clt4"},
    "sparse": {"noise": "sparse", "p_zero": 0.8, "rounds": 10, "mode": "sequential"},
    "scales": {"scales": {"a": 2.0, "b": 0.3}, "noise": "rademacher", "queries": 2},
    "bf16": {"dtype": torch.bfloat16, "lr": 0.1, "eps": 0.1, "noise": "hadamard"},
    "bf16 to nearest": {"dtype": torch.bfloat16, "lr": 0.1, "eps": 0.1, "stochastic_rounding": False, "strategy": "fused"},
}  # fmt: skip


@pytest.mark.parametrize("kind", RUNS)
def test_the_weights_of_every_step_are_made_again(kind, tmp_path):
    kwargs = RUNS[kind]
    dtype = kwargs.get("dtype", torch.float32)
    opt = made(**kwargs)
    log = ezo.SeedLog(opt)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.9**step)
    seen = run(opt, log, 11, dtype=dtype, spoilt=(3, 4, 10), after=schedule.step)
    assert opt.skipped == 3 and len(log) == 8 and log.steps == (0, 8)
    log.save(tmp_path / "run.seeds")
    loaded = ezo.SeedLog.load(tmp_path / "run.seeds")
    for step in (0, 1, 3, 4, 7):
        twin = made(**kwargs).model
        loaded.replay_(twin, step)
        trunk = [name for site in twin._ezo.manifest for name in site.names]
        assert all(torch.equal(twin.state_dict()[name], seen[step][name]) for name in trunk), step
    twin = made(**kwargs).model
    loaded.replay_(twin)
    assert same(bits(twin), bits(opt.model))
    assert len(loaded) == 8 and loaded.steps == (0, 8)


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_of_a_captured_run(mode, monkeypatch, tmp_path):
    monkeypatch.setattr("ezo_kernels.optim.elastic_zo.graphs_for", RecordingGraphs)
    opt = made(head=(), capture=True, mode=mode, queries=2)
    log = ezo.SeedLog(opt)
    run(opt, log, 9)
    assert opt.capture_counters["replays"] > 3
    log.save(tmp_path / "log")
    twin = made(head=(), queries=2).model
    ezo.SeedLog.load(tmp_path / "log").replay_(twin)
    assert same(bits(twin), bits(opt.model))


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("head", [(), ("fc3",)])
def test_in_integers_with_a_schedule(head, antithetic, tmp_path):
    opt = ezo.ElasticZOInt8(int8_models.lenet(head), queries=2, antithetic=antithetic, seed=7, p_zero=0.5)
    log = ezo.SeedLog(opt)
    schedule = IntegerSchedule(opt, {2: {"r_max": 31, "bits": 2}, 4: {"r_max": 63, "p_zero": 0.7}})
    seen = [int8_models.state(opt.model)]
    for i in range(6):
        int8_models.steps(opt, 1, first=i)
        schedule.step()
        log.observe()
        seen.append(int8_models.state(opt.model))
    assert not int8_models.same(seen[3], seen[4])
    log.save(tmp_path / "log")
    loaded = ezo.SeedLog.load(tmp_path / "log")
    twin = int8_models.lenet(head)
    loaded.replay_(twin)
    assert int8_models.same(int8_models.state(twin), seen[-1])
    twin = int8_models.lenet(head)
    loaded.replay_(twin, 3)
    assert torch.equal(twin.conv1.weight, seen[3]["conv1.weight"])


def test_a_run_that_goes_on_adds_to_its_log(tmp_path):
    opt = made(queries=2)
    log = ezo.SeedLog(opt)
    run(opt, log, 5)
    log.save(tmp_path / "log")
    saved = copy.deepcopy((opt.model.state_dict(), opt.state_dict()))
    other = made(queries=2)
    other.model.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    more = ezo.SeedLog.load(tmp_path / "log")
    with pytest.raises(ValueError, match=r"was loaded: resume\(optimizer\)"):
        more.observe()
    more.resume(other)
    run(other, more, 4, first=5)
    more.save(tmp_path / "log", {"of": "a test"})
    twin, loaded = made(queries=2).model, ezo.SeedLog.load(tmp_path / "log")
    loaded.replay_(twin)
    assert same(bits(twin), bits(other.model)) and loaded.steps == (0, 9) and loaded.note == {"of": "a test"}
    for wrong, words in (
        (made(queries=2), "ends at step 9, the optimizer is at step 0"),
        (made(queries=2, seed=1), "another run: seed differs"),
        (made(queries=1), "another run: queries differs"),
        (made(queries=2, noise="clt4"), "another run: noise differs"),
    ):
        with pytest.raises(ValueError, match=words):
            loaded.resume(wrong)
    moved = made(queries=2)
    moved.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="not have the weights that the log ends with"):
        loaded.resume(moved)


def test_a_log_of_the_middle_of_a_run(tmp_path):
    """It begins where it was made, and two logs one after the other are one."""
    opt = made(head=())
    logs = []
    for part in range(2):
        logs.append(ezo.SeedLog(opt))
        run(opt, logs[-1], 3, first=3 * part)
        logs[-1].save(tmp_path / str(part))
    twin = made(head=()).model
    for part in range(2):
        ezo.SeedLog.load(tmp_path / str(part)).replay_(twin)
    assert same(bits(twin), bits(opt.model)) and logs[1].steps == (3, 6)


def test_a_step_that_was_not_observed_is_noticed(tmp_path):
    opt = made()
    log = ezo.SeedLog(opt)
    run(opt, log, 2)
    opt.train_step(randn(6, 12), torch.arange(6) % 3)
    with pytest.raises(ValueError, match="at step 3 and the log at step 2"):
        log.save(tmp_path / "log")
    run(opt, log, 1)
    with pytest.raises(ValueError, match="after step 2 the log came to step 4"):
        log.save(tmp_path / "log")
    assert not list(tmp_path.iterdir())


def test_what_does_not_lead_to_the_runs_weights_is_refused_and_writes_nothing(tmp_path):
    opt = made(head=())
    log = ezo.SeedLog(opt)
    run(opt, log, 3)
    with torch.no_grad():
        opt.model.b.weight[0, 0] += 1.0  # by somebody else
    log.save(tmp_path / "log")
    loaded, twin = ezo.SeedLog.load(tmp_path / "log"), made(head=()).model
    held = bits(twin)
    with pytest.raises(ValueError, match="do not lead to the weights that the run ended with: 'b.weight'"):
        loaded.replay_(twin)
    with pytest.raises(ValueError, match="step is 4: the log has 0 to 3"):
        loaded.replay_(twin, 4)
    assert same(bits(twin), held)
    loaded.replay_(twin, verify=False)
    assert not same(bits(twin), held)
    held = bits(twin)
    with pytest.raises(ValueError, match="not have the weights that the log begins at: 'a.bias', 'a.weight'"):
        loaded.replay_(twin)
    for other, words in (
        (ezo.convert_(Normed(), head=["o"]), "another model, or of one converted with another head"),
        (ezo.convert_(Normed(torch.bfloat16), head=0), "other dtypes"),
        (int8_models.tiny(), "of floats, and the model is not"),
        (Normed(), "convert_"),
    ):
        with pytest.raises(ValueError, match=words):
            loaded.replay_(other)
    assert same(bits(twin), held)


def test_files_that_are_no_log(tmp_path):
    opt = made()
    log = ezo.SeedLog(opt)
    run(opt, log, 3)
    log.save(tmp_path / "log")
    whole = (tmp_path / "log").read_bytes()
    with pytest.raises(FileNotFoundError, match="no such log"):
        ezo.SeedLog.load(tmp_path / "none")
    middle = whole.index(b"queries")
    for name, content in (
        ("cut", whole[:-20]),
        ("text", b"text"),
        ("bit", whole[:middle] + b"X" + whole[middle + 1 :]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: corrupt or no seed log"):
            ezo.SeedLog.load(tmp_path / name)
    torch.save({"format": "other"}, tmp_path / "other")
    with pytest.raises(ValueError, match="its format is 'other'"):
        ezo.SeedLog.load(tmp_path / "other")
    held = torch.load(tmp_path / "log", weights_only=True)
    held["columns"]["lr"] = held["columns"]["lr"][1:]
    torch.save(held, tmp_path / "short")
    with pytest.raises(ValueError, match="it holds g, lr of 3 steps"):
        ezo.SeedLog.load(tmp_path / "short")
    held = torch.load(tmp_path / "log", weights_only=True)
    held["rng_version"] = "ezo-philox4x32-9"
    torch.save(held, tmp_path / "version")
    with pytest.raises(ValueError, match="noise contract 'ezo-philox4x32-9', this is"):
        ezo.SeedLog.load(tmp_path / "version").replay_(made().model)


def test_runs_that_have_none():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(TypeError, match="ElasticZO or ElasticZOInt8, got SGD"):
        ezo.SeedLog(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="no trunk"):
        ezo.SeedLog(ezo.ElasticZO(ezo.convert_(copy.deepcopy(model), head="all")))
    nodes = ezo.NodePerturbation(["0"])
    with pytest.raises(NotImplementedError, match="node_perturbation"):
        ezo.SeedLog(ezo.ElasticZO(ezo.convert_(model, head=["2"]), node_perturbation=nodes))


def test_lenet_and_a_closure(tmp_path):
    """Two kinds of step; the file is small."""
    opt = ezo.ElasticZO(ezo.convert_(lenet(), head=0), lr=1e-4)
    log = ezo.SeedLog(opt)
    x, y = batch(8)
    for i in range(40):
        if i % 2:
            opt.step(lambda: F.cross_entropy(opt.model(x), y))
        else:
            opt.train_step(x, y)
        log.observe()
    log.save(tmp_path / "log")
    twin = ezo.convert_(lenet(), head=0)
    ezo.SeedLog.load(tmp_path / "log").replay_(twin)
    assert same(bits(twin), bits(opt.model))
    assert (tmp_path / "log").stat().st_size < 6_000 < sum(p.numel() for p in twin.parameters())


def test_a_log_that_goes_on_replays_like_one_that_was_loaded(tmp_path):
    """Its last step with the head and the buffers, and verified; a copy that went another way is refused."""
    opt = made(queries=2)
    log = ezo.SeedLog(opt)
    run(opt, log, 6)
    twin = made(queries=2).model
    log.replay_(twin)
    assert same(bits(twin), bits(opt.model))
    held, twin = copy.deepcopy(opt.model.state_dict()), made(queries=2).model
    with torch.no_grad():
        opt.model.b.weight[0, 0] += 1.0
    with pytest.raises(ValueError, match="do not lead to the weights that the run ended with: 'b.weight'"):
        log.replay_(twin)
    opt.model.load_state_dict(held)
    other = made(queries=2)
    other.model.load_state_dict(held)
    other.load_state_dict(opt.state_dict())
    log.resume(other)  # steps that are on the device still are kept
    run(other, log, 1, first=6)
    assert log.steps == (0, 7)


def test_what_no_replay_would_take_is_not_saved(tmp_path):
    opt = made(head=(), dtype=torch.bfloat16)
    log = ezo.SeedLog(opt)
    log.observe()  # before any step, as of integers
    run(opt, log, 3, dtype=torch.bfloat16)
    opt.stochastic_rounding = False
    with pytest.raises(ValueError, match="rounding changed while the log went on"):
        log.save(tmp_path / "log")
    opt.stochastic_rounding = True
    for note in ({"accuracy": np.float64(0.5)}, {"folder": tmp_path}):
        with pytest.raises(ValueError, match="note is to hold plain values"):
            log.save(tmp_path / "log", note)
    (tmp_path / "log.part").write_text("mine")
    log.save(tmp_path / "log", {"of": "a test"})
    assert {path.name for path in tmp_path.iterdir()} == {"log", "log.part"}
    more = ezo.SeedLog.load(tmp_path / "log")
    more.resume(opt)
    more.save(tmp_path / "log")
    assert ezo.SeedLog.load(tmp_path / "log").note == {"of": "a test"}
    state = opt.state_dict()
    run(opt, log, 1, first=3, dtype=torch.bfloat16)
    opt.load_state_dict(state)  # and the next step is the fourth again
    opt.train_step(randn(6, 12).bfloat16(), torch.arange(6) % 3)
    for call in (log.observe, lambda: log.save(tmp_path / "log")):
        with pytest.raises(ValueError, match="has loaded a state since"):
            call()
    integers = ezo.ElasticZOInt8(int8_models.lenet(), seed=7)
    log = ezo.SeedLog(integers)
    log.observe()
    assert log.steps == (0, 0)
    integers.load_state_dict(integers.state_dict())
    with pytest.raises(ValueError, match="has loaded a state since"):
        log.observe()


def test_a_buffer_that_is_expanded(tmp_path):
    def build(value=0.0):
        model = Normed()
        model.register_buffer("e", torch.full((1,), value).expand(4))
        return ezo.convert_(model, head=["o"])

    opt = ezo.ElasticZO(build(), lr=1e-3)
    log = ezo.SeedLog(opt)
    run(opt, log, 3)
    log.save(tmp_path / "log")
    twin, loaded = build(), ezo.SeedLog.load(tmp_path / "log")
    loaded.replay_(twin)
    assert same(bits(twin), bits(opt.model))
    twin = build(1.0)
    held = bits(twin)
    with pytest.raises(ValueError, match="the elements of 'e' share their memory"):
        loaded.replay_(twin)
    assert same(bits(twin), held)


@pytest.mark.parametrize("integers", [False, True])
def test_under_another_default_device(integers, tmp_path):
    """As with torch.set_default_device("cuda"): what the host keeps is on the host."""

    def build():
        return int8_models.lenet(("fc3",)) if integers else made().model

    opt, twin = (ezo.ElasticZOInt8(build(), seed=7), build()) if integers else (made(), build())
    log, batches = ezo.SeedLog(opt), [int8_models.lenet_batch(8, i) for i in range(6)]
    if not integers:
        batches = [(randn(6, 12, seed=i), torch.arange(6) % 3) for i in range(6)]
    with torch.device("meta"):
        for x, y in batches:
            opt.train_step(x, y)
            log.observe()
        log.save(tmp_path / "log", {"a": torch.zeros(1, device="cpu")})
        ezo.SeedLog.load(tmp_path / "log").replay_(twin)
    assert same(bits(twin), bits(opt.model))
