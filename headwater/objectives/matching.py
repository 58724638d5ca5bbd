"""Do these two belong together? Fused pairs of two modalities, matched and mismatched, and the model tells which.

Image-text matching with hard negatives: ALBEF (Li et al. 2021, arXiv:2107.07651, section 3.2), BLIP (arXiv:2201.12086), UniVL
(arXiv:2002.06353). Every sample gives three pairs: its own, and each of its halves with a stranger, drawn with a probability
that grows with the contrastive score.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater import distributed, random
from headwater.model import Model
from headwater.objectives.heads import Projector
from headwater.objectives.objective import Batch, Objective, Term, check_context, part, wide
from headwater.tokens import Pooled, Tokens, append, mean_pool, unpack

Negatives = Literal["hard", "random"]


def strangers(score: Tensor, seed: Tensor, every_seed: Tensor, first: int, name: str) -> Tensor:
    """(J,) for each local sample another one of all ranks, drawn from the softmax of its scores without itself.

    score: (J, G) of local samples with those of all ranks; seed: (J,); every_seed: (G,); first: column of local sample 0. The
    largest of scores plus Gumbel noise is such a draw; noise belongs to the two seeds, so it does not depend on rows or ranks.
    """
    own = torch.arange(len(score), device=score.device) + first
    noise = random.gumbel(random.fold(seed[:, None], every_seed[None]), (), name)
    return (score + noise).scatter(1, own[:, None], float("-inf")).argmax(1)


def everywhere(t: Tokens) -> tuple[Tokens, int]:
    """Rows of all ranks, padded to the longest of any, and the number of rows before this rank's own; x has its gradient."""
    longest = max(distributed.lengths(t.x.shape[1], t.x.device))
    grown = t.map(lambda field: F.pad(field, (0, 0) * (field.ndim - 2) + (0, longest - field.shape[1])))
    fields = grown._replace(valid=grown.real().to(torch.uint8))
    x, first = distributed.gather(fields.x)
    others = [None if field is None else distributed.gather(field)[0] for field in fields[1:]]
    whole = Tokens(x, *others)  # type: ignore[arg-type]
    return whole._replace(valid=whole.valid.bool()), first  # type: ignore[union-attr]


class Matching(Objective):
    """Hides whether two modalities come from one sample; fused features are asked.

    Encoders run once: what a stranger lends are its encoded tokens, with their gradient, from whichever rank it is on. Strangers
    come from the whole batch of all ranks.

    Args:
        model: has a fusion that brings both together. Hard negatives need pooled vectors of equal size (`space` of the model).
        a, b: the two modalities.
        negatives: "hard" = the more alike, the more often; "random" = all strangers alike.
        temperature: that the similarities of hard negatives, from -1 to 1, are divided by.
    """

    coupled = True
    classes = 2

    def __init__(
        self, model: Model, a: str = "image", b: str = "text", negatives: Negatives = "hard", temperature: float = 0.07
    ) -> None:
        super().__init__()
        check_context(model, a, [b])
        fusion: Any = model.fusion
        if fusion.last in (a, b):
            raise ValueError(
                f"{type(fusion).__name__} encodes {fusion.last} behind the fusion, but strangers lend encoded "
                "tokens; take JointTokens, CrossAttend or another fusion without `last`"
            )
        if negatives == "hard" and model.dim(a) != model.dim(b):
            raise ValueError(
                f"{a} pools to {model.dim(a)} numbers and {b} to {model.dim(b)}; hard negatives need the same size: give the model "
                "a shared space, for example `space: 128`, or take negatives: random"
            )
        self.a, self.b, self.needs, self.negatives, self.temperature = a, b, (a, b), negatives, temperature
        made = [name for name in fusion.widths if name not in model.encoders]  # such as the latents of a resampler
        self.read = (a, b, *made)
        width = sum(fusion.widths[name] for name in self.read)
        self.head = nn.Sequential(nn.LayerNorm(width), Projector([width, width, 1], norm="none"))

    def task(self, batch: Batch, hints: None = None) -> Batch:
        """Adds "both" (J,), the samples that have both modalities, and how many such samples all ranks have, "pairs"."""
        samples = batch[self.a].samples()
        both = samples[torch.isin(samples, batch[self.b].samples())]
        return {**batch, "both": both, "pairs": distributed.total(torch.tensor(len(both), device=both.device))}

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        kinds = torch.where(batch["pairs"] > 1, 3, 1)  # one sample alone has no stranger
        return {"matching": len(batch["both"]) * kinds}

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        raw, both = part(batch, self.needs), batch["both"]
        encoded = model.in_pieces(lambda piece: _encode(model, piece), raw)
        alone = {name: _rows(raw[name], encoded[name], encoded[f"{name}/behind"], both) for name in self.needs}
        left, right = self._pairs(alone, encoded, batch)
        logit = wide(self.head(self._fuse(model, {self.a: left, self.b: right}))[:, 0])
        truth = torch.arange(len(logit), device=logit.device) < len(both)
        total = F.binary_cross_entropy_with_logits(logit, truth.to(logit.dtype), reduction="sum")
        metrics = {"accuracy": ((logit > 0) == truth).float().mean()} if len(truth) else {}
        return {"matching": Term(total, self.numbers(batch)["matching"], metrics=metrics)}

    def _pairs(self, alone: dict[str, Tokens], encoded: dict[str, Pooled], batch: Batch) -> tuple[Tokens, Tokens]:
        """Both sides of 3 J pairs as rows: the own ones, each `a` with a strange `b`, each `b` with a strange `a`."""
        (every_a, first), (every_b, _) = everywhere(alone[self.a]), everywhere(alone[self.b])
        own = torch.arange(len(batch["both"]), device=every_a.x.device) + first
        if batch["pairs"] < 2:
            return every_a.map(lambda field: field[own]), every_b.map(lambda field: field[own])
        other_b, other_a = self._draw(encoded, batch)
        rows_a, rows_b = torch.cat([own, own, other_a]), torch.cat([own, other_b, own])
        return every_a.map(lambda field: field[rows_a]), every_b.map(lambda field: field[rows_b])

    @torch.no_grad()
    def _draw(self, encoded: dict[str, Pooled], batch: Batch) -> tuple[Tensor, Tensor]:
        """(J,), (J,) a strange `b` for each `a` and a strange `a` for each `b`, as rows of all ranks."""
        seed = batch["seed"][batch["both"]]
        every_seed, first = distributed.gather(seed)
        if self.negatives == "random":
            forth = back = torch.zeros(len(seed), len(every_seed), device=seed.device)
        else:
            pooled = [encoded[f"{name}/vector"] for name in self.needs]
            a, b = (F.normalize(v.x[torch.isin(v.sample, batch["both"])].float(), dim=-1) / self.temperature**0.5 for v in pooled)
            forth, back = a @ distributed.gather(b)[0].T, b @ distributed.gather(a)[0].T
        return strangers(forth, seed, every_seed, first, "matching/b"), strangers(back, seed, every_seed, first, "matching/a")

    def _fuse(self, model: Model, pairs: dict[str, Tokens]) -> Tensor:
        """Encoded pairs in rows -> (rows, sum of the widths that are read): means of fused tokens."""

        fusion: Any = model.fusion

        def ask(piece: dict[str, Tokens]) -> dict[str, Pooled]:
            fused = fusion(piece)
            means = [mean_pool(fused[name] if name in piece else fused[name]._replace(order=None)) for name in self.read]
            return {"pair": Pooled(torch.cat([mean.x for mean in means], -1), means[0].sample)}

        rows = len(pairs[self.a].x)
        return (ask(pairs) if rows < model.chunks else model.in_pieces(ask, pairs))["pair"].x


def _encode(model: Model, piece: dict[str, Tokens]) -> dict[str, Pooled]:
    """Of each modality the contextual tokens that came with the signal, those that stand behind them, and the pooled vector."""
    out = {}
    for name, t in model.encode(model.embed(piece)).items():
        for key, mine in ((name, t.real() & t.given()), (f"{name}/behind", t.real() & ~t.given())):
            sample = t.sample()[mine]
            by_sample = sample.argsort(stable=True)
            out[key] = Pooled(t.x[mine][by_sample], sample[by_sample])
        out[f"{name}/vector"] = model.pool(name, t._replace(x=t.x.detach()))
    return out


def _rows(raw: Tokens, given: Pooled, behind: Pooled, both: Tensor) -> Tokens:
    """Encoded tokens (T, D) of all samples in rows of their own, (J, L + R, D), for the samples (J,) that have both."""
    samples, rows = raw.samples(), unpack(raw)
    place = tuple(rows.real().nonzero().T)
    t = rows._replace(x=given.x.new_zeros(*rows.real().shape, given.x.shape[-1]).index_put(place, given.x))
    if len(behind.x):
        t = append(t, behind.x.unflatten(0, (len(samples), -1)))
    mine = torch.isin(samples, both)
    return t.map(lambda field: field[mine])
