"""Sound as the ids of a neural codec: precomputed codes of residual vector quantisers (SoundStream, EnCodec, DAC, Mimi)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from headwater import random
from headwater.modalities.action import array
from headwater.model import Encoder, Reader
from headwater.pooling import Pooling
from headwater.tokens import Tokens
from headwater.trunk import Trunk
from headwater.view import View

Pattern = Literal["flatten", "delay"]


class CodecReader(Reader):
    """An .npy array of codes (T, K), the coarsest codebook first -> one id per moment and codebook: code + codebook * size.

    Position: (step, codebook). Tokens stand in the order of their steps:
        "flatten": the step is the moment; codebook after codebook, each sees those before it.
        "delay": codebook k comes k steps later than the first one; what has the same step shares an order, so that it can be
            given at once (MusicGen, Copet et al. 2023, arXiv:2306.05284, section 2.2). Places that the delay leaves empty have
            no token.
    A codec is residual, so the first `codebooks` of an array that has more are a coarser version of the same sound. Of an array
    longer than `steps` a random view takes a random part, the plain signal the first one.

    Args:
        codebooks: how many are read, K or fewer.
        size: codes per codebook.
        steps: the most moments that are read.
        pattern: "flatten" or "delay".
    """

    extensions = ("codes.npy",)
    vocab: int

    def __init__(self, codebooks: int = 4, size: int = 1024, steps: int = 256, pattern: Pattern = "delay") -> None:
        if pattern not in ("flatten", "delay"):
            raise ValueError(f"found pattern {pattern!r}; expected flatten or delay")
        self.codebooks, self.size, self.steps, self.pattern = codebooks, size, steps, pattern
        self.vocab = codebooks * size

    def decode(self, members: dict[str, bytes]) -> np.ndarray:
        return array(members[str(self.member(members))])

    def tokens(self, signal: Any, view: View | None = None) -> Tokens:
        codes = self._checked(np.asarray(signal))
        late = max(0, len(codes) - self.steps)
        first = int(view.uniform((1,), "start") * (late + 1)) if view is not None else 0
        codes = codes[first : first + self.steps]
        moment, position = layout(len(codes), self.codebooks, self.pattern)
        ids = torch.from_numpy(codes.astype(np.int64)) + torch.arange(self.codebooks) * self.size
        order = position[:, 0].long() if self.pattern == "delay" else None
        return Tokens(ids[moment, position[:, 1].long()], position, order=order)

    def _checked(self, codes: np.ndarray) -> np.ndarray:
        """The codebooks that are read, (T, codebooks)."""
        if codes.dtype.kind not in "iu" or codes.ndim != 2 or not len(codes) or codes.shape[1] < self.codebooks:
            raise ValueError(
                f"found codes {codes.dtype} {codes.shape}; expected whole numbers (T, {self.codebooks} or more), one row per moment"
            )
        codes = codes[:, : self.codebooks]
        if codes.min() < 0 or codes.max() >= self.size:
            raise ValueError(f"found codes from {codes.min()} to {codes.max()}; expected 0 to {self.size - 1} in every codebook")
        return codes

    def length(self, facts: dict[str, float]) -> int | None:
        """From "steps"."""
        return min(int(facts["steps"]), self.steps) * self.codebooks if "steps" in facts else None

    def blank(self) -> Tokens:
        position = layout(self.steps, self.codebooks, self.pattern)[1]
        return self.canvas(position, position[:, 0].long() if self.pattern == "delay" else None)

    def allowed(self, position: Tensor) -> Tensor:
        book = torch.arange(self.vocab, device=position.device) // self.size
        return book == position[..., 1:2]

    def restore(self, t: Tokens) -> np.ndarray:
        """Codes (T, codebooks) for the decoder of the codec. ValueError where a token is no code of its codebook."""
        ids = t.x[0][t.real()[0]].cpu()
        moment, position = layout(len(ids) // self.codebooks, self.codebooks, self.pattern)
        if len(moment) != len(ids):
            raise ValueError(f"found {len(ids)} tokens; expected a multiple of the {self.codebooks} codebooks")
        book = position[:, 1].long()
        if (wrong := (ids // self.size != book).nonzero()).numel():
            at = int(wrong[0])
            raise ValueError(f"found id {int(ids[at])} at place {at}, which is for codebook {int(book[at])}: no code of it")
        codes = ids.new_empty(len(ids) // self.codebooks, self.codebooks)
        codes[moment, book] = ids - book * self.size
        return codes.numpy()

    def example(self, n: int, seed: int) -> list[Tokens]:
        draws = random.uniform(torch.tensor(seed), (n, 5, self.codebooks), "codec")
        return [self.tokens((d[: 2 + k % 4] * self.size).long().numpy()) for k, d in enumerate(draws)]


class Codec(Encoder):
    """A transformer over the codes of a neural codec.

    Args:
        trunk: the transformer.
        codebooks: how many are read, the coarsest first.
        size: codes per codebook.
        steps: the most moments that are read.
        pattern: "flatten" or "delay", see CodecReader.
        pooling, tied: see Encoder.
    """

    def __init__(
        self,
        trunk: Trunk,
        codebooks: int = 4,
        size: int = 1024,
        steps: int = 256,
        pattern: Pattern = "delay",
        pooling: Pooling = "mean",
        tied: bool = False,
    ) -> None:
        super().__init__(CodecReader(codebooks, size, steps, pattern), trunk, pooling, tied=tied)


@lru_cache(maxsize=1024)
def layout(steps: int, codebooks: int, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The moment of every token (steps * codebooks,) int64 and its position (step, codebook), int32. Never write into them."""
    moment, book = torch.cartesian_prod(torch.arange(steps), torch.arange(codebooks)).reshape(-1, 2).T
    step = moment + book if pattern == "delay" else moment
    order = (step * codebooks + book).argsort()
    return moment[order], torch.stack([step, book], 1)[order].to(torch.int32)
