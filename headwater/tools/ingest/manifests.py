"""Read manifests (CSV, TSV, JSONL, Parquet) into samples: which columns hold files, which URLs, which the caption."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from headwater.tools.decode import KIND, extension_of
from headwater.tools.ingest.fetch import Fetched
from headwater.tools.ingest.sources import Found, Sample, Skip, prefix_of, show, unknown

CAPTIONS = ("caption", "text", "title", "label")
MANIFESTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
NO_CAPTION = "caption column: none"
URL = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*)://\S", re.ASCII)
Row = dict[str, Any]
Get = Callable[[list[str]], Fetched]


class Columns(NamedTuple):
    """What the columns of a manifest hold. files: column -> prefix of its members; fetched: URL -> file; text: the caption."""

    files: dict[str, str]
    fetched: Fetched
    text: str | None


def read_manifest(
    path: Path,
    caption: str | None,
    keep: Collection[str] = (),
    url: Collection[str] = (),
    get: Get | None = None,
) -> Found:
    """Samples of a manifest's rows, in the order of their first file.

    keep: extensions beside the known ones; url: columns to fetch, else guessed; get: fetches a list of URLs.
    """
    wanted = {*KIND, *keep}
    try:
        rows = list(table_rows(path))
    except (ValueError, csv.Error) as error:
        raise SystemExit(f"{path} cannot be read as {path.suffix}: {error}; expected a whole file, texts in UTF-8") from error
    skipped = [Skip(f"{path.name}:{number}", row) for number, row in rows if isinstance(row, str)]
    good = [(number, row) for number, row in rows if isinstance(row, dict)]
    columns = list(dict.fromkeys(name for _, row in good for name in row))
    for name in (c for _, row in good for c, v in row.items() if isinstance(v.get("bytes") if isinstance(v, dict) else v, bytes)):
        raise SystemExit(f"{path}: column {name!r} holds bytes; expected file paths and texts; save the bytes as files first")
    for option, asked in (("caption", [caption] if caption is not None else []), ("url", url)):
        for name in (name for name in asked if name not in columns):
            raise SystemExit(f"{path} has no column {name!r}; it has {', '.join(columns)}; give one of them as --{option}")
    values = {c: [v.strip() for _, row in good if isinstance(v := row.get(c), str) and v.strip()] for c in columns}
    remote = list(url) or _url_columns(path, values, wanted)
    fetched = get([v for c in remote for v in values[c]]) if get and remote else Fetched({}, {}, [])
    files = _file_columns(values, remote, fetched, wanted)
    guesses = [c for g in CAPTIONS for c in columns if c.lower() == g and c not in files]
    text = caption or next(iter(guesses), None)
    meant = Columns(files, fetched, None if text in files else text)
    samples: list[Sample] = []
    for number, row in good:
        sample = _row_sample(path, number, row, meant, wanted)
        (samples if isinstance(sample, Sample) else skipped).append(sample)  # type: ignore[arg-type]
    kind = f"{path.suffix[1:].upper()} manifest{' with semicolons' if _delimiter(path) == ';' else ''}"
    kind += f", file columns: {', '.join(files) or 'none'}, {f'caption column: {text}' if text else NO_CAPTION}"
    if remote:
        kind += f", fetched: {', '.join(remote)}"
    return Found(kind, sorted(samples, key=lambda sample: sample.name), skipped, report=fetched.report)


def table_rows(path: Path) -> Iterator[tuple[int, Row | str]]:
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
        delimiter = _delimiter(path)
        csv.field_size_limit(1 << 30)
        reader = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL)
        header = next(reader, [])
        if len(set(header)) < len(header) or any((path.parent / name).is_file() for name in header if name):
            raise ValueError(f"first line is {header}, expected distinct column names; add a header line")
        for values in filter(None, reader):
            wrong = f"{len(values)} fields, the header has {len(header)}" if len(values) != len(header) else ""
            yield reader.line_num, wrong or dict(zip(header, values))


def _delimiter(path: Path) -> str:
    """Tab for TSV, comma for CSV; semicolon where the header has no other, as spreadsheets of many countries write."""
    if path.suffix.lower() != ".csv":
        return "\t"
    with path.open("rb") as file:
        header = file.readline()
    return ";" if b";" in header and b"," not in header else ","


def _json_row(line: str) -> Row | str:
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else f"a JSON {type(row).__name__}, expected an object"


def _url_columns(path: Path, values: dict[str, list[str]], wanted: Collection[str]) -> list[str]:
    """Columns to fetch: those of URLs that mostly end in a known extension; else the only one of URLs, unless files are named.

    Manifests also link to pages, licences and authors; fetching those would fail every sample.
    """
    linked = [column for column, texts in values.items() if _mostly(texts, URL.match)]
    media = [c for c in linked if _mostly(values[c], lambda text: extension_of(text.partition("?")[0]) in wanted)]
    if media or any(_mostly(texts, lambda text: extension_of(text) in wanted) for c, texts in values.items() if c not in linked):
        return media
    if len(linked) > 1:
        raise SystemExit(f"{path}: columns {', '.join(linked)} hold URLs; name those to fetch with --url {linked[0]}")
    return linked


def _mostly(texts: list[str], test: Callable[[str], object]) -> bool:
    return bool(texts) and 2 * sum(bool(test(text)) for text in texts) >= len(texts)


def _file_columns(values: dict[str, list[str]], remote: list[str], fetched: Fetched, wanted: Collection[str]) -> dict[str, str]:
    """Columns whose values mostly end in a known extension, or were fetched -> prefix that keeps two columns apart.

    The file need not exist: a wrong folder must show as missing files, not as text.
    """
    prefixes: dict[str, str] = {}
    taken: set[str] = set()
    for column, texts in values.items():
        files = [fetched.files[text].name for text in texts if text in fetched.files] if column in remote else texts
        extensions = [e for name in files if (e := extension_of(name)) in wanted]
        if column in remote or (extensions and 2 * len(extensions) >= len(texts) and not _mostly(texts, URL.match)):
            prefixes[column] = prefix_of(column) if taken & set(extensions) else ""
            taken.update(extensions)
    return prefixes


def _row_sample(path: Path, number: int, row: Row, columns: Columns, wanted: Collection[str]) -> Sample | Skip:
    named = {c: row[c].strip() for c in columns.files if isinstance(row.get(c), str) and row[c].strip()}
    name = next(iter(named.values()), f"{path.name}:{number}")
    if columns.files and not named:
        return Skip(name, f"no file named in {', '.join(columns.files)}")
    if lost := [v for v in named.values() if v in columns.fetched.reasons]:
        return Skip(name, f"{'' if lost[0] == name else f'{lost[0]}: '}{columns.fetched.reasons[lost[0]]}")
    places = {c: columns.fetched.files.get(v, path.parent / v) for c, v in named.items()}
    if odd := [place for place in places.values() if extension_of(place.name) not in wanted]:
        return Skip(name, unknown(odd[0]))
    row = {c: None if value != value else value for c, value in row.items()}  # NaN is no JSON and no caption
    facts = {c: value for c, value in row.items() if c not in columns.files and c != columns.text}
    texts = {}
    if columns.text is not None:
        value = row.get(columns.text)
        if isinstance(value, list):
            facts[columns.text], value = value, next(iter(value), None)
        texts["txt"] = "" if value is None else str(value)
    files = {columns.files[c] + extension_of(place.name): place for c, place in places.items()}
    return Sample(show(name), files, texts, facts)
