"""Reshaped and reweighted likelihood of ids: sum over tokens of w * f(p), where p is the probability of the right answer.

`Causal` takes a `Likelihood`, and so does `Masked` for ids. Shapes f are functions of log p; weighings change the cost of each
token by what is known of it; an anchor holds the model near a reference. All of them leave the number of targets alone, except
`HashDrop`, which takes tokens out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from headwater import random
from headwater.model import Model, Reader
from headwater.objectives.objective import Batch, Schedule, at, wide
from headwater.objectives.tiled_likelihood import log_probabilities
from headwater.teacher import Teacher
from headwater.tokens import Tokens

Unembed = Callable[[Tensor], Tensor]  # vectors (T, D) -> logits (T, V), each token alone


class Shape:
    """f(p) = -log p, the likelihood itself. Subclasses give other costs; each is called with log p (...) and returns (...)."""

    def __call__(self, log_p: Tensor) -> Tensor:
        return -log_p


class Power(Shape):
    """f(p) = -p^k: unlikely answers teach little (Li et al. 2025, arXiv:2510.00526; https://github.com/GaotangLi/Beyond-Log-Likelihood)."""

    def __init__(self, k: float = 1.0) -> None:
        self.k = positive("k", k)

    def __call__(self, log_p: Tensor) -> Tensor:
        return -(self.k * log_p).exp()


class Tempered(Shape):
    """f(p) = (1 - p^a) / a: -log p as a goes to 0, 1 - p at a = 1 (Zhang and Sabuncu 2018, arXiv:1805.07836)."""

    def __init__(self, a: float = 0.5) -> None:
        self.a = positive("a", a)

    def __call__(self, log_p: Tensor) -> Tensor:
        return -torch.expm1(self.a * log_p) / self.a


class Focal(Shape):
    """f(p) = -(1 - p)^gamma log p: what is known already counts less (Lin et al. 2017, arXiv:1708.02002)."""

    def __init__(self, gamma: float = 2.0) -> None:
        self.gamma = positive("gamma", gamma)

    def __call__(self, log_p: Tensor) -> Tensor:
        return -(self.gamma * log_complement(log_p)).exp() * log_p


class Unlikelihood(Shape):
    """f(p) = -log(1 - p): the answer should not be given (Welleck et al. 2019, arXiv:1908.04319)."""

    def __call__(self, log_p: Tensor) -> Tensor:
        return -log_complement(log_p)


def log_complement(log_p: Tensor) -> Tensor:
    """log(1 - p). At p = 1 it stays finite and keeps a gradient: there it is that of a p smaller by one millionth."""
    return torch.log(-torch.expm1(torch.where(log_p > -1e-6, log_p - 1e-6, log_p)))


def positive(name: str, value: float) -> float:
    """The value, if it is above 0."""
    if not value > 0:
        raise ValueError(f"found {name}={value}; expected a number above 0")
    return value


class HashDrop:
    """About one in k tokens is never asked for: those after h tokens whose hash says so, in every copy of a passage the same.

    What was left out cannot be recited (Goldfish loss, Hans et al. 2024, arXiv:2406.10209; https://github.com/ahans30/goldfish-loss).
    The first h tokens of a document are always asked for.

    Args:
        k: inverse of the share that is dropped.
        h: tokens that are hashed.
        salt: another one drops other tokens.
    """

    def __init__(self, k: float = 4.0, h: int = 13, salt: int = 0) -> None:
        if k <= 1 or h < 1:
            raise ValueError(f"found k={k} and h={h}; expected k above 1, of which 1/k is dropped, and h of 1 or more")
        self.k, self.h, self.salt = k, h, salt

    def keeps(self, raw: Tokens) -> Tensor:
        """(B, N) True = asked for. raw.x: (B, N) ids."""
        seed = torch.full_like(raw.x, self.salt, dtype=torch.int64)
        for back in range(1, self.h + 1):
            seed = random.fold(seed, F.pad(raw.x, (back, 0))[:, : raw.x.shape[1]].long())
        return (random.uniform(seed, (), "hash-drop") >= 1 / self.k) | (raw.place() < self.h)


class Answers(NamedTuple):
    """What is scored. log_p: (B, N) of the right answers; tokens: these, x (B, N) ids; batch: where labels are."""

    log_p: Tensor
    tokens: Tokens
    batch: Batch


class Weighing:
    """Changes the cost of each token. readers: of the labels that it reads, by their key in the batch."""

    readers: dict[str, Reader] = {}

    def __call__(self, cost: Tensor, answers: Answers) -> Tensor:
        """cost: (B, N) -> (B, N)."""
        raise NotImplementedError(f"{type(self).__name__} must return the cost of every token")


class Confidence(Weighing):
    """w = p^power, as a constant: what is likely teaches most (power 1: dynamic fine-tuning, Wu et al. 2025, arXiv:2508.05629)."""

    def __init__(self, power: float = 1.0) -> None:
        self.power = positive("power", power)

    def __call__(self, cost: Tensor, answers: Answers) -> Tensor:
        return cost * (self.power * answers.log_p.detach()).exp()


class Rewarded(Weighing):
    """Rewards of samples or of their segments decide what is learned from them (Korbak et al. 2023, arXiv:2302.08582, section 2).

    rule "exp": w = exp((R - baseline) / beta), at most `most`; "linear": w = R - baseline within +-`most`, an advantage, whose
    sign says whether to learn or to unlearn; "filter": w = 0 below the threshold; "unlikelihood": below the threshold the cost
    is -alpha * log(1 - p). Tokens without a reward keep their cost.

    Args:
        reader: of the rewards, one number per token of the label. A label of a sample with several tokens is one reward per
            segment: each holds from its position (coordinate 0) to that of the next.
        rule: see above.
        beta, baseline, most: of the rules "exp" and "linear".
        threshold, alpha: of the rules "filter" and "unlikelihood".
        label: key of the rewards in the batch.
    """

    def __init__(
        self,
        reader: Reader,
        rule: Literal["exp", "linear", "filter", "unlikelihood"] = "exp",
        beta: float = 1.0,
        baseline: float = 0.0,
        most: float = 20.0,
        threshold: float = 0.0,
        alpha: float = 1.0,
        label: str = "reward",
    ) -> None:
        if reader.features != 1:
            raise ValueError(f"{type(reader).__name__} gives {reader.features} numbers per token; expected one, the reward")
        self.readers, self.label, self.rule = {label: reader}, label, rule
        self.beta, self.baseline, self.most = positive("beta", beta), baseline, positive("most", most)
        self.threshold, self.alpha = threshold, alpha

    def __call__(self, cost: Tensor, answers: Answers) -> Tensor:
        reward = spread(answers.batch[self.label], answers.tokens).to(cost.dtype)
        if self.rule == "unlikelihood":
            return torch.where(reward < self.threshold, self.alpha * Unlikelihood()(answers.log_p), cost)
        return cost * torch.where(reward.isnan(), 1.0, self.weights(reward))

    def weights(self, reward: Tensor) -> Tensor:
        """(...) rewards -> (...) factors on the cost."""
        if self.rule == "filter":
            return (reward >= self.threshold).to(reward.dtype)
        if self.rule == "linear":
            return (reward - self.baseline).clamp(-self.most, self.most)
        return ((reward - self.baseline) / self.beta).clamp(max=math.log(self.most)).exp()


def spread(label: Tokens, t: Tokens) -> Tensor:
    """The number that holds at each token of t, (B, N); NaN where none does. label.x: (B, K, 1)."""
    start = label.position[..., 0]
    holds = (label.sample()[:, None] == t.sample()[..., None]) & label.real()[:, None]
    holds &= start[:, None] <= t.position[..., :1]
    if not label.x.shape[1]:
        return label.x.new_full(t.position.shape[:2], torch.nan)
    last = torch.where(holds, start[:, None].double(), -torch.inf).argmax(-1)
    return label.x[..., 0].gather(1, last).masked_fill(~holds.any(-1), torch.nan)


class Anchor:
    """Adds weight * KL(model || reference) of every token that is asked for (with `Confidence`: Zhu et al. 2025, arXiv:2509.23753).

    With a power above 0 the divergence counts less where the reference is unsure: it is multiplied by (1 - H / log V)^power, H the
    reference's entropy in nats (Vassoyan et al. 2025, arXiv:2502.06533).

    Args:
        weight: a number or a schedule over the run.
        power: see above.
    """

    def __init__(self, weight: float | Schedule = 0.1, power: float = 0.0) -> None:
        self.weight, self.power = weight, power

    def __call__(self, logits: Tensor, reference: Tensor) -> Tensor:
        """logits, reference: (..., V) -> (...)."""
        away = divergence(logits, reference)
        return away * (1 - entropy(reference) / math.log(logits.shape[-1])).clamp(min=0) ** self.power if self.power else away


class Soft:
    """Where the reference is unsure, part of the cost is KL(reference || model); where it is sure, the plain cost stays.

    Distillation that spares tokens of low entropy (Goyal et al. 2025, arXiv:2509.01649).

    Args:
        share: of the divergence in the cost, 0 to 1.
        threshold: entropy of the reference in nats from which on it counts.
    """

    def __init__(self, share: float = 0.5, threshold: float = 0.5) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"found share {share}; expected 0 (all plain) to 1 (all from the reference)")
        self.share, self.threshold = share, threshold

    def __call__(self, cost: Tensor, logits: Tensor, reference: Tensor) -> Tensor:
        """cost: (...); logits, reference: (..., V) -> (...)."""
        share = self.share * (entropy(reference) >= self.threshold).to(cost.dtype)
        return (1 - share) * cost + share * divergence(reference, logits)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats of two sets of logits: (..., V), (..., V) -> (...)."""
    p, q = wide(p).log_softmax(-1), wide(q).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def entropy(logits: Tensor) -> Tensor:
    """In nats: (..., V) -> (...)."""
    log_p = wide(logits).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


class Likelihood:
    """What a token costs, given what the model answers.

    Args:
        shape: f(p); None = -log p.
        weights: change the cost, one after the other.
        drop: takes tokens out.
        anchor: holds the model near the reference; a term of its own.
        soft: brings the reference's answers into the cost.
        reference: a frozen model with the same encoders by name; None = the trained model as it starts.
    """

    def __init__(
        self,
        shape: Shape | None = None,
        weights: Sequence[Weighing] = (),
        drop: HashDrop | None = None,
        anchor: Anchor | None = None,
        soft: Soft | None = None,
        reference: Model | None = None,
    ) -> None:
        if reference is not None and anchor is None and soft is None:
            raise ValueError("found a reference that nobody asks; expected an anchor or soft beside it, or no reference")
        self.shape, self.weights, self.drop = shape or Shape(), tuple(weights), drop
        self.anchor, self.soft, self.reference = anchor, soft, reference
        self.readers = {label: reader for weighing in self.weights for label, reader in weighing.readers.items()}

    def teacher(self, model: Model) -> Teacher | None:
        """The reference as a frozen copy, where anybody asks it. model: what is copied where no other reference was given."""
        return Teacher(self.reference or model) if self.anchor or self.soft else None

    def keeps(self, raw: Tokens) -> Tensor:
        """(B, N) True = real, and asked for. raw.x: (B, N) ids."""
        return raw.real() if self.drop is None else raw.real() & self.drop.keeps(raw)

    @property
    def plain(self) -> bool:
        """True = each answer that is asked for costs -log p."""
        return type(self.shape) is Shape and not self.weights and self.anchor is None and self.soft is None

    def cost(self, log_p: Tensor, tokens: Tokens, batch: Batch) -> Tensor:
        """(B, N) of the log-probabilities (B, N) of the right answers, which are `tokens`."""
        answers = Answers(log_p, tokens, batch)
        cost = self.shape(log_p)
        for weighing in self.weights:
            cost = weighing(cost, answers)
        return cost

    def score(self, unembed: Unembed, x: Tensor, answer: Tokens, asked: Tensor, batch: Batch) -> Tensor:
        """What each answer costs where it is asked for, elsewhere 0, (B, N); logits never exist as a whole.

        x: (B, N, D) of which `unembed` makes logits; answer: the right ids (B, N); asked: (B, N).
        """
        found = log_probabilities(unembed, x[asked], answer.x[asked], self.plain and "worth" not in batch)
        log_p = found.new_zeros(asked.shape).index_put((asked.nonzero(as_tuple=True)), found)
        return self.cost(log_p, answer, batch) * asked

    def anchored(self, progress: float) -> float:
        """Weight of the anchor at this share of the run."""
        return 0.0 if self.anchor is None else at(self.anchor.weight, progress)
