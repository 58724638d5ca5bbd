"""Masking by what matters to the model: hide the tokens that it attends to, or those that it cannot guess."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from headwater import random
from headwater.model import Encoder
from headwater.objectives.inside import attention_scores
from headwater.objectives.masks.policies import Policy, lengths
from headwater.tokens import LAST, Tokens
from headwater.trunk import Trunk


class Salient(Policy):
    """Those that matter to the model: by the attention that they receive (AttMask, Kakogeorgiou et al. 2022, arXiv:2203.12719),
    or by the error when they were hidden (hard patches, Wang et al. 2023, arXiv:2304.05919).

    Args:
        score: "attention" in the last block, or "loss".
        most: hide those with the largest scores, else those with the smallest.
        temperature: of Gumbel noise, in deviations of the scores in a sample: more of it makes the choice more random.
    """

    def __init__(self, score: Literal["attention", "loss"] = "attention", most: bool = True, temperature: float = 0.0) -> None:
        if temperature < 0:
            raise ValueError(f"found temperature {temperature}; expected 0, the largest scores as they are, or more")
        self.score, self.sign, self.temperature = score, 1 if most else -1, temperature

    def key(self, t: Tokens, seed: Tensor, name: str, score: Tensor | None) -> Tensor:
        if score is None:
            raise ValueError("Salient found no scores; hand it (B, N), one number per token")
        draw = random.uniform(random.token_seed(seed, t), (), name).to(score.dtype).clamp(min=1e-7)
        return -self.sign * standard(t, score, len(seed)) + self.temperature * (-draw.log()).log()


def standard(t: Tokens, score: Tensor, samples: int) -> Tensor:
    """Scores (B, N) with mean 0 and deviation 1 over the real tokens of each sample."""
    sample, real = t.sample(), t.real()
    length = lengths(t, samples).clamp(min=1).to(score.dtype)

    def mean(x: Tensor) -> Tensor:
        return (x.new_zeros(samples).index_add(0, sample.flatten(), torch.where(real, x, 0).flatten()) / length)[sample]

    away = score - mean(score)
    return away / (mean(away.square()) + 1e-12).sqrt()


def attended(encoder: Encoder, t: Tokens) -> Tensor:
    """(B, N): the mean over heads of what class and register tokens attend to, or without such over all real queries.

    Kakogeorgiou et al. 2022, arXiv:2203.12719 (AttMask), there the class token of a teacher. t: raw tokens (B, N) of the encoder.
    A full matrix of attention is made for the one block. Call it without gradient.
    """
    trunk = getattr(encoder, "trunk", None)
    if not isinstance(trunk, Trunk) or encoder.causal:
        raise ValueError(f"the attention of {type(encoder).__name__} cannot be read; expected an encoder with a Trunk, not causal")
    block: Any = trunk.blocks[-1]
    length = t.position.shape[1]
    scores, out = attention_scores(block.attn, lambda: encoder(encoder.embed(t)))
    if len(scores) != len(out.position) or scores.shape[2] != out.position.shape[1]:
        raise ValueError(f"found blocks of {type(encoder).__name__} that see parts of a signal; attention is read of whole ones")
    asks = out.real()
    if out.order is not None and out.position.shape[1] > length:
        asks = asks & (out.order == LAST)
    received = (scores.softmax(-1).mean(1) * asks[..., None]).sum(1)
    return received[:, :length] * t.real()
