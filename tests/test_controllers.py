import math
import re

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from headwater.controllers import (
    UCB,
    Exp3,
    Forecast,
    Progress,
    Seen,
    SkillGraph,
    bound,
    floored,
    importance,
    optimistic,
    products,
    proportional,
    rescaled,
    simplex,
    skill_graph,
)
from headwater.tally import Tally, lowest, reward

NAN = math.nan


def seen(reward, turns=None, share=None):
    reward = torch.tensor(reward, dtype=torch.float64)
    turns = torch.ones_like(reward) if turns is None else torch.tensor(turns, dtype=torch.float64)
    share = torch.full_like(reward, 1 / reward.shape[1]) if share is None else torch.tensor(share, dtype=torch.float64)
    return Seen(reward, turns, share)


def drawn(updates=40, arms=4, seed=0):
    """A record in which some arms are not looked at, as arrays."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.ones(arms), updates)
    turns = rng.multinomial(6, [1 / arms] * arms, updates).astype(float)
    return np.where(turns > 0, rng.normal(size=(updates, arms)), NAN), turns, share


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def test_exp3_of_single_draws_is_the_update_of_the_paper():
    """Auer et al. 2002: w_k *= exp(rate * r / p_k) for the arm that was drawn, p = (1 - K floor) w / sum w + floor."""
    rng, arms, rate, floor = np.random.default_rng(1), 3, 0.3, 0.05
    weight, share, rows = np.ones(arms), np.full(arms, 1 / arms), []
    controller = Exp3(rate, decay=1.0, window=50, rescale=False)
    for _ in range(30):
        arm, paid = rng.choice(arms, p=share), rng.uniform()
        rows.append((np.where(np.arange(arms) == arm, paid, NAN), np.arange(arms) == arm, share))
        weight[arm] *= np.exp(rate * paid / share[arm])
        share = (1 - arms * floor) * weight / weight.sum() + floor
        got = floored(controller(seen(*(np.array(x, float).tolist() for x in zip(*rows)))), floor)
        assert_close(got.numpy(), share)


def test_older_rewards_of_exp3_fade():
    paid, turns, share = drawn()
    sums = np.zeros(4)
    for r, n, p in zip(paid, turns, share):
        sums = 0.8 * sums + np.where(np.isnan(r), 0, r * n / n.sum() / p)
    got = Exp3(0.7, 0.8, 64, rescale=False)(seen(paid.tolist(), turns.tolist(), share.tolist()))
    assert_close(got.numpy(), softmax(0.7 * sums))


def test_importance_weights_make_the_mean_what_all_draws_would_have_paid():
    rng, share, true = np.random.default_rng(0), np.array([0.7, 0.2, 0.1]), np.array([1.0, -2.0, 3.0])
    turns = rng.multinomial(2, share, 40_000).astype(float)
    got = importance(seen(np.where(turns > 0, true, NAN).tolist(), turns.tolist(), np.tile(share, (40_000, 1)).tolist()))
    assert_close(got.mean(0).numpy(), true, rtol=0.05, atol=0.0)


def test_ucb_is_the_formula():
    paid, turns, share = drawn()
    mean = np.nansum(np.where(turns > 0, paid, 0) * turns, 0) / turns.sum(0)
    score = mean + 0.5 * np.sqrt(2 * np.log(turns.sum()) / (1 + turns.sum(0)))
    got = UCB(0.5, 0.3, 64, rescale=False)(seen(paid.tolist(), turns.tolist(), share.tolist()))
    assert_close(got.numpy(), softmax(score / 0.3))
    assert_close(bound(torch.tensor([0.0]), torch.tensor([0.0])), torch.tensor([0.0]))


def test_what_was_never_looked_at_counts_as_the_best():
    got = UCB(0.0, 1.0, rescale=False)(seen([[1.0, 3.0, NAN]], [[2.0, 3.0, 0.0]]))
    assert_close(got.numpy(), softmax(np.array([1.0, 3.0, 3.0])))
    assert_close(Progress()(seen([[1.0, 3.0, NAN]])).numpy(), np.array([1, 3, 3]) / 7)


def test_progress_is_proportional_and_leaves_what_no_longer_pays():
    rows = [[0.4, 0.1, -0.2], [0.2, NAN, -0.4]]
    assert_close(Progress()(seen(rows)).numpy(), np.array([0.3, 0.1, 0.0]) / 0.4)
    assert_close(Progress(absolute=True)(seen(rows)).numpy(), np.array([0.3, 0.1, 0.3]) / 0.7)
    assert_close(Progress(power=2.0)(seen(rows)).numpy(), np.array([0.09, 0.01, 0.0]) / 0.1)
    assert_close(Progress(least=0.1)(seen(rows)).numpy(), np.array([1.0, 0.0, 0.0]))
    assert_close(Progress()(seen([[-1.0, 0.0, -3.0]])).numpy(), np.full(3, 1 / 3))


def test_skill_graph_is_the_formula():
    """Chen et al. 2023, algorithm 1: p_i proportional to exp(eta * sum over j and the window of A_ij L_j)."""
    graph, losses = [[1.0, 0.5, 0.0], [0.0, 1.0, 0.5], [0.2, 0.0, 1.0]], [[2.0, 1.0, 0.5], [1.5, 0.8, 0.4], [1.0, 0.7, 0.3]]
    expected = softmax(np.array([0.2 * sum(graph[i][j] * sum(row[j] for row in losses) for j in range(3)) for i in range(3)]))
    assert_close(SkillGraph(graph, 0.2)(seen(losses)).numpy(), expected)
    before, after = torch.tensor([2.0, 1.0]), torch.tensor([[1.0, 0.9], [2.2, 0.25]])
    assert_close(skill_graph(before, after), torch.tensor([[0.5, 0.1], [0.0, 0.75]]))


def test_rescaled_rewards_lie_between_their_quantiles():
    paid = drawn()[0]
    low, high = np.nanquantile(paid, [0.2, 0.8])
    got = rescaled(torch.tensor(paid)).numpy()
    assert_close(got, np.clip(2 * (paid - low) / (high - low) - 1, -1, 1), equal_nan=True)
    assert_close(rescaled(torch.tensor([[0.0] * 9 + [2.0]])), torch.tensor([[-1.0] * 9 + [1.0]]))
    assert_close(rescaled(torch.tensor([[3.0, NAN, 3.0]])), torch.tensor([[0.0, NAN, 0.0]]), equal_nan=True)


def test_the_upper_bound_of_linucb():
    rng = np.random.default_rng(0)
    x, y, asked = rng.normal(size=(20, 5)), rng.normal(size=20), rng.normal(size=(7, 5))
    a = np.linalg.inv(0.1 * np.eye(5) + sum(np.outer(row, row) for row in x))
    theta = a @ sum(row * paid for row, paid in zip(x, y))
    expected = [row @ theta + 0.5 * np.sqrt(row @ a @ row) for row in asked]
    assert_close(optimistic(*(torch.tensor(v) for v in (x, y, asked)), 0.1, 0.5).numpy(), np.array(expected))


def test_a_forecast_finds_the_mixture_that_pays():
    """What a mixture pays is largest at (0.6, 0.3, 0.1)."""
    rng, best = np.random.default_rng(0), np.array([0.6, 0.3, 0.1])
    share = rng.dirichlet(np.ones(3), 60)
    paid = -((share - best) ** 2).sum(1)
    got = Forecast(explore=0.0, ridge=1e-4)(seen(np.tile(paid[:, None], (1, 3)).tolist(), None, share.tolist()))
    assert abs(got.numpy() - best).max() < 0.05
    unknown = Forecast(explore=10.0)(seen([[0.0, 0.0, 0.0]] * 5, None, [[0.5, 0.5, 0.0]] * 5))
    assert unknown[2] > 0.5


def test_mixtures_are_even_and_products_are_all_of_them():
    points = simplex(20_000, 4)
    assert_close(points.sum(1), torch.ones(20_000, dtype=torch.float64))
    assert_close(points.mean(0), torch.full((4,), 0.25, dtype=torch.float64), rtol=0.02, atol=0.0)
    assert_close(products(torch.tensor([[2.0, 3.0]])), torch.tensor([[1.0, 2.0, 3.0, 4.0, 6.0, 9.0]]))
    assert_close(proportional(torch.zeros(4)), torch.full((4,), 0.25))


@pytest.mark.parametrize("controller", [Exp3(), UCB(), Progress(), SkillGraph([[1.0] * 4] * 4), Forecast()])
@pytest.mark.parametrize("updates", [1, 30])
def test_shares_are_shares(controller, updates):
    paid, turns, share = drawn(updates)
    got = controller(seen(paid.tolist(), turns.tolist(), share.tolist()))
    assert_close(got.sum(), torch.ones((), dtype=torch.float64))
    assert (got >= 0).all()
    assert floored(got, 0.1).min() >= 0.1 - 1e-12


def test_rewards_are_their_formulas():
    before, now, turns = (torch.tensor(x, dtype=torch.float64) for x in ([2.0, 1.0, NAN], [1.5, 1.1, 1.0], [5.0, 0.0, 2.0]))
    assert_close(reward("loss", before, now, turns), now)
    assert_close(reward("drop", before, now, turns).numpy(), np.array([0.5, -0.1, NAN]), equal_nan=True)
    assert_close(reward("progress", before, now, turns).numpy(), np.array([0.1, 0.0, NAN]), equal_nan=True)
    assert_close(lowest("progress", before, now).numpy(), np.array([1.5, 1.0, 1.0]))
    assert_close(lowest("drop", before, torch.full_like(now, NAN)), before, equal_nan=True)
    assert_close(lowest("drop", before, now), now)
    falls = np.linspace(0.9, 1.1, 9)
    expected = [np.clip(-100 * math.e * np.tanh(math.e * np.sqrt(2 * f * 2) * (f - 1) ** 3), -1, 1) for f in falls]
    two = torch.full((9,), 2.0, dtype=torch.float64)
    assert_close(reward("birdie", two, two * torch.tensor(falls), two).numpy(), np.array(expected))


def test_a_tally_keeps_the_books():
    tally = Tally(3, Progress(window=2), "drop", floor=0.1)
    rows = []
    controller, tally.controller = tally.controller, lambda record: rows.append(record) or controller(record)
    share = torch.full((3,), 1 / 3, dtype=torch.float64)
    one = torch.eye(3, dtype=torch.float64)
    for arm, loss in ((0, 4.0), (0, 2.0), (1, 5.0)):
        tally.see(one[arm], share, torch.tensor([loss], dtype=torch.float64))
    assert tally.update().isnan().all()
    assert not rows
    assert tally.before.tolist()[:2] == [3.0, 5.0]
    tally.see(one[0], torch.tensor([0.5, 0.25, 0.25]), torch.tensor([1.0]))
    tally.see(one[1], torch.tensor([0.7, 0.15, 0.15]), torch.tensor([NAN]))
    assert_close(tally.update(), torch.tensor([2.0, NAN, NAN], dtype=torch.float64), equal_nan=True)
    assert_close(rows[0].turns, torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64))
    assert_close(rows[0].share, torch.tensor([[0.6, 0.2, 0.2]], dtype=torch.float64), atol=1e-7, rtol=0)
    tally.see(one[2], share, torch.tensor([7.0]))
    tally.update(losses=torch.tensor([2.0, 4.0, 8.0], dtype=torch.float64))
    assert_close(rows[1].reward[-1], torch.tensor([-1.0, 1.0, NAN], dtype=torch.float64), equal_nan=True)
    assert_close(tally.share, floored(controller(rows[1]), 0.1))
    assert tally.turns.sum() == tally.chance.sum() == tally.asked.sum() == 0


def test_a_tally_goes_on_where_it_was():
    def run(tally, steps):
        for step in steps:
            arm = torch.eye(3, dtype=torch.float64)[step % 3]
            tally.see(arm, tally.share, torch.tensor([math.sin(step) + 2]))
            if step % 4 == 3:
                tally.update()
        return tally

    through, half = run(Tally(3, Exp3(window=5)), range(40)), run(Tally(3, Exp3(window=5)), range(17))
    resumed = Tally(3, Exp3(window=5))
    resumed.load_state_dict(half.state_dict())
    for name, x in run(resumed, range(17, 40)).state_dict().items():
        assert torch.equal(x.nan_to_num(99.0), through.state_dict()[name].nan_to_num(99.0))


@pytest.mark.parametrize(
    ("words", "make"),
    [
        ("window 0", lambda: Exp3(window=0)),
        ("decay 1.5", lambda: Exp3(decay=1.5)),
        ("rate 0", lambda: Exp3(0.0)),
        ("c -1", lambda: UCB(-1)),
        ("temperature 0", lambda: UCB(temperature=0.0)),
        ("power -1", lambda: Progress(-1.0)),
        ("least -1", lambda: Progress(least=-1.0)),
        ("rows of [2, 1] numbers", lambda: SkillGraph([[1.0, 0.0], [1.0]])),
        ("a graph of 2 skills and 3 arms", lambda: SkillGraph([[1.0, 0.0], [0.0, 1.0]])(seen([[1.0, 1.0, 1.0]]))),
        ("best 9 of 8", lambda: Forecast(candidates=8, best=9)),
        ("found 1 to choose from", lambda: Tally(1, Exp3())),
        ("a floor of 0.5", lambda: Tally(2, Exp3(), floor=0.5)),
    ],
)
def test_mistakes_are_named(words, make):
    with pytest.raises(ValueError, match=re.escape(words)):
        make()
