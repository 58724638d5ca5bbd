"""Latent thoughts: behind each token stand slots whose input is the model's own last state, and the last of them answers.

A slot gets the state of what stands before it, so the model computes longer on each step without saying more. As a slot depends
on all slots before it, training solves for them by Jacobi's iteration: a few passes in parallel, each with the states of the
one before, which end at what a step-by-step run would give (PonderLM-2, Zeng et al. 2025, arXiv:2509.23184). With no such pass
slots hold the start token and are pauses (Goyal et al. 2023, arXiv:2310.02226), the control. Nothing is thrown away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwater.model import Model
from headwater.objectives.causal import Causal
from headwater.objectives.likelihood import Likelihood
from headwater.objectives.objective import Batch, part
from headwater.sequence import orders
from headwater.teacher import Teacher
from headwater.tokens import cat


class Slots(Causal):
    """Hides the future of one modality, and gives the model slots to think in before each answer.

    Args:
        model: its states, of the size of its embeddings, go back in.
        modality, prefix, context, likelihood: as in Causal.
        slots: behind each token.
        passes: of Jacobi's iteration, behind a first one without slots; 0 = the slots are pauses.
    """

    def __init__(
        self,
        model: Model,
        modality: str = "text",
        prefix: list[str] | None = None,
        context: list[str] | None = None,
        likelihood: Likelihood | None = None,
        slots: int = 1,
        passes: int = 2,
    ) -> None:
        super().__init__(model, modality, prefix, context, likelihood)
        if slots < 1 or passes < 0:
            raise ValueError(f"found {slots} slots and {passes} passes; expected one slot or more, and no fewer than 0 passes")
        if model.width(modality) != model.encoder(modality).embedded:
            raise ValueError(
                f"found states of {model.width(modality)} and embeddings of {model.encoder(modality).embedded} in {modality}; "
                "expected one size, so that states can go back in"
            )
        self.slots, self.passes = slots, passes

    def states(self, model: Model | Teacher, batch: Batch) -> Tensor:
        """The states (B, N, D) of the last slot at every place."""
        parts = model.embed(part(batch, self.seen))
        parts = {name: t._replace(order=orders(t) * (self.slots + 1)) for name, t in parts.items()}
        t = parts[self.modality]
        length = t.position.shape[1]

        def run(inputs: list[Tensor]) -> list[Tensor]:
            """Inputs of slots, (B, N, D) each -> states of the tokens and of each slot."""
            thoughts = [t._replace(x=x, order=orders(t) + k) for k, x in enumerate(inputs, 1)]
            y = model(parts | {self.modality: cat([t, *thoughts])}, True)[self.modality].x
            return list(y[:, : length * (len(inputs) + 1)].split(length, 1))

        if not self.passes:
            return run([self.pause(model, batch)] * self.slots)[-1]
        states = run([]) * (self.slots + 1)
        for _ in range(self.passes):
            states = run(states[:-1])
        return states[-1]

    def pause(self, model: Model | Teacher, batch: Batch) -> Tensor:
        """The embedded start token at every place, (B, N, D)."""
        raw = batch[self.modality]
        nothing = torch.zeros_like(raw.x) if self.start_id is None else torch.full_like(raw.x, self.start_id)
        return model.embed({self.modality: raw._replace(x=nothing)})[self.modality].x
