"""How the members of one sample become its tokens: each reader its own member, or an interleaved document."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headwater.datamodules.collate import Sample
from headwater.model import Reader
from headwater.tokens import Tokens
from headwater.view import View

Readers = Mapping[str, Reader]


class Stream:
    """Each reader reads its own member: the stream of samples as they are.

    Args:
        rename: extension that a reader looks for -> member that it gets, such as {"mp4": "wrist.mp4"} for one of two cameras.
    """

    def __init__(self, rename: dict[str, str] | None = None) -> None:
        self.rename = rename or {}

    def serves(self, name: str, reader: Reader, members: Collection[str]) -> bool:
        """Whether shards with these members give the modality."""
        return reader.member(self._named(dict.fromkeys(members))) is not None

    def wanted(self, readers: Readers, members: Collection[str]) -> frozenset[str]:
        """The members that must be read for these modalities; the others stay on the disk."""
        asked = {e for reader in readers.values() for e in reader.extensions}
        return frozenset({self.rename.get(e, e) for e in asked} & set(members))

    def lengths(self, readers: Readers, sizes: dict[str, int], hints: dict[str, float]) -> dict[str, int | None]:
        """Tokens of each modality of a sample with members of these sizes; None where they do not follow from the hints.

        hints: all that the index has, NaN where a sample lacks one.
        """
        named = self._named(sizes)
        out = {}
        for name, reader in readers.items():
            if (member := reader.member(named)) is not None:
                out[name] = counted(reader, self.rename.get(member, member), named[member], hints)
        return out

    def tokens(self, readers: Readers, members: dict[str, bytes], views: Mapping[str, View]) -> tuple[Sample, dict[str, Exception]]:
        """A sample's modalities, and what was wrong with those that are missing. views: modality -> its random view."""
        sample, faults = {}, {}
        named = self._named(members)
        decoded: dict[str, Any] = {}  # once for all views of a modality
        for name, reader in readers.items():
            if reader.member(named) is None:
                continue
            try:
                base = name.partition("@")[0]
                if base not in decoded:
                    decoded[base] = reader.decode(named)
                sample[name] = fitting(reader, reader.tokens(decoded[base], views.get(name)))
            except Exception as error:  # any decoder may raise anything on damaged bytes; the sample is named, not lost
                faults[name] = error
        return sample, faults

    def _named(self, members: dict[str, Any]) -> dict[str, Any]:
        return {**members, **{e: members[m] for e, m in self.rename.items() if m in members}} if self.rename else members


class Interleaved(Stream):
    """Documents in which texts and pictures follow one another: web pages, manuals, lectures.

    The .json member tells the order: {"segments": [{"text": "..."}, {"image": "0.jpg"}, ...]}, or two lists of one length
    with a null where the other has the item, {"texts": ["...", null], "images": [null, "0.jpg"]}. Pictures are members of
    the sample ("000017.0.jpg"). Text and picture tokens share one `order`, so in causal attention a text sees the pictures
    before it; a picture is one moment, and its patches see each other.

    Args:
        text, image: names of the modalities.
        length: moments after which a document is cut.
    """

    def __init__(self, text: str = "text", image: str = "image", length: int = 2048) -> None:
        super().__init__()
        self.text, self.image, self.length = text, image, length

    def serves(self, name: str, reader: Reader, members: Collection[str]) -> bool:
        if "json" not in members:
            return False
        return name == self.text or (name == self.image and bool(self._pictures(reader, members)))

    def wanted(self, readers: Readers, members: Collection[str]) -> frozenset[str]:
        pictures = self._pictures(readers[self.image], members) if self.image in readers else []
        return frozenset(["json", *pictures])

    def lengths(self, readers: Readers, sizes: dict[str, int], hints: dict[str, float]) -> dict[str, int | None]:
        """Upper bounds: a text has no more tokens than the .json has bytes."""
        out: dict[str, int | None] = {self.text: min(self.length, sizes.get("json", 0))} if self.text in readers else {}
        if self.image in readers:
            reader = readers[self.image]
            known = [counted(reader, member, sizes[member], hints) for member in self._pictures(reader, sizes)]
            out[self.image] = None if None in known else sum(n for n in known if n is not None)
        return out

    def tokens(self, readers: Readers, members: dict[str, bytes], views: Mapping[str, View]) -> tuple[Sample, dict[str, Exception]]:
        parts: dict[str, list[Tokens]] = {self.text: [], self.image: []}
        faults: dict[str, Exception] = {}
        try:
            document = segments(json.loads(members.get("json", b"null")))
        except ValueError as error:
            return {}, {self.text: error}
        moment = 0
        for kind, content in document:
            name = self.text if kind == "text" else self.image
            if name not in readers or moment >= self.length:
                continue
            try:
                made = self._segment(readers[name], kind, content, members, views.get(name))
            except Exception as error:  # one damaged picture does not cost the document
                faults[name] = error
                continue
            steps = torch.arange(len(made.x)) if kind == "text" else torch.zeros(len(made.x), dtype=torch.int64)
            made = cut(made._replace(position=_at(made.position, moment, kind), order=steps + moment), self.length - moment, kind)
            parts[name].append(made)
            moment += len(made.x) if kind == "text" else 1
        return {name: _joined(found) for name, found in parts.items() if found}, faults

    def _segment(self, reader: Reader, kind: str, content: str, members: dict[str, bytes], view: View | None) -> Tokens:
        if kind == "text":
            return fitting(reader, reader.tokens(content, view))
        if content not in members:
            raise ValueError(f"the document names the picture {content!r}; its members are {', '.join(members)}")
        return fitting(reader, reader.tokens(reader.decode({content.rpartition(".")[2]: members[content]}), view))

    @staticmethod
    def _pictures(reader: Reader, members: Collection[str]) -> list[str]:
        return sorted(m for m in members if m.rpartition(".")[2] in reader.extensions)


def fitting(reader: Reader, t: Tokens) -> Tokens:
    """The tokens of one sample, if they have the shape that the reader promises."""
    if not isinstance(t, Tokens):
        raise ValueError(f"{type(reader).__name__}.tokens gave a {type(t).__name__}; expected Tokens(x, position)")
    x, position = t.x.shape, t.position.shape
    promised = (x[0], *(() if reader.vocab else (reader.features,)))
    if tuple(x) != promised or len(position) != 2 or position[0] != x[0]:
        raise ValueError(
            f"{type(reader).__name__}.tokens gave x {tuple(x)} and position {tuple(position)}; expected x "
            f"{promised} by its features and vocab, and position (N, P)"
        )
    return t


def counted(reader: Reader, member: str, size: int, hints: dict[str, float]) -> int | None:
    """Tokens of one member of `size` bytes; 0 when it was measured in vain, since then it does not decode either."""
    facts = {key.removeprefix(f"{member}."): value for key, value in hints.items() if key.startswith(f"{member}.")}
    known = {name: value for name, value in facts.items() if value == value}
    length = reader.length({"size": size, **known})
    return 0 if length is None and len(known) < len(facts) else length


def segments(document: Any) -> list[tuple[str, str]]:
    """("text" | "image", content) in order, from either form of the .json member; empty texts are left out."""
    if isinstance(document, dict) and isinstance(document.get("segments"), list):
        pairs = [next(iter(one.items())) for one in document["segments"] if isinstance(one, dict) and len(one) == 1]
    elif isinstance(document, dict) and isinstance(document.get("texts"), list) and isinstance(document.get("images"), list):
        both = zip(document["texts"], document["images"], strict=True)
        pairs = [("image", image) if text is None else ("text", text) for text, image in both]
    else:
        raise ValueError('the .json of an interleaved document holds neither "segments" nor "texts" and "images"')
    return [(k, str(v)) for k, v in pairs if k in ("text", "image") and isinstance(v, str) and v.strip()]


def cut(t: Tokens, most: int, kind: str) -> Tokens:
    """At most so many moments of a segment; a picture is one moment and stays whole."""
    return t.map(lambda field: field[:most]) if kind == "text" else t


def _at(position: Tensor, moment: int, kind: str) -> Tensor:
    moved = position.clone()
    moved[:, 0] = moved[:, 0] + moment if kind == "text" else moment
    return moved


def _joined(parts: Sequence[Tokens]) -> Tokens:
    return Tokens(*(None if column[0] is None else torch.cat(column) for column in zip(*parts)))  # type: ignore[arg-type]


def join(samples: Sequence[Sample]) -> Sample:
    """Related samples as one document: modality by modality behind one another, later ones at later times."""
    out: Sample = {}
    start = 0
    moved: dict[str, list[Tokens]] = {}
    for sample in samples:
        span = 1 + max((int(t.position[:, 0].max()) for t in sample.values() if len(t.position)), default=0)
        for name, t in sample.items():
            order = t.position[:, 0].long() if t.order is None else t.order  # modalities of a document share its time
            moved.setdefault(name, []).append(t._replace(position=_at(t.position, start, "text"), order=order + start))
        start += span
    for name, parts in moved.items():
        out[name] = _joined(parts)
    return out
