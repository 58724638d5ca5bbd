"""What masked prediction asks for at hidden places, as an object of its own: raw values here, other ideas in files beside.

`Masked` builds one target per modality that it hides, asks it once per batch for the answers at the hidden places, and trains
heads of the width that the target wants. What a target learns or averages lives and moves with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headwater.model import Model
from headwater.objectives.objective import Batch, Term
from headwater.tokens import Tokens


class Asked(NamedTuple):
    """The K hidden places of every row, about which a target is asked. Places with `raw.valid` False are padding.

    raw: (B, K) tokens as the reader gave them, with the positions and documents of these places.
    seed: (B, K) one seed per token, whatever row it lies in: what a target draws comes from `random.uniform(asked.seed, ...)`.
    embedded: (B, K, E) what the stem makes of them, with gradient; None unless the target's `embeds` asks for it.
    seen: (B, K, ...) what the target's `look` returned, at these places; None where that was None.
    progress: share of the run that is done, 0 to 1.
    """

    raw: Tokens
    seed: Tensor
    embedded: Tensor | None = None
    seen: Tensor | None = None
    progress: float = 0.0


class Target(nn.Module):
    """Subclasses set `ids` and `size` in __init__ and answer; everything else is for those that need it.

    ids: answers are numbers of one of `size` classes, else vectors of `size` numbers.
    embeds: `answer` wants `Asked.embedded` (a quantiser of the stem's output); mode "drop" then embeds all tokens.
    terms: names of the extra terms that `answer` returns. Each has as many targets as there are hidden places on this rank:
        Term(total = mean * number, number = asked.raw.real().sum()).
    coupled: an extra term compares the samples of a batch.

    Args:
        model: read for sizes; no reference is kept.
        modality: whose tokens are hidden.
    """

    ids: bool = False
    size: int = 0
    embeds: bool = False
    terms: tuple[str, ...] = ()
    coupled: bool = False

    def __init__(self, model: Model, modality: str) -> None:
        super().__init__()
        self.modality = modality

    def start(self, model: Model) -> None:
        """After weights are loaded: copy teachers here."""

    def look(self, model: Model, batch: Batch) -> Tensor | None:
        """Without gradient, on the whole signal, before anything is hidden: (B, N, ...) for the N tokens of `batch[modality]`."""
        return None

    def answer(self, asked: Asked) -> tuple[Tensor, dict[str, Term]]:
        """Ids (B, K) or vectors (B, K, size), and the extra terms. Gradient may flow; NaN in a vector = not to be scored."""
        raise NotImplementedError(f"{type(self).__name__}.answer must return the answers and a dict of extra terms")

    def after_step(self, model: Model, progress: float) -> None:
        """Once per optimizer step: moving averages."""


def normalised(x: Tensor) -> Tensor:
    """Vectors (..., F) with mean 0 and deviation 1 over their present slots, as MAE normalises the pixels of a patch."""
    away = x - x.nanmean(-1, keepdim=True)
    spread = away.square().nansum(-1, keepdim=True) / ((~x.isnan()).sum(-1, keepdim=True) - 1).clamp(min=1)
    return away / (spread + 1e-6).sqrt()


class Values(Target):
    """The signal itself: ids, or vectors whose absent slots (NaN) are not scored.

    Args:
        model: read for sizes.
        modality: whose tokens are hidden.
        normalize: give each vector mean 0 and deviation 1 first (He et al. 2021, arXiv:2111.06377); ids stay as they are.
    """

    def __init__(self, model: Model, modality: str, normalize: bool = False) -> None:
        super().__init__(model, modality)
        encoder = model.encoder(modality)
        self.ids, self.size = encoder.vocab is not None, encoder.vocab or encoder.features
        self.normalize = normalize and not self.ids

    def answer(self, asked: Asked) -> tuple[Tensor, dict[str, Term]]:
        return normalised(asked.raw.x) if self.normalize else asked.raw.x, {}


def cell(position: Tensor, cells: Sequence[int]) -> Tensor:
    """The number of the cell of a grid that each place lies in, row by row: (..., P) -> (...) int64.

    cells: how many places each of the first coordinates has; coordinates beyond the last place count as the last.
    """
    if position.shape[-1] < len(cells):
        raise ValueError(f"found tokens of {position.shape[-1]} coordinates and cells {list(cells)}; expected no more cells")
    number = position.new_zeros(position.shape[:-1], dtype=torch.int64)
    for axis, count in enumerate(cells):
        number = number * count + position[..., axis].long().clamp(0, count - 1)
    return number


class Places(Target):
    """Where a hidden token was, as one class per cell of a grid: for `Masked` in mode "locate", where its value stays seen.

    DropPos (Wang et al. 2023, arXiv:2309.03576): some patches lose their positions, which are then predicted by cross entropy.

    Args:
        model: not read.
        modality: whose places are hidden.
        cells: how many places each coordinate has, in the order of coordinates: [1, 8, 8] for pictures of 8 x 8 patches, whose
            coordinates are time, row and column.
    """

    ids = True

    def __init__(self, model: Model, modality: str, cells: list[int]) -> None:
        super().__init__(model, modality)
        if not cells or min(cells) < 1:
            raise ValueError(f"found cells {cells}; expected how many places each coordinate has, for example [1, 8, 8]")
        self.cells, self.size = tuple(cells), math.prod(cells)

    def answer(self, asked: Asked) -> tuple[Tensor, dict[str, Term]]:
        return cell(asked.raw.position, self.cells), {}
