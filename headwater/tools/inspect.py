"""Look into shards: tables of facts and a contact sheet: `headwater inspect 'out/*.tar' --html page.html`."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from headwater.datamodules.index import ShardIndex, index_path, load_index

EXTENSIONS = {
    "image": ("avif", "bmp", "gif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp"),
    "video": ("avi", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "webm"),
    "audio": ("aac", "aiff", "flac", "m4a", "mp3", "ogg", "opus", "wav"),
    "array": ("npy",),
    "text": ("txt", "cls"),
    "json": ("json",),
}
KIND = {extension: kind for kind, extensions in EXTENSIONS.items() for extension in extensions}
MEDIA_TYPE = {"jpg": "jpeg", "mp3": "mpeg", "m4a": "mp4", "m4v": "mp4", "mov": "mp4", "opus": "ogg", "mkv": "webm"}
INLINE = 8 << 20
THUMBNAIL = 256 << 10
COLORS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4b5563")
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1400px;padding:2rem;color:#1f2937;background:#f9fafb}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2.5rem;overflow-wrap:anywhere}
table{border-collapse:collapse;background:#fff}td,th{text-align:left;padding:.35rem .8rem;border:1px solid #e5e7eb;font-size:.9rem}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(240px,1fr));gap:1rem;margin-top:1rem}
.card{background:#fff;border:1px solid #e5e7eb;border-radius:8px;padding:.8rem;overflow:hidden}
.card img,.card video,.card svg{width:100%;max-height:260px;object-fit:contain;background:#f3f4f6;border-radius:4px}
.card audio{width:100%}.card h3{font:600 .8rem ui-monospace,monospace;margin:0 0 .5rem;color:#6b7280;overflow-wrap:anywhere}
.card p{margin:.4rem 0;white-space:pre-wrap;overflow-wrap:anywhere;max-height:14rem;overflow:auto}
.card small{color:#6b7280;display:block}
.card pre{font-size:.75rem;white-space:pre-wrap;overflow-wrap:anywhere;max-height:10rem;overflow:auto}
.fault{color:#b91c1c}
"""


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


def inspect(shards: str, html: str | None = None, samples: int = 24) -> None:
    """Print what shards hold, and write a contact sheet of some samples.

    Args:
        shards: shards as a glob, a brace range, or a folder.
        html: file for the contact sheet, one page without outside parts.
        samples: samples to decode per shard set, spread evenly over it.
    """
    from headwater.datamodules.shards import expand  # imports torch, which headwater.tools.shard does without

    try:
        paths = expand(shards)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    sets: dict[str, list[ShardIndex]] = {}
    for path in paths:
        sets.setdefault(re.sub(r"\d+(?=\.tar$)", "*", str(path)), []).append(load_index(path))
    found = [ShardSet(name, indices, pick(indices, samples)) for name, indices in sets.items()]
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    for one in found:
        _print(one, console)
    if html is not None:
        Path(html).parent.mkdir(parents=True, exist_ok=True)
        Path(html).write_text(page(found), encoding="utf-8", errors="replace")
        console.print(f"contact sheet written to {html}")


def pick(indices: list[ShardIndex], count: int) -> list[Picked]:
    """At most `count` samples, spread evenly: neighbours are often of one class."""
    total = sum(len(index) for index in indices)
    wanted = [i * total // min(count, total) for i in range(min(count, total))]
    picked, start = [], 0
    for index in indices:
        with open(index.path, "rb") as file:
            for row in (i - start for i in wanted if start <= i < start + len(index)):
                picked.append(_picked(index.keys[row].as_py(), index.read(file.fileno(), row)))
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


def extension_of(name: str) -> str:
    """The last extension in lower case: "left.PNG" -> "png"."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def describe(extension: str, content: bytes) -> dict[str, Any]:
    """Decode a member and say what it holds; raises when it does not decode. Never reads pickle; other kinds give {}."""
    kind = KIND.get(extension.rpartition(".")[2].lower())
    if kind == "image":
        from PIL import Image

        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return {"size": f"{image.width}x{image.height}", "mode": image.mode}
    if kind == "audio":
        return _describe_audio(content)
    if kind == "video":
        return _describe_video(content)
    if kind == "array":
        array = _array(content)
        return {"shape": str(array.shape), "dtype": str(array.dtype)}
    if kind == "text":
        return {"words": len(content.decode().split())}
    if kind == "json":
        value = json.loads(content)
        return {"keys": " ".join(value) if isinstance(value, dict) else type(value).__name__}
    return {}


def _array(content: bytes) -> Any:
    import numpy as np

    return np.load(io.BytesIO(content), allow_pickle=False)


def _describe_audio(content: bytes) -> dict[str, Any]:
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


def _describe_video(content: bytes) -> dict[str, Any]:
    import av

    with av.open(io.BytesIO(content), "r") as media:
        if not media.streams.video:
            raise ValueError("no video stream in the file")
        stream = media.streams.video[0]
        first = next(media.decode(stream), None)
        if first is None:
            raise ValueError("the video has no frames")
        rate = float(stream.average_rate or 0)
        known = stream.duration and round(float(stream.duration * (stream.time_base or 0)) * rate)
        length = media.duration and round(media.duration / av.time_base * rate)
        return {"size": f"{first.width}x{first.height}", "fps": round(rate, 2), "frames": stream.frames or known or length or 1}


def _summary(dicts: list[dict[str, Any]]) -> str:
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


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _rows(one: ShardSet) -> list[tuple[str, ...]]:
    """Per extension: name, count, mean size, largest size, decoded facts."""
    rows: list[tuple[str, ...]] = []
    for extension in sorted({e for index in one.indices for e in index.extensions}):
        sizes = [int(s) for index in one.indices if extension in index.size for s in index.size[extension] if s >= 0]
        facts = _summary([p.facts[extension] for p in one.picked if extension in p.facts])
        broken = sum(extension in p.faults for p in one.picked)
        note = f"{broken} do not decode" if broken else ""
        row = (extension, f"{len(sizes):,}", _bytes(sum(sizes) / max(len(sizes), 1)), _bytes(max(sizes, default=0)))
        rows.append((*row, "; ".join(filter(None, (facts, note)))))
    return rows


def _title(one: ShardSet) -> str:
    count = sum(len(index) for index in one.indices)
    total = sum(os.path.getsize(index.path) for index in one.indices)
    beside = [index_path(index.path) for index in one.indices]
    size = sum(path.stat().st_size for path in beside if path.exists()) / max(count, 1)
    return f"{len(one.indices)} shards, {count:,} samples, {_bytes(total)}, index {size:.1f} bytes per sample"


def _faults(one: ShardSet) -> list[str]:
    decoding = [f"{p.key}.{e} does not decode: {reason}" for p in one.picked for e, reason in p.faults.items()]
    return [fault for index in one.indices for fault in index.faults] + decoding


def _print(one: ShardSet, console: Console) -> None:
    console.print(f"{one.name}: {_title(one)}")
    table = Table("member", "count", "mean", "largest", f"decoded from {len(one.picked)} samples")
    for row in _rows(one):
        table.add_row(*row)
    console.print(table)
    for fault in _faults(one):
        console.print(f"fault: {fault}")


def page(sets: list[ShardSet]) -> str:
    """The contact sheet: one HTML document that needs nothing else."""
    parts = []
    for one in sets:
        rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in _rows(one))
        head = "<tr><th>member<th>count<th>mean<th>largest<th>decoded</tr>"
        faults = "".join(f'<p class="fault">{escape(fault)}</p>' for fault in _faults(one))
        cards = "".join(map(_card, one.picked))
        parts.append(f"<h2>{escape(one.name)}</h2><p>{escape(_title(one))}</p><table>{head}{rows}</table>{faults}")
        parts.append(f'<div class="grid">{cards}</div>')
    head = '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>Contact sheet</title><style>{STYLE}</style></head>"
    return f"{head}<body><h1>Contact sheet</h1>{''.join(parts)}</body></html>"


def _card(sample: Picked) -> str:
    order = sorted(sample.members, key=lambda e: list(EXTENSIONS).index(KIND.get(extension_of("." + e), "json")))
    return f'<div class="card"><h3>{escape(sample.key)}</h3>{"".join(_member(sample, e) for e in order)}</div>'


def _member(sample: Picked, name: str) -> str:
    content, extension = sample.members[name], name.rpartition(".")[2]
    kind = KIND.get(extension)
    label = f"<small>{escape(name)}: {escape(_summary([sample.facts.get(name, {})]) or _bytes(len(content)))}</small>"
    if name in sample.faults:
        return f'<p class="fault" dir="auto">{escape(name)} does not decode: {escape(sample.faults[name])}</p>'
    if kind == "image":
        return _picture(content, extension) + label
    if kind in ("audio", "video"):
        if len(content) > INLINE:
            return f"<p>{_bytes(len(content))} of {kind}, too large for this page</p>{label}"
        source = _data(f"{kind}/{MEDIA_TYPE.get(extension, extension)}", content)
        return f'<{kind} controls preload="metadata" src="{source}"></{kind}>{label}'
    if kind == "array":
        return plot(_array(content)) + label
    if kind == "text":
        return f'<p dir="auto">{escape(content.decode()[:4000])}</p>' + ("" if extension == "txt" else label)
    if kind == "json":
        text = json.dumps(json.loads(content), ensure_ascii=False, indent=1)[:4000]
        return f'<details><summary>{escape(name)}</summary><pre dir="auto">{escape(text)}</pre></details>'
    return label


def _data(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def _picture(content: bytes, extension: str) -> str:
    """The image as it is when a browser shows it and it is small, else a thumbnail."""
    if extension not in ("jpg", "jpeg", "png", "gif", "webp", "bmp", "avif") or len(content) > THUMBNAIL:
        from PIL import Image

        image = Image.open(io.BytesIO(content)).convert("RGB")
        image.thumbnail((480, 480))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        content, extension = buffer.getvalue(), "jpeg"
    return f'<img alt="" loading="lazy" src="{_data(f"image/{MEDIA_TYPE.get(extension, extension)}", content)}">'


def plot(array: Any) -> str:
    """Lines over the first axis as inline SVG, one per column (8 at most); "" for what is not a series of numbers."""
    import numpy as np

    if array.ndim == 0 or array.size == 0 or array.dtype.kind not in "biuf":
        return f"<p>{escape(str(array.tolist())[:200])}</p>" if array.size == 1 else ""
    series = array.reshape(len(array), -1)[:: -(-len(array) // 400), : len(COLORS)].astype(float)
    finite = series[np.isfinite(series)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    x = np.linspace(4, 296, len(series))
    y = 116 - 112 * (series - low) / ((high - low) or 1.0)
    lines = []
    for column, color in zip(y.T, COLORS):
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, column) if np.isfinite(b))
        lines.append(f'<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{points}"/>')
    return f'<svg viewBox="0 0 300 120" role="img"><title>{low:g} to {high:g}</title>{"".join(lines)}</svg>'
