"""Fusions one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from headwater.fusion.joint import base
from headwater.model import Fusion
from headwater.spec import plain
from headwater.tokens import Tokens


class Chain(Fusion):
    """Each fusion receives what the one before returned, widths included: Resampler and Project make a small prefix.

    Args:
        widths: modality -> D of its encoder.
        fusions: makers of fusions from widths, or fusions already made.
        last: the modality whose encoder runs behind the last fusion; the others never see it, because it is not encoded yet.
    """

    def __init__(
        self, widths: dict[str, int], fusions: Sequence[Callable[[dict[str, int]], Fusion]], last: str | None = None
    ) -> None:
        super().__init__(widths)
        if not fusions:
            raise ValueError("found an empty chain; expected at least one fusion, or fusion: null for a model without any")
        made: list[Fusion] = []
        for number, fusion in enumerate(fusions):
            final = number == len(fusions) - 1
            given = {name: w for name, w in self.widths.items() if final or name != last}
            made.append(fusion if isinstance(fusion, Fusion) else fusion(given))
            self.widths |= made[-1].widths
            if made[-1].last != (last if final else None):
                raise ValueError(
                    f"{type(made[-1]).__name__}, fusion {number + 1} of {len(fusions)}, has last={made[-1].last}; expected "
                    f"{last if final else None}: only the last of a chain may have one, and `last` of the chain names the same"
                )
        self.fusions, self.last, self.keeps_order = nn.ModuleList(made), last, all(fusion.keeps_order for fusion in made)
        self.cacheable = all(fusion.cacheable for fusion in made)
        self.spec["init_args"]["fusions"] = [plain(fusion) for fusion in made]  # makers are no plain data

    def forward(self, parts: dict[str, Tokens], causal: bool = False) -> dict[str, Tokens]:
        waiting = {name: t for name, t in parts.items() if base(name) == self.last}
        parts = {name: t for name, t in parts.items() if name not in waiting}
        for fusion in self.fusions[:-1]:
            parts = fusion(parts, causal)
        return self.fusions[-1](parts | waiting, causal)
