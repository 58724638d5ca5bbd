"""Read folder trees, image folders and manifests into samples: which files and texts belong together."""

from __future__ import annotations

import csv
import json
import os
import re
import unicodedata
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from headwater.tools.decode import KIND, extension_of

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


def read_folder(root: Path, out: Path, keep: Collection[str] = ()) -> Found:
    """Samples of a folder: one per image when all are images in subfolders, else one per stem and folder.

    keep: extensions beside the known ones.
    """
    files = sorted(_walk(root, out))
    wanted = {*KIND, *keep}
    known = [f for f in files if extension_of(f.name) in wanted]
    unknown = [f for f in files if extension_of(f.name) not in wanted]
    skipped = [
        Skip(show(f.relative_to(root)), f"extension {f.suffix or '(none)'} is not known; --keep takes further ones")
        for f in unknown
    ]
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


def read_manifest(path: Path, caption: str | None, keep: Collection[str] = ()) -> Found:
    """Samples of a manifest's rows, in the order of their first file. keep: extensions beside the known ones."""
    wanted = {*KIND, *keep}
    try:
        rows = list(_rows(path))
    except (ValueError, csv.Error) as error:
        raise SystemExit(f"{path} cannot be read as {path.suffix}: {error}; expected a whole file, texts in UTF-8") from error
    skipped = [Skip(f"{path.name}:{number}", row) for number, row in rows if isinstance(row, str)]
    good = [(number, row) for number, row in rows if isinstance(row, dict)]
    columns = list(dict.fromkeys(name for _, row in good for name in row))
    for name in (c for _, row in good for c, v in row.items() if isinstance(v.get("bytes") if isinstance(v, dict) else v, bytes)):
        raise SystemExit(f"{path}: column {name!r} holds bytes; expected file paths and texts; save the bytes as files first")
    prefixes = _file_columns(columns, [row for _, row in good], wanted)
    if caption is not None and caption not in columns:
        raise SystemExit(f"{path} has no column {caption!r}; it has {', '.join(columns)}; give one of them as --caption")
    guesses = [c for g in CAPTIONS for c in columns if c.lower() == g and c not in prefixes]
    text = caption or next(iter(guesses), None)
    samples: list[Sample] = []
    for number, row in good:
        sample = _row_sample(path, number, row, prefixes, None if text in prefixes else text, wanted)
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


def _file_columns(columns: list[str], rows: list[dict[str, Any]], wanted: Collection[str]) -> dict[str, str]:
    """Columns whose values mostly end in a known extension -> prefix that keeps members of two columns apart.

    The file need not exist: a wrong folder must show as missing files, not as text.
    """
    prefixes: dict[str, str] = {}
    taken: set[str] = set()
    for column in columns:
        values = [value for row in rows if isinstance(value := row.get(column), str) and value.strip()]
        extensions = [e for value in values if (e := extension_of(value.strip())) in wanted]
        if values and 2 * len(extensions) >= len(values):
            prefixes[column] = re.sub(r"\W+", "_", column).lower() + "." if taken & set(extensions) else ""
            taken.update(extensions)
    return prefixes


def _row_sample(
    path: Path, number: int, row: dict[str, Any], prefixes: dict[str, str], text: str | None, wanted: Collection[str]
) -> Sample | Skip:
    named = {c: row[c].strip() for c in prefixes if isinstance(row.get(c), str) and row[c].strip()}
    name = next(iter(named.values()), f"{path.name}:{number}")
    if prefixes and not named:
        return Skip(name, f"no file named in {', '.join(prefixes)}")
    if odd := [v for v in named.values() if extension_of(v) not in wanted]:
        return Skip(name, f"extension .{extension_of(odd[0])} is not known; --keep takes further ones")
    row = {c: None if value != value else value for c, value in row.items()}  # NaN is no JSON and no caption
    facts = {c: value for c, value in row.items() if c not in prefixes and c != text}
    texts = {}
    if text is not None:
        value = row.get(text)
        if isinstance(value, list):
            facts[text], value = value, next(iter(value), None)
        texts["txt"] = "" if value is None else str(value)
    return Sample(show(name), {prefixes[c] + extension_of(v): path.parent / v for c, v in named.items()}, texts, facts)


def show(name: str | Path) -> str:
    """A path as valid Unicode: names on disk may hold any byte."""
    return str(name).encode("utf-8", "backslashreplace").decode()
