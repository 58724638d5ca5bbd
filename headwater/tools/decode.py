"""Decode the members of shards and say what they hold, one by one and over whole sets of shards."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from typing import Any, NamedTuple

from headwater.datamodules.files import File
from headwater.datamodules.index import ShardIndex, index_path

EXTENSIONS = {
    "image": ("avif", "bmp", "gif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp"),
    "video": ("avi", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "webm"),
    "audio": ("aac", "aiff", "flac", "m4a", "mp3", "ogg", "opus", "wav"),
    "array": ("npy",),
    "text": ("txt", "cls"),
    "json": ("json",),
}
PIXELS = 89_478_485  # of a picture or frame; Pillow warns from there on, and raises at twice as many
KIND = {extension: kind for kind, extensions in EXTENSIONS.items() for extension in extensions}


class Picked(NamedTuple):
    """One sample that was read. key: its name; members: extension -> content; facts, faults: what decoding them gave."""

    key: str
    members: dict[str, bytes]
    facts: dict[str, dict[str, Any]]
    faults: dict[str, str]


class ShardSet(NamedTuple):
    """Shards whose names differ only in their number."""

    name: str
    indices: list[ShardIndex]
    picked: list[Picked]


def extension_of(name: str) -> str:
    """The last extension in lower case: "left.PNG" -> "png"."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def describe(extension: str, content: bytes) -> dict[str, Any]:
    """Decode a member and say what it holds; raises when it does not decode. Never reads pickle; other kinds give {}."""
    kind = KIND.get(extension.rpartition(".")[2].lower())
    if kind == "image":
        from PIL import Image

        with Image.open(io.BytesIO(content)) as image:
            bounded(image.width, image.height)
            image.load()
            return {"size": f"{image.width}x{image.height}", "mode": image.mode}
    if kind == "audio":
        return _audio(content)
    if kind == "video":
        return _video(content)
    if kind == "array":
        array = array_of(content)
        return {"shape": str(array.shape), "dtype": str(array.dtype)}
    if kind == "text":
        return {"words": len(content.decode().split())}
    if kind == "json":
        value = json.loads(content)
        return {"keys": " ".join(value) if isinstance(value, dict) else type(value).__name__}
    return {}


def array_of(content: bytes) -> Any:
    """The array of an .npy file; never unpickles."""
    import numpy as np

    try:
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise ValueError(
            "an array of Python objects: a pickle, which can run code, and allow_pickle stays off; save numbers"
        ) from None


def bounded(width: int, height: int) -> None:
    """Raise ValueError when a picture or frame of that size is too large to be decoded."""
    if width * height > PIXELS:
        raise ValueError(
            f"{width}x{height} are {width * height / 1e6:.0f} million pixels; expected at most {PIXELS / 1e6:.0f} million"
        )


def _audio(content: bytes) -> dict[str, Any]:
    import av
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            frames = sum(len(block) for block in file.blocks(1 << 16))
            rate, channels = file.samplerate, file.channels
    except soundfile.LibsndfileError:
        with av.open(io.BytesIO(content), "r") as media:  # AAC is beyond libsndfile
            if not media.streams.audio:
                raise ValueError("no audio stream in the file") from None
            frames = sum(frame.samples for frame in media.decode(audio=0))
            rate, channels = media.streams.audio[0].rate, media.streams.audio[0].channels
    if not frames:
        raise ValueError("the audio has no frames")
    return {"Hz": rate, "channels": channels, "seconds": round(frames / rate, 2)}


def _video(content: bytes) -> dict[str, Any]:
    import av

    with av.open(io.BytesIO(content), "r") as media:
        if not media.streams.video:
            raise ValueError("no video stream in the file")
        stream = media.streams.video[0]
        bounded(stream.width, stream.height)
        first = next(media.decode(stream), None)
        if first is None:
            raise ValueError("the video has no frames")
        rate = float(stream.average_rate or 0)
        known = stream.duration and round(float(stream.duration * (stream.time_base or 0)) * rate)
        length = media.duration and round(media.duration / av.time_base * rate)
        return {"size": f"{first.width}x{first.height}", "fps": round(rate, 2), "frames": stream.frames or known or length or 1}


def pick(indices: list[ShardIndex], count: int) -> list[Picked]:
    """At most `count` samples, spread evenly: neighbours are often of one class."""
    total = sum(len(index) for index in indices)
    wanted = [i * total // min(count, total) for i in range(min(count, total))]
    picked, start = [], 0
    for index in indices:
        with File(index.path) as file:
            for row in (i - start for i in wanted if start <= i < start + len(index)):
                picked.append(_picked(index.key(row), index.read(file, row)))
        start += len(index)
    return picked


def _picked(key: str, members: dict[str, bytes]) -> Picked:
    facts, faults = {}, {}
    for extension, content in members.items():
        try:
            facts[extension] = describe(extension, content)
        except Exception as error:  # decoders raise nearly anything on bad bytes
            faults[extension] = str(error) or type(error).__name__
    return Picked(key, members, facts, faults)


def rows(one: ShardSet) -> list[tuple[str, ...]]:
    """Per extension: name, count, mean size, largest size, decoded facts."""
    lines: list[tuple[str, ...]] = []
    for extension in sorted({e for index in one.indices for e in index.extensions}):
        sizes = [int(s) for index in one.indices for s in index.sizes(extension) if s >= 0]
        facts = summary([p.facts[extension] for p in one.picked if extension in p.facts])
        broken = sum(extension in p.faults for p in one.picked)
        note = f"{broken} do not decode" if broken else ""
        row = (extension, f"{len(sizes):,}", in_bytes(sum(sizes) / max(len(sizes), 1)), in_bytes(max(sizes, default=0)))
        lines.append((*row, "; ".join(filter(None, (facts, note)))))
    return lines


def title(one: ShardSet) -> str:
    """How many shards and samples, and how large they and their indices are, in one line."""
    count = sum(len(index) for index in one.indices)
    total = sum(os.path.getsize(index.path) for index in one.indices)
    beside = [index_path(index.path) for index in one.indices]
    size = sum(path.stat().st_size for path in beside if path.exists()) / max(count, 1)
    return f"{len(one.indices)} shards, {count:,} samples, {in_bytes(total)}, index {size:.1f} bytes per sample"


def faults(one: ShardSet) -> list[str]:
    """What could not be indexed and what did not decode, as sentences."""
    decoding = [f"{p.key}.{e} does not decode: {reason}" for p in one.picked for e, reason in p.faults.items()]
    return [fault for index in one.indices for fault in index.faults] + decoding


def summary(dicts: list[dict[str, Any]]) -> str:
    """Facts of several members in one line: ranges of numbers, the most frequent texts."""
    parts = []
    for name in dict.fromkeys(key for facts in dicts for key in facts):
        values = [facts[name] for facts in dicts if name in facts]
        if isinstance(values[0], str):
            common = Counter(values).most_common()
            parts.append(f"{name} {', '.join(v for v, _ in common[:3])}{f' and {len(common) - 3} more' if len(common) > 3 else ''}")
        else:
            low, high = min(values), max(values)
            parts.append(f"{low:g} {name}" if low == high else f"{low:g}-{high:g} {name}")
    return "; ".join(parts)


def in_bytes(count: float) -> str:
    """A size with its unit: 12_345 -> "12.3 KB"."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
