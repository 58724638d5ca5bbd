"""What a matrix of scores between samples should look like: softmax, sigmoid, margin and bounds of mutual information.

Every loss is a sum over rows, so that the matrix may come in blocks of rows beside all candidates. In these formulas S_ij is
the score of row i and candidate j with the temperature in, T_ij the target, w_ij the weight of a candidate (`positives.py`).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater import distributed
from headwater.init import Rule, constant
from headwater.objectives import heads
from headwater.objectives.contrast.positives import Target


class Loss(nn.Module):
    """A loss of rows of scores and the temperature that these are divided by.

    symmetric: rows and columns give the same sum when candidates are the rows' own partners, so one direction is enough.

    Args:
        temperature: the first value, or the only one. learned: it trains from there, as log of its inverse.
        max_scale: bound of 1 / temperature while it is learned; its other bound is 1.
    """

    symmetric: bool = False

    def __init__(self, temperature: float = 0.07, learned: bool = True, max_scale: float = 100.0) -> None:
        super().__init__()
        if temperature <= 0 or (learned and not 1 <= 1 / temperature <= max_scale):
            raise ValueError(
                f"found temperature {temperature} and max_scale {max_scale}; expected a temperature above 0 and, while it is "
                "learned, 1 / temperature from 1 to max_scale"
            )
        self.start, self.max_scale = -math.log(temperature), max_scale
        # of one dimension: FSDP2 splits no scalars
        self.log_scale = nn.Parameter(torch.tensor([self.start])) if learned else None

    def init_rules(self) -> dict[str, Rule]:
        return {} if self.log_scale is None else {"log_scale": constant(self.start)}

    def logits(self, scores: Tensor) -> Tensor:
        """(A, C) -> (A, C): divided by the temperature."""
        return scores * (math.exp(self.start) if self.log_scale is None else self.log_scale.exp())

    def rows(self, logits: Tensor, target: Target) -> Tensor:
        """(A, C) -> what each row adds, (A,) or (A, K)."""
        raise NotImplementedError(f"{type(self).__name__}.rows must score every row")

    def total(self, rows: Tensor) -> Tensor:
        """All rows of this rank -> their share of the loss."""
        return rows.sum()

    def metrics(self) -> dict[str, Tensor]:
        """What is learned here, to log."""
        return {} if self.log_scale is None else {"scale": self.log_scale.detach().exp()[0]}

    @torch.no_grad()
    def after_step(self) -> None:
        """Back into the bounds."""
        if self.log_scale is not None:
            self.log_scale.clamp_(0, math.log(self.max_scale))


class Softmax(Loss):
    """Cross entropy of the target under the softmax over candidates: InfoNCE (arXiv:1807.03748), CLIP (arXiv:2103.00020).

    loss_i = - sum_j T_ij log( e^{S_ij} / sum_k w_ik e^{S_ik} ).
    """

    def rows(self, logits: Tensor, target: Target) -> Tensor:
        weighted = logits if target.log_w is None else logits + target.log_w
        return target.t.sum(1) * weighted.logsumexp(1) - (target.t * logits).sum(1)


class Sigmoid(Loss):
    """Each pair on its own: match or not (SigLIP, Zhai et al. 2023, arXiv:2303.15343; google-research/big_vision).

    loss_i = sum_j w_ij log(1 + e^{-z_ij (S_ij + b)}) with z = 1 where T > 0, else -1, and a learned bias b.

    Args:
        bias: where b starts; about minus the log of the number of candidates makes the first loss small.
    """

    symmetric = True

    def __init__(self, temperature: float = 0.1, learned: bool = True, max_scale: float = 100.0, bias: float = -10.0) -> None:
        super().__init__(temperature, learned, max_scale)
        self.first_bias = bias
        self.bias = nn.Parameter(torch.tensor([bias]))

    def init_rules(self) -> dict[str, Rule]:
        return super().init_rules() | {"bias": constant(self.first_bias)}

    def rows(self, logits: Tensor, target: Target) -> Tensor:
        each = F.softplus(torch.where(target.t > 0, -1.0, 1.0).to(logits.dtype) * (logits + self.bias))
        return (each if target.log_w is None else each * target.log_w.exp()).sum(1)

    def metrics(self) -> dict[str, Tensor]:
        return super().metrics() | {"bias": self.bias.detach()[0]}


class Margin(Loss):
    """Answers are ahead of every other candidate by a margin: max(0, margin + S_ij - S_ip), S_ip the mean score of the answers.

    The mean over all others, the hardest of them (VSE++, Faghri et al. 2017, arXiv:1707.05612), or the hardest of those that are
    behind the answer (FaceNet, Schroff et al. 2015, arXiv:1503.03832). The temperature is 1: the margin is one of scores.

    Args:
        margin: in units of the score.
        others: which of them count.
    """

    def __init__(self, margin: float = 0.2, others: Literal["all", "hardest", "semi-hard"] = "hardest") -> None:
        super().__init__(1.0, learned=False)
        if margin <= 0:
            raise ValueError(f"found margin {margin}; expected more than 0, or equal scores would cost nothing")
        self.margin, self.others = margin, others

    def rows(self, logits: Tensor, target: Target) -> Tensor:
        answer = (target.t * logits).sum(1, keepdim=True)
        counts = (target.t <= 0) if target.log_w is None else (target.t <= 0) & (target.log_w > -math.inf)
        if self.others == "semi-hard":
            counts = counts & (logits < answer)
        cost = F.relu(self.margin + logits - answer).masked_fill(~counts, 0)
        return cost.sum(1) / counts.sum(1).clamp(min=1) if self.others == "all" else hardest(cost)


def hardest(cost: Tensor) -> Tensor:
    """(A, C) -> (A,) the largest of each row; 0 where there are no columns."""
    return cost.amax(1) if cost.shape[1] else cost.sum(1)


class Bound(Loss):
    """Minus a lower bound of the mutual information of the two sides, in nats ("jsd": of a divergence that rises with it).

    With f = S, pairs p and all other combinations q of the batch (InfoNCE, the bound below log of the candidates, is `Softmax`):
    "nwj": E_p[f] - E_q[e^f] / e (Nguyen, Wainwright and Jordan 2010, arXiv:0809.0853);
    "jsd": -E_p[log(1 + e^-f)] - E_q[log(1 + e^f)] (Hjelm et al. 2018, Deep InfoMax, arXiv:1808.06670);
    "smile": E_p[f] - log E_q[clip(e^f, e^-clip, e^clip)] (Song and Ermon 2019, arXiv:1910.06222); without a bound on the clip
    it is Donsker and Varadhan's (MINE, arXiv:1801.04062).

    Args:
        clip: bound of |f| under the logarithm, for "smile".
    """

    symmetric = True

    def __init__(
        self,
        kind: Literal["nwj", "jsd", "smile"] = "smile",
        temperature: float = 0.2,
        learned: bool = True,
        max_scale: float = 20.0,
        clip: float = 5.0,
    ) -> None:
        super().__init__(temperature, learned, max_scale)
        if clip <= 0:
            raise ValueError(f"found clip {clip}; expected more than 0 (or .inf for no bound)")
        self.kind, self.clip = kind, clip

    def rows(self, logits: Tensor, target: Target) -> Tensor:
        """-> (A, 2): minus the row's mean over pairs, its mean over other combinations under the sign of q."""
        other = (target.t <= 0) if target.log_w is None else (target.t <= 0) & (target.log_w > -math.inf)
        inside = {
            "nwj": lambda f: (f - 1).exp(),
            "jsd": F.softplus,
            "smile": lambda f: f.clamp(-self.clip, self.clip).exp(),
        }[self.kind]
        pair = target.t * (F.softplus(-logits) if self.kind == "jsd" else -logits)
        means = inside(logits).masked_fill(~other, 0).sum(1) / other.sum(1).clamp(min=1)
        return torch.stack([pair.sum(1), means], 1)

    def total(self, rows: Tensor) -> Tensor:
        if self.kind != "smile":
            return rows.sum()
        mean = distributed.summed(rows[:, 1].sum()) / heads.rows(rows)
        return rows[:, 0].sum() + len(rows) * torch.where(mean > 0, mean, 1.0).log()
