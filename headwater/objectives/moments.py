"""The tokens of a sample that share coordinates: a moment of a film, a word's pieces, a label and what it is about."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headwater.tokens import Tokens


class Groups(NamedTuple):
    """M groups, sorted by sample and then by coordinates.

    sample: (M,) of each group. number: (M,) of each group within its sample, from 0. member: for each token (B, N), the number of
    its group from 0 to M - 1, or -1 where it is padding or came with no signal.
    """

    sample: Tensor
    number: Tensor
    member: Tensor

    def mean(self, x: Tensor) -> Tensor:
        """Vectors of tokens (B, N, D) -> mean of each group (M, D)."""
        inside = self.member >= 0
        group = self.member[inside]
        total = x.new_zeros(len(self.sample), x.shape[-1]).index_add(0, group, x[inside])
        return total / group.bincount(minlength=len(self.sample))[:, None].to(x.dtype)

    def per_sample(self, samples: int) -> Tensor:
        """(S,) how many groups each of the `samples` of the batch has."""
        return self.sample.bincount(minlength=samples)

    def place(self) -> Tensor:
        """(B, N) the number of each token's group within its sample; 0 where it is in none."""
        return torch.where(self.member >= 0, self.number[self.member], 0) if len(self.number) else torch.zeros_like(self.member)


def groups(t: Tokens, axes: int = 1) -> Groups:
    """Tokens of one sample with the same first `axes` coordinates; with 1, the moments of a signal."""
    inside = t.real() & t.given()
    key = keys(t, inside, axes)
    found, group = key.unique(dim=0, return_inverse=True)
    sample = found[:, 0].long()
    first = torch.searchsorted(sample, sample)
    member = torch.full_like(t.sample(), -1)
    return Groups(sample, torch.arange(len(sample), device=sample.device) - first, member.masked_scatter(inside, group))


def keys(t: Tokens, inside: Tensor, axes: int) -> Tensor:
    """(T, 1 + axes) sample and first coordinates of the tokens inside (B, N); exact, since both are whole numbers or halves."""
    if t.position.shape[-1] < axes:
        raise ValueError(f"found tokens with {t.position.shape[-1]} coordinates; expected {axes} or more, as their labels have")
    return torch.cat([t.sample()[inside][:, None].double(), t.position[inside][:, :axes].double()], 1)


def about(label: Tokens, t: Tokens) -> Tensor:
    """(B, L) the group of `groups(t, axes of the label)` that each label token is about; -1 = there is none."""
    axes = label.position.shape[-1]
    asked, inside = label.real(), t.real() & t.given()
    key, known = keys(label, asked, axes), keys(t, inside, axes).unique(dim=0)
    _, number = torch.cat([known, key]).unique(dim=0, return_inverse=True)
    group = torch.full((int(number.max()) + 1 if len(number) else 0,), -1, device=key.device)
    group[number[: len(known)]] = torch.arange(len(known), device=key.device)
    return torch.full_like(label.sample(), -1).masked_scatter(asked, group[number[len(known) :]])


class Steps(NamedTuple):
    """How regular each sample is: moments (S,) how many, size (S,) tokens in each of them; 0 where sizes or order vary."""

    moments: Tensor
    size: Tensor


def steps(t: Tokens, samples: int) -> Steps:
    """Moments one behind the other with equally many tokens each, for the `samples` of the batch."""
    found, real, sample = groups(t), t.real(), t.sample()
    count = found.per_sample(samples)
    tokens = torch.zeros_like(count).index_add(0, sample[real], torch.ones_like(sample[real]))
    size = tokens // count.clamp(min=1)
    astray = real & (found.place() != t.place() // size[sample].clamp(min=1))
    odd = torch.zeros_like(count).index_add(0, sample[real], astray[real].long())
    return Steps(count, torch.where((odd == 0) & (size * count == tokens), size, 0))


def moved(t: Tokens, source: Tensor) -> Tensor:
    """(B, N, ...) values of which place p of a document holds that of its place source[p]. source: (B, N)."""
    here = torch.arange(t.x.shape[1], device=t.x.device) - t.place()
    return t.take((here + source).clamp(0, t.x.shape[1] - 1)).x
