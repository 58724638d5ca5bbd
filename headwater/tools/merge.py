"""Make one set of several: `headwater merge birds/ 'cats-*.tar' animals/`."""

from __future__ import annotations

import re
from collections import Counter

from rich.console import Console

from headwater.datamodules.files import expand
from headwater.tools.copying import Copied, copy, local, report, staged
from headwater.tools.ingest.slots import distinct
from headwater.tools.ingest.splits import SPLITS
from headwater.tools.parts import plain, refuse_mixed_slots, set_name, survey, with_prefixes, without_copies


def merge(
    shards: list[str],
    out: str,
    samples: int = 10_000,
    size: int = 1 << 30,
    dedupe: bool = False,
    overwrite: bool = False,
) -> None:
    """Make one set of shards of several sets, at constant memory.

    Members are copied byte by byte, with their hints; a shard keeps the header of its samples, so facts of the sets that
    differ do not mix, and slots of robots that differ are refused. Where keys repeat, every key gets the name of its set.
    Sets with splits (train, validation, test) are merged split by split.

    Args:
        shards: the sets, each a tar, a folder, a glob, a brace range or a URL.
        out: folder for the new shards; it appears, or they appear in it, when all are written.
        samples: samples per shard.
        size: bytes per shard; it is closed by the sample that reaches them.
        dedupe: of samples whose members are all the same bytes, keep the first only. Validation and test come before train.
        overwrite: replace the shards that `out` holds.
    """
    sources = {label: expand(given) for label, given in zip(distinct(map(_label, shards)), shards)}
    target = local(out)
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    names = _names(sources, target.name)
    copied = Copied(Counter(), Counter(), Counter(), [])
    with staged(target, [*names], overwrite) as folder:
        parts = [survey(path, label, hashed=dedupe) for label, paths in sources.items() for path in paths]
        refuse_mixed_slots(parts)
        if dedupe:
            before = sum(len(part.rows) for part in parts)
            parts = without_copies(sorted(parts, key=lambda part: names[part.path] == "train"))
            console.print(f"{before - sum(len(part.rows) for part in parts):,} of {before:,} samples are copies and are left out")
        parts = with_prefixes(parts)
        if parts[0].prefix:
            console.print(f"keys repeat: each gets the name of its set, such as {parts[0].prefix}KEY")
        copy(parts, folder, lambda part, key: names[part.path], samples, size, "none", copied)
        if not copied.samples:
            raise ValueError(f"found no sample in {len(names)} shards; nothing was written")
        report(copied, folder, target, console)


def _label(given: str) -> str:
    """A name for a set: the folder, or what its tars have in common: "out/cats-*.tar" -> "cats"."""
    last = given.rstrip("/").rpartition("/")[2]
    fixed = re.sub(r"[-_]?(\{.*\}|[\d*?]|\[.*\])*\.tar$", "", last)
    return plain(fixed) or "set"


def _names(sources: dict[str, list[str]], otherwise: str) -> dict[str, str]:
    """Shard -> its new set: the split that it names, or one set for all when none names any."""
    splits = {path: set_name(path, "") for paths in sources.values() for path in paths}
    named = [path for path, name in splits.items() if name in SPLITS]
    if not named:
        return dict.fromkeys(splits, plain(otherwise))
    if others := [path for path, name in splits.items() if name not in SPLITS]:
        raise ValueError(
            f"{named[0]} is of the split {splits[named[0]]}, and {others[0]} names none of {', '.join(SPLITS)}; expected all sets "
            "with splits or none. Deal it out first: headwater reshard SHARDS OUT --split train=0.9,validation=0.1"
        )
    return splits
