"""What was done to a signal: backwards, in another order, faster, turned. The model is asked which, once per sample.

Arrow of time (Pickup et al. 2014), order of clips (Xu et al. 2019, "Self-supervised spatiotemporal learning via video clip order
prediction"), playback speed (Benaim et al. 2020, arXiv:2004.06130), swapped sentences (Lan et al. 2019, arXiv:1909.11942),
rotations (Gidaris et al. 2018, arXiv:1803.07728). Only values change: places, lengths and masks are the same whatever was done, so
that nothing but the content can tell. Texts need `end: ""`: a mark would tell where the end was.
"""

from __future__ import annotations

from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headwater import random
from headwater.init import OUTPUT, Rule
from headwater.model import Model
from headwater.objectives.moments import Steps, moved, steps
from headwater.objectives.objective import Batch, Objective, Term, cross_entropy, part
from headwater.tokens import Tokens


class Change(NamedTuple):
    """What a transform does with the tokens: source (B, N) the place in the document whose value each place gets; kept (B, N)."""

    source: Tensor
    kept: Tensor


class Transform:
    """kinds: how many things it may do to a sample; all are equally likely, and the first leaves it as it is."""

    kinds: int = 2

    def fits(self, t: Tokens, found: Steps) -> Tensor:
        """(S,) samples that every kind can be done to."""
        return (found.moments > 1) & (found.size > 0)

    def change(self, t: Tokens, found: Steps, kind: Tensor, seed: Tensor) -> Change:
        """kind, seed: (S,). Asked for all samples, used for those that fit."""
        sample = t.sample()
        size = found.size[sample].clamp(min=1)
        moment, kept = self.moment(t.place() // size, found.moments[sample], kind[sample], seed[sample])
        return Change(moment * size + t.place() % size, kept)

    def moment(self, number: Tensor, count: Tensor, kind: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        """For each token (B, N) with the number of its moment of `count`: the moment whose values it gets, and whether it stays."""
        raise NotImplementedError(f"{type(self).__name__}.moment must say where values come from")

    def values(self, x: Tensor, kind: Tensor) -> Tensor:
        """Changes inside of the moved values (B, N, ...). kind: (B, N)."""
        return x


class Reversal(Transform):
    """Half of the samples run backwards."""

    def moment(self, number: Tensor, count: Tensor, kind: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(kind == 1, count - 1 - number, number), torch.ones_like(number, dtype=torch.bool)


class Permutation(Transform):
    """Segments of equal length in any order; what does not fill one is left out. With 2 segments: in order or swapped.

    Args:
        segments: K, of which there are K! orders.
    """

    def __init__(self, segments: int = 2) -> None:
        if not 2 <= segments <= 5:
            raise ValueError(f"found {segments} segments, which have {segments}! orders; expected 2 to 5")
        self.segments, self.orders = segments, torch.tensor([*permutations(range(segments))])
        self.kinds = len(self.orders)

    def fits(self, t: Tokens, found: Steps) -> Tensor:
        return (found.moments >= self.segments) & (found.size > 0)

    def moment(self, number: Tensor, count: Tensor, kind: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        length = (count // self.segments).clamp(min=1)
        segment = (number // length).clamp(max=self.segments - 1)
        source = self.orders.to(number.device)[kind, segment]
        return source * length + number % length, number < self.segments * length


class Speed(Transform):
    """`length` moments, taken one by one or at another pace, from a random one on.

    Args:
        factors: every how-manieth moment is taken, one kind each.
        length: moments that are seen at every pace.
    """

    def __init__(self, factors: list[int] | None = None, length: int = 4) -> None:
        self.factors, self.length = torch.tensor(factors or [1, 2]), length
        self.kinds = len(self.factors)
        if self.kinds < 2 or len(set(self.factors.tolist())) < self.kinds or self.factors.min() < 1 or length < 2:
            raise ValueError(f"found factors {factors} and length {length}; expected two or more different paces and moments")
        self.span = (length - 1) * int(self.factors.max()) + 1

    def fits(self, t: Tokens, found: Steps) -> Tensor:
        return (found.moments >= self.span) & (found.size > 0)

    def moment(self, number: Tensor, count: Tensor, kind: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        factor = self.factors.to(number.device)[kind]
        free = (count - (self.length - 1) * factor).clamp(min=1)  # starts from which it fits
        start = (random.uniform(seed, (), "speed/start").double() * free).long()
        return start + number * factor, number < self.length


class Rotation(Transform):
    """Square pictures, or every frame of square films, turned by 0, 90, 180 or 270 degrees, patches and pixels alike.

    Args:
        patch: pixels per patch side.
        channels: values per pixel. A token holds (frames,) patch, patch, channels.
    """

    kinds = 4

    def __init__(self, patch: int = 8, channels: int = 3) -> None:
        self.patch, self.channels = patch, channels

    def fits(self, t: Tokens, found: Steps) -> Tensor:
        if t.x.ndim == 2 or t.x.shape[-1] % (self.patch**2 * self.channels) or t.position.shape[-1] < 3:
            raise ValueError(
                f"found tokens {tuple(t.x.shape[2:])} at {t.position.shape[-1]} coordinates; expected (time, row, column) and "
                f"whole patches of {self.patch} x {self.patch} x {self.channels}: set patch and channels as the reader has them"
            )
        sample, real = t.sample(), t.real()
        row, column = self._cell(t, found)
        astray = (row != t.position[..., 1]) | (column != t.position[..., 2])
        odd = torch.zeros_like(found.size).index_add(0, sample[real], astray[real].long())
        return (found.size > 0) & (odd == 0) & (self._side(found).square() == found.size)

    @staticmethod
    def _side(found: Steps) -> Tensor:
        return found.size.double().sqrt().round().long()

    def _cell(self, t: Tokens, found: Steps) -> tuple[Tensor, Tensor]:
        """Row and column (B, N) of each token, if its picture is square."""
        size, side = (n[t.sample()].clamp(min=1) for n in (found.size, self._side(found)))
        return t.place() % size // side, t.place() % size % side

    def change(self, t: Tokens, found: Steps, kind: Tensor, seed: Tensor) -> Change:
        row, column = self._cell(t, found)
        last = self._side(found)[t.sample()].clamp(min=1) - 1
        turned = [(row, column), (column, last - row), (last - row, last - column), (last - column, row)]
        sources = torch.stack([i * (last + 1) + j for i, j in turned])
        inside = sources.gather(0, kind[t.sample()][None])[0]
        frame = t.place() - t.place() % found.size[t.sample()].clamp(min=1)
        return Change(frame + inside, torch.ones_like(row, dtype=torch.bool))

    def values(self, x: Tensor, kind: Tensor) -> Tensor:
        pixels = x.unflatten(-1, (-1, self.patch, self.patch, self.channels))
        for turns in range(1, 4):
            turned = torch.rot90(pixels, turns, (-3, -2)).flatten(-4)
            x = torch.where((kind == turns)[..., None], turned, x)
        return x


class Transformed(Objective):
    """Hides which of the kinds of a transform was done to one modality of each sample; samples that it does not fit count nothing.

    Args:
        model: its pooled vector is asked.
        modality: what is transformed.
        transform: Reversal, Permutation, Speed, Rotation; None = Reversal.
    """

    def __init__(self, model: Model, modality: str = "audio", transform: Transform | None = None) -> None:
        super().__init__()
        self.modality, self.needs, self.transform = modality, (modality,), transform or Reversal()
        self.classes = self.transform.kinds
        self.head = nn.Linear(model.dim(modality), self.transform.kinds)

    def init_rules(self) -> dict[str, Rule]:
        return {"head.weight": OUTPUT}

    def task(self, batch: Batch, hints: None = None) -> Batch:
        """The transformed modality, "kind" (S,) and "fits" (S,)."""
        t, seed = batch[self.modality], batch["seed"]
        found = steps(t, len(seed))
        fits = self.transform.fits(t, found)
        kind = (random.uniform(seed, (), f"transformed/{self.modality}") * self.transform.kinds).long()
        change, mine = self.transform.change(t, found, kind, seed), fits[t.sample()] & t.real()
        x = self.transform.values(moved(t, torch.where(mine, change.source, t.place())), kind[t.sample()])
        x = torch.where(mine if x.ndim == 2 else mine[..., None], x, t.x)
        hidden = mine & ~change.kept
        left = t._replace(x=x, valid=t.real() & ~hidden if bool(hidden.any()) else t.valid)
        return {**batch, self.modality: left, "kind": kind, "fits": fits}

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        return {"transformed": batch["fits"][batch[self.modality].samples()].sum()}

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        encoded = model.encode(model.embed(part(batch, self.needs)))
        pooled = model.pool(self.modality, encoded[self.modality])
        asked = batch["fits"][pooled.sample]
        logits, truth = self.head(pooled.x[asked]), batch["kind"][pooled.sample[asked]]
        metrics = {"accuracy": (logits.argmax(-1) == truth).float().mean()} if len(truth) else {}
        return {"transformed": Term(cross_entropy(logits, truth).sum(), asked.sum(), metrics=metrics)}
