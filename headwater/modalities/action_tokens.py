"""Continuous actions as ids, so that a language model can predict them: bins, numbers in words, or FAST."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from headwater.embedded import place
from headwater.modalities.action import ActionReader, array
from headwater.modalities.fast import At, Fast
from headwater.modalities.robots import Steps
from headwater.modalities.text import BYTES, TextReader
from headwater.model import Encoder
from headwater.pooling import Pooling
from headwater.tokens import Tokens
from headwater.trunk import Trunk
from headwater.view import View


class Bins:
    """One id per slot that is there: the number of the bin (RT-1, Brohan et al. 2022, arXiv:2212.06817; with ranges from 1 % to
    99 % OpenVLA, Kim et al. 2024, arXiv:2406.09246). A value inside the edges is wrong by half its bin at most.

    edges: (S, bins + 1) or (1, bins + 1), rising; values beyond them fall into the outermost bins.
    """

    def __init__(self, edges: np.ndarray) -> None:
        if edges.ndim != 2 or edges.shape[1] < 3 or not (np.diff(edges) >= 0).all():
            raise ValueError(f"found edges of shape {edges.shape}; expected (slots, bins + 1) numbers that rise along each row")
        self.edges, self.vocab = edges, edges.shape[1] - 1

    def numbers(self, x: np.ndarray) -> np.ndarray:
        """(T, S) -> int64 bins (T, S); those of absent slots mean nothing."""
        edges = np.broadcast_to(self.edges, (x.shape[1], self.vocab + 1))
        return np.stack([np.searchsorted(of[1:-1], column, side="right") for of, column in zip(edges, x.T)], 1)

    def middles(self, numbers: np.ndarray, slot: np.ndarray) -> np.ndarray:
        """The value in the middle of each bin. slot: of each number."""
        of = slot % len(self.edges)
        return (self.edges[of, numbers] + self.edges[of, numbers + 1]) / 2

    def encode(self, x: np.ndarray) -> tuple[np.ndarray, At]:
        """(T, S) with NaN where absent -> ids (N,), and step and slot of each (N, 2)."""
        there = ~np.isnan(x)
        return self.numbers(x)[there], np.argwhere(there).astype(np.int32)

    def decode(self, ids: np.ndarray, at: At, slots: int) -> np.ndarray:
        """The inverse, (T, S)."""
        x = np.full((int(at[:, 0].max()) + 1, slots), np.nan, np.float32)
        x[at[:, 0], at[:, 1]] = self.middles(ids, at[:, 1])
        return x

    def most(self, steps: int, slots: int) -> int:
        """The most tokens that so many steps can have."""
        return steps * slots


class Words:
    """The bins of a step as a text, "128 091 ---", ended like every text, in the ids of a tokenizer: a language model needs no
    new ones (RT-2, Brohan et al. 2023, arXiv:2307.15818). All numbers are equally wide, because some tokenizers lose spaces."""

    def __init__(self, bins: Bins, tokenizer: str) -> None:
        self.bins, self.reader, self.wide = bins, TextReader(tokenizer, 1 << 16), len(str(bins.vocab - 1))
        self.vocab = int(self.reader.vocab or 0)
        probe = self.reader.tokens("0123 4567 89 -").map(lambda field: field[None])
        if "".join(self.reader.restore(probe).split()) != "0123456789-":
            raise ValueError(f"the tokenizer {tokenizer!r} does not give numbers back; expected one that knows all digits and -")

    def encode(self, x: np.ndarray) -> tuple[np.ndarray, At]:
        """(T, S) with NaN where absent -> ids (N,), and step and place in the step of each (N, 2)."""
        numbers = np.where(np.isnan(x), -1, self.bins.numbers(x))
        lines = [" ".join("-" * self.wide if n < 0 else str(n).zfill(self.wide) for n in step) for step in numbers.tolist()]
        ids = [self.reader.tokens(line).x.numpy() for line in lines]
        at = [(step, place) for step, of in enumerate(ids) for place in range(len(of))]
        return np.concatenate(ids), np.array(at, np.int32)

    def decode(self, ids: np.ndarray, at: At, slots: int) -> np.ndarray:
        """The inverse, (T, S). What is no number of a bin is absent."""
        x = np.full((int(at[:, 0].max()) + 1, slots), np.nan, np.float32)
        for step in range(len(x)):
            mine = torch.from_numpy(ids[at[:, 0] == step])[None]
            text = "".join(self.reader.restore(Tokens(mine, mine[..., None])).split())
            for slot, word in enumerate(text[i : i + self.wide] for i in range(0, slots * self.wide, self.wide)):
                if word.isdecimal() and int(word) < self.bins.vocab:
                    x[step, slot] = self.bins.middles(np.array(int(word)), np.array(slot))
        return x

    def most(self, steps: int, slots: int) -> int:
        """The most tokens that so many steps can have: a token holds a byte at least."""
        return steps * (slots * (self.wide + 1) + self.reader.marks)


def quantile_edges(sequences: Sequence[np.ndarray], bins: int = 256) -> np.ndarray:
    """(S, bins + 1) edges between which equally many values lie, by all sequences (T, S); absent slots have no part in them."""
    values = np.concatenate([np.asarray(x, np.float64) for x in sequences])
    if missing := np.flatnonzero(np.isnan(values).all(0)).tolist():
        raise ValueError(f"slots {missing} have no value in any sequence; edges need some")
    return np.nanquantile(values, np.linspace(0, 1, bins + 1), axis=0).T


class ActionTokensReader(ActionReader):
    """An .npy array of continuous steps -> ids. Positions are (step, slot), or (first step of the chunk, place in it) for "fast"
    and (step, place in it) for "words"; order is the step, so step t sees the frames up to t.

    Args:
        codec: "bins" gives one id per slot, "words" the same as text, "fast" few ids per chunk of steps.
        slots: size of an action, or names of its slots; 0 = those of all robots in `statistics`.
        steps: the most steps that are read.
        scale: values are divided by this; bins lie between -1 and 1.
        statistics: JSON file of `headwater stats SHARDS --json FILE`; see ActionReader.
        bins: of every slot.
        edges: .npy file of an array (S, bins + 1) where bins are not all equally wide; see `quantile_edges`. It replaces `bins`.
        tokenizer: for "words" as in TextReader; for "fast" the file that `headwater tokenizer --kind fast` wrote.
    """

    def __init__(
        self,
        codec: Literal["bins", "words", "fast"] = "bins",
        slots: int | list[str] = 0,
        steps: int = 64,
        scale: float = 1.0,
        statistics: str | None = None,
        bins: int = 256,
        edges: str | None = None,
        tokenizer: str = BYTES,
    ) -> None:
        super().__init__(0, slots, steps, scale, statistics)
        if bins < 2:
            raise ValueError(f"found bins={bins}; expected at least 2")
        self.edges, self.tokenizer = edges, tokenizer
        made = Bins(array(Path(place(edges)).read_bytes()) if edges else np.linspace(-1, 1, bins + 1)[None])
        if len(made.edges) not in (1, self.slots):
            raise ValueError(f"found edges of {len(made.edges)} slots in {edges}; the actions have {self.slots}")
        self.codec: Bins | Words | Fast = (
            Fast(tokenizer) if codec == "fast" else Words(made, tokenizer) if codec == "words" else made
        )
        self.vocab = self.codec.vocab

    def tokens(self, signal: Any, view: View | None = None) -> Tokens:
        if not np.size(signal.values if isinstance(signal, Steps) else signal):
            raise ValueError("the action sequence has no step")
        x = self.vectors(signal) / np.float32(self.scale)
        if np.isnan(x).all():
            raise ValueError("the actions have no value: every slot is absent in every step")
        ids, at = self.codec.encode(x)
        return Tokens(torch.from_numpy(ids), torch.from_numpy(at), order=torch.from_numpy(at[:, 0].astype(np.int64)))

    def length(self, facts: dict[str, float]) -> int | None:
        """An upper bound: absent slots and frequent patterns make it less."""
        return self.codec.most(min(int(facts["steps"]), self.steps), self.slots) if "steps" in facts else None

    def blank(self) -> Tokens:
        """As many steps as are read, with every slot."""
        if isinstance(self.codec, Fast):
            raise NotImplementedError("FAST makes as many ids of a chunk as its moves need; take bins or words to generate actions")
        one = self.codec.encode(np.zeros((1, self.slots), np.float32))[1]  # all steps have as many ids
        at = torch.from_numpy(np.concatenate([one + np.array([step, 0]) for step in range(self.steps)]).astype(np.int32))
        return self.canvas(at, at[:, 0].long())

    def restore(self, t: Tokens, robot: str = "") -> np.ndarray:
        real = t.real()[0]
        ids, at = (field[0][real].cpu().numpy() for field in (t.x, t.position))
        return self.physical(self.codec.decode(ids, at, self.slots) * np.float32(self.scale), robot)

    def files(self) -> dict[str, Path]:
        found = super().files() | ({"edges": Path(place(self.edges))} if self.edges else {})
        if isinstance(self.codec, Fast):
            return found | {"tokenizer": Path(place(self.tokenizer))}
        return found | (self.codec.reader.files() if isinstance(self.codec, Words) else {})


class ActionTokens(Encoder):
    """A transformer over continuous actions as ids; `Causal` then learns to act as it learns to write.

    Args:
        trunk: the transformer.
        codec: "bins" gives one id per slot, "words" the same as text, "fast" few ids per chunk of steps.
        slots: size of an action, or names of its slots; 0 = those of all robots in `statistics`.
        steps: the most steps that are read.
        scale: values are divided by this; bins lie between -1 and 1.
        statistics: JSON file of `headwater stats SHARDS --json FILE`; see ActionReader.
        bins: of every slot.
        edges: .npy file of an array (S, bins + 1) where bins are not all equally wide; see `quantile_edges`.
        tokenizer: for "words" as in TextReader; for "fast" the file that `headwater tokenizer --kind fast` wrote.
        pooling: how tokens become one vector; see Encoder.
        tied: the head that gives ids is the table that embeds them.
    """

    def __init__(
        self,
        trunk: Trunk,
        codec: Literal["bins", "words", "fast"] = "bins",
        slots: int | list[str] = 0,
        steps: int = 64,
        scale: float = 1.0,
        statistics: str | None = None,
        bins: int = 256,
        edges: str | None = None,
        tokenizer: str = BYTES,
        pooling: Pooling = "mean",
        tied: bool = False,
    ) -> None:
        reader = ActionTokensReader(codec, slots, steps, scale, statistics, bins, edges, tokenizer)
        super().__init__(reader, trunk, pooling, tied=tied)
