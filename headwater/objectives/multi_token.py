"""Multi-token prediction: from each place the tokens behind the next one are predicted too, by heads that are thrown away.

Head k makes a state of its own from that of place t, and the encoder's own `unembed` says from it which token stands k places
further on than the one that t is asked for. Heads beside one another are those of Gloeckle et al. 2024 (arXiv:2404.19737); in a
chain, each with the embedding of the token that the one before had to predict, those of DeepSeek-V3 (arXiv:2412.19437, section
2.2) and MiMo (arXiv:2505.07608). What is kept is the plain model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from headwater.model import Model
from headwater.objectives.causal import Causal
from headwater.objectives.likelihood import Likelihood
from headwater.objectives.objective import Batch, Schedule, Term, at, squared_error
from headwater.tokens import Tokens
from headwater.trunk import Trunk


def further(t: Tokens, k: int | Tensor) -> tuple[Tensor, Tensor]:
    """The column of the token k places behind each one, and whether it is of the same document; both (B, N). k: one, or (B, N)."""
    here = torch.arange(t.position.shape[1], device=t.position.device).expand(t.position.shape[:2])
    column = (here + k).clamp(max=max(here.shape[1] - 1, 0))
    sample = t.sample()
    return column, (here + k == column) & (sample.gather(1, column) == sample)


def cost(objective: Causal, model: Model, states: Tensor, answer: Tokens, asked: Tensor, batch: Batch) -> Tensor:
    """Sum of what the answers cost where they are asked for. states: (B, K, D); answer: (B, K) ids or vectors; asked: (B, K)."""
    unembed = model.encoder(objective.modality).unembed
    if objective.ids:
        return objective.likelihood.score(unembed, states, answer, asked, batch).sum()
    return (squared_error(unembed(states).float(), answer.x) * asked).sum()


class Head(nn.Module):
    """A state for a token further on.

    Args:
        width: D of the states.
        embedded: size of the embedding of the token before; None = it is not told.
        depth: transformer blocks.
    """

    def __init__(self, width: int, embedded: int | None, depth: int) -> None:
        super().__init__()
        self.trunk = Trunk(width, depth, position="rotary")
        if embedded is not None:
            self.norms = nn.ModuleList(self.trunk.make_norm(size) for size in (width, embedded))
            self.join = nn.Linear(width + embedded, width, bias=False)

    def forward(self, t: Tokens, token: Tensor | None) -> Tokens:
        """t.x: (B, N, D) states; token: (B, N, E) embeddings -> (B, N, D)."""
        if token is not None:
            state, token = (norm(x) for norm, x in zip(self.norms, (t.x, token), strict=True))
            t = t._replace(x=self.join(torch.cat([state, token], -1)))
        return self.trunk(t, causal=True)


class MultiToken(Causal):
    """Hides the future of one modality, and asks for several steps of it at once.

    Args:
        model: its encoder's `unembed` answers for the heads too.
        modality, prefix, context, likelihood: as in Causal; the likelihood counts for every head.
        weights: of the heads' losses, one for each, beside that of the next token, which is 1; numbers or schedules.
        chained: each head gets the state of the one before and the embedding of the token before its own; otherwise all get the
            model's state and nothing else.
        depth: transformer blocks of a head.
    """

    def __init__(
        self,
        model: Model,
        modality: str = "text",
        prefix: list[str] | None = None,
        context: list[str] | None = None,
        likelihood: Likelihood | None = None,
        weights: Sequence[float | Schedule] = (0.3,),
        chained: bool = False,
        depth: int = 1,
    ) -> None:
        super().__init__(model, modality, prefix, context, likelihood)
        if not weights or depth < 1:
            raise ValueError(f"found weights {weights} and depth {depth}; expected a weight for each head, and one block or more")
        self.weights, self.chained = tuple(weights), chained
        told = model.encoder(modality).embedded if chained else None
        self.heads: nn.ModuleList = nn.ModuleList(Head(model.width(modality), told, depth) for _ in self.weights)

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        more = {f"ahead{k}": self.ahead(batch, k)[1].sum() for k in range(1, len(self.heads) + 1)}
        return super().numbers(batch) | more

    def ahead(self, batch: Batch, k: int) -> tuple[Tokens, Tensor]:
        """What head k is asked at each place, and where it is asked, (B, N)."""
        column, there = further(batch[self.modality], k)
        answer = batch[self.modality]._replace(x=batch["answer"])
        return answer.take(column), there & batch["asked"].gather(1, column)

    def score(self, model: Model, states: Tensor, batch: Batch) -> dict[str, Term]:
        terms = super().score(model, states, batch)
        first = state = batch[self.modality]._replace(x=states, order=None)  # places of one order may not see each other here
        answers = {self.modality: batch[self.modality]._replace(x=batch["answer"])}
        tokens = model.embed(answers)[self.modality].x if self.chained else None
        for k, (head, weight) in enumerate(zip(self.heads, self.weights, strict=True), 1):
            before = None if tokens is None else tokens.take_along_dim(further(first, k - 1)[0][..., None], 1)
            state = head(state if self.chained else first, before)
            answer, asked = self.ahead(batch, k)
            total = cost(self, model, state.x, answer, asked, batch)
            terms[f"ahead{k}"] = Term(total, asked.sum(), at(weight, batch.get("progress", 0.0)))
        return terms
