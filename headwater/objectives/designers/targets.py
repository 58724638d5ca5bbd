"""What each token of ids is worth, or what shall be answered besides the right id: designers of a language model's targets."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headwater.init import ZERO, Rule, constant
from headwater.model import Model
from headwater.objectives.designers.designer import Designer
from headwater.objectives.objective import Batch, Objective, Term, wide
from headwater.objectives.tiled_likelihood import TILE, expected_log_probability, log_probabilities


class Guesses(NamedTuple):
    """What the learner answers at T places. ids, log_p: (T, K) its K best, best first; right: (T,) log p of the right id."""

    ids: Tensor
    log_p: Tensor
    right: Tensor


class Looked(NamedTuple):
    """hints: of the objective. guesses: those of the first pass that looks ahead, in which they are made, so that all passes share
    them; None = each step makes its own."""

    hints: Any
    guesses: list[Guesses] | None


class TargetDesigner(Designer):
    """Prices the objective's tokens by what the learner answers: sum_k w_k (-log p_k) over the right id and the K best others.

    What is read of the answers is a constant, so the loss is linear in w: looking ahead needs no graph of the learner, and the
    learner's step no second pass.

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

    def look(self, inner: Objective, model: Model, batch: Batch, ahead: bool) -> Looked:
        return Looked(inner.look(model, batch), [] if ahead else None)

    def design(self, inner: Objective, batch: Batch, hints: Looked, ahead: bool) -> Batch:
        return {**inner.task(batch, hints.hints), "guesses": hints.guesses}

    def ask(self, inner: Any, model: Model, task: Batch) -> dict[str, Term]:
        asked, unembed = task["asked"], model.encoder(inner.modality).unembed
        x, answer, memory = inner.states(model, task)[asked], task["answer"][asked], task["guesses"]
        if memory is None:

            def choose(log_p: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
                return self.targets(self.guess(log_p, answer[rows]), answer[rows])

            cost = -expected_log_probability(unembed, x, choose)
        else:
            if not memory:
                memory.append(self.guesses(unembed, x.detach(), answer))
            ids, weight = self.targets(memory[0], answer)
            log_p = log_probabilities(unembed, x, ids)
            cost = -(weight.to(log_p.dtype) * log_p).sum(-1)
        (name,) = inner.numbers(task)
        return {name: Term(cost.sum(), asked.sum())}

    @torch.no_grad()
    def guesses(self, unembed: Any, x: Tensor, answer: Tensor) -> Guesses:
        """Of vectors (T, D), in tiles."""
        rows = max(1, TILE // unembed(x[:1]).shape[-1]) if len(x) else 1
        starts = range(0, max(len(x), 1), rows)
        every = [self.guess(wide(unembed(x[s : s + rows])).log_softmax(-1), answer[s : s + rows]) for s in starts]
        return Guesses(*(torch.cat(field).detach() for field in zip(*every, strict=True)))  # from forward mode, too

    def guess(self, log_p: Tensor, answer: Tensor) -> Guesses:
        """log_p: (T, V); answer: (T,) ids."""
        best = log_p.topk(self.k)
        return Guesses(best.indices, best.values, log_p.gather(-1, answer[:, None])[:, 0])

    def read(self, seen: Guesses) -> Tensor:
        """(T, outputs)."""
        read = torch.cat([seen.log_p, seen.right[:, None]], -1).clamp(min=-20) / 5
        return self.net(read.to(next(self.net.parameters()).dtype))

    def targets(self, seen: Guesses, answer: Tensor) -> tuple[Tensor, Tensor]:
        """Ids (T, any) and their weights w."""
        raise NotImplementedError(f"{type(self).__name__} must say what is asked for, and how much it counts")


class SoftTargets(TargetDesigner):
    """The target is the right id mixed with the learner's own K best answers, which the designer weighs.

    w = (1 - m) onehot + m softmax(scores + log p / temperature) over the K best, m = sigmoid(mix + score), all per token.

    Args:
        model, inner: see TargetDesigner.
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
        self.temperature, self.mix, self.first = temperature, nn.Parameter(torch.tensor([mix])), mix

    def init_rules(self) -> dict[str, Rule]:
        return {**super().init_rules(), "mix": constant(self.first)}

    def targets(self, seen: Guesses, answer: Tensor) -> tuple[Tensor, Tensor]:
        said = self.read(seen)
        share = torch.sigmoid(said[:, :1] + self.mix)
        best = torch.softmax(said[:, 1:] + seen.log_p.to(said.dtype) / self.temperature, -1)
        return torch.cat([answer[:, None], seen.ids], -1), torch.cat([1 - share, share * best], -1)

    def tell(self) -> dict[str, Tensor]:
        return {"mix": self.mix.detach().sigmoid()[0]}


class TokenWeights(TargetDesigner):
    """Each token counts 2 sigmoid(w), w from what the learner makes of it.

    Args:
        model, inner: see TargetDesigner.
        k: best answers that the designer looks at.
        hidden: width of its network.
    """

    def __init__(self, model: Model, inner: Objective, k: int = 4, hidden: int = 32) -> None:
        super().__init__(model, inner, k, hidden, 1)

    def targets(self, seen: Guesses, answer: Tensor) -> tuple[Tensor, Tensor]:
        return answer[:, None], 2 * torch.sigmoid(self.read(seen))
