"""Values one after the other, until all rows have ended: drawn, or the likeliest of several beams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from headwater import random
from headwater.generation.choosing import Allowed, choose

Ask = Callable[[Tensor], Tensor]  # values so far, (B, n) ids or (B, n, F) -> answers for the next place, (B, V) or (B, F)
Pick = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # these, values so far -> the next value, (B,) True = had ended before


class Frame(NamedTuple):
    """What is to be filled. x: (B, N) ids or (B, N, F) values, of which the first `known` (B,) of each row are given.

    room: (B,) places of each row, at most N. end: the id that ends a row; None = rows fill their room.
    """

    x: Tensor
    known: Tensor
    room: Tensor
    end: int | None = None


class Filled(NamedTuple):
    """x: (B, n) or (B, n, F) so far. length: (B,) how many of them are the row's own, known ones too."""

    x: Tensor
    length: Tensor


def unfold(frame: Frame, ask: Ask, pick: Pick) -> Iterator[Filled]:
    """What is filled after every place, from the first one that is not known in all rows.

    Rows that have ended stay as they are; what is computed for them is not kept.
    """
    places, first = int(frame.room.max()), min(int(frame.known.min()), int(frame.room.max()))
    x, length = frame.x[:, :first], frame.known.minimum(frame.room).clamp(max=first)
    ended = frame.room <= first
    if first == places:
        yield Filled(x, frame.room)
    for place in range(first, places):
        value, stops = pick(ask(x), x)
        given = frame.known > place
        value = torch.where(given if value.ndim == 1 else given[:, None], frame.x[:, place], value)
        ended = ended | (stops & ~given)
        length = length + ~ended
        x = torch.cat([x, value.to(frame.x.dtype)[:, None]], 1)
        ended = ended | (frame.room <= place + 1)
        if frame.end is not None:
            ended = ended | ((value == frame.end) & ~given)
        yield Filled(x, length)
        if bool(ended.all()):
            return


def drawn(seed: Tensor, allowed: list[Allowed], temperature: float, top_k: int | None, top_p: float | None) -> Pick:
    """Picks ids for `unfold` by draws of (seed of the row (B,), place)."""

    def pick(logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, stops = masked(logits, x, allowed)
        return choose(logits, random.fold(seed, x.shape[1]), temperature, top_k, top_p), stops

    return pick


def masked(logits: Tensor, x: Tensor, allowed: list[Allowed]) -> tuple[Tensor, Tensor]:
    """Logits (B, V) in float32, with what is not allowed at -inf, and (B,) True = nothing is allowed there; then all stay."""
    mask = torch.ones_like(logits[:, :1], dtype=torch.bool)
    for may in allowed:
        mask = mask & may(x)
    stops = ~mask.any(-1)
    return logits.float().masked_fill(~(mask | stops[:, None]), -torch.inf), stops


def beam_search(frame: Frame, ask: Ask, take: Callable[[Tensor], None], allowed: list[Allowed], beams: int) -> Filled:
    """The sequence with the largest probability among those that stay in `beams` at every place, and are allowed.

    take: called with the rows of the last question that the next one goes on with, (B * beams,); rows of a sample stay together.
    """
    rows, places, first = len(frame.x), int(frame.room.max()), min(int(frame.known.min()), int(frame.room.max()))
    x, score = frame.x[:, None, :first], torch.zeros(rows, 1, device=frame.x.device)
    length = frame.known.minimum(frame.room).clamp(max=first)[:, None]
    ended = (frame.room <= first)[:, None]
    for place in range(first, places):
        log_p, stops = masked(ask(x.flatten(0, 1)).float().log_softmax(-1), x.flatten(0, 1), allowed)
        cost, width = -log_p.unflatten(0, (rows, -1)), x.shape[1]
        given, value = (frame.known > place)[:, None].expand(-1, width), frame.x[:, None, place].expand(-1, width)
        ended = ended | (stops.view(rows, -1) & ~given)
        fixed = given | ended  # only one way to go on, at no cost
        free = torch.full_like(cost, torch.inf).scatter(-1, value[..., None], 0.0)
        score, index = (
            (score[..., None] - torch.where(fixed[..., None], free, cost)).flatten(1).topk(min(beams, width * cost.shape[-1]), -1)
        )
        beam, value = index // cost.shape[-1], index % cost.shape[-1]
        take((torch.arange(rows, device=beam.device)[:, None] * width + beam).flatten())
        ended, given = ended.gather(1, beam), given.gather(1, beam)
        length = length.gather(1, beam) + ~ended
        x = torch.cat([x.take_along_dim(beam[..., None], 1), value[..., None]], -1)
        ended = ended | (frame.room <= place + 1)[:, None]
        if frame.end is not None:
            ended = ended | ((value == frame.end) & ~given)
        if bool(ended.gather(1, score.argmax(1, keepdim=True)).all()):  # what has not ended can only lose
            break
    best = score.argmax(1, keepdim=True)
    return Filled(x.take_along_dim(best[..., None], 1)[:, 0], length.gather(1, best)[:, 0])
