"""Robot episodes of any format: aligned in time, their numbers in named slots, turned into samples with their statistics."""

from __future__ import annotations

import io
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track

from headwater.tools.ingest.alignment import Alignment, Picked, check, pick
from headwater.tools.ingest.frames import encode
from headwater.tools.ingest.slots import Slot, Statistics, align, distinct, union
from headwater.tools.ingest.sources import Found, Sample, Skip

UNEVEN = 1.0  # ms; steps that are less even keep their times in .time.npy
NOMINAL = 30.0  # frames per second of clips whose source tells no rate
Slots = dict[str, tuple[Slot, ...]]  # of "action" and "state"


class Rows(NamedTuple):
    """The numbers of one episode.

    values: "action" (T, A) and "state" (T, E), as the source has them; time: (T,) seconds, None = no clock; text: the task, may
    be empty; faults: what is wrong with the rows; notes: what is odd and does no harm.
    """

    values: dict[str, np.ndarray]
    time: np.ndarray | None
    text: str
    faults: list[str]
    notes: list[str]


class Episode(NamedTuple):
    """Where one episode is and how it is read; picklable.

    name: unique within the source; slots: of the columns of its values; read: gives the rows;
    shown: gives per camera the seconds, on the clock of the rows, at which its frames are shown, NaN where it has no clock;
    cameras that it leaves out have a frame for each row; frames: per camera what gives all its frames in order;
    files: cameras that have a video file to themselves; fps: as declared; split: "train" and the like, "" = the source has none.
    """

    name: str
    slots: Slots
    read: Callable[[], Rows]
    shown: Callable[[], dict[str, np.ndarray]]
    frames: dict[str, Callable[[], Iterator[Any]]]
    files: dict[str, Path]
    fps: float | None
    facts: dict[str, Any]
    split: str = ""


def gather(kind: str, episodes: Sequence[Episode], skipped: list[Skip], allow_misaligned: bool = False) -> Found:
    """Check all episodes; samples of those that are aligned, or of what their streams share when misaligned ones are allowed.

    The slots are those of all episodes, by name. Statistics are of the training episodes; all are, where there are no splits.
    """
    slots = {name: union(episode.slots[name] for episode in episodes) for name in ("action", "state")}
    statistics = {name: Statistics(len(slots[name])) for name in slots}
    cameras = extensions(camera for episode in episodes for camera in episode.frames)
    samples: list[Sample] = []
    broken: list[Skip] = []
    refused: list[Skip] = []
    taken: list[Alignment] = []
    notes: Counter[str] = Counter()
    for episode in track(episodes, "reading", disable=not sys.stdout.isatty()):
        try:
            rows, alignment, picked = _read(episode, allow_misaligned)
        except Exception as error:  # readers raise nearly anything on broken files
            broken.append(Skip(episode.name, str(error) or type(error).__name__))
            continue
        if alignment.faults and not allow_misaligned:
            refused.append(Skip(episode.name, f"misaligned: {'; '.join(alignment.faults)}"))
            continue
        samples.append(_sample(episode, rows, alignment, picked, slots, cameras))
        taken.append(alignment)
        notes.update(rows.notes)
        if episode.split in ("", "train"):
            kept = slice(None) if picked is None else picked.rows
            for name in slots:
                statistics[name].update(_placed(rows, episode, name, slots)[kept])
    report = [*_report(taken, refused, samples), *_inventory(slots), *(f"{note}: {n} episodes" for note, n in notes.items())]
    header = _header(episodes, slots, statistics)
    return Found(kind, samples, [*skipped, *broken, *refused], header=header, report=report)


def _header(episodes: Sequence[Episode], slots: Slots, statistics: dict[str, Statistics]) -> dict[str, Any]:
    """What every shard of the source tells: slots with their statistics, the rate and the robots. fps: None = they differ."""
    rates, robots = {episode.fps for episode in episodes}, {str(episode.facts.get("robot") or "") for episode in episodes}
    parts = {name: {"slots": [slot._asdict() for slot in of], **statistics[name].summary()} for name, of in slots.items() if of}
    return {**parts, "fps": rates.pop() if len(rates) == 1 else None, "robot": ", ".join(sorted(robots - {""})) or None}


def _read(episode: Episode, allow_misaligned: bool) -> tuple[Rows, Alignment, Picked | None]:
    rows, shown = episode.read(), episode.shown()
    length = len(rows.values["action"])
    if not length:
        raise ValueError("the episode has no rows")
    if infinite := [name for name, values in rows.values.items() if np.isinf(values).any()]:
        raise ValueError(f"{' and '.join(infinite)} holds infinite values")
    alignment = check(length, rows.time, shown, episode.fps)
    alignment = alignment._replace(faults=rows.faults + alignment.faults)
    allowed = alignment.faults and allow_misaligned
    return rows, alignment, pick(length, rows.time, shown, 1 / _rate(episode, alignment)) if allowed else None


def _rate(episode: Episode, alignment: Alignment) -> float:
    """Rows per second: as declared, unless that was found to be wrong."""
    if alignment.faults and alignment.rate:
        return alignment.rate
    return episode.fps or alignment.rate or NOMINAL


def _placed(rows: Rows, episode: Episode, name: str, slots: Slots) -> np.ndarray:
    """(T, columns of the episode) -> float32 (T, slots of the source)."""
    return align(rows.values[name], [slot.name for slot in episode.slots[name]], [slot.name for slot in slots[name]])


def _sample(
    episode: Episode, rows: Rows, alignment: Alignment, picked: Picked | None, slots: Slots, cameras: dict[str, str]
) -> Sample:
    files = {cameras[camera]: path for camera, path in episode.files.items()} if picked is None else {}
    clips = {cameras[camera]: camera for camera in episode.frames if cameras[camera] not in files}
    steps = len(rows.values["action"]) if picked is None else len(picked.rows)
    facts = episode.facts | {"fps": episode.fps, "steps": steps}
    if rows.time is not None and alignment.rate is not None:
        facts |= {"start": float(rows.time[0]), "rate": round(alignment.rate, 4), "jitter_ms": round(alignment.jitter, 3)}
    if alignment.faults:
        facts["misaligned"] = alignment.faults
    uneven = rows.time is not None and (alignment.jitter > UNEVEN or picked is not None)
    make = partial(members, episode, slots, clips, _rate(episode, alignment), picked, uneven)
    return Sample(episode.name, files, {"txt": rows.text} if rows.text else {}, facts, make, episode.split)


def members(
    episode: Episode, slots: Slots, clips: dict[str, str], rate: float, picked: Picked | None, uneven: bool
) -> dict[str, bytes]:
    """What a sample holds beside its files: action.npy and state.npy, float32 (T, S), NaN = absent; clips; uneven times.

    A single slot of whole numbers is written as ids, int64 (T,). clips: extension -> camera.
    """
    rows = episode.read()
    kept = slice(None) if picked is None else picked.rows
    made = {}
    for name in ("action", "state"):
        if episode.slots[name]:
            ids = [slot.kind for slot in slots[name]] == ["discrete"]
            made[f"{name}.npy"] = npy(
                (rows.values[name][:, 0].astype(np.int64) if ids else _placed(rows, episode, name, slots))[kept]
            )
    if uneven and rows.time is not None:
        made["time.npy"] = npy(rows.time[kept])
    for extension, camera in clips.items():
        frames = episode.frames[camera]()
        made[extension] = encode(frames if picked is None else _chosen(frames, picked.frames.get(camera, picked.rows)), rate)
    return made


def _chosen(frames: Iterator[Any], places: np.ndarray) -> Iterator[Any]:
    """The frames at these ascending places; a place may come more than once."""
    at, frame = -1, None
    for place in places:
        while at < place:
            at, frame = at + 1, next(frames, None)
        if frame is None:
            raise ValueError(f"found {at} frames; expected at least {place + 1}")
        yield frame


def npy(array: np.ndarray) -> bytes:
    """The array as an .npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def extensions(cameras: Iterable[str]) -> dict[str, str]:
    """Cameras -> member extensions: "observation.images.Left Wrist" -> "left_wrist.mp4"; one camera alone -> "mp4"."""
    names = sorted({*cameras})
    if len(names) == 1:
        return {names[0]: "mp4"}
    short = [name.removeprefix("observation.").removeprefix("images.").lower() for name in names]
    plain = distinct(re.sub(r"[^a-z0-9]+", "_", name).strip("_") or "camera" for name in short)
    return {name: f"{extension}.mp4" for name, extension in zip(names, plain)}


def _report(taken: list[Alignment], refused: list[Skip], samples: list[Sample]) -> list[str]:
    good = [alignment for alignment in taken if not alignment.faults]
    jitter, drift = (max((getattr(a, of) for a in good), default=0.0) for of in ("jitter", "drift"))
    measured = f": steps differ by {jitter:.1f} ms at most, frames lie within {drift:.1f} ms of their rows" if good else ""
    lines = [f"{len(good)} of {len(taken) + len(refused)} episodes are aligned{measured}"]
    if blind := sum(alignment.rate is None for alignment in good):
        lines.append(f"{blind} of them have no clock: only numbers of rows and frames were compared")
    odd = [f"{sample.name} ({'; '.join(sample.facts['misaligned'])})" for sample in samples if "misaligned" in sample.facts]
    if odd:
        lines.append(f"{len(odd)} misaligned episodes are taken, cut to what their streams share: {_first(odd)}")
    if refused:
        names = _first([f"{skip.source} ({skip.reason.removeprefix('misaligned: ')})" for skip in refused])
        lines.append(f"{len(refused)} misaligned episodes are refused; --allow_misaligned takes what their streams share: {names}")
    return lines


def _first(names: list[str]) -> str:
    return "; ".join([*names[:3], *([f"{len(names) - 3} more"] if len(names) > 3 else [])])


def _inventory(slots: Slots) -> Iterator[str]:
    for name, of in slots.items():
        kinds = Counter(slot.kind for slot in of)
        yield f"{name} slots: {', '.join(f'{n} {kind}' for kind, n in kinds.items()) or 'none'}"
