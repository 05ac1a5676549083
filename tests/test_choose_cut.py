"""The chosen cut: its estimates against exact ones, its rule, its budgets, and that it touches nothing."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.nn.cut import all_cuts
from ezo_kernels.planning import CutRow, choose_cut, regret
from ezo_kernels.planning.choice import ENOUGH, TIMED_STEPS, gains, pick, seconds_of
from ezo_kernels.planning.signal import FOLD, MICRO_BATCHES, Moments, _fold, draw_classes, measure, segments


def fixed(seconds: float = 0.01):
    """A clock for tests: takes the step, and says always the same."""

    def time_step(step):
        step()
        return seconds

    return time_step


def mlp(rows=32):
    generator = torch.Generator().manual_seed(0)
    model = ezo.models.MLP(12, 20, 16, 5, generator=generator)
    return model, (torch.randn(rows, 12, generator=generator), torch.arange(rows) % 5)


# ---- estimates


def test_layers_split_the_parameters():
    model, (x, _) = mlp()
    found = segments(model, all_cuts(model, x))
    assert [name for name, _ in found] == ["fc1", "fc2", "fc3"]
    assert [n for _, own in found for n in own] == [n for n, _ in model.named_parameters()]
    norm_first = nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    found = segments(norm_first, all_cuts(norm_first, x))
    assert found[0][1] == ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]


def test_g_b_is_the_squared_norm_of_the_whole_batchs_gradient():
    """An identity of the estimator: G + tr(Sigma) / B over the same micro-batches is |mean gradient|^2."""
    model, (x, y) = mlp(4 * MICRO_BATCHES)
    products = measure(model, x, y, F.cross_entropy, all_cuts(model, x))
    for layer, found in zip((model.fc1, model.fc2, model.fc3), products, strict=True):
        own = torch.autograd.grad(F.cross_entropy(model(x), y), list(layer.parameters()))
        exact = sum(float((g.double() ** 2).sum()) for g in own)
        moments = found.moments()
        assert 0 < moments.G < moments.G_B
        torch.testing.assert_close(moments.G_B, exact, rtol=1e-4, atol=0)


def test_g_b_and_h_are_those_of_the_batch_they_are_asked_for():
    """At micro-batches as large as a step's: the means over them, of |g|^2 and of (g'd)^2. Between, a line in 1 / batch."""
    model, (x, y) = mlp(4 * MICRO_BATCHES)
    cuts, k = all_cuts(model, x), MICRO_BATCHES
    by_batch = {n: measure(model, x, y, F.cross_entropy, cuts, batch=n) for n in (4, 16, 4 * (k - 1))}
    for small, middle, large in zip(*by_batch.values(), strict=True):
        one, some, all_others = small.moments(), middle.moments(), large.moments()
        assert torch.equal(small.cross, large.cross) and (one.G, one.T) == (some.G, some.T) == (
            all_others.G,
            all_others.T,
        )
        assert pytest.approx(float(small.true.diagonal().mean())) == one.G_B
        apart = small.cross[~torch.eye(k, dtype=torch.bool)].view(k, k - 1)
        assert one.h == pytest.approx(4 * float((apart**2).mean()))
        columns = small.cross.T[~torch.eye(k, dtype=torch.bool)].view(
            k, k - 1
        )  # a drawn gradient's with all others' rows
        assert all_others.h == pytest.approx(4 * float((columns.mean(1) ** 2).mean()))
        share = (1 / 16 - 1 / 60) / (1 / 4 - 1 / 60)
        assert some.h == pytest.approx(all_others.h + share * (one.h - all_others.h))
        assert one.G_B > some.G_B > all_others.G_B > one.G


@pytest.mark.parametrize("rows", [32, 512])
def test_h_does_not_count_a_rows_noise_twice(rows):
    """Of a linear regression on many independent inputs the curvature is the same everywhere: h = 2 G_B."""
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(rows, 512, generator=generator), torch.randn(rows, 1, generator=generator)
    model = nn.Linear(512, 1, bias=False)
    nn.init.zeros_(model.weight)
    (found,) = measure(model, x, y, F.mse_loss, [(), ("",)], batch=32)
    assert found.moments().h == pytest.approx(2 * found.moments().G_B, rel=0.5)


def test_the_curvature_of_a_regression_is_its_hessians():
    """Mean squared error of a linear model: the Fisher matrix is the Hessian, whatever the targets."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(320, 6, generator=generator), 3 * torch.randn(320, 40, generator=generator)
    torch.manual_seed(0)
    model = nn.Linear(6, 40)
    (found,) = measure(model, x, y, F.mse_loss, [(), ("",)])
    moments = found.moments()
    torch.testing.assert_close(moments.T, 2 * float((x**2).sum(1).mean()) + 2, rtol=0.15, atol=0)
    own = list(model.parameters())
    gradient = torch.autograd.grad(F.mse_loss(model(x), y), own, create_graph=True)
    direction = [g.detach() for g in gradient]
    along = torch.autograd.grad(sum((g * d).sum() for g, d in zip(gradient, direction, strict=True)), own)
    exact = float(sum((a * d).sum() for a, d in zip(along, direction, strict=True)))
    assert exact / 2 < moments.h < 2 * exact  # one direction's worth of 16 draws


def test_the_predicted_falls_are_those_of_a_quadratic():
    """E over z of the fall of g'd + d'Hd / 2 at the best learning rate, simulated."""
    generator = torch.Generator().manual_seed(5)
    curvature = torch.rand(9, generator=generator, dtype=torch.float64) + 0.1
    g = torch.randn(9, generator=generator, dtype=torch.float64)
    m = Moments(G=float(g @ g), G_B=float(g @ g), T=float(curvature.sum()), h=float(g @ (curvature * g)))

    def fall(d):
        return -(d @ g + (d * d) @ curvature / 2)

    assert m.gain_backprop() == pytest.approx(float(fall(-g * m.G / m.h)))
    for queries in (1, 4):
        z = torch.randn(200_000, queries, 9, generator=generator, dtype=torch.float64)
        estimate = ((z @ g)[..., None] * z).mean(1)
        lr = m.G * queries / (m.G_B * m.T + (queries + 1) * m.h)
        assert m.gain_zeroth_order(queries) == pytest.approx(float(fall(-lr * estimate).mean()), rel=0.05)


def test_many_queries_gain_what_backpropagation_does():
    m = Moments(G=2.0, G_B=3.0, T=50.0, h=1.5)
    falls = [m.gain_zeroth_order(q) for q in (1, 8, 64, 10**9)]
    assert falls == sorted(falls) and falls[-1] == pytest.approx(m.gain_backprop(), rel=1e-6)


def test_folding_keeps_inner_products():
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(3 * FOLD + 17, generator=generator)
    b = a + torch.randn(a.shape, generator=generator)

    def folded(t):
        return _fold([t[:1000], t[1000:]], torch.Generator().manual_seed(7))

    assert len(folded(a)) == FOLD
    for u, v in ((a, a), (a, b), (b, b)):
        assert float(folded(u) @ folded(v)) == pytest.approx(float(u @ v), rel=0.03)
    short = torch.arange(5.0)
    assert torch.equal(_fold([short], generator), short)


def test_classes_are_drawn_from_the_models_own_distribution():
    p = torch.tensor([0.1, 0.6, 0.3])
    y = torch.zeros(20_000, dtype=torch.int64)
    y[:100] = -100
    drawn = draw_classes(p.log().expand(20_000, 3), y, torch.Generator().manual_seed(0))
    assert bool((drawn[:100] == -100).all())
    shares = torch.bincount(drawn[100:], minlength=3) / 19_900
    assert torch.allclose(shares, p, atol=0.015)
    pixels = draw_classes(torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int64), torch.Generator())
    assert pixels.shape == (2, 4, 5) and len(pixels.unique()) == 3


# ---- the choice


def test_the_choice_follows_its_rule_and_says_why(tmp_path):
    model, sample = mlp()
    choice = choose_cut(model, sample, time_step=fixed())
    chosen = next(row for row in choice.rows if row.layers == choice.layers)
    best = max(row.gain for row in choice.rows)
    enough = [row for row in choice.rows if row.gain >= ENOUGH * best]
    assert chosen in enough and chosen.bytes == min(row.bytes for row in enough) and chosen.head == choice.head
    products = measure(model, *sample, F.cross_entropy, all_cuts(model, sample[0]))
    assert [row.gain for row in choice.rows] == gains(products, 1)
    for signal, found in zip(choice.signals, products, strict=True):
        m = found.moments()
        assert (signal.G, signal.T) == (m.G, m.T) and signal.lr == pytest.approx(m.G / (m.G_B * m.T))
    assert choice.signals[0].snr == pytest.approx(choice.signals[0].G / (260 * choice.signals[0].G_B))
    text = str(choice)
    for word in ("chosen", "gain a step", "best lr", "fc2", "snr"):
        assert word in text
    loaded = json.loads(json.dumps(choice.to_dict()))
    assert loaded["layers"] == choice.layers and len(loaded["rows"]) == 4 and loaded["enough"] == ENOUGH
    choice.plot(tmp_path / "choice.png")
    assert (tmp_path / "choice.png").read_bytes()[:4] == b"\x89PNG"


def test_the_head_is_one_that_convert_takes_and_trains():
    model, sample = mlp()
    choice = choose_cut(model, sample, time_step=fixed())
    opt = ezo.ElasticZO(ezo.convert_(model, head=choice.head))
    assert torch.isfinite(opt.train_step(*sample))


def test_same_choice_twice_and_nothing_is_touched():
    model, sample = mlp()
    model = nn.Sequential(model, nn.Dropout(0.5), nn.BatchNorm1d(5), nn.Linear(5, 5))
    model[2].weight.grad = torch.ones(5)
    model[3].eval()
    before = copy.deepcopy(model.state_dict())
    flags = [(type(m), m.training) for m in model.modules()]
    x, y = sample[0].clone(), sample[1].clone()
    state = torch.get_rng_state()
    first = choose_cut(model, sample, time_step=fixed())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert choose_cut(model, sample, time_step=fixed()) == first
    assert choose_cut(model, sample, time_step=fixed(), seed=1).signals != first.signals
    assert [(type(m), m.training) for m in model.modules()] == flags and "_ezo" not in model.__dict__
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], v) for k, v in before.items())
    assert all(p.requires_grad for p in model.parameters())
    grads = [n for n, p in model.named_parameters() if p.grad is not None]
    assert grads == ["2.weight"] and torch.equal(model[2].weight.grad, torch.ones(5))
    assert torch.equal(sample[0], x) and torch.equal(sample[1], y)


def test_a_memory_budget_rules_cuts_out_and_names_the_smallest():
    model, sample = mlp()
    free = choose_cut(model, sample, mode="stacked", time_step=fixed())
    least = min(row.bytes for row in free.rows)
    tight = choose_cut(model, sample, mode="stacked", memory_budget=least, time_step=fixed())
    assert {row.bytes for row in tight.rows if row.allowed} == {least}
    assert all((row.seconds is None) == (row.bytes > least) for row in tight.rows)
    assert "over budget" in str(tight)
    with pytest.raises(ValueError, match=f"{least - 1:,} bytes: the smallest that one does is {least:,} "):
        choose_cut(model, sample, mode="stacked", memory_budget=least - 1, time_step=fixed())


def test_groups_run_one_by_one_where_all_at_once_would_not_fit():
    model, sample = mlp()
    stacked = choose_cut(model, sample, time_step=fixed())
    assert {row.mode for row in stacked.rows} == {"stacked"} == {stacked.mode}
    sequential = choose_cut(model, sample, mode="sequential", time_step=fixed())
    least = min(row.bytes for row in sequential.rows)
    assert least < min(row.bytes for row in stacked.rows)
    tight = choose_cut(model, sample, memory_budget=least, time_step=fixed())
    assert tight.mode == "sequential" and "mode sequential" in str(tight) and tight.to_dict()["mode"] == "sequential"
    opt = ezo.ElasticZO(ezo.convert_(copy.deepcopy(model), head=tight.head), mode=tight.mode)
    assert torch.isfinite(opt.train_step(*sample))
    # both kinds in one table: a cut that fits all at once stays so
    between = sorted(row.bytes for row in stacked.rows)[1]
    found = choose_cut(model, sample, memory_budget=between, time_step=fixed())
    assert [row.mode for row in found.rows if row.bytes <= between and row.allowed].count("stacked") >= 1
    for row, all_at_once in zip(found.rows, stacked.rows, strict=True):
        assert (row.mode == "stacked") == (all_at_once.bytes <= between)
    with pytest.raises(ValueError, match=f"the smallest that one does is {least:,} "):
        choose_cut(model, sample, memory_budget=least - 1, time_step=fixed())


def test_a_time_budget_rules_cuts_out_and_names_the_smallest():
    model, sample = mlp()
    times = [0.04, 0.03, 0.02, 0.05]

    def clock():
        left = iter(times)
        return lambda step: next(left)

    choice = choose_cut(model, sample, time_budget=0.03, time_step=clock())
    assert [row.allowed for row in choice.rows] == [False, True, True, False] and choice.layers in (1, 2)
    assert [row.seconds for row in choice.rows] == times
    assert choose_cut(model, sample, time_budget=0.02, time_step=clock()).layers == 2
    with pytest.raises(ValueError, match=r"time_budget=0\.019 seconds a step: the smallest that one does is 0\.02$"):
        choose_cut(model, sample, time_budget=0.019, time_step=clock())
    with pytest.raises(ValueError, match="and memory_budget=1,000,000,000 bytes"):
        choose_cut(model, sample, time_budget=0.019, memory_budget=10**9, time_step=clock())


def test_steps_are_timed_by_the_clock():
    calls = []
    assert seconds_of(lambda: calls.append(1)) >= 0 and len(calls) == 1 + TIMED_STEPS
    model, sample = mlp(8)
    assert all(row.seconds > 0 for row in choose_cut(model, sample).rows)


def test_of_equal_gains_the_fewest_bytes_and_then_the_smaller_head():
    def row(layers, size, gain, allowed=True):
        return CutRow(layers, (), "stacked", size, 0.1, gain, allowed)

    assert pick([row(0, 10, 0.1), row(1, 20, 0.89), row(2, 40, 0.9), row(3, 30, 1.0)]).layers == 3
    assert pick([row(0, 10, 0.1), row(1, 20, 0.95), row(2, 20, 1.0)]).layers == 1
    assert pick([row(0, 10, 0.1), row(1, 20, 5.0, False), row(2, 40, 0.105)]).layers == 0


def test_regret():
    accuracies = {0: 70.0, 1: 80.0, 2: 88.0, 3: 90.0}
    found = regret(accuracies, 2)
    assert (found.best, found.chosen, found.last_one, found.random) == (3, 2.0, 10.0, 8.0)
    found = regret(accuracies, 0, allowed=[0, 2])
    assert (found.best, found.chosen, found.last_one, found.random) == (2, 18.0, None, 9.0)
    with pytest.raises(ValueError, match=r"cuts \[5\]"):
        regret(accuracies, 5, allowed=[5])
    with pytest.raises(ValueError, match="4 is not among"):
        regret(accuracies, 4)
    with pytest.raises(ValueError, match="finite"):
        regret({0: float("nan"), 1: 1.0}, 1)


def test_bad_input():
    model, (x, y) = mlp(4)
    with pytest.raises(ValueError, match="needs targets"):
        choose_cut(model, x)
    with pytest.raises(ValueError, match="1 rows: at least 2"):
        choose_cut(model, (x[:1], y[:1]))
    with pytest.raises(ValueError, match="3 rows: at least 4"):
        choose_cut(nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 5)), (x[:3], y[:3]))
    with pytest.raises(ValueError, match="the sample has 4 rows in x and 3 in y"):
        choose_cut(model, (x, y[:3]))
    with pytest.raises(ValueError, match="the sample has 4 rows in x and 1 in y"):  # and not broadcast
        choose_cut(model, (x, torch.zeros(1, 5)), loss_fn=F.mse_loss)
    with pytest.raises(ValueError, match="draw_target"):
        choose_cut(model, (x, y), loss_fn=lambda out, y: F.cross_entropy(out, y))
    for name in ("memory_budget", "time_budget"):
        with pytest.raises(TypeError, match=name):
            choose_cut(model, (x, y), **{name: "1 GB"})
        for value in (0, -1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=name):
                choose_cut(model, (x, y), **{name: value})
    with pytest.raises(ValueError, match="mode must be one of"):
        choose_cut(model, (x, y), mode="paired")
    with pytest.raises(ValueError, match="optimizer one of"):
        choose_cut(model, (x, y), optimizer="lion")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(value):
    model, (x, y) = mlp(8)
    bad = x.clone()
    bad[3, 2] = value
    for loss_fn, target in ((F.cross_entropy, y), (F.mse_loss, torch.randn(8, 5))):
        with pytest.raises(ValueError, match="no gradient can be told from it; not finite are: x$"):
            choose_cut(model, (bad, target), loss_fn=loss_fn, time_step=fixed())
    with torch.no_grad():
        model.fc2.weight.fill_(value)
    with pytest.raises(ValueError, match="not finite are: fc2.weight$"):
        choose_cut(model, (x, y), time_step=fixed())
    with pytest.raises(ValueError, match="no class can be drawn"):
        draw_classes(torch.full((2, 3), float("nan")), y[:2], torch.Generator())


@pytest.mark.parametrize("label", [5, -1])
def test_labels_of_no_class_are_refused(label):
    model, (x, y) = mlp(8)
    y = y.clone()
    y[6] = label
    with pytest.raises(ValueError, match=f"labels must be 0 to 4, or -100 .* of 5 classes, got {label}$"):
        choose_cut(model, (x, y), time_step=fixed())


def test_a_micro_batch_of_padding_has_no_gradient():
    model, (x, y) = mlp(64)
    y[8:12] = -100
    for layer in measure(model, x, y, F.cross_entropy, all_cuts(model, x)):
        assert layer.drawn.isfinite().all() and layer.drawn.nonzero().flatten().tolist() == [0, 1, *range(3, 16)]


@pytest.mark.parametrize("seed, error", [(1.5, TypeError), ("a", TypeError), (True, TypeError), (-1, ValueError)])
def test_seeds_are_checked(seed, error):
    model, (x, y) = mlp(8)
    with pytest.raises(error, match="seed must be"):
        choose_cut(model, (x, y), seed=seed)
    with pytest.raises(error, match="seed must be"):
        measure(model, x, y, F.cross_entropy, all_cuts(model, x), seed=seed)


def test_the_largest_seed_is_one():
    model, (x, y) = mlp(8)
    assert measure(model, x, y, F.cross_entropy, all_cuts(model, x), seed=2**64 - 1)


def test_a_loss_of_ones_own_with_its_draw():
    model, (x, y) = mlp(8)
    own = choose_cut(
        model, (x, y), loss_fn=lambda out, y: F.cross_entropy(out, y), draw_target=draw_classes, time_step=fixed()
    )
    assert own.rows == choose_cut(model, (x, y), time_step=fixed()).rows


def test_gains_of_more_rows_than_a_batch():
    model, (x, y) = mlp(256)
    sample, rows = (x[:16], y[:16]), (x, y)
    choice = choose_cut(model, sample, signal_sample=rows, time_step=fixed())
    products = measure(model, x, y, F.cross_entropy, all_cuts(model, x), batch=16)
    assert [row.gain for row in choice.rows] == gains(products, 1)
    alone = choose_cut(model, sample, time_step=fixed())
    assert [row.bytes for row in choice.rows] == [row.bytes for row in alone.rows]
    assert [row.gain for row in choice.rows] != [row.gain for row in alone.rows]
    for bad, said in (
        (x, "signal_sample as the pair"),
        ((x[:15], y[:15]), "signal_sample has 15 rows, fewer than the 16"),
        ((x[:64], y[:5]), "signal_sample has 64 rows in x and 5 in y"),
        ((x[:64], y), "signal_sample has 64 rows in x and 256 in y"),
        ((x,), "signal_sample: .* got 1 items"),
    ):
        with pytest.raises(ValueError, match=said):
            choose_cut(model, sample, signal_sample=bad)
    with pytest.raises(ValueError, match="the sample has 1 rows"):
        choose_cut(model, (x[:1], y[:1]), signal_sample=rows)
