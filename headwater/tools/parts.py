"""Which samples of which shards are copied, and under which keys."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from headwater.datamodules.files import File
from headwater.datamodules.index import ShardIndex, fits, load_index
from headwater.tools.index_shards import complete
from headwater.tools.sets import content_prints, key_prints, repeated, stem


class Part(NamedTuple):
    """One shard to copy from.

    label: the set that it was given in; faults: what of it could not be indexed; rows: (K,) samples that are taken; keys,
    contents: (K,) uint64 hashes of their keys and of their members; prefix: is put before the keys.
    """

    path: str
    label: str
    header: dict[str, Any]
    faults: tuple[str, ...]
    rows: np.ndarray
    keys: np.ndarray
    contents: np.ndarray
    prefix: str = ""

    def only(self, kept: np.ndarray) -> Part:
        """The part with some of its rows. kept: (K,) bool."""
        return self._replace(rows=self.rows[kept], keys=self.keys[kept], contents=self.contents[kept])


def opened(path: str) -> ShardIndex:
    """The index of a shard; OSError when the tar is another one by now."""
    index = load_index(path)
    with File(path) as file:
        if not fits(index, file):
            raise OSError(f"{path} has changed since it was indexed; run `headwater index --force` on it")
    return index


def survey(path: str, label: str = "", wanted: re.Pattern[str] = re.compile(""), hashed: bool = False) -> Part:
    """What there is to copy in a shard. wanted: found in the keys that are taken; hashed: insist on hashes of the contents."""
    index = opened(path)
    if hashed and not index.hash.all():
        with File(path) as file:
            index, _ = complete(index, file)
    rows, prints = np.arange(len(index)), (key_prints(index), content_prints(index))
    part = Part(path, label, index.card.header, index.faults, rows, *prints)
    return part.only(np.array([wanted.search(key) is not None for key in index.keys.to_pylist()], bool))


def without_copies(parts: Sequence[Part]) -> list[Part]:
    """Of samples whose members are all the same bytes, only the first."""
    contents = np.concatenate([part.contents for part in parts])
    first = np.zeros(len(contents), bool)
    first[np.unique(contents, return_index=True)[1]] = True
    ends = np.cumsum([len(part.rows) for part in parts])[:-1]
    return [part.only(kept) for part, kept in zip(parts, np.split(first, ends))]


def with_prefixes(parts: Sequence[Part]) -> list[Part]:
    """Parts whose keys do not meet: as they are, or all with the name of their set, or with that and the name of their shard.

    ValueError when keys repeat even so.
    """
    for depth in range(3):
        parts = [part._replace(prefix=_prefix(part, depth)) for part in parts]
        together: dict[str, list[np.ndarray]] = {}
        for part in parts:
            together.setdefault(part.prefix, []).append(part.keys)
        if not any(len(repeated(prints)) for prints in together.values()):
            return list(parts)
    raise ValueError(
        "keys repeat in shards of one name and one set; rename the shards, or give the sets apart to `headwater merge`"
    )


def _prefix(part: Part, depth: int) -> str:
    shard = plain(part.path.rpartition("/")[2].removesuffix(".tar"))
    return "".join(f"{name}-" for name in (part.label, shard)[:depth] if name)


def plain(name: str) -> str:
    """A name that can stand in a key: WebDataset cuts keys at the first dot."""
    return re.sub(r"[^\w-]+", "_", name)


def refuse_mixed_slots(parts: Sequence[Part]) -> None:
    """ValueError when parts name different slots for one array: the same column would mean different things."""
    seen: dict[str, tuple[list[Any], str]] = {}
    for part in parts:
        for name, fact in part.header.items():
            if not isinstance(fact, dict) or not isinstance(fact.get("slots"), list):
                continue
            slots = [slot.get("name") if isinstance(slot, dict) else slot for slot in fact["slots"]]
            before, where = seen.setdefault(name, (slots, part.path))
            if slots != before:
                found = f"{where} has the {name} slots {', '.join(map(str, before))}, and {part.path} {', '.join(map(str, slots))}"
                raise ValueError(
                    f"{found}; in one set a column would mean two things. Train on them as two sources of a recipe, or give "
                    "`headwater shard` the folder of all their episodes: it joins slots by name"
                )


def set_name(path: str, otherwise: str) -> str:
    """The name of the new set of a shard: that of its own set, or another where it has but a number."""
    return plain(stem(path)) or otherwise
