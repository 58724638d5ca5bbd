"""Another tokenizer for a trained encoder of texts: rows of known tokens are kept, those of new ones are made of their pieces."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headwater.modalities.text import BYTES, TextReader
from headwater.model import Encoder
from headwater.surgery.remake import Change, filled, remade

Spelling = bytes | str  # bytes where they are known, else the token as its tokenizer writes it


class Words(NamedTuple):
    """Which old rows make up every new one, and how many tokens both have, are made of pieces, of none, or go."""

    rows: list[list[int]]
    kept: int
    made: int
    unknown: int
    left: int


def letters() -> dict[str, int]:
    """The characters by which byte-level tokenizers (GPT-2) write bytes: printable ones as themselves, the others from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + k): byte for k, byte in enumerate(others)}


def special(reader: TextReader) -> set[str]:
    """Tokens that no text has."""
    if reader.tokenizer == BYTES:
        return set()
    return {token.content for token in reader._codec.get_added_tokens_decoder().values()}


def spellings(reader: TextReader) -> dict[int, Spelling]:
    """Id -> what it stands for, of all tokens of a tokenizer."""
    if reader.tokenizer == BYTES:
        return {i: bytes([i]) for i in range(256)}
    codec, marks = reader._codec, special(reader)
    made, table = json.loads(codec.to_str()), letters()
    by_bytes = "ByteLevel" in json.dumps([made.get("decoder"), made.get("pre_tokenizer")])
    found: dict[int, Spelling] = {}
    for token, number in codec.get_vocab().items():
        known = by_bytes and token not in marks and all(letter in table for letter in token)
        found[number] = bytes(table[letter] for letter in token) if known else token
    return found


def pieces(token: Spelling, reader: TextReader, ids: dict[Spelling, int], marks: set[int]) -> list[int]:
    """The ids into which an old tokenizer cuts a token that it does not have; those of its bytes where it is no whole text.

    ids: of what the old tokenizer knows. marks: those that mean nothing, such as what stands for all that is unknown.
    """
    if isinstance(token, bytes):
        try:
            text = token.decode()
        except UnicodeDecodeError:
            return [ids[bytes([byte])] for byte in token if bytes([byte]) in ids]
    else:
        text = token.removeprefix("##").replace("\u2581", " ")  # how WordPiece and SentencePiece mark inner and first pieces
    return [int(i) for i in reader.ids(text) if int(i) not in marks]


def compared(old: TextReader, new: TextReader) -> Words:
    """What becomes of every id. Marks and extra ids behind those of the tokenizer keep their role."""
    theirs = {what: i for i, what in spellings(old).items()}
    mine, marks = spellings(new), special(new)
    idle, written = {theirs[what] for what in special(old)}, set(mine.values())
    rows: list[list[int]] = []
    kept = made = unknown = 0
    for number in range(new.known):
        what = mine.get(number)
        if what in theirs:
            found, kept = [theirs[what]], kept + 1  # type: ignore[index]
        else:
            found = [] if what is None or what in marks else pieces(what, old, theirs, idle)
            made, unknown = made + bool(found), unknown + (not found)
        rows.append(found)
    if new.end == new.known:
        rows.append([old.end] if old.end is not None else [])
    rows += [[old.extras[k]] if k < len(old.extras) else [] for k in range(len(new.extras))]
    rows += [[]] * (new.vocab - len(rows))  # type: ignore[operator]
    return Words(rows, kept, made, unknown, sum(what not in written for what in theirs))


def gathered(table: Tensor, rows: list[list[int]]) -> Tensor:
    """Means of rows: (V, ...) -> (len(rows), ...); a row without any is the mean of all."""
    middle = table.mean(0)
    return torch.stack([table[found].mean(0) if found else middle for found in rows])


@torch.no_grad()
def reworded(encoder: Encoder, tokenizer: str) -> Encoder:
    """An encoder of texts with another tokenizer: a class_path for `encoders` in a recipe.

    encoder: of a TextReader. tokenizer: as TextReader takes it. A token that both tokenizers have keeps its rows in the table and
    in the head, so that its logits stay what they were; a new one gets the mean of the rows of the pieces into which the old
    tokenizer cuts it (fast vocabulary transfer, Gee et al. 2022, arXiv:2402.09977), one without pieces the mean of all. `words` of
    the result counts them. Expanding a vocabulary is to give a tokenizer that has all old tokens and more.
    """
    old: Any = encoder.reader
    if not isinstance(old, TextReader):
        raise ValueError(f"found {type(encoder).__name__}, which reads no texts; expected an encoder of a TextReader such as Text")
    given = old.spec["init_args"]
    moved = {name: _mark(old, given[name], tokenizer) for name in ("start", "end")}
    padded = {"vocab": None} if "vocab" in given and "reader" in encoder.spec["init_args"] else {}
    made = remade(encoder, None, {"tokenizer": tokenizer, **moved, **padded}, _own_start(encoder, tokenizer))
    words = compared(old, made.reader)  # type: ignore[arg-type]
    changes: Change = {}
    for name, table in encoder.state_dict().items():
        if name == "stem.weight":
            first = table[encoder.vocab :]  # what stands before the first token, where it has a row of its own
            changes[name] = ("resampled", torch.cat([gathered(table[: encoder.vocab], words.rows), first]))
        elif name.startswith("head."):
            changes[name] = ("resampled", gathered(table, words.rows))
    made = filled(made, encoder, changes)
    made.settled = True
    made.words = words  # type: ignore[assignment]
    return made


def _mark(old: TextReader, mark: int | str | None, tokenizer: str) -> int | str | None:
    """A mark that was given by its id has another id now."""
    if not isinstance(mark, int):
        return mark
    what = spellings(old)[mark]
    found = {spelled: i for i, spelled in spellings(TextReader(tokenizer)).items()}
    if what not in found:
        raise ValueError(f"found no token {what!r} in {tokenizer!r}, which the encoder uses as a mark; add it to the tokenizer")
    return found[what]


def _own_start(encoder: Encoder, tokenizer: str) -> dict[str, Any]:
    """The id that stands where nothing is known, of encoders that were given one."""
    given = encoder.spec["init_args"]
    if "reader" not in given or given.get("start") is None:
        return {}
    return {"start": _mark(encoder.reader, given["start"], tokenizer)}  # type: ignore[arg-type]
