"""Turn a folder or a manifest of files into WebDataset shards: `headwater shard DIR out/`."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from headwater.datamodules.writer import ShardWriter
from headwater.tools.decode import KIND, describe, extension_of
from headwater.tools.sources import MANIFESTS, Found, Sample, Skip, read_folder, read_manifest, show


def shard(
    source: str,
    out: str,
    caption: str | None = None,
    samples: int = 10_000,
    train: float = 1.0,
    size: int | None = None,
    overwrite: bool = False,
    keep: str = "",
) -> None:
    """Make WebDataset shards from a folder tree, an image folder or a manifest.

    Hidden files are left out. Files that do not decode are skipped, named and listed in out/skipped.jsonl.

    Args:
        source: a folder (files with the same stem are one sample; only images in subfolders: the subfolder is the class),
            or a CSV, TSV (unquoted), JSONL or Parquet manifest whose columns hold file paths and texts.
        out: folder for train-00000.tar, validation-00000.tar and their indices.
        caption: manifest column written as .txt; guessed from caption, text, title, label. Of a list, the first entry.
        samples: samples per shard.
        train: share of samples in the train shards, by a hash of the source name; the rest goes to validation shards.
        size: re-encode larger images so that the longer side has this many pixels (first frame only); default: original bytes.
        overwrite: replace the shards that `out` holds.
        keep: further extensions, "csv,beats", for readers of your own; these files are taken as they are.
    """
    root, folder = Path(source), Path(out)
    old = _refuse(root, folder, samples, train, size, overwrite)
    if root.is_dir() and caption is not None:
        raise SystemExit(f"--caption {caption} names a manifest column but {root} is a folder; leave it out, or give a manifest")
    more = [extension.strip().lstrip(".").lower() for extension in keep.split(",") if extension.strip()]
    found = read_folder(root, folder, more) if root.is_dir() else read_manifest(root, caption, more)
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    console.print(f"{show(root)}: {found.kind}, {len(found.samples)} samples found")
    shards, members, skipped = _write(found, folder, samples, train, size, console.is_terminal)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(skip._asdict(), ensure_ascii=False) + "\n" for skip in skipped]
    (folder / "skipped.jsonl").write_text("".join(lines), encoding="utf-8")
    _report(found, members, skipped, folder, console)
    if not shards:
        known = " ".join(f".{extension}" for extension in KIND)
        raise SystemExit(
            f"nothing to write: {show(root)} ({found.kind}) gave 0 samples and {len(skipped)} skipped; expected at least one file"
            f" that decodes among {known}; see {folder / 'skipped.jsonl'}, check the path and the files"
        )
    for stale in old - shards:
        stale.unlink()
        Path(f"{stale}.idx").unlink(missing_ok=True)
    if found.classes:
        (folder / "classes.json").write_text(json.dumps(found.classes, ensure_ascii=False), encoding="utf-8")
    elif old:
        (folder / "classes.json").unlink(missing_ok=True)


def _refuse(root: Path, out: Path, samples: int, train: float, size: int | None, overwrite: bool) -> set[Path]:
    """Stop on what cannot work; return the shards that are to be replaced."""
    if not root.exists():
        raise SystemExit(f"{root} does not exist; expected a folder or a manifest; check the path")
    if root.is_file() and root.suffix.lower() not in MANIFESTS:
        raise SystemExit(f"{root} is a file; expected a folder or a manifest ({', '.join(MANIFESTS)}); give its folder")
    if not 0 < train <= 1 or samples < 1 or (size is not None and size < 1):
        raise SystemExit(f"found --train {train} --samples {samples} --size {size}; expected 0 < train <= 1 and counts from 1 up")
    if out.exists() and not out.is_dir():
        raise SystemExit(f"{out} is a file; expected a folder for the shards; give another path")
    old = {*out.glob("train-*.tar"), *out.glob("validation-*.tar")}
    if old and not overwrite:
        raise SystemExit(f"{out} holds {len(old)} shards; expected none; give another folder, or --overwrite to replace them")
    return old


def _write(
    found: Found, out: Path, samples: int, train: float, size: int | None, progress: bool
) -> tuple[set[Path], dict[str, Counter[str]], list[Skip]]:
    """The shards written, per split the number of samples and members, and all that was skipped."""
    members: dict[str, Counter[str]] = {"train": Counter(), "validation": Counter()}
    skipped = list(found.skipped)
    width = max(6, len(str(len(found.samples))))
    pattern = str(out).replace("{", "{{").replace("}", "}}") + "/%s-{:05d}.tar"
    with ShardWriter(pattern % "train", samples) as first, ShardWriter(pattern % "validation", samples) as second:
        for sample, content in track(_loaded(found.samples, size), "writing", total=len(found.samples), disable=not progress):
            if isinstance(content, Skip):
                skipped.append(content)
                continue
            # By a hash of the name: a sample keeps its split when others are added, and captions of one file stay together.
            place = int(hashlib.sha256(sample.name.encode()).hexdigest()[:8], 16) / (1 << 32)
            split, writer = ("train", first) if place < train else ("validation", second)
            writer.write(f"{first.written + second.written:0{width}d}", content)
            members[split].update(["samples", *content])
    return {*first.shards, *second.shards}, members, skipped


def _loaded(samples: list[Sample], size: int | None) -> Iterator[tuple[Sample, dict[str, bytes] | Skip]]:
    """Samples in order, decoded by threads a few at a time so that memory stays small."""
    window = 4 * (os.cpu_count() or 1)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(samples), window):
            part = samples[start : start + window]
            yield from zip(part, pool.map(lambda sample: load(sample, size), part))


def load(sample: Sample, size: int | None = None) -> dict[str, bytes] | Skip:
    """The members of a sample as bytes that were seen to decode, or the reason to skip it."""
    members = {}
    where = ""
    try:
        for extension, path in sample.files.items():
            where = "" if sample.name.endswith(show(path.name)) else f"{show(path.name)}: "
            members[extension] = _content(path, size)
        where = "texts: "
        if members.keys() & sample.texts.keys():
            raise ValueError("a file and a text column both give .txt; choose one with --caption")
        members |= {extension: _text(text.encode()) for extension, text in sample.texts.items()}
        given = json.loads(members.get("json", b"{}"))
        facts = (given if isinstance(given, dict) else {"json": given}) | sample.facts
        if "source" in facts:
            facts["source_given"] = facts["source"]
        members["json"] = json.dumps(facts | {"source": sample.name}, ensure_ascii=False, default=str).encode()
    except Exception as error:  # decoders raise nearly anything on bad bytes
        # PIL names the buffer by its address, which would differ between two runs.
        return Skip(sample.name, where + re.sub(r"<_io\.BytesIO[^>]*>", "the file", str(error) or type(error).__name__))
    return members


def _content(path: Path, size: int | None) -> bytes:
    if not path.is_file():
        raise ValueError(f"missing file {show(path)}")
    content, extension = path.read_bytes(), extension_of(path.name)
    if KIND.get(extension) == "text":
        return _text(content)
    if not content:
        raise ValueError("empty file (0 bytes)")
    describe(extension, content)
    return _shrink(content, size) if size and KIND.get(extension) == "image" else content


def _text(content: bytes) -> bytes:
    text = content.decode("utf-8-sig").strip()
    if not text:
        raise ValueError("empty caption")
    return text.encode()


def _shrink(content: bytes, size: int) -> bytes:
    from PIL import Image, ImageOps

    original = Image.open(io.BytesIO(content))
    if max(original.size) <= size:
        return content
    form = "JPEG" if original.format == "MPO" else str(original.format)
    image = ImageOps.exif_transpose(original)
    if image.mode in ("P", "PA", "1"):  # colour numbers and bits cannot be averaged
        image = image.convert("L" if image.mode == "1" else "RGBA" if image.has_transparency_data else "RGB")
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    quality = {"quality": 95} if form in ("JPEG", "WEBP", "AVIF") else {}
    image.save(buffer, form, icc_profile=image.info.get("icc_profile"), **quality)
    return buffer.getvalue()


def _report(found: Found, members: dict[str, Counter[str]], skipped: list[Skip], out: Path, console: Console) -> None:
    written = sum(count["samples"] for count in members.values())
    table = Table("split", "samples", "members", title=f"{show(out)}")
    for split, count in members.items():
        if count:
            table.add_row(split, str(count["samples"]), ", ".join(f"{e} {n}" for e, n in sorted(count.items()) if e != "samples"))
    if written:
        console.print(table)
    if found.classes:
        classes = Table("number", "class", title="classes")
        for number, name in enumerate(found.classes):
            classes.add_row(str(number), name)
        console.print(classes)
    named = [f"{skip.source} ({skip.reason})" for skip in skipped[:10]]
    if len(skipped) > len(named):
        named.append(f"{len(skipped) - len(named)} more in {show(out / 'skipped.jsonl')}")
    console.print(f"{written} written, {len(skipped)} skipped{': ' if named else ''}{'; '.join(named)}")
