"""Text as ids of a tokenizer or as bytes."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from headwater import random
from headwater.embedded import place
from headwater.model import Encoder, Reader
from headwater.tokens import Tokens
from headwater.trunk import Trunk

BYTES = "bytes"


class TextReader(Reader):
    """A string -> ids, ended by the id `end`, cut to `length`.

    Args:
        tokenizer: a tokenizer.json file of the `tokenizers` library, or "bytes" for UTF-8 bytes.
        length: the most tokens of a text, `end` included.
    """

    extensions = ("txt", "text", "caption")

    def __init__(self, tokenizer: str = BYTES, length: int = 77) -> None:
        self.tokenizer, self.length = tokenizer, length
        self.end = 256 if tokenizer == BYTES else self._codec.get_vocab_size()
        self.vocab = self.end + 1

    @cached_property
    def _codec(self):
        from tokenizers import Tokenizer

        path = Path(place(self.tokenizer))
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer {self.tokenizer!r} was not found; expected 'bytes' or the path of a tokenizer.json")
        return Tokenizer.from_file(str(path))

    def decode(self, members: dict[str, bytes]) -> str:
        return members[str(self.member(members))].decode("utf-8")

    def tokens(self, signal: str, view: Tensor | None = None) -> Tokens:
        text = signal.strip()
        if not text:
            raise ValueError("the text is empty")
        ids = list(text.encode()) if self.tokenizer == BYTES else self._codec.encode(text, add_special_tokens=False).ids
        ids = [*ids[: self.length - 1], self.end]
        return Tokens(torch.tensor(ids), torch.arange(len(ids), dtype=torch.int32)[:, None])

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
