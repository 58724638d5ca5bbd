"""The contact sheet of `headwater inspect --html`: one HTML page that shows pictures, plays sound and clips, draws arrays."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from typing import Any

from headwater.tools.decode import (
    EXTENSIONS,
    KIND,
    Picked,
    ShardSet,
    array_of,
    extension_of,
    faults,
    in_bytes,
    rows,
    summary,
    title,
)

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


def page(sets: list[ShardSet]) -> str:
    """The contact sheet: one HTML document that needs nothing else."""
    parts = []
    for one in sets:
        lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows(one))
        head = "<tr><th>member<th>count<th>mean<th>largest<th>decoded</tr>"
        wrong = "".join(f'<p class="fault">{escape(fault)}</p>' for fault in faults(one))
        cards = "".join(map(_card, one.picked))
        parts.append(f"<h2>{escape(one.name)}</h2><p>{escape(title(one))}</p><table>{head}{lines}</table>{wrong}")
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
    label = f"<small>{escape(name)}: {escape(summary([sample.facts.get(name, {})]) or in_bytes(len(content)))}</small>"
    if name in sample.faults:
        return f'<p class="fault" dir="auto">{escape(name)} does not decode: {escape(sample.faults[name])}</p>'
    if kind == "image":
        return _picture(content, extension) + label
    if kind in ("audio", "video"):
        if len(content) > INLINE:
            return f"<p>{in_bytes(len(content))} of {kind}, too large for this page</p>{label}"
        source = _data(f"{kind}/{MEDIA_TYPE.get(extension, extension)}", content)
        return f'<{kind} controls preload="metadata" src="{source}"></{kind}>{label}'
    if kind == "array":
        return plot(array_of(content)) + label
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
