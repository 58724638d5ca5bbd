"""Turn a folder or a manifest of files into WebDataset shards: `headwater shard DIR out/`."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

from headwater.datamodules.writer import ShardWriter
from headwater.tools.inspect import KIND, describe, extension_of

CAPTIONS = ("caption", "text", "title", "label")
MANIFESTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
RANK = {extension: rank for rank, extension in enumerate(KIND)}


class Sample(NamedTuple):
    """One sample to write. name: its source, sets order and split; files, texts: by extension; facts: for the .json."""

    name: str
    files: dict[str, Path]
    texts: dict[str, str]
    facts: dict[str, Any]


class Skip(NamedTuple):
    """What is not written, and why."""

    source: str
    reason: str


class Found(NamedTuple):
    """A source as it was read. kind: printed; classes: names in the order of their numbers."""

    kind: str
    samples: list[Sample]
    skipped: list[Skip]
    classes: tuple[str, ...] = ()


def shard(
    source: str,
    out: str,
    caption: str | None = None,
    samples: int = 10_000,
    train: float = 1.0,
    size: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write a folder or a manifest of files as WebDataset shards.

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
    """
    root, folder = Path(source), Path(out)
    old = _refuse(root, folder, samples, train, size, overwrite)
    if root.is_dir() and caption is not None:
        raise SystemExit(f"--caption {caption} names a manifest column but {root} is a folder; leave it out, or give a manifest")
    found = read_folder(root, folder) if root.is_dir() else read_manifest(root, caption)
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    console.print(f"{_show(root)}: {found.kind}, {len(found.samples)} samples found")
    shards, members, skipped = _write(found, folder, samples, train, size, console.is_terminal)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(skip._asdict(), ensure_ascii=False) + "\n" for skip in skipped]
    (folder / "skipped.jsonl").write_text("".join(lines), encoding="utf-8")
    _report(found, members, skipped, folder, console)
    if not shards:
        known = " ".join(f".{extension}" for extension in KIND)
        raise SystemExit(
            f"nothing to write: {_show(root)} ({found.kind}) gave 0 samples and {len(skipped)} skipped; expected at least one file"
            f" that decodes among {known}; see {folder / 'skipped.jsonl'}, check the path and the files"
        )
    for stale in old - shards:
        stale.unlink()
        Path(f"{stale}.idx").unlink(missing_ok=True)
    if found.classes:
        (folder / "classes.json").write_text(json.dumps(found.classes, ensure_ascii=False), encoding="utf-8")
    elif old:
        (folder / "classes.json").unlink(missing_ok=True)


def read_folder(root: Path, out: Path) -> Found:
    """Samples of a folder: one per image when all are images in subfolders, else one per stem and folder."""
    files = sorted(_walk(root, out))
    known = [f for f in files if extension_of(f.name) in KIND]
    unknown = [f for f in files if extension_of(f.name) not in KIND]
    skipped = [Skip(_show(f.relative_to(root)), f"extension {f.suffix or '(none)'} is not known") for f in unknown]
    if known and all(KIND[extension_of(f.name)] == "image" and f.parent != root for f in known):
        return _image_folder(root, known, skipped)
    return _folder_tree(root, known, skipped)


def _folder_tree(root: Path, files: list[Path], skipped: list[Skip]) -> Found:
    groups: dict[tuple[Path, str], dict[str, Path]] = {}
    for f in files:
        group = groups.setdefault((f.parent, unicodedata.normalize("NFC", f.stem)), {})
        first = group.setdefault(extension_of(f.name), f)
        if first != f:
            skipped.append(Skip(_show(f.relative_to(root)), f"same stem and extension as {_show(first.name)}; rename one"))
    # The name is the main file's path: it says where the sample came from and survives a move of the whole folder.
    samples = [Sample(_show(group[min(group, key=RANK.__getitem__)].relative_to(root)), group, {}, {}) for group in groups.values()]
    return Found("folder tree", sorted(samples, key=lambda sample: sample.name), skipped)


def _image_folder(root: Path, files: list[Path], skipped: list[Skip]) -> Found:
    """Each image with its parent folder as class; numbers follow the sorted names, broken images included."""
    number = {name: str(i) for i, name in enumerate(sorted({_show(f.parent.name) for f in files}))}
    samples = []
    for f in files:
        name = _show(f.parent.name)
        texts = {"txt": re.sub(r"[_\-\s]+", " ", name).strip() or name, "cls": number[name]}
        samples.append(Sample(_show(f.relative_to(root)), {extension_of(f.name): f}, texts, {"class": name}))
    return Found("image-folder", sorted(samples, key=lambda sample: sample.name), skipped, tuple(number))


def read_manifest(path: Path, caption: str | None) -> Found:
    """Samples of a manifest's rows, in the order of their first file."""
    try:
        rows = list(_rows(path))
    except (ValueError, csv.Error) as error:
        raise SystemExit(f"{path} cannot be read as {path.suffix}: {error}; expected a whole file, texts in UTF-8") from error
    skipped = [Skip(f"{path.name}:{number}", row) for number, row in rows if isinstance(row, str)]
    good = [(number, row) for number, row in rows if isinstance(row, dict)]
    columns = list(dict.fromkeys(name for _, row in good for name in row))
    for name in (c for _, row in good for c, v in row.items() if isinstance(v.get("bytes") if isinstance(v, dict) else v, bytes)):
        raise SystemExit(f"{path}: column {name!r} holds bytes; expected file paths and texts; save the bytes as files first")
    prefixes = _file_columns(columns, [row for _, row in good])
    if caption is not None and caption not in columns:
        raise SystemExit(f"{path} has no column {caption!r}; it has {', '.join(columns)}; give one of them as --caption")
    guesses = [c for g in CAPTIONS for c in columns if c.lower() == g and c not in prefixes]
    text = caption or next(iter(guesses), None)
    samples: list[Sample] = []
    for number, row in good:
        sample = _row_sample(path, number, row, prefixes, None if text in prefixes else text)
        (samples if isinstance(sample, Sample) else skipped).append(sample)  # type: ignore[arg-type]
    kind = f"{path.suffix[1:].upper()} manifest, file columns: {', '.join(prefixes) or 'none'}, caption column: {text or 'none'}"
    return Found(kind, sorted(samples, key=lambda sample: sample.name), skipped)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line or row number with the row, or with the reason why it is not usable."""
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet as parquet

        batches = parquet.ParquetFile(path).iter_batches()
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
        return
    with path.open(encoding="utf-8-sig", newline=None if path.suffix.lower() in (".jsonl", ".ndjson") else "") as file:
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _json_row(line)
            return
        # A quote is an ordinary character in TSV: read as a delimiter, one stray quote would swallow rows.
        tabs = path.suffix.lower() == ".tsv"
        csv.field_size_limit(1 << 30)
        reader = csv.reader(file, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL)
        header = next(reader, [])
        if len(set(header)) < len(header) or any((path.parent / name).is_file() for name in header if name):
            raise ValueError(f"first line is {header}, expected distinct column names; add a header line")
        for values in filter(None, reader):
            wrong = f"{len(values)} fields, the header has {len(header)}" if len(values) != len(header) else ""
            yield reader.line_num, wrong or dict(zip(header, values))


def _json_row(line: str) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else f"a JSON {type(row).__name__}, expected an object"


def _file_columns(columns: list[str], rows: list[dict[str, Any]]) -> dict[str, str]:
    """Columns whose values mostly end in a known extension -> prefix that keeps members of two columns apart.

    The file need not exist: a wrong folder must show as missing files, not as text.
    """
    prefixes: dict[str, str] = {}
    taken: set[str] = set()
    for column in columns:
        values = [value for row in rows if isinstance(value := row.get(column), str) and value.strip()]
        extensions = [e for value in values if (e := extension_of(value.strip())) in KIND]
        if values and 2 * len(extensions) >= len(values):
            prefixes[column] = re.sub(r"\W+", "_", column).lower() + "." if taken & set(extensions) else ""
            taken.update(extensions)
    return prefixes


def _row_sample(path: Path, number: int, row: dict[str, Any], prefixes: dict[str, str], text: str | None) -> Sample | Skip:
    named = {c: row[c].strip() for c in prefixes if isinstance(row.get(c), str) and row[c].strip()}
    name = next(iter(named.values()), f"{path.name}:{number}")
    if prefixes and not named:
        return Skip(name, f"no file named in {', '.join(prefixes)}")
    row = {c: None if value != value else value for c, value in row.items()}  # NaN is no JSON and no caption
    facts = {c: value for c, value in row.items() if c not in prefixes and c != text}
    texts = {}
    if text is not None:
        value = row.get(text)
        if isinstance(value, list):
            facts[text], value = value, next(iter(value), None)
        texts["txt"] = "" if value is None else str(value)
    return Sample(_show(name), {prefixes[c] + extension_of(v): path.parent / v for c, v in named.items()}, texts, facts)


def load(sample: Sample, size: int | None = None) -> dict[str, bytes] | Skip:
    """The members of a sample as bytes that were seen to decode, or the reason to skip it."""
    members = {}
    where = ""
    try:
        for extension, path in sample.files.items():
            where = "" if sample.name.endswith(_show(path.name)) else f"{_show(path.name)}: "
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
        raise ValueError(f"missing file {_show(path)}")
    content, extension = path.read_bytes(), extension_of(path.name)
    if KIND.get(extension) == "text":
        return _text(content)
    if not content:
        raise ValueError("empty file (0 bytes)")
    if extension not in KIND:
        raise ValueError(f"extension .{extension} is not known")
    describe(extension, content)
    return _shrink(content, size) if size and KIND[extension] == "image" else content


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
        raise SystemExit(f"{out} holds {len(old)} shards; expected none; give another folder, or --overwrite true to replace them")
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


def _report(found: Found, members: dict[str, Counter[str]], skipped: list[Skip], out: Path, console: Console) -> None:
    written = sum(count["samples"] for count in members.values())
    table = Table("split", "samples", "members", title=f"{_show(out)}")
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
        named.append(f"{len(skipped) - len(named)} more in {_show(out / 'skipped.jsonl')}")
    console.print(f"{written} written, {len(skipped)} skipped{': ' if named else ''}{'; '.join(named)}")


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
        f"folder {_show(error.filename)}: {error.strerror}; expected a readable folder; change its mode or move it away"
    )


def _show(name: str | Path) -> str:
    """A path as valid Unicode: names on disk may hold any byte."""
    return str(name).encode("utf-8", "backslashreplace").decode()
