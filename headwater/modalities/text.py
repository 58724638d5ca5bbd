"""Text as ids of a tokenizer or as bytes."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from headwater import random
from headwater.embedded import place
from headwater.modalities.image import grid
from headwater.modalities.tokenizer_files import is_foreign, tokenizer_of
from headwater.model import Encoder, Reader
from headwater.pooling import Pooling
from headwater.tokens import Tokens
from headwater.trunk import Trunk
from headwater.view import View

BYTES = "bytes"


class TextReader(Reader):
    """A string -> ids between the marks `start` and `end`, cut to `length`. White space at both ends is dropped.

    The rule of marks is the same for every tokenizer: what its own library would put around a text is never put by itself. By
    default texts end with an id of their own, one behind all ids of the tokenizer. A model that was trained elsewhere has
    marks among its ids, and is given those: "[CLS]" and "[SEP]" for BERT, "<start_of_text>" and "<end_of_text>" for CLIP, only
    `end="<|endoftext|>"` for GPT-2.

    Args:
        tokenizer: "bytes" for UTF-8 bytes, a tokenizer.json of the `tokenizers` library, "open_clip:MODEL", or "hf:FOLDER" or
            "hf:NAME" for transformers' AutoTokenizer. The last two are turned into a tokenizer.json, which is what is saved.
        length: the most tokens of a text, marks included.
        start: the token, or its id, before every text; None = none.
        end: the token, or its id, behind every text; None = an id of its own; "" = none.
        vocab: how many ids the table of a model has, where it has more than its tokenizer; None = as many as there are.
        extra: ids behind all others that no text has: marks of hidden spans and of tasks, which objectives use.
    """

    extensions = ("txt", "text", "caption")

    def __init__(
        self,
        tokenizer: str = BYTES,
        length: int = 77,
        start: int | str | None = None,
        end: int | str | None = None,
        vocab: int | None = None,
        extra: int = 0,
    ) -> None:
        self.tokenizer, self.most = tokenizer, length
        self._json = tokenizer_of(tokenizer).to_str() if is_foreign(tokenizer) else None  # so that no other process converts it
        self.known = 256 if tokenizer == BYTES else max(self._codec.get_vocab().values()) + 1  # ids of the tokenizer
        self.start = None if start is None else self._mark(start)
        self.end = self.known if end is None else None if end == "" else self._mark(end)
        first = self.known + (end is None)
        needed = first + extra
        self.vocab, self.extras = vocab or needed, range(first, needed)
        if self.vocab < needed:
            raise ValueError(f"found vocab {vocab}; tokenizer {tokenizer!r} has {needed} ids with its marks")
        self.marks = (self.start is not None) + (self.end is not None)
        if length < max(self.marks, 1):
            raise ValueError(f"found length {length} for texts with {self.marks} marks; expected at least {max(self.marks, 1)}")

    def _mark(self, mark: int | str) -> int:
        """The id of a token of the tokenizer."""
        found = mark if isinstance(mark, int) else None if self.tokenizer == BYTES else self._codec.token_to_id(mark)
        if found is None or not 0 <= found < self.known:
            marks = [] if self.tokenizer == BYTES else [t.content for t in self._codec.get_added_tokens_decoder().values()]
            special = f" or one of its special tokens {', '.join(marks[:12])}" if marks else ""
            raise ValueError(f"tokenizer {self.tokenizer!r} has no token {mark!r}; expected an id below {self.known}{special}")
        return found

    @cached_property
    def _codec(self):
        from tokenizers import Tokenizer

        return tokenizer_of(self.tokenizer) if self._json is None else Tokenizer.from_str(self._json)

    @cached_property
    def digest(self) -> str:
        """What names the tokenizer in the fact `tokens-<digest>`: the start of its file's SHA-256, or "bytes"."""
        if self.tokenizer == BYTES:
            return BYTES
        content = Path(place(self.tokenizer)).read_bytes() if self._json is None else self._json.encode()
        return hashlib.sha256(content).hexdigest()[:12]

    def decode(self, members: dict[str, bytes]) -> str:
        return members[str(self.member(members))].decode("utf-8")

    def tokens(self, signal: str, view: View | None = None) -> Tokens:
        if not isinstance(signal, str):
            raise ValueError(f"found a text of {type(signal).__name__}; expected a str")
        found = self.ids((signal if view is None else fewer(signal, view)).strip())
        if not len(found):
            raise ValueError("the text is empty")
        found = found[: self.most - self.marks]
        ids = np.empty(len(found) + self.marks, np.int64)
        first = int(self.start is not None)
        ids[first : first + len(found)] = found
        if self.start is not None:
            ids[0] = self.start
        if self.end is not None:
            ids[-1] = self.end
        return Tokens(torch.from_numpy(ids), grid(len(ids)))

    def ids(self, text: str) -> Sequence[int] | np.ndarray:
        """All ids of a text as it is, without marks."""
        if self.tokenizer == BYTES:
            return np.frombuffer(text.encode(), np.uint8)
        return self._codec.encode(text, add_special_tokens=False).ids

    def text(self, ids: Sequence[int]) -> str:
        """The inverse of `ids`."""
        if self.tokenizer == BYTES:
            return bytes(ids).decode(errors="replace")
        return self._codec.decode(ids, skip_special_tokens=False)

    def count(self, content: bytes) -> int:
        """How many ids the text of a member has, without marks and uncut: the value of the fact `tokens-<digest>`."""
        return len(self.ids(content.decode("utf-8").strip()))

    def length(self, facts: dict[str, float]) -> int | None:
        """From "size" for bytes, too large by the white space at both ends; else from `tokens-<digest>` (see `count`)."""
        count = facts.get(f"tokens-{self.digest}", facts["size"] if self.tokenizer == BYTES else None)
        return None if count is None else min(int(count) + self.marks * bool(count), self.most)

    def restore(self, t: Tokens) -> str:
        """The text between the marks. Exact for bytes and byte-level tokenizers; others lose what they normalise."""
        ids = [i for i in t.x[0][t.real()[0]].tolist() if i < self.known]
        ids = ids[1:] if ids[:1] == [self.start] else ids
        ids = ids[:-1] if ids[-1:] == [self.end] else ids
        return self.text(ids)

    def blank(self) -> Tokens:
        return self.canvas(grid(self.most))

    def files(self) -> dict[str, Path]:
        if self.tokenizer == BYTES:
            return {}
        if self._json is None:
            return {"tokenizer": Path(place(self.tokenizer))}
        path = Path(self._folder.name) / "tokenizer.json"
        path.write_text(self._json, encoding="utf-8")
        return {"tokenizer": path}

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory:
        """Where the file of a converted tokenizer is, as long as the reader lives."""
        return tempfile.TemporaryDirectory(prefix="headwater-")

    def example(self, n: int, seed: int) -> list[Tokens]:
        words = ["a", "dog", "sees", "the", "red", "boat", "and", "sings"]
        draws = (random.uniform(torch.tensor(seed), (n, 5), "text") * len(words)).long().tolist()
        return [self.tokens(" ".join(words[i] for i in row[: 2 + k % 4])) for k, row in enumerate(draws)]

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_codec", "_folder")}


class Text(Encoder):
    """A transformer over the ids of TextReader.

    Args:
        trunk: the transformer.
        tokenizer: "bytes", a tokenizer.json, "open_clip:MODEL" or "hf:FOLDER"; see TextReader.
        length: the most tokens of a text, marks included.
        start: the token, or its id, before every text; None = none.
        end: the token, or its id, behind every text; None = an id of its own; "" = none.
        extra: ids behind all others for marks of objectives; see TextReader.
        pooling: how tokens become one vector; see Encoder.
        tied: the head that gives ids is the table that embeds them.
    """

    def __init__(
        self,
        trunk: Trunk,
        tokenizer: str = BYTES,
        length: int = 77,
        start: int | str | None = None,
        end: int | str | None = None,
        pooling: Pooling = "mean",
        tied: bool = False,
        extra: int = 0,
    ) -> None:
        super().__init__(TextReader(tokenizer, length, start, end, extra=extra), trunk, pooling, tied=tied)


def fewer(text: str, view: View) -> str:
    """The words that a view sees: a run of them, all unless it names a share, less those that its strength takes; at least one."""
    words = text.split()
    if not words or (view.share is None and not view.strength):
        return text
    share, late = view.uniform((2,), "words").tolist()
    count = max(1, round(view.part(share, (1.0, 1.0)) * len(words)))
    first = round(late * (len(words) - count))
    words = words[first : first + count]
    draws = view.uniform((count,), "lost")
    kept = [word for word, draw in zip(words, draws.tolist(), strict=True) if draw >= view.strength]
    return " ".join(kept or [words[int(draws.argmax())]])
