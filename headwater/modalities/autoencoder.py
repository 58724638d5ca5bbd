"""A tokeniser: any modality's encoder, a bottleneck, and a decoder that makes the signal again out of what came through.

What is behind the bottleneck is the code of a signal: ids for language models and discrete diffusion, or short vectors for flows.
`Reconstructed` trains it, `Tokenised` uses it, and until then it is an encoder like any other: contrastive and other objectives
may shape the same codes (VTP, Yao et al. 2025, arXiv:2512.13687).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from headwater import random
from headwater.init import OUTPUT, TABLE, Rule, initialise
from headwater.modalities.bottlenecks import Bottleneck, Coded
from headwater.model import Encoder
from headwater.tokens import LAST, Tokens, cat
from headwater.trunk import Trunk


class Rebuilt(NamedTuple):
    """A signal that went through.

    values: (B, N, features), or scores (B, N, vocab) of ids. latent: (B, n, inputs) before the bottleneck, at the places of the
    codes. coded: what came through. seed: (B, n) with which it was drawn.
    """

    values: Tensor
    latent: Tokens
    coded: Coded
    seed: Tensor


class Autoencoder(Encoder):
    """Encoder, bottleneck, decoder.

    `vocab` and `features` are those of the values that it reads and makes; those of the codes are the bottleneck's. As an encoder
    it gives every token as it looks behind the bottleneck, widened to the decoder's width.

    Args:
        encoder: of any modality; its own head is taken off.
        bottleneck: what a code is.
        decoder: the transformer that makes values of codes.
        codes: "tokens" = a code for every token. "registers" = a code for every register of the encoder's trunk, so that few codes
            describe the whole signal (TiTok, Yu et al. 2024, arXiv:2406.07550); the decoder paints on an empty canvas, which
            `decode` takes to be that of the longest signal.
        frozen: the encoder does not train (a representation autoencoder).
        causal: neither encoder nor decoder looks ahead, so that sound and films can be coded while they come in.
        pooling: see Encoder.
    """

    def __init__(
        self,
        encoder: Encoder,
        bottleneck: Bottleneck,
        decoder: Trunk,
        codes: Literal["tokens", "registers"] = "tokens",
        frozen: bool = False,
        causal: bool = False,
        pooling: Literal["mean", "class", "registers", "last"] = "mean",
    ) -> None:
        nn.Module.__init__(self)
        registers = getattr(getattr(encoder, "trunk", None), "registers", None)
        count = 0 if registers is None else len(registers)
        if codes == "registers" and (not count or causal):
            raise ValueError(
                f"found codes: registers with {count} registers and causal: {causal}; set `registers: 1` or more on the encoder, "
                "which is an argument of its trunk, and leave `causal` out"
            )
        if pooling in ("class", "registers") and not count:
            raise ValueError(f"found pooling: {pooling} on an encoder without registers; set `registers: 1` or more on its trunk")
        if getattr(encoder, "head", None) is not None:
            encoder.head = None  # the decoder answers
        self.reader, self.embedded, self.width, self.dim = encoder.reader, encoder.embedded, decoder.width, decoder.width
        self.features, self.vocab, self.start = encoder.features, encoder.vocab, encoder.start
        self.maskable, self.pointwise = encoder.maskable, encoder.pointwise
        self.cacheable = False
        self.causal, self.frozen, self.pooling, self.pooler, self.pooled_norm = causal, frozen, pooling, None, nn.Identity()
        self.queries = count if codes == "registers" else None
        self.encoder, self.bottleneck, self.decoder = encoder, bottleneck, decoder
        if frozen:
            encoder.requires_grad_(False).settled = True  # it keeps its weights when training starts
        if bottleneck.inputs is None:
            bottleneck.fit(encoder.width)
        self.down: nn.Module = nn.Identity() if bottleneck.inputs is None else nn.Linear(encoder.width, bottleneck.inputs)
        self.up = nn.Linear(bottleneck.features, decoder.width)
        self.head = nn.Linear(decoder.width, self.vocab or self.features)
        self.canvas = Canvas(count, decoder.width) if self.queries else None
        self.train()

    def init_rules(self) -> dict[str, Rule]:
        return {"head.weight": OUTPUT}

    def train(self, mode: bool = True) -> Autoencoder:
        """Training mode, but not for a frozen encoder."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def embed(self, raw: Tokens) -> Tokens:
        return self.encoder.embed(raw)

    def forward(self, t: Tokens, causal: bool = False, condition: Tensor | None = None) -> Tokens:
        y = self.encoder(t, causal or self.causal, condition)
        return y._replace(x=self._wide(self.bottleneck(self.down(y.x)).x))

    def _wide(self, x: Tensor) -> Tensor:
        return self.up(x.to(self.up.weight.dtype))

    def latent(self, raw: Tokens) -> Tokens:
        """Prepared values (B, N) -> what the bottleneck gets, (B, n, inputs), at the places of the codes."""
        x = raw.x.to(self.up.weight.dtype) if raw.x.is_floating_point() else raw.x
        y = self.encoder(self.encoder.embed(raw._replace(x=x)), self.causal)
        length = raw.position.shape[1]
        if self.queries is None:
            return raw._replace(x=self.down(y.x[:, :length]))
        own = y.map(lambda field: field[:, length:])._replace(order=None)
        place = own.place()[..., None] % self.queries  # of padding too
        return own._replace(x=self.down(own.x), position=place.to(raw.position.dtype))

    def values(self, latent: Tokens, canvas: Tokens) -> Tensor:
        """What came through the bottleneck, (B, n, d) -> values or scores at the places of the canvas, (B, N, ...)."""
        t = latent._replace(x=self._wide(latent.x))
        if self.canvas is not None:
            t = self.canvas(t, canvas)
        return self.unembed(self.decoder(t, self.causal).x[:, : canvas.position.shape[1]])

    def rebuild(self, raw: Tokens, seed: Tensor | None = None, progress: float = 1.0) -> Rebuilt:
        """Prepared values there and back. seed: (S,) of the samples, from which the bottleneck draws; None = it draws nothing."""
        latent = self.latent(raw)
        own = torch.zeros_like(latent.place()) if seed is None else random.fold(random.token_seed(seed, latent), "rebuild")
        coded = self.bottleneck(latent.x, None if seed is None else own, progress)
        return Rebuilt(self.values(latent._replace(x=coded.x), raw), latent, coded, own)

    def codes(self, raw: Tokens) -> Tokens:
        """Prepared values -> their codes: ids (B, n), the k-th of K codebooks from k * vocab / K on, or vectors (B, n, d).

        With several codebooks a place has one id of each, in a row, and the number of the codebook as last coordinate.
        """
        latent = self.latent(raw)
        found, books = self.bottleneck.code(latent.x), self.bottleneck.books
        if self.bottleneck.vocab is None:
            return latent._replace(x=found)
        number = torch.arange(books, device=found.device)
        ids = (found + number * (self.bottleneck.vocab // books)).flatten(1)
        if books == 1:
            return latent._replace(x=ids)
        whole = latent._replace(x=ids[:, ::books]).map(lambda field: field.repeat_interleave(books, 1))
        book = number.repeat(found.shape[1]).expand_as(ids)[..., None]
        return whole._replace(x=ids, position=torch.cat([whole.position, book.to(whole.position.dtype)], -1))

    def decode(self, codes: Tokens) -> Tokens:
        """All codes of a signal -> prepared values (B, N) at their places. An id of another codebook counts by its number there."""
        books, vocab = self.bottleneck.books, self.bottleneck.vocab
        if codes.position.shape[1] % books:
            raise ValueError(f"found {codes.position.shape[1]} ids; expected one of each of the {books} codebooks at every place")
        found = codes.x if vocab is None else codes.x.unflatten(1, (-1, books)) % (vocab // books)
        t = codes.map(lambda field: field[:, ::books])
        if books > 1:
            t = t._replace(position=t.position[..., :-1])
        t = t._replace(x=self.bottleneck.vectors(found))
        made = self.values(t, canvas := self._places(t))
        return canvas._replace(x=made if self.vocab is None else made.argmax(-1))

    def _places(self, t: Tokens) -> Tokens:
        """The places of the values of codes, where there is one code for each: the same, else those of the longest signal."""
        if self.queries is None:
            return t
        if t.document is not None:
            raise ValueError("found packed rows of codes that describe whole signals; decode one signal per row")
        rows = t.position.shape[0]
        return self.encoder.blank().map(lambda field: field.to(t.x.device).expand(rows, *field.shape[1:]))

    def blank_codes(self) -> Tokens:
        """One row: the places of the codes of the longest signal, with empty codes."""
        with torch.no_grad():
            codes = self.codes(self.encoder.blank().map(lambda field: field.to(self.up.weight.device)))
        return codes._replace(x=torch.zeros_like(codes.x))


class Canvas(nn.Module):
    """Empty tokens at the places of a signal, before the codes that describe all of it: what a decoder paints on.

    Args:
        count: codes of a signal. width: D of the decoder.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.index = nn.Parameter(torch.empty(count, width))
        self.empty = nn.Parameter(torch.empty(width))
        initialise(self)

    def init_rules(self) -> dict[str, Rule]:
        return {"index": TABLE, "empty": TABLE}

    def forward(self, t: Tokens, places: Tokens) -> Tokens:
        """Codes (B, n, D), each with its number as position, and the places (B, N) of values -> (B, N + n, D)."""
        behind = torch.full_like(t.place(), LAST)
        t = t._replace(x=t.x + self.index[t.position[..., 0].long()].to(t.x.dtype), order=behind)
        empty = self.empty.to(t.x.dtype).expand(*places.position.shape[:2], -1)
        return cat([places._replace(x=empty), t])
