"""Who gets how much from now on: from what sources, or objectives, have paid so far to new shares of them.

A controller is a pure function of a record of what was tried and what it paid; whoever asks it keeps the record (`Tally`), so a run
that is resumed goes on as it would have. Rewards are losses, drops of losses, or values: larger = more of it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from headwater import random


class Seen(NamedTuple):
    """What happened between updates, oldest first, float64 (T, K) for K arms.

    reward: NaN where an arm was not looked at. turns: how often each arm was drawn. share: its mean share of the draws as they
    were planned, which sums to 1 over arms.
    """

    reward: Tensor
    turns: Tensor
    share: Tensor


class Controller:
    """From what was seen to new shares. window: updates that it looks back on."""

    window: int = 1

    def __call__(self, seen: Seen) -> Tensor:
        """(K,) shares that sum to 1, from at least one update, at most `window` of them."""
        raise NotImplementedError(f"{type(self).__name__} must return the share of every arm")


class Exp3(Controller):
    """Shares proportional to exp(rate * S), S being the sum of importance weighted rewards, of which older ones fade.

    Auer et al. 2002 (The nonstochastic multiarmed bandit problem); with mean losses as rewards the data mixing of Albalak et al.
    2023, arXiv:2312.02406, with learning progress the automated curriculum of Graves et al. 2017, arXiv:1704.03003. Exploration
    is the floor that whoever asks puts under all shares.

    Args:
        rate: of the exponent.
        decay: factor on a reward per update after it; 1 = nothing fades before it leaves the window.
        window: updates that are looked at.
        rescale: rewards are first brought to -1 .. 1 (`rescaled`), so that `rate` does not depend on their unit.
    """

    def __init__(self, rate: float = 0.5, decay: float = 0.9, window: int = 64, rescale: bool = True) -> None:
        check(window=window, rate=rate)
        if not 0 < decay <= 1:
            raise ValueError(f"found decay {decay}; expected a factor above 0, at most 1")
        self.rate, self.decay, self.window, self.rescale = rate, decay, window, rescale

    def __call__(self, seen: Seen) -> Tensor:
        reward = importance(seen._replace(reward=rescaled(seen.reward)) if self.rescale else seen)
        age = torch.arange(len(reward) - 1, -1, -1, dtype=reward.dtype, device=reward.device)
        return (self.rate * (self.decay**age)[:, None] * reward).sum(0).softmax(0)


class UCB(Controller):
    """Shares by a softmax of mean + c * sqrt(2 ln N / (1 + n)), n turns of the arm among N in the window.

    The curriculum over distributions of Wang et al. 2025 (DUMP, arXiv:2504.09710), there with mean |advantage| as the reward. An
    arm that was not looked at counts as the best one.

    Args:
        c: of the bonus for what was seldom drawn.
        temperature: of the softmax.
        window: updates that are looked at.
        rescale: see Exp3.
    """

    def __init__(self, c: float = 1.0, temperature: float = 0.2, window: int = 16, rescale: bool = True) -> None:
        check(window=window, temperature=temperature)
        if c < 0:
            raise ValueError(f"found c {c}; expected 0 or more")
        self.c, self.temperature, self.window, self.rescale = c, temperature, window, rescale

    def __call__(self, seen: Seen) -> Tensor:
        mean = average(rescaled(seen.reward) if self.rescale else seen.reward, seen.turns)
        return (bound(mean, seen.turns.sum(0), self.c) / self.temperature).softmax(0)


class Progress(Controller):
    """Shares proportional to the mean reward of the window to a power; what paid nothing, or cost, gets the floor alone.

    With drops of losses this is sampling by learning progress (Matiisen et al. 2017, arXiv:1707.00183). An arm that was not
    looked at counts as the best one.

    Args:
        power: above 1 concentrates on the best.
        least: mean rewards up to this one count as 0: where nothing pays more, all have the same share.
        window: updates that are looked at.
        absolute: losses that rise count as those that fall: what is being forgotten is asked for again.
    """

    def __init__(self, power: float = 1.0, least: float = 0.0, window: int = 4, absolute: bool = False) -> None:
        check(window=window, power=power)
        if least < 0:
            raise ValueError(f"found least {least}; expected a reward of 0 or more")
        self.power, self.least, self.window, self.absolute = power, least, window, absolute

    def __call__(self, seen: Seen) -> Tensor:
        mean = average(seen.reward, seen.turns)
        paid = mean.abs() if self.absolute else mean
        return proportional(torch.where(paid > self.least, paid, 0.0) ** self.power)


class SkillGraph(Controller):
    """Shares proportional to exp(rate * sum_j A_ij L_j), L_j being the sum of arm j's losses over the window.

    Skill-it (Chen et al. 2023, arXiv:2307.14430; https://github.com/HazyResearch/skill-it): A_ij tells how much training on i helps
    j. Ask it with losses as rewards. Where some arms are the aim, the columns of the others are 0.

    Args:
        graph: A, K rows of K numbers in the order of the arms; see `skill_graph`.
        rate: of the exponent, eta of the paper.
        window: updates over which losses are summed.
    """

    def __init__(self, graph: list[list[float]], rate: float = 0.2, window: int = 3) -> None:
        check(window=window, rate=rate)
        if not graph or any(len(row) != len(graph) for row in graph):
            raise ValueError(f"found rows of {[len(row) for row in graph]} numbers; expected as many as there are rows")
        self.graph, self.rate, self.window = graph, rate, window

    def __call__(self, seen: Seen) -> Tensor:
        graph = seen.reward.new_tensor(self.graph)
        if len(graph) != seen.reward.shape[1]:
            raise ValueError(f"found a graph of {len(graph)} skills and {seen.reward.shape[1]} arms; expected as many")
        losses = average(seen.reward, (~seen.reward.isnan()).to(seen.reward)) * len(seen.reward)
        return (self.rate * graph @ losses).softmax(0)


class Forecast(Controller):
    """Predicts what a mixture would pay, all arms together, from those that were tried, and takes the mean of the best.

    The reward model of Birdie (Blouir et al. 2024, arXiv:2411.01030; https://github.com/samblouir/birdie) is a network that is
    trained on the history; here it is a ridge regression on the shares and their products, which needs no training state, with
    the upper bound of LinUCB (Li et al. 2010, arXiv:1003.0146) in place of drawn exploration.

    Args:
        window: updates that are looked at.
        explore: factor on the standard deviation of a prediction that is added to it.
        ridge: penalty on the coefficients.
        candidates: mixtures that are compared; drawn once and for all, evenly over all there are.
        best: so many of them are averaged.
    """

    def __init__(self, window: int = 64, explore: float = 0.5, ridge: float = 0.1, candidates: int = 1024, best: int = 8) -> None:
        check(window=window, ridge=ridge, candidates=candidates, best=best)
        if explore < 0 or best > candidates:
            raise ValueError(f"found explore {explore} and the best {best} of {candidates}; expected 0 or more, and fewer of them")
        self.window, self.explore, self.ridge, self.candidates, self.best = window, explore, ridge, candidates, best

    def __call__(self, seen: Seen) -> Tensor:
        tried = seen.share / seen.share.sum(1, keepdim=True)
        mixtures = simplex(self.candidates, tried.shape[1]).to(tried)
        paid = seen.reward.nansum(1)
        paid = (paid - paid.mean()) / paid.std(correction=0).clamp(min=1e-12)
        scores = optimistic(products(tried), paid, products(mixtures), self.ridge, self.explore)
        return mixtures[scores.topk(self.best).indices].mean(0)


def importance(seen: Seen) -> Tensor:
    """(T, K): reward * turns / (all turns * share), whose mean over draws is the reward that all draws would have brought; 0 where
    an arm was not looked at. One draw per update gives reward / share of the arm that was drawn."""
    among = seen.turns / seen.turns.sum(1, keepdim=True).clamp(min=1e-12)
    return torch.where(seen.reward.isnan(), 0.0, seen.reward * among / seen.share.clamp(min=1e-12))


def rescaled(reward: Tensor, low: float = 0.2, high: float = 0.8) -> Tensor:
    """(T, K): the quantiles `low` and `high` of all rewards that were seen become -1 and 1, what lies beyond is cut (Graves et al.
    2017, arXiv:1704.03003, section 3). Where most are one number, the least and the largest stand for the quantiles; all alike are
    0, and NaN stays."""
    bottom, top = reward.nanquantile(low), reward.nanquantile(high)
    if not top > bottom:
        bottom, top = reward.nanquantile(0.0), reward.nanquantile(1.0)
    if not top > bottom:
        return torch.where(reward.isnan(), reward, 0.0)
    return (2 * (reward - bottom) / (top - bottom) - 1).clamp(-1, 1)


def average(reward: Tensor, turns: Tensor) -> Tensor:
    """(T, K), (T, K) -> (K,): the mean per turn of what was looked at. An arm that was not looked at has the largest of the
    others' means."""
    here = ~reward.isnan()
    weight = turns.clamp(min=1e-12) * here
    mean = (torch.where(here, reward, 0.0) * weight).sum(0) / weight.sum(0)
    return torch.where(here.any(0), mean, mean.nan_to_num(-math.inf).max())


def bound(mean: Tensor, turns: Tensor, c: float = 1.0) -> Tensor:
    """(K,), (K,) -> (K,): mean + c * sqrt(2 ln N / (1 + n)) with n turns of each arm and N of all."""
    return mean + c * (2 * turns.sum().clamp(min=1).log() / (1 + turns)).sqrt()


def proportional(x: Tensor) -> Tensor:
    """(K,) numbers of 0 or more -> shares; all alike where there is nothing."""
    return x / x.sum() if x.sum() > 0 else torch.full_like(x, 1 / len(x))


def floored(shares: Tensor, floor: float) -> Tensor:
    """(K,) shares, none of them below the floor: floor + (1 - K floor) * share."""
    return floor + (1 - len(shares) * floor) * shares


def skill_graph(before: Tensor, after: Tensor) -> Tensor:
    """A of `SkillGraph` from short runs: the share of its loss that skill j loses while i alone is trained, where it loses any.

    before: (K,) losses at the start. after: (K, K) losses of j, the columns, after training on i, the rows. After Chen et al. 2023,
    arXiv:2307.14430, section 3.
    """
    return (1 - after / before).clamp(min=0)


def simplex(count: int, arms: int) -> Tensor:
    """(count, arms) float64 mixtures, evenly drawn, always the same; the first ones are the arms by themselves."""
    draws = -(1 - random.uniform(torch.arange(count), (arms,), "mixtures").double()).log()
    alone = torch.eye(arms, dtype=torch.float64)[:count]
    return torch.cat([alone, draws[len(alone) :] / draws[len(alone) :].sum(1, keepdim=True)])


def products(shares: Tensor) -> Tensor:
    """(T, K) -> (T, 1 + K + K (K + 1) / 2): 1, the shares, and their products by twos."""
    row, column = torch.triu_indices(shares.shape[1], shares.shape[1], device=shares.device)
    return torch.cat([torch.ones_like(shares[:, :1]), shares, shares[:, row] * shares[:, column]], 1)


def optimistic(known: Tensor, paid: Tensor, asked: Tensor, ridge: float, explore: float) -> Tensor:
    """Ridge regression of what was paid (T,) on features (T, F), for features (M, F): prediction + explore * sqrt(x' A^-1 x), (M,),
    where A = X' X + ridge (LinUCB)."""
    inverse = torch.linalg.inv(known.T @ known + ridge * torch.eye(known.shape[1], dtype=known.dtype, device=known.device))
    doubt = ((asked @ inverse) * asked).sum(1).clamp(min=0).sqrt()
    return asked @ (inverse @ (known.T @ paid)) + explore * doubt


def check(window: int, **positive: float) -> None:
    """ValueError unless all are above 0."""
    for name, value in {"window": window, **positive}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"found {name} {value}; expected a number above 0")
