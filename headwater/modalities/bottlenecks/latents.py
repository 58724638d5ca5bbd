"""Codes that are vectors: as the encoder gives them, or drawn around them."""

from __future__ import annotations

import torch
from torch import Tensor

from headwater import distributed, random
from headwater.init import ONE, ZERO, Rule
from headwater.modalities.bottlenecks.bottleneck import Bottleneck, Coded


class Plain(Bottleneck):
    """The vectors as they are; as codes they have mean 0 and deviation 1, by moving averages over training.

    Args:
        size: d; None = the encoder's own vectors, without a linear layer before (a representation autoencoder).
        noise: training adds noise of deviation |N(0, noise^2)|, drawn for each token, so that the decoder forgives what a generator
            gets a little wrong (RAE, Zheng et al. 2025, arXiv:2510.11690).
        decay: of the moving averages.
    """

    count: Tensor
    sums: Tensor
    squares: Tensor

    def __init__(self, size: int | None = None, noise: float = 0.0, decay: float = 0.99) -> None:
        super().__init__()
        if noise < 0 or not 0 <= decay < 1 or (size is not None and size < 1):
            raise ValueError(f"found size {size}, noise {noise}, decay {decay}; expected noise of 0 or more and a decay below 1")
        self.inputs, self.noise, self.decay = size, noise, decay
        self.notes: list[Tensor] = []
        if size is not None:
            self.fit(size)

    def fit(self, width: int) -> None:
        self.features = width
        for name, start in (("count", 1.0), ("sums", 0.0), ("squares", 1.0)):
            self.register_buffer(name, torch.full((1 if name == "count" else self.features,), start))

    def init_rules(self) -> dict[str, Rule]:
        return {"count": ONE, "sums": ZERO, "squares": ONE}

    def forward(self, z: Tensor, seed: Tensor | None = None, progress: float = 1.0) -> Coded:
        if seed is None or not self.noise:
            return Coded(z)
        noise = random.normal(seed, (1 + z.shape[-1],), "bottleneck").to(z.dtype)
        return Coded(z + self.noise * noise[..., :1].abs() * noise[..., 1:])

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation, (d,) each."""
        mean = self.sums / self.count
        return mean, (self.squares / self.count - mean.square()).clamp(min=1e-8).sqrt()

    def code(self, z: Tensor) -> Tensor:
        mean, deviation = self.moments()
        return (self(z).x - mean) / deviation

    def vectors(self, codes: Tensor) -> Tensor:
        mean, deviation = self.moments()
        return codes * deviation + mean

    def observe(self, z: Tensor, coded: Coded, real: Tensor, seed: Tensor) -> None:
        x, weight = self(z).x.detach().to(self.sums.dtype), real[..., None].to(self.sums.dtype)
        self.notes.append(torch.cat([(value * weight).sum((0, 1)) for value in (x, x.square(), torch.ones_like(weight))]))

    @torch.no_grad()
    def move(self) -> None:
        if not self.notes:
            return
        new = distributed.total(torch.stack(self.notes).sum(0))
        self.notes = []
        for name, value in zip(("sums", "squares", "count"), new.split([self.features, self.features, 1]), strict=True):
            getattr(self, name).lerp_(value, 1 - self.decay)


class KL(Plain):
    """A normal distribution for each token (Kingma and Welling 2013, arXiv:1312.6114), as latent diffusion has it.

    The encoder gives mean and log variance. In training a vector is drawn, at other times it is the mean. The loss is the
    divergence from the standard normal distribution, in nats per token, which `Reconstructed` weighs (1e-6 in Rombach et al.
    2021, arXiv:2112.10752).

    Args:
        size: d.
        decay: of the moving averages of the mean.
    """

    costs = True

    def __init__(self, size: int = 8, decay: float = 0.99) -> None:
        super().__init__(size, 0.0, decay)
        self.inputs = 2 * size

    def forward(self, z: Tensor, seed: Tensor | None = None, progress: float = 1.0) -> Coded:
        mean, log = z.chunk(2, -1)
        log = log.clamp(-30, 20)
        loss = 0.5 * (mean.square() + log.exp() - 1 - log).sum(-1)
        if seed is None:
            return Coded(mean, None, loss)
        return Coded(mean + (0.5 * log).exp() * random.normal(seed, mean.shape[-1:], "bottleneck").to(z.dtype), None, loss)
