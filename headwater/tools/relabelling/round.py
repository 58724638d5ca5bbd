"""One round: models answer for every sample of some shards, the best answers are kept, and their samples are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from headwater import random
from headwater.datamodules.faults import said
from headwater.datamodules.files import File
from headwater.datamodules.index import content_hash
from headwater.datamodules.writer import ShardWriter
from headwater.tools.copying import Copied, row_hints
from headwater.tools.parts import Part, opened, set_name
from headwater.tools.relabelling.annotator import Annotator, Answer, Members
from headwater.tools.relabelling.choosing import Keep
from headwater.tools.relabelling.record import answered, labelled, recorded
from headwater.tools.remote import fetched


class Said(NamedTuple):
    """An answer to the sample in this row of this part."""

    part: Part
    row: int
    answer: Answer


@dataclass
class Round:
    """by: who answers. keep: which answers stay. number: of the round. known: people's labels are replaced. seed: of all draws.
    rows: samples at a time. left_out: condition -> how many did not meet it. skipped: samples without an answer, as sentences.
    """

    by: Annotator
    keep: Keep
    number: int
    known: bool
    seed: int
    rows: int
    left_out: Counter[str] = field(default_factory=Counter)
    skipped: list[str] = field(default_factory=list)

    def kept(self, parts: Sequence[Part]) -> list[Said]:
        """The answers for all samples that meet every condition."""
        found = [one for part in parts for one in self.answers(part)]
        chosen = self.keep.among([one.answer.score for one in found], [one.answer.group for one in found])
        self.left_out["share or number"] = len(found) - int(chosen.sum())
        return [one for one, stays in zip(found, chosen) if stays]

    def answers(self, part: Part) -> Iterator[Said]:
        """Those for one shard that meet the conditions which look at one answer alone."""
        index = opened(part.path)
        with fetched(part.path) as copy, File(copy) as file:
            for start in range(0, len(part.rows), self.rows):
                piece = part.rows[start : start + self.rows].tolist()
                asked = {row: members for row in piece if self.asks(members := index.read(file, row), part, index.key(row))}
                seeds = [random.seed_of(self.seed, content_hash((part.prefix + index.key(row)).encode())) for row in asked]
                made = self.by(list(asked.values()), seeds) if asked else []
                for (row, members), answer in zip(asked.items(), made, strict=True):
                    if isinstance(answer, str):
                        self.skip(part, index.key(row), answer)
                    elif why := self.keep.refuses(answer.value, answer.score, answer.agreement, members):
                        self.left_out[why] += 1
                    else:
                        yield Said(part, row, answer)

    def asks(self, members: Members, part: Part, key: str) -> bool:
        """Whether an answer for this sample is wanted."""
        try:
            done = labelled(self.by, members) and not self.known
        except ValueError as error:  # its .json cannot be read
            self.skip(part, key, said(error))
            return False
        self.left_out["labelled by people"] += done
        return not done

    def skip(self, part: Part, key: str, why: str) -> None:
        """A sample without an answer."""
        self.left_out["no answer"] += 1
        self.skipped.append(f"{part.path}: {key}: {why}")

    def write(self, kept: Sequence[Said], folder: Path, otherwise: str, samples: int, copied: Copied) -> None:
        """Copy samples with their answers to folder/SET-00000.tar and so on, and count them in `copied`.

        otherwise: name of the set of shards that have but a number. samples: per shard.
        """
        writers: dict[str, ShardWriter] = {}
        places: dict[str, list[Said]] = {}
        for one in kept:
            places.setdefault(one.part.path, []).append(one)
        with ExitStack() as stack:
            for path, inside in places.items():
                name = set_name(path, otherwise)
                if name not in writers:
                    writers[name] = stack.enter_context(ShardWriter(folder / f"{name}-{{:05d}}.tar", samples))
                self.copy(inside[0].part, inside, writers[name])
        for name, writer in writers.items():
            copied.shards[name] += len(writer.shards)
            copied.samples[name] += writer.written
            copied.size[name] += sum(path.stat().st_size for path in writer.shards)

    def copy(self, part: Part, inside: Sequence[Said], writer: ShardWriter) -> None:
        """The samples of one shard. A shard holds samples of one header only."""
        index = opened(part.path)
        if writer.header != part.header:
            writer.close()
            writer.header = part.header
        with fetched(part.path) as copy, File(copy) as file:
            for one in inside:
                key, before = index.key(one.row), index.read(file, one.row)
                record = recorded(self.by, self.number, f"{part.path}/{key}", one.answer)
                after = answered(self.by, before, one.answer, record)
                changed = {extension for extension in after if after[extension] != before.get(extension)}
                hints = {name: x for name, x in row_hints(index, one.row).items() if name.rpartition(".")[0] not in changed}
                writer.write(part.prefix + key, after, hints)

    def summary(self, kept: Sequence[Said]) -> dict[str, Any]:
        """The round in figures."""
        groups: Counter[Hashable] = Counter(one.answer.group for one in kept)
        scores = [one.answer.score for one in kept]
        return {
            "round": self.number,
            "by": type(self.by).__name__,
            "models": self.by.models,
            "kept": len(kept),
            "classes": {str(name): count for name, count in groups.most_common() if name is not None},
            "score": {"mean": round(sum(scores) / len(scores), 6), "least": round(min(scores), 6)},
            "left out": {name: count for name, count in self.left_out.items() if count},
        }
