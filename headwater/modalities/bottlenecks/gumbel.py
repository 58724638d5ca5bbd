"""Codes that are drawn by score."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater import random
from headwater.codes import select_code
from headwater.init import TABLE, Rule, initialise
from headwater.modalities.bottlenecks.bottleneck import Bottleneck, Coded


class Gumbel(Bottleneck):
    """One of K learned vectors, chosen by K scores plus Gumbel noise (the dVAE of DALL-E, Ramesh et al. 2021, arXiv:2102.12092).

    The loss is the divergence of the choice from an even one, in nats: log K - entropy. Without seeds the best score wins.

    Args:
        codes: K.
        size: d.
        temperature: of the choice; it may fall over the run.
    """

    costs = True

    def __init__(self, codes: int = 512, size: int = 64, temperature: float | Callable[[float], float] = 1.0) -> None:
        super().__init__()
        if codes < 2 or size < 1:
            raise ValueError(f"found {codes} codes of size {size}; expected 2 or more, of size 1 or more")
        self.inputs = self.vocab = codes
        self.features, self.temperature = size, temperature
        self.codebook = nn.Parameter(torch.empty(codes, size))
        initialise(self)

    def init_rules(self) -> dict[str, Rule]:
        return {"codebook": TABLE._replace(std=1.0)}

    def forward(self, z: Tensor, seed: Tensor | None = None, progress: float = 1.0) -> Coded:
        z = z.to(self.codebook.dtype)
        noise = torch.zeros_like(z) if seed is None else random.gumbel(seed, z.shape[-1:], "bottleneck").to(z.dtype)
        temperature = self.temperature(progress) if callable(self.temperature) else self.temperature
        chosen = select_code(z, noise, temperature)
        share = z.log_softmax(-1)
        loss = math.log(len(self.codebook)) + (share.exp() * share).sum(-1)
        return Coded(chosen @ self.codebook, chosen.argmax(-1, keepdim=True), loss)

    def vectors(self, codes: Tensor) -> Tensor:
        return F.embedding(codes[..., 0], self.codebook)
