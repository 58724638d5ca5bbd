"""Three ways to ask for hidden tokens: behind encoders that saw the rest, with a vector in their place, or without their place.

Each takes what `Masked.task` returned and gives the features at the hidden places of every hidden modality, from which a linear
layer answers, and the embeddings of whole signals where it made them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from headwater import random
from headwater.init import TABLE, Rule
from headwater.model import Model
from headwater.objectives.objective import Batch
from headwater.tokens import Tokens, cat, split
from headwater.trunk import Trunk

Answers = tuple[dict[str, Tensor], dict[str, Tensor]]  # modality -> features (B, K, width); modality -> embedded (B, N, E)


class Drop(nn.Module):
    """Encoders see what is kept; a decoder sees all of that, of all modalities, and asks at the hidden places with mask vectors.

    Args:
        model: gives widths.
        hides: modalities that are hidden. sees: those of which anything may be seen.
        depth, width: of the decoder. Several modalities are told apart by a learned vector each.
    """

    def __init__(self, model: Model, hides: Sequence[str], sees: Sequence[str], depth: int, width: int) -> None:
        super().__init__()
        self.hides, self.sees, self.widths = hides, sees, dict.fromkeys(hides, width)
        self.enter = nn.ModuleDict({name: nn.Linear(model.width(name), width) for name in sees})
        self.kind = nn.ParameterDict({n: nn.Parameter(torch.randn(width) * 0.02) for n in sees if len(sees) > 1})
        self.mask = nn.ParameterDict({n: nn.Parameter(torch.randn(width) * 0.02) for n in hides})
        self.decoder = Trunk(width, depth)

    def init_rules(self) -> dict[str, Rule]:
        return {f"{part}.{name}": TABLE for part in ("kind", "mask") for name in getattr(self, part)}

    def forward(self, model: Model, batch: Batch) -> Answers:
        parts = {name: self._visible(model, batch, name) for name in self.sees}
        seen = {n: t._replace(x=self.enter[n](t.x)) for n, t in model(parts).items() if n in self.enter}
        seen = {n: t._replace(x=t.x + self.kind[n].to(t.x.dtype)) if n in self.kind else t for n, t in seen.items()}
        dtype, asked = next(iter(seen.values())).x.dtype, []
        for name in self.hides:
            places = batch[name].take(*batch["places"][name])
            asked.append(places._replace(x=self.mask[name].to(dtype).expand(*places.position.shape[:2], -1)))
        lengths = [t.position.shape[1] for t in asked]
        answers = split(self.decoder(cat([*asked, *seen.values()]), first=sum(lengths)), lengths)
        return {name: t.x for name, t in zip(self.hides, answers, strict=True)}, {}

    def _visible(self, model: Model, batch: Batch, name: str) -> Tokens:
        """Embedded tokens that are seen; no others are embedded where the stem looks at each token alone."""
        if name not in self.hides:
            return model.embed({name: batch[name]})[name]
        if model.encoder(name).pointwise:
            return model.embed({name: batch[name].take(*batch["kept"][name])})[name]
        return model.embed({name: batch[name]})[name].take(*batch["kept"][name])


class Substitute(nn.Module):
    """A learned vector stands at the hidden places, or, of a share of them, what was there, or a random id.

    Args:
        model: gives widths.
        hides: modalities that are hidden. needs: these and those that are seen whole.
        keep, swap: shares of the hidden tokens that are left, or become a random id.
    """

    def __init__(self, model: Model, hides: Sequence[str], needs: Sequence[str], keep: float = 0.0, swap: float = 0.0) -> None:
        super().__init__()
        self.hides, self.needs, self.keep, self.swap = hides, needs, keep, swap
        self.widths = {name: model.width(name) for name in hides}
        self.mask = nn.ParameterDict({n: nn.Parameter(torch.randn(model.encoder(n).embedded) * 0.02) for n in hides})

    def init_rules(self) -> dict[str, Rule]:
        return {f"mask.{name}": TABLE for name in self.mask}

    def forward(self, model: Model, batch: Batch) -> Answers:
        parts = model.embed({name: batch[name] for name in self.needs})
        embedded = {name: parts[name].x for name in self.hides}
        for name in self.hides:
            t, masked = self._swapped(model, batch, name, parts[name])
            parts[name] = t._replace(x=torch.where(masked[..., None], self.mask[name].to(t.x.dtype), t.x))
        return at_places(model(parts), batch), embedded

    def _swapped(self, model: Model, batch: Batch, name: str, t: Tokens) -> tuple[Tokens, Tensor]:
        """Embedded tokens with other ids at some of the hidden places, and where the mask vector goes (B, N)."""
        raw, masked = batch[name], batch["hidden"][name]
        if not (self.keep or self.swap):
            return t, masked
        draw = random.uniform(random.token_seed(batch["seed"], raw), (2,), f"mask/{name}/swap")
        if self.swap:
            other = (draw[..., 1] * (model.encoder(name).vocab or 0)).long()
            swapped = masked & (draw[..., 0] >= 1 - self.swap)
            t = model.embed({name: raw._replace(x=torch.where(swapped, other, raw.x))})[name]
        return t, masked & (draw[..., 0] >= self.keep) & (draw[..., 0] < 1 - self.swap)


class Locate(Substitute):
    """Hidden tokens keep their values; their coordinates become zero, and the learned vector is added to tell."""

    def forward(self, model: Model, batch: Batch) -> Answers:
        raw = {name: batch[name] for name in self.needs}
        for name, hidden in batch["hidden"].items():
            raw[name] = raw[name]._replace(position=raw[name].position * ~hidden[..., None])
        parts = model.embed(raw)
        for name, hidden in batch["hidden"].items():
            t = parts[name]
            parts[name] = t._replace(x=t.x + hidden[..., None] * self.mask[name].to(t.x.dtype))
        return at_places(model(parts), batch), {}


def at_places(contextual: dict[str, Tokens], batch: Batch) -> dict[str, Tensor]:
    """Features (B, K, D) at the hidden places of each hidden modality."""
    return {name: contextual[name].x.take_along_dim(places.column[..., None], 1) for name, places in batch["places"].items()}
