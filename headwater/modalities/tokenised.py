"""A modality as the codes of a trained tokeniser: every objective for ids, or for vectors, then works on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headwater.modalities.autoencoder import Autoencoder
from headwater.model import Encoder
from headwater.pooling import Pooling
from headwater.tokens import Tokens
from headwater.trunk import Trunk


class Tokenised(Encoder):
    """A transformer over the codes that a frozen tokeniser makes of a signal, once per batch on the device.

    With ids, `Causal` is autoregression over visual or sound tokens and `DiscreteDiffusion` is MaskGIT; with vectors, `Flow` is
    latent diffusion. The tokeniser is saved with it, stays in evaluation mode and never trains.

    Args:
        tokeniser: an Autoencoder, usually a trained one: {class_path: headwater.hub.pretrained, init_args: {name: FOLDER}}.
        trunk: the transformer.
        pooling, causal, tied: see Encoder.
    """

    tokeniser: Autoencoder

    def __init__(
        self, tokeniser: Encoder, trunk: Trunk, pooling: Pooling = "mean", causal: bool = False, tied: bool = False
    ) -> None:
        if not isinstance(tokeniser, Autoencoder):
            raise ValueError(f"found a tokeniser {type(tokeniser).__name__}; expected an Autoencoder, trained by Reconstructed")
        super().__init__(tokeniser.reader, trunk, pooling, causal=causal, tied=tied, values=tokeniser.bottleneck)
        self.tokeniser = tokeniser.requires_grad_(False)
        tokeniser.settled = True  # it keeps its weights when training starts
        self.train()

    def train(self, mode: bool = True) -> Tokenised:
        """Training mode, but not for the tokeniser."""
        super().train(mode)
        self.tokeniser.eval()
        return self

    @torch.no_grad()
    def prepare(self, raw: Tokens) -> Tokens:
        return self.tokeniser.codes(self.tokeniser.prepare(raw))

    @torch.no_grad()
    def restore(self, t: Tokens) -> Any:
        return self.tokeniser.restore(self.tokeniser.decode(t.map(lambda field: field[:1])))

    def blank(self) -> Tokens:
        return self.tokeniser.blank_codes()

    def allowed(self, position: Tensor) -> Tensor | None:
        """Which ids may stand at these places, (..., P) -> (..., vocab): those of the place's codebook; None = all."""
        books, vocab = self.tokeniser.bottleneck.books, self.vocab
        if books == 1 or vocab is None:
            return None
        return torch.arange(vocab, device=position.device) // (vocab // books) == position[..., -1:]
