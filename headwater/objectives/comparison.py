"""How a student's answer is held against its teacher's: by prototypes (DINO), or as one vector against another (BYOL)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater import distributed
from headwater.init import ZERO, Rule
from headwater.objectives.heads import Projector
from headwater.objectives.objective import Schedule, at, wide


class Comparison(nn.Module):
    """Answer and target are vectors of one size, and the error follows from their inner product.

    That is linear in the target, so the mean error over several targets is the error of their mean, which costs as much as one.

    head: vectors (..., D) -> (..., K); the teacher has an averaged copy of it.
    """

    head: nn.Module

    def answers(self, z: Tensor) -> Tensor:
        """What the student says, given what its head did: (..., K) -> (..., K)."""
        raise NotImplementedError(f"{type(self).__name__}.answers must turn the student's head into answers")

    def targets(self, z: Tensor, progress: float) -> Tensor:
        """What is asked for, given what the teacher's head said of this rank's part of the batch: (R, K) -> (R, K)."""
        raise NotImplementedError(f"{type(self).__name__}.targets must turn the teacher's head into targets")

    def error(self, agreement: Tensor) -> Tensor:
        """Inner products of answers and targets -> errors, of any shape."""
        raise NotImplementedError(f"{type(self).__name__}.error must score the agreement of answers and targets")

    def metrics(self, targets: Tensor) -> dict[str, Tensor]:
        """How far from collapse the teacher is. targets: (R, K)."""
        return {}

    def after_step(self) -> None:
        """Once per optimizer step: moving averages."""


class PrototypeHead(nn.Module):
    """(..., D) -> (..., K) cosines between what an MLP makes of a vector and K learned directions, in [-1, 1].

    Args:
        width: D. prototypes: K. sizes: of the MLP behind the input; the last is the space in which directions are compared.
    """

    def __init__(self, width: int, prototypes: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.mlp = Projector([width, *sizes], norm="none")
        self.prototypes = nn.Linear(sizes[-1], prototypes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.mlp(x), dim=-1), F.normalize(self.prototypes.weight, dim=-1))


class Prototypes(Comparison):
    """Cross entropy between the shares that both give to prototypes (DINO, Caron et al. 2021, arXiv:2104.14294).

    https://github.com/facebookresearch/dino

    Args:
        width: D of the vectors that are compared.
        prototypes: K. sizes: of the head's MLP; the last is its bottleneck.
        balance: what keeps the teacher from one answer for all: "centre" = its mean answer, a moving average over steps, is taken
            off; "sinkhorn" = all prototypes get equal shares of the batch (SwAV, arXiv:2006.09882; DINOv2, arXiv:2304.07193);
            "none" = nothing, which collapses.
        temperature: of the student. teacher_temperature: lower, so that targets are sharp.
        centre_momentum: share of itself that the centre keeps in a step.
    """

    centre: Tensor

    def __init__(
        self,
        width: int,
        prototypes: int = 1024,
        sizes: Sequence[int] = (512, 512, 128),
        balance: Literal["centre", "sinkhorn", "none"] = "centre",
        temperature: float = 0.1,
        teacher_temperature: float | Schedule = 0.04,
        centre_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if prototypes < 2 or not sizes:
            raise ValueError(f"found {prototypes} prototypes and sizes {list(sizes)}; expected 2 or more and at least one size")
        if temperature <= 0 or not 0 <= centre_momentum < 1:
            raise ValueError(
                f"found temperature {temperature} and centre_momentum {centre_momentum}; expected more than 0, and 0 to below 1"
            )
        self.head = PrototypeHead(width, prototypes, sizes)
        self.balance, self.temperature, self.teacher_temperature = balance, temperature, teacher_temperature
        self.centre_momentum = centre_momentum
        self.register_buffer("centre", torch.zeros(prototypes))
        self.mean: Tensor | None = None  # of the teacher's answers to the last batch, until the step is done

    def init_rules(self) -> dict[str, Rule]:
        return {"centre": ZERO}

    def answers(self, z: Tensor) -> Tensor:
        return (wide(z) / self.temperature).log_softmax(-1)

    def targets(self, z: Tensor, progress: float) -> Tensor:
        z, temperature = wide(z), at(self.teacher_temperature, progress)
        if self.balance == "sinkhorn":
            return sinkhorn(z, temperature)
        if self.balance == "centre":
            self.mean = overall_mean(z, self.centre)
            z = z - self.centre
        return (z / temperature).softmax(-1)

    def error(self, agreement: Tensor) -> Tensor:
        return -agreement

    def metrics(self, targets: Tensor) -> dict[str, Tensor]:
        """Mean entropy of the teacher's answers in nats, from 0 (certain) to log K; share of the prototypes that are in use,
        which is exp(entropy of the mean answer) / K."""
        mean = targets.mean(0)
        used = torch.special.entr(mean).sum().exp() / len(mean)
        return {"teacher_entropy": torch.special.entr(targets).sum(-1).mean(), "prototypes_used": used}

    def after_step(self) -> None:
        if self.mean is not None:
            self.centre.lerp_(self.mean.to(self.centre.dtype), 1 - self.centre_momentum)


class Regression(Comparison):
    """2 - 2 cos of what a predictor makes of the student's vector and the teacher's (BYOL, Grill et al. 2020, arXiv:2006.07733).

    https://github.com/google-deepmind/deepmind-research/tree/master/byol

    Args:
        width: D of the vectors that are compared.
        sizes: of the projector that both have, behind its input. hidden: of the predictor, which only the student has.
        norm: inside of both. last_norm: behind the projector too, as SimSiam has it (Chen and He 2020, arXiv:2011.10566).
    """

    def __init__(
        self,
        width: int,
        sizes: Sequence[int] = (512, 128),
        hidden: int = 512,
        norm: Literal["batch", "layer", "none"] = "batch",
        last_norm: bool = False,
    ) -> None:
        super().__init__()
        self.head = Projector([width, *sizes], norm, last_norm)
        self.predictor = Projector([sizes[-1], hidden, sizes[-1]], norm)

    def answers(self, z: Tensor) -> Tensor:
        return F.normalize(wide(self.predictor(z)), dim=-1)

    def targets(self, z: Tensor, progress: float) -> Tensor:
        return F.normalize(wide(z), dim=-1)

    def error(self, agreement: Tensor) -> Tensor:
        return 2 - 2 * agreement

    def metrics(self, targets: Tensor) -> dict[str, Tensor]:
        """Deviation of the teacher's unit vectors times sqrt(K): about 1 where they fill the sphere, 0 where they collapse."""
        return {"teacher_std": targets.std(0, correction=0).mean() * targets.shape[-1] ** 0.5}


def sinkhorn(z: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Shares of prototypes (R, K) from scores (R, K) of this rank: each row sums to 1, and over all ranks each prototype gets the
    same, as near as the iterations of Sinkhorn and Knopp come (Cuturi 2013, arXiv:1306.0895). Without gradient.

    https://github.com/facebookresearch/swav
    """
    top = z.max()[None] if z.numel() else z.new_full((1,), -torch.inf)
    shares = ((z - distributed.gather(top)[0].max()) / temperature).exp()  # no overflow, and no rank has another scale
    for _ in range(iterations):
        shares = shares / distributed.total(shares.sum(0)).clamp(min=torch.finfo(z.dtype).tiny)
        shares = shares / shares.sum(1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
    return shares


def overall_mean(z: Tensor, default: Tensor) -> Tensor:
    """Mean (K,) of the rows (R, K) of all ranks; `default` where there is none."""
    *summed, number = distributed.total(torch.cat([z.sum(0), z.new_tensor([float(len(z))])])).split([z.shape[1], 1])
    return torch.where(number > 0, summed[0] / number.clamp(min=1), default.to(z.dtype))


def agreement(answers: Tensor, targets: Tensor, own: bool) -> Tensor:
    """(V, S, K) and (G, S, K) -> (S,) mean inner product over all pairs of unlike views.

    own: the first G answers are of the same views as the targets, and these pairs are left out.
    """
    both = torch.linalg.vecdot(answers.sum(0), targets.sum(0))
    if own:
        both = both - torch.linalg.vecdot(answers[: len(targets)], targets).sum(0)
    return both / (len(targets) * (len(answers) - own))
