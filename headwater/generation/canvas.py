"""The canvas that is filled: what is known, what may stand where, and how the model is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from headwater import random
from headwater.generation.choosing import Allowed, Choices, only
from headwater.generation.stepwise import Guided, Stepwise
from headwater.generation.unfold import Filled, Frame, beam_search, drawn, unfold
from headwater.model import Encoder, Model
from headwater.samplers import Solver, draw, draw_ids
from headwater.sequence import behind, orders
from headwater.tokens import Tokens
from headwater.turns import before

Way = Literal["causal", "flow", "diffusion"]
Layout = Literal["causal", "prefixed", "denoising", "interleaved"]


@dataclass(frozen=True)
class Settings:
    """How to generate; every field is an argument of `generate`."""

    way: Way | None = None
    layout: Layout = "causal"
    length: int | None = None
    begin: int | None = None
    context: Sequence[str] | None = None
    seed: int = 0
    samples: int = 1
    guidance: float = 1.0
    without: Sequence[str] | None = None
    steps: int | None = None
    solver: Solver = "heun"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    beams: int = 1
    choices: Sequence[Any] | None = None
    allowed: Sequence[int] | Allowed | None = None

    def __post_init__(self) -> None:
        if self.beams < 1 or self.samples < 1 or self.temperature < 0:
            raise ValueError(
                f"found beams {self.beams}, samples {self.samples}, temperature {self.temperature}; expected 1 or more of the "
                "first two, and a temperature of 0 (the likeliest) or above"
            )
        if (self.top_k is not None and self.top_k < 1) or (self.top_p is not None and not 0 < self.top_p <= 1):
            raise ValueError(f"found top_k {self.top_k} and top_p {self.top_p}; expected 1 or more, and a share in (0, 1]")


class Canvas:
    """What is given and what is to be filled.

    Args:
        model: in evaluation mode.
        to: the modality that is made.
        settings: how.
        rows: B.
        given: prepared Tokens of the others, one sample per row.
        begins: the values that each row begins with, (n,) ids or (n, F); None = none.
        choices: what alone may be said.
    """

    def __init__(
        self,
        model: Model,
        to: str,
        settings: Settings,
        rows: int,
        given: Mapping[str, Tokens],
        begins: Sequence[Tensor | None] | None = None,
        choices: Choices | None = None,
    ) -> None:
        self.model, self.to, self.settings, self.rows, self.begins, self.choices = model, to, settings, rows, begins, choices
        self.encoder: Encoder = model.encoder(to)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.given = {name: self._typed(t) for name, t in given.items()}
        blank = self._typed(self.encoder.blank().map(lambda field: field.to(self.device)))
        self.blank = blank.map(lambda field: field.expand(rows, *field.shape[1:]))
        self.turns = settings.layout == "interleaved"
        if self.turns and self.given:  # span after span, each between a start and a closing place
            self.given, count = before(self.given, {name: model.encoder(name).start for name in self.given})
            self.blank = self.blank._replace(order=count[:, None] + self.blank.place())
        self.lead = self._lead() if settings.layout == "denoising" else None
        self.context = self._context()

    def _lead(self) -> Tokens | None:
        """What is given of the modality itself, as a source: it leads what is made, in place and in order."""
        begins, self.begins = self.begins or [None] * self.rows, None
        count = torch.tensor([0 if begin is None else len(begin) for begin in begins], device=self.device)
        most, position = int(count.max()), self.blank.position.clone()
        position[..., 0] += count[:, None].to(position.dtype)
        self.blank = self.blank._replace(position=position, order=1 + self.blank.place())
        if not most:
            return None
        x = self.blank.x.new_zeros(self.rows, most)
        for row, begin in enumerate(begins):
            if begin is not None:
                x[row, : len(begin)] = begin
        place = torch.arange(most, device=self.device).expand(self.rows, -1)
        position = F.pad(place[..., None], (0, position.shape[-1] - 1)).to(position.dtype)
        return Tokens(x, position, place < count[:, None], None, torch.zeros_like(place))

    def _typed(self, t: Tokens) -> Tokens:
        """Values in the precision of the model."""
        return t._replace(x=t.x.to(self.dtype)) if t.x.is_floating_point() else t

    def _context(self) -> tuple[str, ...]:
        asked = [*self.given] if self.turns else self.settings.context
        if asked is None:
            return tuple(name for name, t in self.given.items() if t.order is not None and self.blank.order is not None)
        if stray := set(asked) - set(self.given):
            raise ValueError(f"found context {sorted(stray)}; expected some of what is given: {', '.join(self.given) or 'nothing'}")
        return tuple(asked)

    def way(self) -> Way:
        """What was asked for, or what the model was made for."""
        if self.settings.way is not None:
            return self.settings.way
        trunk = getattr(self.encoder, "trunk", None)
        flows = self.encoder.vocab is None and (self.to in self.model.processes or getattr(trunk, "conditional", False))
        return "flow" if flows else "causal"

    def fill(self) -> Iterator[Tokens]:
        """What there is after every step."""
        way, how, ids = self.way(), self.settings, self.encoder.vocab is not None
        if ids != (way == "diffusion") and way != "causal":
            raise ValueError(
                f"found way {way} for {self.to}, which is made of {'ids' if ids else 'vectors'}; expected causal or "
                + ("diffusion" if ids else "flow")
            )
        if (way != "causal" or not ids) and (how.beams > 1 or self.choices is not None or how.allowed is not None):
            raise ValueError(f"found beams, choices or allowed for {self.to} by {way}; they are for ids one by one. Leave them out")
        if how.layout in ("prefixed", "denoising") and (way != "causal" or not ids):
            raise ValueError(f"found layout {how.layout} for {self.to} by {way}; it is for ids one by one. Leave it out")
        if way == "causal":
            yield from self._causal()
        else:
            yield self._flow() if way == "flow" else self._diffusion()

    def _flow(self) -> Tokens:
        how = self.settings
        if any(begin is not None for begin in self.begins or ()):
            raise ValueError(f"found a beginning of {self.to}, which is made all at once by flow; leave it out")
        frame = self.frame()
        canvas = self.tokens(Filled(frame.x, frame.room))
        canvas = behind(canvas) if self.turns else canvas
        past = self.context if self.turns or how.context else ()
        return draw(
            self.model, self.to, canvas, self.seed(), self.given, how.guidance, how.without, how.steps or 50, how.solver, past=past
        )

    def _diffusion(self) -> Tokens:
        how, frame = self.settings, self.frame()
        canvas = self.tokens(Filled(frame.x, frame.room))
        free = canvas.place() >= frame.known[:, None]
        made = draw_ids(
            self.model, self.to, canvas, free, self.seed(), self.given, how.guidance, how.without, how.steps or 16, how.temperature
        )
        if frame.end is None:
            return made
        ends = ((made.x == frame.end) & free).long().cumsum(1)  # what stands behind the first end is not read
        return made._replace(valid=made.real() & (ends - (made.x == frame.end).long() <= 0))

    def seed(self) -> Tensor:
        """(B,) one per row."""
        return random.fold(torch.tensor(self.settings.seed, device=self.device), torch.arange(self.rows, device=self.device))

    def _causal(self) -> Iterator[Tokens]:
        how, ids = self.settings, self.encoder.vocab is not None
        allowed = self._allowed() if ids else []
        frame = self.frame()
        known = self._steps(self.given, frame)
        steps = known if how.guidance == 1 else Guided(known, self._steps(self._free(), frame), how.guidance)
        if how.beams > 1:
            yield self.tokens(beam_search(frame, steps.ask, steps.take, allowed, how.beams))
            return
        pick = drawn(self.seed(), allowed, how.temperature, how.top_k, how.top_p) if ids else said
        for filled in unfold(frame, steps.ask, pick):
            yield self.tokens(filled)

    def _free(self) -> dict[str, Tokens]:
        """What is given, for the half that does not see all of it."""
        gone = [*self.given] if self.settings.without is None else self.settings.without
        if not gone or set(gone) - set(self.given):
            raise ValueError(
                f"found guidance {self.settings.guidance} by {sorted(gone)}; expected some of what is given: {[*self.given]}"
            )
        return {n: t._replace(valid=torch.zeros_like(t.real())) if n in gone else t for n, t in self.given.items()}

    def _steps(self, given: Mapping[str, Tokens], frame: Frame) -> Stepwise:
        prefix = {name: t for name, t in given.items() if name not in self.context}
        context = {name: given[name] for name in self.context}
        mutual = frame.known if self.settings.layout == "prefixed" else None
        return Stepwise(self.model, self.to, self.blank, prefix, context, self.lead, mutual)

    def frame(self) -> Frame:
        """What is known of every row, and its room."""
        places, how = self.blank.position.shape[1], self.settings
        if not 1 <= (places if how.length is None else how.length) <= places:
            raise ValueError(f"found length {how.length}; expected 1 to {places}, the places of a signal of {self.to}")
        room = torch.full((self.rows,), how.length or places, device=self.device)
        for name in () if self.turns else self.context:  # steps without anything beside them are none
            t = self.given[name]
            last = orders(t).masked_fill(~t.real(), -1).amax(1, keepdim=True)
            room = room.minimum((orders(self.blank) <= last).sum(1))
        x, known = self.blank.x.clone(), torch.zeros_like(room)
        for row, begin in enumerate(self.begins or ()):
            if begin is not None:
                known[row] = min(len(begin), places, len(begin) if how.begin is None else how.begin)
                x[row, : known[row]] = begin[: known[row]].to(x.dtype)
        return Frame(x, known, room, end_of(self.encoder))

    def _allowed(self) -> list[Allowed]:
        """All that restricts the ids."""
        how, vocab = self.settings, int(self.encoder.vocab or 0)
        found: list[Allowed] = []
        if self.encoder.allowed(self.blank.position[:1, :1]) is not None:
            found.append(lambda x: self.encoder.allowed(self.blank.position[:1, x.shape[1]]).expand(len(x), -1))  # type: ignore[union-attr]
        if how.allowed is not None:
            found.append(how.allowed if callable(how.allowed) else only(how.allowed, vocab))
        return found if self.choices is None else [*found, self.choices]

    def tokens(self, filled: Filled) -> Tokens:
        """Values at their places; `valid` is None where all rows are full, so that fused attention stays on."""
        count = filled.x.shape[1]
        inside = torch.arange(count, device=self.device) < filled.length[:, None]
        return self.blank.map(lambda field: field[:, :count])._replace(x=filled.x, valid=None if bool(inside.all()) else inside)


def said(answer: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Picks for `unfold` what a regression says."""
    return answer, torch.zeros(len(answer), dtype=torch.bool, device=answer.device)


def end_of(encoder: Encoder) -> int | None:
    """The id that ends a signal. Codes of a tokeniser have none: they are not what the reader gives."""
    return encoder.reader.end if type(encoder).prepare is Encoder.prepare else None
