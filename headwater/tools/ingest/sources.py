"""Read folder trees and image folders into samples: which files and texts belong together."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from headwater.datamodules.faults import PICKLES
from headwater.tools.decode import KIND, extension_of

RANK = {extension: rank for rank, extension in enumerate(KIND)}


class Sample(NamedTuple):
    """One sample to write. name: its source, sets order and split; files, texts: by extension; facts: for the .json.

    make: gives members that have to be cut or converted, extension -> bytes. Picklable: a functools.partial of a function
    at the top of a module. It runs in a thread of its own, and what it raises is the reason to skip the sample. Its .json is
    joined with that of `files` and with the facts.
    split: the set of shards it belongs to, such as "train"; "" = by a hash of the group.
    group: what must stay on one side of such a split, such as the speaker or the film; "" = the name.
    """

    name: str
    files: dict[str, Path]
    texts: dict[str, str]
    facts: dict[str, Any]
    make: Callable[[], dict[str, bytes]] | None = None
    split: str = ""
    group: str = ""


class Skip(NamedTuple):
    """What is not written, and why."""

    source: str
    reason: str


class Found(NamedTuple):
    """A source as it was read. kind: printed; classes: names in the order of their numbers.

    header: facts of the whole source, JSON-able, kept in every shard; report: sentences to print after reading.
    """

    kind: str
    samples: list[Sample]
    skipped: list[Skip]
    classes: tuple[str, ...] = ()
    header: dict[str, Any] = {}
    report: list[str] = []


def read_folder(root: Path, out: Path, keep: Collection[str] = ()) -> Found:
    """Samples of a folder: one per image when all are images in subfolders, else one per stem and folder.

    keep: extensions beside the known ones.
    """
    files = sorted(_walk(root, out))
    wanted = {*KIND, *keep}
    known = [f for f in files if extension_of(f.name) in wanted]
    skipped = [Skip(show(f.relative_to(root)), unknown(f)) for f in files if extension_of(f.name) not in wanted]
    if known and all(KIND.get(extension_of(f.name)) == "image" and f.parent != root for f in known):
        return _image_folder(root, known, skipped)
    return _folder_tree(root, known, skipped)


def _folder_tree(root: Path, files: list[Path], skipped: list[Skip]) -> Found:
    groups: dict[tuple[Path, str], dict[str, Path]] = {}
    for f in files:
        group = groups.setdefault((f.parent, unicodedata.normalize("NFC", f.stem)), {})
        first = group.setdefault(extension_of(f.name), f)
        if first != f:
            skipped.append(Skip(show(f.relative_to(root)), f"same stem and extension as {show(first.name)}; rename one"))
    # The name is the main file's path: it says where the sample came from and survives a move of the whole folder.
    samples = [
        Sample(show(group[min(group, key=lambda e: RANK.get(e, -1))].relative_to(root)), group, {}, {}) for group in groups.values()
    ]
    return Found("folder tree", sorted(samples, key=lambda sample: sample.name), skipped)


def _image_folder(root: Path, files: list[Path], skipped: list[Skip]) -> Found:
    """Each image with its parent folder as class; numbers follow the sorted names, broken images included."""
    number = {name: str(i) for i, name in enumerate(sorted({show(f.parent.name) for f in files}))}
    samples = []
    for f in files:
        name = show(f.parent.name)
        texts = {"txt": re.sub(r"[_\-\s]+", " ", name).strip() or name, "cls": number[name]}
        samples.append(Sample(show(f.relative_to(root)), {extension_of(f.name): f}, texts, {"class": name}))
    return Found("image-folder", sorted(samples, key=lambda sample: sample.name), skipped, tuple(number))


def _walk(root: Path, out: Path) -> Iterator[Path]:
    """Files below `root` without hidden ones and without the output; linked folders are followed once."""
    seen = {os.path.realpath(out)}
    for folder, below, names in os.walk(root, onerror=_stop, followlinks=True):
        real = os.path.realpath(folder)
        below[:] = [] if real in seen else sorted(name for name in below if not name.startswith("."))
        if real not in seen:
            yield from (Path(folder, name) for name in names if not name.startswith("."))
        seen.add(real)


def _stop(error: OSError) -> None:
    # os.walk would leave the folder out in silence
    raise SystemExit(
        f"folder {show(error.filename)}: {error.strerror}; expected a readable folder; change its mode or move it away"
    )


def unknown(path: Path) -> str:
    """Why a file is not taken whose extension nobody reads."""
    if extension_of(path.name) in PICKLES:
        return f"extension {path.suffix} is not known and never taken: a pickle runs code when it is read; save arrays as .npy"
    return f"extension {path.suffix or '(none)'} is not known; --keep takes further ones"


def prefix_of(column: str) -> str:
    """What keeps members of one column apart from those of another: "Left eye" -> "left_eye."."""
    return re.sub(r"\W+", "_", column).lower() + "."


def show(name: str | Path) -> str:
    """A path as valid Unicode: names on disk may hold any byte."""
    return str(name).encode("utf-8", "backslashreplace").decode()
