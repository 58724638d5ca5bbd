"""Codes that are learned: the nearest of a codebook, or of several in turn."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater import distributed
from headwater.codes import nearest
from headwater.init import ONE, TABLE, Rule, initialise
from headwater.modalities.bottlenecks.bottleneck import Bottleneck, Coded

NONE = torch.iinfo(torch.int64).max  # the seed of what is no token


class VQ(Bottleneck):
    """The nearest of K learned vectors (van den Oord et al. 2017, arXiv:1711.00937), or one of each of several codebooks.

    z' = e_k with k = argmin |z - e_k|, and the gradient of z' goes to z unchanged. With `normalise` both are unit vectors, which
    keeps most codes in use when d is small (ViT-VQGAN, Yu et al. 2021, arXiv:2110.04627, section 3.2). With several `levels` each
    codebook quantises what the ones before it left over (SoundStream, Zeghidour et al. 2021, arXiv:2107.03312, section 3.3).

    The loss is beta * mean (z - sg(e))^2, and + mean (sg(z) - e)^2 where codes learn by gradient (`decay` None). Else a code is the
    moving average of the vectors that chose it (appendix A.1 of VQ-VAE). Codes that few tokens choose start anew as vectors of the
    batch, drawn by the tokens' seeds.

    Args:
        codes: K, in each codebook.
        size: d; a few numbers (4 to 32) are best with `normalise`.
        levels: codebooks.
        normalise: compare directions only; with one level.
        beta: how strongly vectors are held to their code.
        decay: of the moving averages; None = codes are parameters.
        revive: a code that is chosen less than this share of the mean starts anew; 0 = never. Only with `decay`.
    """

    costs = True
    codebook: Tensor
    count: Tensor

    def __init__(
        self,
        codes: int = 512,
        size: int = 8,
        levels: int = 1,
        normalise: bool = True,
        beta: float = 0.25,
        decay: float | None = None,
        revive: float = 0.0,
    ) -> None:
        super().__init__()
        if codes < 2 or size < 1 or levels < 1 or (normalise and size == 1):
            raise ValueError(
                f"found {levels} levels of {codes} codes of size {size}; expected 2 codes or more, unit vectors of 2 or more"
            )
        if normalise and levels > 1:
            raise ValueError("found normalise with several levels; what a level leaves over has a length: set `normalise: false`")
        if (decay is not None and not 0 <= decay < 1) or not 0 <= revive < 1:
            raise ValueError(f"found decay {decay} and revive {revive}; expected shares below 1, for example 0.99 and 0.1")
        if revive and decay is None:
            raise ValueError("found revive with codes that are parameters; set a `decay`, so that codes are moving averages")
        self.inputs = self.features = size
        self.codes, self.books, self.vocab = codes, levels, levels * codes
        self.normalise, self.beta, self.decay, self.revive = normalise, beta, decay, revive
        start = torch.empty(levels, codes, size)
        if decay is None:
            self.codebook = nn.Parameter(start)
        else:
            self.register_buffer("codebook", start)  # the sum of the vectors, of which `count` is the number
            self.register_buffer("count", torch.empty(levels, codes))
        self.notes: list[tuple[Tensor, Tensor, Tensor]] = []
        initialise(self)

    def init_rules(self) -> dict[str, Rule]:
        """Directions may start anywhere; other codes start small and close together, as in the official VQGAN."""
        small = 1 if self.normalise else 1 / (math.sqrt(3) * self.codes)
        return {"codebook": TABLE._replace(std=small)} | ({} if self.decay is None else {"count": ONE})

    def table(self) -> Tensor:
        """(G, K, d) the codes."""
        codes = self.codebook if self.decay is None else self.codebook / self.count[..., None]
        return F.normalize(codes, dim=-1) if self.normalise else codes

    def forward(self, z: Tensor, seed: Tensor | None = None, progress: float = 1.0) -> Coded:
        z = self._directed(z)
        x, ids, loss = torch.zeros_like(z), [], z.new_zeros(z.shape[:-1])
        for table in self.table():
            rest = z - x.detach()
            ids.append(nearest(rest.detach(), table))
            code = F.embedding(ids[-1], table)
            loss = loss + self.beta * (rest - code.detach()).square().mean(-1)
            if self.decay is None:
                loss = loss + (rest.detach() - code).square().mean(-1)
            x = x + code
        return Coded(z + (x - z).detach(), torch.stack(ids, -1), loss)

    def _directed(self, z: Tensor) -> Tensor:
        z = z.to(self.codebook.dtype)  # whatever autocast made of it
        return F.normalize(z, dim=-1) if self.normalise else z

    def vectors(self, codes: Tensor) -> Tensor:
        return sum(F.embedding(ids, table) for ids, table in zip(codes.unbind(-1), self.table(), strict=True))  # type: ignore[return-value]

    def observe(self, z: Tensor, coded: Coded, real: Tensor, seed: Tensor) -> None:
        if self.decay is None or coded.ids is None:
            return
        weight, ids = real.flatten().to(self.count.dtype)[:, None], coded.ids.flatten(0, 1)
        rest, sums, drawn = self._directed(z).detach().flatten(0, 1), [], []
        seed = seed.masked_fill(~real, NONE).flatten()
        first = seed.argsort()[: self.codes]
        for k, table in enumerate(self.table()):
            note = torch.cat([rest * weight, weight], 1)
            sums.append(note.new_zeros(self.codes, note.shape[1]).index_add(0, ids[:, k], note))
            drawn.append(rest[first])
            rest = rest - F.embedding(ids[:, k], table)
        self.notes.append((torch.stack(sums), torch.stack(drawn, 1), seed[first]))

    @torch.no_grad()
    def move(self) -> None:
        if not self.notes:
            return
        sums, drawn, seed = zip(*self.notes, strict=True)
        self.notes = []
        new = distributed.total(torch.stack(sums).sum(0))
        still = (new[..., -1] == 0) & (self.count < 1e-3)  # or a code that is never chosen would become 0 / 0
        keep = torch.full_like(self.count, self.decay or 0.0).masked_fill(still, 1.0)
        self.codebook.mul_(keep[..., None]).add_((1 - keep[..., None]) * new[..., :-1])
        self.count.mul_(keep).add_((1 - keep) * new[..., -1])
        if self.revive:
            self._revive(distributed.gather(torch.cat(drawn))[0], distributed.gather(torch.cat(seed))[0])

    def _revive(self, drawn: Tensor, seed: Tensor) -> None:
        """drawn: (T, G, d) vectors of tokens of all ranks, in the order of whose seeds (T,) they become codes."""
        drawn = drawn[seed.argsort()][: int((seed != NONE).sum())]
        mean = self.count.mean(1)
        for k, count in enumerate(self.count):
            dead = (count < self.revive * mean[k]).nonzero()[: len(drawn), 0]
            self.codebook[k, dead] = drawn[: len(dead), k] * mean[k]
            self.count[k, dead] = mean[k]
