"""Records of a .json as turns of text: one modality for questions, classes, tables, boxes and dialogues.

The turns are written by a codec, see record_turns; which roles are learned is told to the objective `Roles`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

from headwater import random
from headwater.modalities.image import grid
from headwater.modalities.label import fields, row
from headwater.modalities.record_turns import Codec, Turn
from headwater.modalities.record_values import MARKS
from headwater.modalities.text import BYTES, TextReader
from headwater.model import Encoder
from headwater.pooling import Pooling
from headwater.tokens import Tokens
from headwater.trunk import Trunk
from headwater.view import View


class RecordReader(TextReader):
    """A .json record -> for each turn the mark of its role, the ids of its text, and the end mark. Too long ones are refused.

    A record without its answer ends with the mark of the role that shall answer, for generation to go on from. The extra ids are
    the marks of the roles, in their order, and then those that stand for values. A member that lacks one of the fields, or has a
    null there, has no tokens. Every record comes back with bytes and with byte-level tokenizers; others lose what they normalise.

    Args:
        codec: how records are written.
        tokenizer: "bytes", or another one; see TextReader.
        length: the most tokens of a record, marks included.
        end: the token, or its id, behind every turn; None = an id of its own.
        member: extension of the member.
    """

    def __init__(
        self, codec: Codec, tokenizer: str = BYTES, length: int = 256, end: int | str | None = None, member: str = "json"
    ) -> None:
        super().__init__(tokenizer, length, end=end, extra=len(codec.roles) + codec.marks)
        if self.end is None:
            raise ValueError("found end ''; expected an id that ends turns, None for one of its own")
        self.codec, self.extensions = codec, (member,)  # type: ignore[misc, assignment]
        self.roles = dict(zip(codec.roles, self.extras, strict=False))  # role -> the id of its mark
        self.first = self.extras.start + len(codec.roles)  # the id of mark 0

    def length(self, facts: dict[str, float]) -> int:
        return self.most  # the bytes of the member do not tell

    def decode(self, members: dict[str, bytes]) -> dict[str, Any] | None:  # type: ignore[override]
        record = fields(members[str(self.member(members))].decode("utf-8"))
        return None if any(record.get(name) is None for name in self.codec.fields) else record

    def tokens(self, signal: Mapping[str, Any] | None, view: View | None = None) -> Tokens:  # type: ignore[override]
        if signal is None:
            return row([], [])
        turns = self.codec.write(signal)
        if any(turn.text is None for turn in turns[:-1]):
            raise ValueError("found a turn without a text before the last one; expected only the last one to be asked for")
        ids = [number for turn in turns for number in self._said(turn)]
        if len(ids) > self.most:
            raise ValueError(f"found a record of {len(ids)} tokens; expected at most {self.most}. Raise `length`, or shorten it")
        return Tokens(torch.tensor(ids), grid(len(ids)))

    def _said(self, turn: Turn) -> list[int]:
        ids = [self.roles[turn.role]]
        if turn.text is None:
            return ids
        for marked, letters in groupby(turn.text, lambda letter: ord(letter) >= MARKS):
            text = "".join(letters)
            if marked:
                ids += [ord(letter) - MARKS + self.first for letter in text]
            else:
                ids += [*self.ids(text)]
        if self.end in ids:
            raise ValueError(f"found the end mark, id {self.end}, inside of {turn.text!r}; take it out, or leave `end` out")
        return [*ids, int(self.end or 0)]

    def restore(self, t: Tokens) -> dict[str, Any]:  # type: ignore[override]
        """The record; ValueError when the ids are none that `tokens` gives."""
        return self.codec.read(self.turns(t.x[0][t.real()[0]].tolist()))

    def turns(self, ids: Sequence[int]) -> list[Turn]:
        """Ids -> turns, each from the mark of a role to an end."""
        by_mark, turns, start = {mark: role for role, mark in self.roles.items()}, [], 0
        for place, number in enumerate(ids):
            if number == self.end:
                if ids[start] not in by_mark:
                    raise ValueError(f"found the id {ids[start]} at {start}; expected the mark of a role, one of {sorted(by_mark)}")
                turns.append(Turn(by_mark[ids[start]], self._text(ids[start + 1 : place])))
                start = place + 1
        if start != len(ids):
            raise ValueError(f"found {len(ids) - start} ids behind the last end mark; expected every turn to end with {self.end}")
        return turns

    def _text(self, ids: Sequence[int]) -> str:
        if stray := [number for number in ids if self.known <= number < self.first or number >= self.extras.stop]:
            raise ValueError(f"found the ids {stray} inside of a turn; expected letters and marks of values")
        parts = []
        for marked, run in groupby(ids, lambda number: number >= self.first):
            numbers = [*run]
            text = "".join(chr(MARKS + k - self.first) for k in numbers) if marked else self.text(numbers)
            if not marked and self.tokenizer == BYTES and text.encode() != bytes(numbers):
                raise ValueError(f"found the bytes {bytes(numbers)!r}; expected UTF-8")
            parts.append(text)
        return "".join(parts)

    def example(self, n: int, seed: int) -> list[Tokens]:
        return [self.tokens(self.codec.example(random.seed_of(seed, k))) for k in range(n)]


class Records(Encoder):
    """A transformer over records as turns of text.

    Args:
        trunk: the transformer.
        codec: how records are written.
        tokenizer, length, end, member: see RecordReader.
        pooling: how tokens become one vector; see Encoder.
        tied: the head that gives ids is the table that embeds them.
    """

    def __init__(
        self,
        trunk: Trunk,
        codec: Codec,
        tokenizer: str = BYTES,
        length: int = 256,
        end: int | str | None = None,
        member: str = "json",
        pooling: Pooling = "mean",
        tied: bool = False,
    ) -> None:
        super().__init__(RecordReader(codec, tokenizer, length, end, member), trunk, pooling, tied=tied)
