"""What an objective may ask of a run before a step is taken: gradients of any loss, and losses at nearby weights.

V-Pretraining, gradient harmonisation, influence and bilevel learning all stand on it. It works for one process, DDP and FSDP2
alike: a gradient comes back summed over ranks, in the form in which its parameter is held.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from headwater import distributed, fused
from headwater.distributed import local
from headwater.objectives.objective import Term, count, weighted_sum

Ask = Callable[[], dict[str, Term]]


class Probe:
    """Of one step. Nothing that is asked for changes the run: buffers, random state and `.grad` are afterwards what they were.

    What shall change it is handed over: gradients for the optimizer, and numbers to log.

    Args:
        module: all that trains: parameters and buffers.
        learner: the part of it whose trainable parameters are `theta`.
        call: runs a function while the weights can be used (under FSDP2 they are gathered).
        seed: of dropout in every pass that is made here.
        step: its number. micro: pieces that its batch is cut into to save memory.
    """

    def __init__(
        self, module: nn.Module, learner: nn.Module, call: Callable[[Ask], Any], seed: int = 0, step: int = 0, micro: int = 1
    ) -> None:
        self.module, self.learner, self.call, self.seed, self.step, self.micro = module, learner, call, seed, step, micro
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]  # FSDP2 shows what an earlier call has gathered in place of the shares
        named = {name: p for name, p in learner.named_parameters() if p.requires_grad}
        self.names, self.theta = list(named), list(named.values())
        self.shared = any(isinstance(p, DTensor) for p in self.theta)
        self.handed: list[tuple[list[nn.Parameter], list[Tensor], bool]] = []
        self.told: dict[str, Tensor] = {}
        self.direction: list[Tensor] | None = None

    def hand(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], apart: bool = True) -> None:
        """Gradients that the optimizer gets beside those of this step's loss.

        apart: bounded by a norm of their own, so that the learner's step is what it would be without them.
        """
        self.handed.append((list(parameters), list(gradients), apart))

    @torch.no_grad()
    def give(self, apart: bool, clip: float = 0.0) -> None:
        """The Pretrainer, once backward is done: what was handed over becomes part of `.grad`. clip: largest norm; 0 = any.

        What is handed apart and not finite is left out.
        """
        if not apart and self.direction is not None:
            self._appraise(self.direction)
        for parameters, gradients, alone in self.handed:
            if alone != apart or (alone and not self.norm(gradients).isfinite()):
                continue
            if alone and clip:
                fused.scale_gradients(gradients, clip, fused.gradient_norm(gradients))
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = g if p.grad is None else p.grad + g

    def _appraise(self, direction: list[Tensor]) -> None:
        """Log what the learner's gradient is worth along a direction."""
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.theta]
        value = self.dot(found, direction)
        self.tell("value", value)
        self.tell("alignment", value / (self.norm(found) * self.norm(direction)).clamp(min=1e-30))

    def among(self, pattern: str | None) -> None:
        """From here on `theta` are those parameters whose names match; None = no change."""
        if pattern is None:
            return
        kept = {name: p for name, p in zip(self.names, self.theta, strict=True) if re.search(pattern, name)}
        if not kept:
            raise ValueError(f"no trainable parameter of the model matches {pattern!r}; their names are like {self.names[0]}")
        self.names, self.theta = list(kept), list(kept.values())

    def tell(self, name: str, value: Tensor | float) -> None:
        """Log train/NAME for this step."""
        self.told[name] = torch.as_tensor(value)

    def watch(self, direction: list[Tensor]) -> None:
        """Log what the gradient that the learner follows in this step is worth: train/value is its inner product with this
        direction of `theta`, train/alignment the cosine."""
        self.direction = direction

    def gradient(self, ask: Ask, of: Sequence[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
        """The loss, normalised by its numbers of targets on all ranks, and its gradient, summed over ranks.

        Other parameters need no graph, so that a loss which reaches `of` without the learner costs no backward pass through it.
        """
        of = list(of)
        with self.still(), torch.enable_grad(), self.only(of):
            if self.shared:
                return self._collected(ask, of)
            loss = self.loss(ask)
            return distributed.total(loss), self._summed(loss, of)

    def loss(self, ask: Ask) -> Tensor:
        """This rank's part of the normalised loss; the sum over ranks is the loss of the whole batch."""
        terms = self.call(ask)
        numbers = count([{name: term.number for name, term in terms.items()}])
        return weighted_sum(terms, numbers, distributed.world() if self.shared else 1)  # FSDP2 averages over ranks

    @staticmethod
    def _summed(loss: Tensor, of: list[nn.Parameter]) -> list[Tensor]:
        found: Sequence[Tensor | None] = [None] * len(of)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, of, allow_unused=True)
        return total([torch.zeros_like(p) if g is None else g for p, g in zip(of, found, strict=True)])

    def _collected(self, ask: Ask, of: list[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
        """By an ordinary backward pass, in which FSDP2 gathers weights and shares gradients out."""
        self.let_go()
        every = list(self.module.parameters())
        kept = [p.grad for p in every]
        for p in every:
            p.grad = None
        loss = self.loss(ask)
        if loss.requires_grad:
            loss.backward()
        found = [torch.zeros_like(p.detach()) if p.grad is None else p.grad for p in of]
        for p, before in zip(every, kept, strict=True):
            p.grad = before
        return distributed.total(loss) / distributed.world(), found

    def let_go(self) -> None:
        """FSDP2 keeps what it has gathered until a backward pass; here it must see that weights have changed."""
        if self.shared:
            self.module.reshard()  # type: ignore[operator]

    @contextmanager
    def nudged(self, direction: Sequence[Tensor], amount: float) -> Iterator[None]:
        """Inside, theta + amount * direction; afterwards theta, bit by bit."""
        self.let_go()
        kept = [local(p).clone() for p in self.theta]
        self.move(direction, amount)
        try:
            yield
        finally:
            self.let_go()
            with torch.no_grad():
                for p, before in zip(self.theta, kept, strict=True):
                    local(p).copy_(before)

    @torch.no_grad()
    def move(self, direction: Sequence[Tensor], amount: float) -> None:
        """theta += amount * direction, for good: inside of `nudged`."""
        for p, d in zip(self.theta, direction, strict=True):
            local(p).add_(local(d), alpha=amount)

    def dot(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """Inner product, float64 (), the same on all ranks."""
        pairs = [(local(x).double() * local(y)).sum() for x, y in zip(a, b, strict=True)]
        found = torch.stack(pairs).sum()
        return distributed.total(found) if any(isinstance(x, DTensor) for x in a) else found

    def norm(self, a: Sequence[Tensor]) -> Tensor:
        """Euclidean norm, float64 ()."""
        return self.dot(a, a).sqrt()

    @contextmanager
    def still(self) -> Iterator[None]:
        """Dropout inside is the same whenever this is entered; buffers and random state are afterwards what they were."""
        buffers = [(b, b.detach().clone()) for b in self.module.buffers()]
        device = self.theta[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            yield
        with torch.no_grad():
            for b, before in buffers:
                b.copy_(before)

    @contextmanager
    def only(self, of: Sequence[nn.Parameter]) -> Iterator[None]:
        """Nothing else needs a gradient. FSDP2 knows from the start which weights do, so there nothing changes."""
        wanted = set(map(id, of))
        others = [] if self.shared else [p for p in self.module.parameters() if p.requires_grad and id(p) not in wanted]
        for p in others:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in others:
                p.requires_grad_(True)


def total(gradients: list[Tensor]) -> list[Tensor]:
    """Summed over ranks, in one exchange."""
    if distributed.world() == 1 or not gradients:
        return gradients
    flat = distributed.total(torch.cat([g.flatten() for g in gradients]))
    return [part.view_as(g) for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True)]
