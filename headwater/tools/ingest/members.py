"""The members of one sample as bytes that were seen to decode, or the reason to leave it out."""

from __future__ import annotations

import io
import json
import re
from typing import Any, NamedTuple

from headwater.tools.decode import KIND, describe, extension_of
from headwater.tools.ingest.sources import Sample, Skip, show
from headwater.tools.lengths import measure


class Loaded(NamedTuple):
    """A sample to write. members: extension -> bytes; hints: lengths for the index, such as {"wav.seconds": 2.5}."""

    members: dict[str, bytes]
    hints: dict[str, float]


def load(sample: Sample, size: int | None = None) -> Loaded | Skip:
    """Read, make and decode all members of a sample; the first that fails is the reason to skip it.

    size: re-encode larger images so that the longer side has this many pixels.
    """
    loaded = Loaded({}, {})
    where = ""
    try:
        for extension, path in sample.files.items():
            where = "" if sample.name.endswith(show(path.name)) else f"{show(path.name)}: "
            if not path.is_file():
                raise ValueError(f"missing file {show(path)}")
            _add(loaded, extension, path.read_bytes(), size)
        where = ""
        facts: dict[str, Any] = {}
        given = [loaded.members.pop("json", b"{}"), *_made(sample, loaded, size), json.dumps(sample.facts, default=str).encode()]
        for one in (json.loads(content, parse_constant=lambda name: None) for content in given):  # NaN is no JSON
            facts |= one if isinstance(one, dict) else {"json": one}
        where = "texts: "
        for extension, text in sample.texts.items():
            _add(loaded, extension, text.encode(), size)
        if "source" in facts:
            facts["source_given"] = facts["source"]
        facts["source"] = sample.name
        loaded.members["json"] = json.dumps(facts, ensure_ascii=False).encode()
    except Exception as error:  # decoders raise nearly anything on bad bytes
        # PIL names the buffer by its address, which would differ between two runs.
        return Skip(sample.name, where + re.sub(r"<_io\.BytesIO[^>]*>", "the file", str(error) or type(error).__name__))
    return loaded


def _made(sample: Sample, loaded: Loaded, size: int | None) -> list[bytes]:
    """Add what the sample makes itself; its .json is given back, to be joined with the facts."""
    made = sample.make() if sample.make else {}
    for extension, content in made.items():
        if extension != "json":
            _add(loaded, extension, content, size)
    return [made["json"]] if "json" in made else []


def _add(loaded: Loaded, extension: str, content: bytes, size: int | None) -> None:
    """Decode a member once on the way in and note its lengths."""
    kind = KIND.get(extension_of(f".{extension}"))
    if extension in loaded.members:
        raise ValueError(f"two sources give .{extension}, such as a file and a text column; choose one with --caption")
    if kind == "text":
        content = content.decode("utf-8-sig").strip().encode()
    if not content:
        raise ValueError("empty caption" if kind == "text" else "empty file (0 bytes)")
    describe(extension, content)
    lengths = measure(extension, content)
    if size and kind == "image" and max(lengths.values()) > size:
        content = _shrink(content, size)
        lengths = measure(extension, content)
    loaded.members[extension] = content
    loaded.hints.update(lengths)


def _shrink(content: bytes, size: int) -> bytes:
    from PIL import Image, ImageOps

    original = Image.open(io.BytesIO(content))
    form = "JPEG" if original.format == "MPO" else str(original.format)
    image = ImageOps.exif_transpose(original)
    if image.mode in ("P", "PA", "1"):  # colour numbers and bits cannot be averaged
        image = image.convert("L" if image.mode == "1" else "RGBA" if image.has_transparency_data else "RGB")
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    quality = {"quality": 95} if form in ("JPEG", "WEBP", "AVIF") else {}
    image.save(buffer, form, icc_profile=image.info.get("icc_profile"), **quality)
    return buffer.getvalue()
