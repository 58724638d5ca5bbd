"""Put broken samples of a shard aside and write the shard anew without them; nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
from itertools import count
from pathlib import Path

from headwater.datamodules.files import File
from headwater.datamodules.index import index_path, scan
from headwater.datamodules.writer import ShardWriter
from headwater.tools.copying import row_hints
from headwater.tools.index_shards import carry, current

NOTES = "quarantine.jsonl"
ALL = 1 << 62  # samples or bytes of a shard that is never full


def set_aside(path: str, bad: dict[str, list[str]], damaged: bool, folder: Path) -> int:
    """Move samples of a local shard to `folder`; returns how many.

    First the samples are written to folder/SHARD-000.tar with their bytes as they are, and their keys and reasons are added to
    folder/quarantine.jsonl. Then the shard is written anew under another name and takes the place of the old one, its index
    after it. A run that is stopped in between is simply started again. A shard of which nothing is left is removed.

    Args:
        bad: key -> what is wrong.
        damaged: some bytes of the tar belong to no sample; the old tar is kept in `folder` as a whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = _free(folder, Path(path).stem)
    if damaged:
        _keep(path, folder / f"{name}.damaged")
    index, saved = scan(path), current(path)
    index = index if saved is None else carry(saved, index)
    aside = ShardWriter(_plain(folder / f"{name}.tar"), ALL, ALL, index.card.header)
    anew = ShardWriter(_plain(f"{path}.new"), ALL, ALL, index.card.header)
    with File(path) as file, aside, anew:
        for row in range(len(index)):
            key = index.key(row)
            (aside if key in bad else anew).write(key, index.read(file, row), row_hints(index, row))
    notes = [{"shard": path, "key": key, "in": f"{name}.tar", "why": why} for key, why in bad.items()]
    if damaged:
        notes.append({"shard": path, "key": "", "in": f"{name}.damaged", "why": list(index.faults)})
    with (folder / NOTES).open("a", encoding="utf-8") as listing:
        listing.writelines(json.dumps(note, ensure_ascii=False) + "\n" for note in notes)
    _replace(path, bool(anew.shards))
    return len(bad)


def _free(folder: Path, stem: str) -> str:
    """STEM-000, or the next number that no earlier run has taken."""
    taken = {one.stem for one in folder.iterdir()}
    return next(name for number in count() if (name := f"{stem}-{number:03d}") not in taken)


def _plain(path: str | Path) -> str:
    """A path as a pattern of ShardWriter without a field."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _keep(path: str, target: Path) -> None:
    """The whole old tar under another name, at no cost where both are on one disk."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, f"{target}.partial")
        os.replace(f"{target}.partial", target)


def _replace(path: str, left: bool) -> None:
    """Put the new tar and its index in place of the old. left: there is a new one."""
    if not left or os.path.getsize(f"{path}.new") == os.path.getsize(path):
        index_path(path).unlink(missing_ok=True)  # otherwise the size tells that it is not of the new tar
    if left:
        os.replace(f"{path}.new", path)
        finish(path)
    else:
        os.unlink(path)


def finish(path: str) -> None:
    """Put the index in place when a run was stopped after it had done so with the tar."""
    if index_path(f"{path}.new").exists() and not os.path.exists(f"{path}.new"):
        os.replace(index_path(f"{path}.new"), index_path(path))
