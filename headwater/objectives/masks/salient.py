"""Masking by what matters to the model: hide the tokens that it attends to, or those that it cannot guess."""

from __future__ import annotations

from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from headwater import random
from headwater.model import Encoder
from headwater.objectives.masks.policies import Policy, lengths
from headwater.position import rotate
from headwater.tokens import LAST, Tokens, attention_mask
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
    attention, length = trunk.blocks[-1].attn, t.position.shape[1]
    entering: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda module, given: entering.append(given[0]))
    try:
        out = encoder(encoder.embed(t))
    finally:
        handle.remove()
    if entering[0].shape[:2] != out.position.shape[:2]:
        raise ValueError(f"found blocks of {type(encoder).__name__} that see parts of a signal; attention is read of whole ones")
    weight = weights(attention, entering[0], trunk, out)
    asks = out.real()
    if out.order is not None and out.position.shape[1] > length:
        asks = asks & (out.order == LAST)
    received = (weight.mean(1) * asks[..., None]).sum(1)
    return received[:, :length] * t.real()


def weights(attention: Any, x: Tensor, trunk: Trunk, t: Tokens) -> Tensor:
    """(B, H, N, N) softmax weights of an Attention layer of this trunk on what enters it, x: (B, N, D)."""
    qkv = rearrange(attention.qkv(x), "b n (h d) -> b h n d", d=attention.size)
    q, k, _ = qkv.split([attention.heads, attention.kv_heads, attention.kv_heads], 1)
    q, k = attention.q_norm(q), attention.k_norm(k).repeat_interleave(attention.heads // attention.kv_heads, 1)
    if (turn := trunk.turn(t)) is not None:
        q, k = rotate(q, turn), rotate(k, turn)
    logits = q @ k.mT / attention.size**0.5
    if (bias := trunk.position.bias(t, t)) is not None:
        logits = logits + bias
    if (see := attention_mask(t, t).dense) is not None:
        logits = logits.masked_fill(~see, torch.finfo(logits.dtype).min)
    return logits.softmax(-1)
