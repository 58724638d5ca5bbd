"""LLM-JEPA: from one view of a content, predict the embedding of another, by the very model that reads both.

Huang, LeCun and Balestriero 2025, arXiv:2509.14252 (https://github.com/galilai-group/llm-jepa). Text and code, a mission and the
actions that fulfil it: k learned tokens stand behind the first view, and what the encoder makes of the last of them is the
prediction. Beside next-token prediction in a `Weighted` it is that paper's loss, CE + lambda * d.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater.init import OUTPUT, TABLE, Rule
from headwater.model import Model
from headwater.objectives.guide import Guide
from headwater.objectives.objective import Batch, Objective, Schedule, Term, viewed
from headwater.pooling import last_pool
from headwater.tokens import Pooled, Tokens, append, join
from headwater.view import View


def ask_behind(encoder: nn.Module, t: Tokens, questions: Tensor, causal: bool = True) -> Pooled:
    """What the encoder says at the last of `questions` (K, E), put behind every sample of the embedded tokens t -> (S, D).

    Questions see the whole sample and each other; in causal attention no token sees them.
    """
    asked = append(t, questions)
    said = encoder(asked, causal)
    said = said.map(lambda field: field[:, : asked.x.shape[1]])  # an encoder's own registers stand behind
    return last_pool(said._replace(valid=said.real() & ~said.given(), order=None))


class Paired(Objective):
    """Hides the other view of a pair: its embedding is predicted, and scored by 1 - cosine.

    Args:
        model: its encoder of `a` predicts. Encoders see one view each: fused features would leak the pair.
        a, b: what is read and what is predicted; modalities, or views of one.
        tokens: k, how many learned tokens stand behind `a`; 0 = the pooled vector of `a` is the prediction itself.
        teacher: who embeds `b`: "both" = the model, and gradient flows through both, as in the paper, where another objective
            prevents collapse; "same" = the model without gradient (SimSiam, arXiv:2011.10566); "average" = a moving average of it;
            "start" = the frozen start.
        momentum: share of itself that the average keeps in a step.
        causal: read as a language model reads.
        views: how the loader makes views among a and b; one that is not named here is the reader's own.
    """

    def __init__(
        self,
        model: Model,
        a: str = "text",
        b: str = "image",
        tokens: int = 1,
        teacher: Literal["both", "same", "average", "start"] = "both",
        momentum: float | Schedule = 0.996,
        causal: bool = True,
        views: dict[str, View] | None = None,
    ) -> None:
        super().__init__()
        if a == b:
            raise ValueError(f"found {a} as both views of a pair; expected two modalities, or two views such as {a}@0 and {a}@1")
        if tokens < 0:
            raise ValueError(f"found tokens {tokens}; expected how many learned tokens stand behind {a}, 0 or more")
        self.needs, self.a, self.b, self.causal = (a, b), a, b, causal
        self.views = viewed(self.needs, views)
        encoder = model.encoder(a)
        size, wanted = encoder.width if tokens else encoder.dim, model.encoder(b).dim
        self.teacher = None if teacher in ("both", "same") else Guide(model, teacher, [b], momentum)  # type: ignore[arg-type]
        self.through = teacher == "both"
        self.questions = nn.Parameter(torch.randn(tokens, encoder.embedded) * 0.02) if tokens else None
        self.out = nn.Identity() if size == wanted else nn.Linear(size, wanted)

    def init_rules(self) -> dict[str, Rule]:
        found = {} if self.questions is None else {"questions": TABLE}
        return found | ({"out.weight": OUTPUT} if isinstance(self.out, nn.Linear) else {})

    def start(self, model: Model) -> None:
        if self.teacher is not None:
            self.teacher.start(model)

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        return {"paired": torch.isin(batch[self.a].samples(), batch[self.b].samples()).sum()}

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        predicted, wanted = join(self._predict(model, batch), self._embed(model, batch))
        cosine = F.cosine_similarity(self.out(predicted), wanted, dim=-1)
        return {"paired": Term((1 - cosine).sum(), self.numbers(batch)["paired"], metrics={"cosine": cosine.detach().mean()})}

    def _predict(self, model: Model, batch: Batch) -> Pooled:
        encoder = model.encoder(self.a)
        t = encoder.embed(batch[self.a])
        if self.questions is None:
            return encoder.pool(encoder(t, self.causal))
        return ask_behind(encoder, t, self.questions, self.causal)

    def _embed(self, model: Model, batch: Batch) -> Pooled:
        with torch.set_grad_enabled(self.through and torch.is_grad_enabled()):
            encoder = (model if self.teacher is None else self.teacher.model).encoder(self.b)
            return encoder.pool(encoder(encoder.embed(batch[self.b]), self.causal))

    def after_step(self, model: Model, progress: float) -> None:
        if self.teacher is not None:
            self.teacher.after_step(model, progress)
