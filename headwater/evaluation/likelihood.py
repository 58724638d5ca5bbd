"""How likely a model finds signals of ids: log p of every token, from what is kept after pretraining.

Causal models score each token given those before it, with the objective's own order of places. Masked models score each token
given all others, one hidden at a time (pseudo-log-likelihood, Salazar et al. 2019, arXiv:1910.14659). No logits of a whole batch
are ever held. Run them in evaluation mode, where nothing is dropped.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from headwater import random
from headwater.model import Encoder, Model
from headwater.objectives.causal import Causal
from headwater.objectives.interleaved import Interleaved
from headwater.objectives.masked import Masked
from headwater.objectives.masks.asking import Substitute
from headwater.objectives.masks.policies import indices
from headwater.objectives.objective import cross_entropy
from headwater.objectives.tiled_likelihood import log_probabilities
from headwater.tokens import Tokens, unpack

Parts = Mapping[str, Tokens]
Score = Callable[[Model, Parts], Tensor]  # prepared tokens -> (B, N) log p of each token in nats, 0 at padding
Fill = Callable[[Model, Parts, Tensor], Tensor]  # tokens, one hidden per row (B, N) -> logits of these (B, V)


@torch.no_grad()
def causal_log_p(
    model: Model,
    batch: Parts,
    modality: str = "text",
    prefix: Sequence[str] = (),
    context: Sequence[str] = (),
    rows: int = 32,
) -> Tensor:
    """(B, N) log p of every token given those before it, what `prefix` modalities hold, and `context` up to its step.

    batch: prepared tokens, packed or not. rows: that go through the model at a time.
    """
    objective, found = Causal(model, modality, list(prefix), list(context)), []
    for piece in pieces({name: batch[name] for name in objective.seen}, rows):
        task = objective.task(piece)
        asked, states = task["asked"], objective.states(model, task)
        found.append(placed(said(model.encoder(modality), states[asked], task["answer"][asked]), asked))
    return torch.cat(found)


@torch.no_grad()
def interleaved_log_p(
    model: Model, batch: Parts, modality: str = "text", modalities: Sequence[str] = ("image", "text"), rows: int = 32
) -> Tensor:
    """(B, N) the same from a model that learned documents in which modalities take turns (`Interleaved`)."""
    objective, found = Interleaved(model, modalities), []
    for piece in pieces({name: batch[name] for name in objective.modalities}, rows):
        task = objective.task(piece)
        answers, states = task["answers"][modality], objective.states(model, task)[modality]
        asked = answers.real()
        found.append(placed(said(model.encoder(modality), states[asked], answers.x[asked]), piece[modality].real()))
    return torch.cat(found)


def said(encoder: Encoder, x: Tensor, ids: Tensor) -> Tensor:
    """(T,) log p of ids (T,) at contextual vectors (T, D); logits exist for a tile of them at a time."""
    vocabulary(encoder)
    return log_probabilities(encoder.unembed, x, ids)


def placed(values: Tensor, where: Tensor) -> Tensor:
    """Values (T,) at the T places of (B, N) that are True, 0 elsewhere."""
    return values.new_zeros(where.shape).masked_scatter(where, values)


def vocabulary(encoder: Encoder) -> int:
    """How many ids there are; ValueError where tokens are vectors."""
    if encoder.vocab is None:
        raise ValueError(f"found {type(encoder).__name__}, whose tokens are vectors; likelihoods are of ids")
    return encoder.vocab


@torch.no_grad()
def pseudo_log_p(
    model: Model,
    batch: Parts,
    modality: str = "text",
    context: Sequence[str] = (),
    fill: Fill | None = None,
    rows: int = 32,
) -> Tensor:
    """(B, N) log p of every token given all others of its sample, each hidden alone: N passes per sample, `rows` at a time.

    batch: prepared tokens, one sample per row. fill: how a token is hidden and asked for; None = `by_id` with the encoder's
    own id for what is not known.
    """
    t, fill = batch[modality], fill or by_id(modality)
    if t.document is not None:
        raise ValueError(f"found packed rows of {modality}; expected one sample per row (`headwater.tokens.unpack`)")
    found = torch.zeros(t.x.shape, device=t.x.device)
    row, column = t.real().nonzero(as_tuple=True)
    for r, c in zip(row.split(rows), column.split(rows), strict=True):
        piece = {name: batch[name].map(lambda field, r=r: field[r]) for name in (modality, *context)}  # type: ignore[misc]
        logits = fill(model, piece, F.one_hot(c, t.x.shape[1]).bool())
        found[r, c] = -cross_entropy(logits, t.x[r, c]).to(found.dtype)
    return found


def by_id(modality: str = "text", mask: int | None = None) -> Fill:
    """An id stands at the hidden place and the encoder's head answers: models trained by discrete diffusion, BERT with [MASK].

    mask: the id; None = the encoder's `start`.
    """

    def fill(model: Model, parts: Parts, hidden: Tensor) -> Tensor:
        encoder, t = model.encoder(modality), parts[modality]
        stand_in = encoder.start if mask is None else mask
        if stand_in is None or getattr(encoder, "causal", False):
            raise ValueError(
                f"{type(encoder).__name__} has no id for what is hidden, or never looks ahead; name a `mask`, or take causal_log_p"
            )
        y = model(model.embed({**parts, modality: t._replace(x=t.x.masked_fill(hidden, stand_in))}))[modality].x
        return encoder.unembed(y[:, : hidden.shape[1]][hidden])

    return fill


def by_objective(masked: Masked, modality: str = "text") -> Fill:
    """The learned vector stands at the hidden place and the head of a `Masked` objective of mode "substitute" answers."""
    if not isinstance(masked.way, Substitute) or not masked.targets[modality].ids:
        raise ValueError(f"found {type(masked.way).__name__} in Masked; expected mode 'substitute' with ids as targets")
    way = copy.copy(masked.way)
    way.keep = way.swap = 0.0  # the hidden token is never left in place

    def fill(model: Model, parts: Parts, hidden: Tensor) -> Tensor:
        nothing = {name: torch.zeros_like(t.real()) for name, t in parts.items()}
        task = {**parts, "hidden": nothing | {modality: hidden}, "places": {n: indices(hidden) for n in way.hides}}
        return masked.out[modality](way(model, task)[0][modality][:, 0])

    return fill


def pieces(batch: Parts, rows: int) -> Iterator[dict[str, Tokens]]:
    """So many rows at a time."""
    for start in range(0, len(next(iter(batch.values())).x), rows):
        yield {name: t.map(lambda field, s=start: field[s : s + rows]) for name, t in batch.items()}  # type: ignore[misc]


def sizes(encoder: Encoder, t: Tokens) -> Tensor:
    """(S,) bytes of UTF-8 that the texts of prepared tokens hold, of the samples that have any: what likelihoods of any tokenizer
    can be divided by."""
    t = unpack(t)
    texts = (encoder.restore(t.map(lambda field, r=r: field[r : r + 1])) for r in range(len(t.x)))  # type: ignore[misc]
    return torch.tensor([len(text.encode()) for text in texts], device=t.x.device)


def bits_per_byte(log_p: Tensor, size: Tensor) -> float:
    """Of texts with these log-likelihoods in nats (S,) and bytes (S,)."""
    return float(-log_p.double().sum() / math.log(2) / size.sum())


def confident_nll(log_p: Tensor, reference: Tensor) -> Tensor:
    """(B,) negative log-likelihood of traces, tokens weighted by a stronger model's probability of them; both (B, N), 0 at padding.

    It ranks training data by small models for what only large ones can do (rBridge, Koh et al. 2025, arXiv:2509.21013).
    """
    weight = reference.exp() * (reference != 0)
    return -(weight * log_p).sum(1) / weight.sum(1)


def copy_gain(model: Model, modality: str = "text", length: int = 32, samples: int = 16, seed: int = 0) -> float:
    """Nats per token by which the second copy of a random sequence is likelier than the first: above 0, the model copies from its
    context (induction, Olsson et al. 2022, arXiv:2209.11895)."""
    device = next(model.parameters()).device
    draw = random.uniform(random.fold(torch.arange(samples, device=device), seed), (length,), "copies")
    ids = (draw * vocabulary(model.encoder(modality))).long().repeat(1, 2)
    position = torch.arange(2 * length, device=device)[None, :, None].expand(samples, -1, 1)
    log_p = causal_log_p(model, {modality: Tokens(ids, position)}, modality)
    return float(log_p[:, length:].mean() - log_p[:, :length].mean())
