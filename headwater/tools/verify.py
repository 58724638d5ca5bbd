"""Check shards member by member, and put broken samples aside: `headwater verify out/ --decode --quarantine aside/`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from headwater.datamodules.files import expand, is_remote
from headwater.datamodules.index import scan
from headwater.tools.checks import BROKEN, Checked, Problem, check
from headwater.tools.engine import Engine, Result, spread
from headwater.tools.index_shards import current
from headwater.tools.quarantine import finish, set_aside
from headwater.tools.remote import absolute
from headwater.tools.sets import repeated, sets_of

SHOWN = 20  # problems that are printed
REWRITTEN = ("tar", "interleaved", "hash", "empty", "decode")  # kinds that a new tar without the sample does not have


def verify(
    shards: str,
    jobs: int | None = None,
    decode: bool = False,
    quarantine: str | None = None,
    report: str = "verify.jsonl",
    engine: Engine = "local",
) -> None:
    """Check every member of shards against its hash, and decode it with --decode.

    Exit code 1 when something is broken: a tar is damaged or cannot be read, an index is not of its tar, the members of a
    sample do not stand together, a member is empty, has changed or does not decode. All else that is found is a note.

    Args:
        shards: a tar, a folder, a glob, a brace range or a URL.
        jobs: shards at once; default: as many as there are cores.
        decode: decode every member, pictures and sounds in full, of films the first frame.
        quarantine: folder to which broken samples are moved; their shards are written anew without them.
        report: file for all that is found, one JSON object per line.
        engine: local = processes of this machine; ray = tasks of a Ray cluster.
    """
    paths = absolute(expand(shards), engine)
    if quarantine:
        _prepare(paths, quarantine)
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    spreading = spread(partial(check, decode=decode), paths, jobs, engine)
    checked = [_checked(result) for result in track(spreading, "checking", total=len(paths), disable=not console.is_terminal)]
    problems = [problem for one in checked for problem in one.problems] + list(_shared_keys(checked))
    lines = [json.dumps({"broken": p.kind in BROKEN, **p._asdict()}, ensure_ascii=False) + "\n" for p in problems]
    Path(report).write_text("".join(lines), encoding="utf-8")
    _show(checked, problems, report, console)
    if not decode:
        console.print("members were not decoded; --decode does that")
    mended = _set_aside(checked, Path(quarantine), console) if quarantine else set()
    if left := [problem for problem in problems if problem.kind in BROKEN and problem.shard not in mended]:
        raise SystemExit(f"broken: {len(left):,}; {report} lists them")


def _prepare(paths: list[str], quarantine: str) -> None:
    """Refuse what cannot work, and end what an earlier run began."""
    for path in paths:
        if is_remote(path):
            raise ValueError(f"{path} is remote, and --quarantine writes shards anew; fetch it first, or verify without it")
        if Path(path).resolve().parent == Path(quarantine).resolve():
            raise ValueError(f"--quarantine {quarantine} is the folder of the shards; expected another one; give it a new name")
        finish(path)


def _checked(result: Result) -> Checked:
    """What came of a shard; one that could not be read has a problem and no samples."""
    if not result.error:
        return result.value
    unreadable = Problem(result.item, "unreadable", "", "", f"cannot be read: {result.error}")
    return Checked(result.item, 0, 0, [unreadable], Counter(), np.empty(0, np.uint64))


def _by_set(checked: list[Checked]) -> dict[str, list[Checked]]:
    out: dict[str, list[Checked]] = {}
    for name, one in zip(sets_of([one.path for one in checked]), checked):
        out.setdefault(name, []).append(one)
    return out


def _shared_keys(checked: list[Checked]) -> Iterator[Problem]:
    """Keys that several shards of one set have."""
    for of in _by_set(checked).values():
        twice = repeated(one.prints for one in of)
        where: dict[str, list[str]] = {}
        for one in of:
            if rows := np.flatnonzero(np.isin(one.prints, twice)).tolist():
                index = current(one.path) or scan(one.path)
                for row in rows:
                    where.setdefault(index.key(row), []).append(one.path)
        for key, (first, *others) in where.items():
            yield Problem(first, "key", key, "", f"is a key in {', '.join(others)} too; `headwater reshard` tells them apart")


def _show(checked: list[Checked], problems: list[Problem], report: str, console: Console) -> None:
    """A row per set, what was decoded, and the first problems, the broken ones before the notes."""
    table = Table(Column("set", overflow="fold", min_width=24), "shards", "samples", "members", "broken", "notes")
    for name, of in _by_set(checked).items():
        paths = {one.path for one in of}
        mine = Counter(problem.kind in BROKEN for problem in problems if problem.shard in paths)
        counts = (len(of), sum(one.samples for one in of), sum(one.members for one in of), mine[True], mine[False])
        table.add_row(name, *(f"{count:,}" for count in counts))
    console.print(table)
    facts: dict[tuple[str, str], Counter[str]] = {}
    for one in checked:
        for (extension, fact, value), count in one.facts.items():
            facts.setdefault((extension, fact), Counter())[value] += count
    for (extension, fact), values in sorted(facts.items()):
        console.print(f"{extension}: {fact} {', '.join(f'{value} ({count:,})' for value, count in values.most_common(5))}")
    for problem in sorted(problems, key=lambda p: p.kind not in BROKEN)[:SHOWN]:
        what = ".".join(filter(None, (problem.key, problem.member)))
        said = " ".join(filter(None, (what, problem.why)))
        console.print(f"{'broken' if problem.kind in BROKEN else 'note'}: {problem.shard}: {said}")
    if len(problems) > SHOWN:
        console.print(f"{len(problems):,} in all; {report} lists them")


def _set_aside(checked: list[Checked], folder: Path, console: Console) -> set[str]:
    """Write shards anew without their broken samples, one after the other; returns these shards."""
    mended = set()
    for one in checked:
        bad: dict[str, list[str]] = {}
        for problem in one.problems:
            if problem.kind in ("hash", "empty", "decode"):
                bad.setdefault(problem.key, []).append(f".{problem.member} {problem.why}")
        kinds = {problem.kind for problem in one.problems}
        if kinds & {*REWRITTEN}:
            moved = set_aside(one.path, bad, "tar" in kinds, folder)
            whole = ", the old tar as a whole" if "tar" in kinds else ""
            console.print(f"{one.path}: written anew without {moved} of {one.samples} samples; they are in {folder}{whole}")
            mended.add(one.path)
    return mended
