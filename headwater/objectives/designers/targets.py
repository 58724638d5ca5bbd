"""What each token of ids is worth, or what shall be answered besides the right id: designers of a language model's targets."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headwater.init import ZERO, Rule, constant
from headwater.model import Model
from headwater.objectives.designers.designer import Designer
from headwater.objectives.objective import Batch, Objective, Term, wide
from headwater.objectives.tiled_likelihood import TILE, log_probabilities


class Guesses(NamedTuple):
    """What the learner answers. hints: of the objective; ids, log_p: its K best answers of each token, (B, N, K), best first;
    right: log p of the right one, (B, N)."""

    hints: Any
    ids: Tensor
    log_p: Tensor
    right: Tensor


class Guessing(Designer):
    """Reads the learner's answers to the task, and prices the objective's tokens itself.

    Args:
        model: not read.
        inner: asks for ids at every place, as Causal and its kin do, and prices them plainly.
        k: best answers that are looked at.
        hidden: width of the designer's network, which reads log p of the K best answers and of the right one.
        outputs: numbers that it gives per token.
    """

    def __init__(self, model: Model, inner: Objective, k: int, hidden: int, outputs: int) -> None:
        super().__init__()
        likelihood = getattr(inner, "likelihood", None)
        if not hasattr(inner, "states") or likelihood is None or not likelihood.plain or inner.classes is None:
            raise ValueError(
                f"found {type(inner).__name__}; expected an objective that answers every place with ids at their plain likelihood, "
                "such as Causal"
            )
        if not 1 <= k <= inner.classes:
            raise ValueError(f"found k={k}; expected 1 to {inner.classes} answers")
        self.k = k
        self.net = nn.Sequential(nn.Linear(k + 1, hidden), nn.GELU(), nn.Linear(hidden, outputs))

    def init_rules(self) -> dict[str, Rule]:
        """Before it has learned it says 0 of every token."""
        return {"net.2.weight": ZERO}

    def look(self, inner: Any, model: Model, batch: Batch) -> Guesses:
        hints = inner.look(model, batch)
        task = inner.task(batch, hints)
        states, unembed = inner.states(model, task), model.encoder(inner.modality).unembed
        best, right = [], []
        flat, answer = states.flatten(0, 1), task["answer"].flatten()
        rows = max(1, TILE // inner.classes)
        for start in range(0, len(flat), rows):
            log_p = wide(unembed(flat[start : start + rows])).log_softmax(-1)
            best.append(log_p.topk(self.k))
            right.append(log_p.gather(-1, answer[start : start + rows, None])[:, 0])
        shape = states.shape[:2]
        ids, values = (torch.cat([getattr(b, name) for b in best]).view(*shape, self.k) for name in ("indices", "values"))
        return Guesses(hints, ids, values, torch.cat(right).view(shape))

    def read(self, seen: Guesses) -> Tensor:
        """(B, N, outputs)."""
        read = torch.cat([seen.log_p, seen.right[..., None]], -1).clamp(min=-20) / 5
        return self.net(read.to(next(self.net.parameters()).dtype))

    @staticmethod
    def name(inner: Objective, task: Batch) -> str:
        """Of the only term."""
        (name,) = inner.numbers(task)
        return name


class SoftTargets(Guessing):
    """The target is the right id mixed with the learner's own K best answers, which the designer weighs.

    q = (1 - m) onehot + m softmax(scores + log p / temperature) over the K best, m = sigmoid(mix), all per token. Because q sums
    to 1 the loss is sum_k q_k (-log p_k), linear in q.

    Args:
        model, inner: see Guessing.
        k: best answers that may become targets.
        hidden: width of the designer's network.
        temperature: of the learner's answers.
        mix: logit of m to begin with.
    """

    def __init__(
        self, model: Model, inner: Objective, k: int = 8, hidden: int = 32, temperature: float = 1.0, mix: float = -3.0
    ) -> None:
        super().__init__(model, inner, k, hidden, k + 1)
        if temperature <= 0:
            raise ValueError(f"found temperature {temperature}; expected one above 0")
        self.temperature, self.mix = temperature, nn.Parameter(torch.tensor([mix]))
        self.first = mix

    def init_rules(self) -> dict[str, Rule]:
        return {**super().init_rules(), "mix": constant(self.first)}

    def design(self, inner: Objective, batch: Batch, hints: Guesses, ahead: bool) -> Batch:
        said = self.read(hints)
        share = torch.sigmoid(said[..., :1] + self.mix)
        best = torch.softmax(said[..., 1:] + hints.log_p.to(said.dtype) / self.temperature, -1)
        task = inner.task(batch, hints.hints)
        ids = torch.cat([task["answer"][..., None], hints.ids], -1)
        return {**task, "ids": ids, "design": torch.cat([1 - share, share * best], -1)}

    def ask(self, inner: Any, model: Model, task: Batch) -> dict[str, Term]:
        asked, unembed = task["asked"], model.encoder(inner.modality).unembed
        log_p = log_probabilities(unembed, inner.states(model, task)[asked], task["ids"][asked])
        return {self.name(inner, task): Term(-(task["design"][asked].to(log_p.dtype) * log_p).sum(), asked.sum())}

    def tell(self) -> dict[str, Tensor]:
        return {"mix": self.mix.detach().sigmoid()[0]}


class TokenWeights(Guessing):
    """Each token counts 2 sigmoid(w), w from what the learner makes of it.

    Args:
        model, inner: see Guessing.
        k: best answers that the designer looks at.
        hidden: width of its network.
    """

    def __init__(self, model: Model, inner: Objective, k: int = 4, hidden: int = 32) -> None:
        super().__init__(model, inner, k, hidden, 1)

    def design(self, inner: Objective, batch: Batch, hints: Guesses, ahead: bool) -> Batch:
        return {**inner.task(batch, hints.hints), "design": 2 * torch.sigmoid(self.read(hints)[..., 0])}

    def ask(self, inner: Any, model: Model, task: Batch) -> dict[str, Term]:
        asked, unembed = task["asked"], model.encoder(inner.modality).unembed
        log_p = log_probabilities(unembed, inner.states(model, task)[asked], task["answer"][asked])
        return {self.name(inner, task): Term(-(task["design"][asked].to(log_p.dtype) * log_p).sum(), asked.sum())}
