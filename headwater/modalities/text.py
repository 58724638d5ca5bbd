"""Text as ids of a tokenizer or as bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from headwater import random
from headwater.embedded import place
from headwater.modalities.image import grid
from headwater.model import Encoder, Reader
from headwater.tokens import Tokens
from headwater.trunk import Trunk

BYTES = "bytes"


class TextReader(Reader):
    """A string -> ids, ended by the id `end`, cut to `length`. White space at both ends is dropped.

    Args:
        tokenizer: a tokenizer.json file of the `tokenizers` library, or "bytes" for UTF-8 bytes.
        length: the most tokens of a text, `end` included.
    """

    extensions = ("txt", "text", "caption")

    def __init__(self, tokenizer: str = BYTES, length: int = 77) -> None:
        self.tokenizer, self.most = tokenizer, length
        self.end = 256 if tokenizer == BYTES else self._codec.get_vocab_size()
        self.vocab = self.end + 1

    @cached_property
    def _codec(self):
        from tokenizers import Tokenizer

        path = Path(place(self.tokenizer))
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer {self.tokenizer!r} was not found; expected 'bytes' or the path of a tokenizer.json")
        return Tokenizer.from_file(str(path))

    @cached_property
    def digest(self) -> str:
        """What names the tokenizer in the fact `tokens-<digest>`: the start of its file's SHA-256, or "bytes"."""
        if self.tokenizer == BYTES:
            return BYTES
        return hashlib.sha256(Path(place(self.tokenizer)).read_bytes()).hexdigest()[:12]

    def decode(self, members: dict[str, bytes]) -> str:
        return members[str(self.member(members))].decode("utf-8")

    def tokens(self, signal: str, view: Tensor | None = None) -> Tokens:
        if not isinstance(signal, str):
            raise ValueError(f"found a text of {type(signal).__name__}; expected a str")
        found = self._ids(signal)
        if not len(found):
            raise ValueError("the text is empty")
        found = found[: self.most - 1]
        ids = np.empty(len(found) + 1, np.int64)
        ids[:-1], ids[-1] = found, self.end
        return Tokens(torch.from_numpy(ids), grid(len(ids)))

    def _ids(self, text: str) -> Sequence[int] | np.ndarray:
        """All ids of a text, without the end."""
        text = text.strip()
        if self.tokenizer == BYTES:
            return np.frombuffer(text.encode(), np.uint8)
        return self._codec.encode(text, add_special_tokens=False).ids

    def count(self, content: bytes) -> int:
        """How many ids the text of a member has, without the end and uncut: the value of the fact `tokens-<digest>`."""
        return len(self._ids(content.decode("utf-8")))

    def length(self, facts: dict[str, float]) -> int | None:
        """From "size" for bytes, too large by the white space at both ends; else from `tokens-<digest>` (see `count`)."""
        count = facts.get(f"tokens-{self.digest}", facts["size"] if self.tokenizer == BYTES else None)
        return None if count is None else min(int(count) + bool(count), self.most)

    def restore(self, t: Tokens) -> str:
        ids = [i for i in t.x[0][t.real()[0]].tolist() if i < self.end]
        return bytes(ids).decode(errors="replace") if self.tokenizer == BYTES else self._codec.decode(ids)

    def files(self) -> dict[str, Path]:
        return {} if self.tokenizer == BYTES else {"tokenizer": Path(place(self.tokenizer))}

    def example(self, n: int, seed: int) -> list[Tokens]:
        words = ["a", "dog", "sees", "the", "red", "boat", "and", "sings"]
        draws = (random.uniform(torch.tensor(seed), (n, 5), "text") * len(words)).long().tolist()
        return [self.tokens(" ".join(words[i] for i in row[: 2 + k % 4])) for k, row in enumerate(draws)]

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_codec"}


class Text(Encoder):
    """A transformer over the ids of TextReader.

    Args:
        trunk: the transformer.
        tokenizer: a tokenizer.json file, or "bytes".
        length: the most tokens of a text.
    """

    def __init__(self, trunk: Trunk, tokenizer: str = BYTES, length: int = 77) -> None:
        super().__init__(TextReader(tokenizer, length), trunk)
