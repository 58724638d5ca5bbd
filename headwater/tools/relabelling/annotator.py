"""What says something of samples: the part that labels and texts by models share."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from headwater.datamodules.collate import Sample
from headwater.datamodules.faults import said
from headwater.datamodules.streams import Stream
from headwater.model import Reader
from headwater.view import View

Members = dict[str, bytes]  # extension -> content, of one sample


class Answer(NamedTuple):
    """value: a label, a list of them, or a text. score: 0 to 1, how sure. agreement: share of voices that say it.

    group: among which the surest are found: the class of a label; None for all else. more: for the record.
    """

    value: Any
    score: float
    agreement: float
    group: Hashable = None
    more: Mapping[str, Any] = {}


class Annotator(nn.Module):
    """Models that say what a sample lacks. A subclass is chosen with `--by`.

    member: that the answer is written to. field: of that .json; None = the whole member. adds: answers go beyond what people have
    said, so samples that have the member are asked about, too. models: who answers, for the record.
    """

    member: str = "txt"
    field: str | None = None
    adds: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.models: list[dict[str, Any]] = []

    @property
    def name(self) -> str:
        """Of the answer, in records and weights."""
        return self.field or self.member

    def forward(self, samples: Sequence[Members], seeds: Sequence[int]) -> list[Answer | str]:
        """One answer for each sample, or why there is none. seeds: of all draws for a sample."""
        raise NotImplementedError(f"{type(self).__name__}.forward must return one answer per sample")


def read(readers: Mapping[str, Reader], members: Members, view: View | None = None) -> Sample | str:
    """A sample's tokens of all these modalities, in one random view or plain; else what is wrong with them."""
    sample, faults = Stream().tokens(readers, members, {} if view is None else dict.fromkeys(readers, view))
    for name in readers:
        if name in faults:
            return f"{name} does not decode: {said(faults[name])}"
        if name not in sample or not len(sample[name].position):
            return f"it has no {name}"
    return sample


def listed(given: Sequence[str] | str) -> list[str]:
    """One or several names, at least one."""
    names = [given] if isinstance(given, str) else list(given)
    if not names:
        raise ValueError("found no model; name one or more")
    return names


def identity(name: str, card: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a backbone from all others: its place, and the hash or step of its weights."""
    place = str(Path(name).resolve()) if Path(name).exists() else name
    return {"name": place, **{key: card[key] for key in ("sha256", "step", "revision") if card.get(key) is not None}}
