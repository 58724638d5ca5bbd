"""How wrong each answer of masked prediction is: by distance where slots may be absent, or by choice among the hidden places."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from headwater.objectives.distances import Distance, distance_of
from headwater.tokens import Tokens


def error(kind: Distance, predicted: Tensor, wanted: Tensor) -> Tensor:
    """Distance over the slots of `wanted` that are present (not NaN), 0 where none is: (..., D), (..., D) -> (...)."""
    present = ~wanted.isnan()
    share = present.to(predicted.dtype).mean(-1)
    if kind == "cosine":
        return distance_of(kind)(torch.where(present, predicted, 0), torch.where(present, wanted, 0)) * (share > 0)
    return distance_of(kind)(predicted, torch.where(present, wanted, predicted.detach())) / share.clamp(min=1 / wanted.shape[-1])


def select(predicted: Tensor, wanted: Tokens, temperature: float) -> Tensor:
    """-log of the softmax share of the right vector among those of all hidden places of the sample, by cosine / temperature.

    wav2vec 2.0's contrastive loss (Baevski et al. 2020, arXiv:2006.11477, equation 3) with all other hidden places in place of
    100 drawn ones. Places that want the same direction are no distractors, as equal codes are none in its official code.

    predicted: (B, K, D); wanted: the right vectors as Tokens (B, K), of which those that are real count -> (B, K).
    """
    predicted, right = (F.normalize(x, dim=-1) for x in (predicted, wanted.x.nan_to_num()))
    logits = predicted @ right.mT / temperature
    itself = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    others = wanted.real()[:, None, :] & ((right @ right.mT).detach() < 1 - 1e-6)
    if wanted.document is not None:
        others = others & (wanted.document[:, :, None] == wanted.document[:, None, :])
    logits = logits.masked_fill(~(others | itself), float("-inf"))
    return logits.logsumexp(-1) - logits.diagonal(dim1=1, dim2=2)
