"""Read what Dataset.save_to_disk or DatasetDict.save_to_disk of Hugging Face `datasets` wrote; nothing is decoded here."""

from __future__ import annotations

import io
import json
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from headwater.tools.decode import KIND, extension_of
from headwater.tools.ingest.manifests import CAPTIONS
from headwater.tools.ingest.signatures import HEAD, extension_by_content
from headwater.tools.ingest.sources import Found, Sample, prefix_of
from headwater.tools.ingest.splits import split_of

SPOKEN = ("sentence", "transcription", "transcript")  # what data sets of speech call their texts


class Plan(NamedTuple):
    """What becomes of each column. media: column -> prefix of its members; arrays: column -> (extension, dtype).

    text: the caption; labels: columns of class numbers -> their names, the first gives .cls; left: not taken, since they hold
    bytes that nobody reads. The other columns are facts.
    """

    media: dict[str, str]
    arrays: dict[str, tuple[str, str]]
    text: str | None
    labels: dict[str, tuple[str, ...]]
    left: tuple[str, ...]


def matches_saved(root: Path) -> bool:
    """Whether a folder was written by save_to_disk."""
    return (root / "dataset_dict.json").is_file() or all((root / name).is_file() for name in ("dataset_info.json", "state.json"))


def read_saved(root: Path, caption: str | None = None) -> Found:
    """One sample per row. Pictures, sound and video as they are stored, lists of numbers as .npy, one text column as .txt.

    Splits keep their names, dev and the like become validation; a data set of one split named train may be divided by --train.
    """
    parts = _open(str(root), None)
    parts = parts if isinstance(parts, dict) else {"": parts}
    plan = _plan(next(iter(parts.values())).features, caption, root)
    samples, report = [], []
    for name, part in parts.items():
        split = "" if name in ("", "train") and len(parts) == 1 else split_of(name)
        report.append(f"split {name or 'all'}: {len(part)} rows, written as {split or 'train (and validation with --train)'}")
        for row in range(len(part)):
            make = partial(row_members, str(root), name or None, row, plan)
            samples.append(Sample(f"{name or 'row'}/{row:08d}", {}, {}, {}, make, split))
    if plan.left:
        report.append(f"not taken, since they hold bytes of no known kind: {', '.join(plan.left)}")
    label = next(iter(plan.labels), "none")
    kind = f"Hugging Face data set, member columns: {', '.join([*plan.media, *plan.arrays]) or 'none'}"
    return Found(f"{kind}, caption column: {plan.text or label}", samples, [], plan.labels.get(label, ()), report=report)


@lru_cache(maxsize=64)
def _open(root: str, split: str | None) -> Any:
    """The data set, or one split of it, with rows as they lie in Arrow; memory-mapped."""
    try:
        import datasets
    except ImportError as error:
        raise SystemExit(f"{root} is a Hugging Face data set; to read it, pip install 'headwater[data]'") from error
    found = datasets.load_from_disk(root if split is None else str(Path(root) / split))
    return found.with_format("arrow")


def _plan(features: Any, caption: str | None, root: Path) -> Plan:
    """Decide by the types of the columns."""
    import datasets

    media: dict[str, str] = {}
    arrays: dict[str, tuple[str, str]] = {}
    texts, labels, kinds, left = [], {}, set(), []
    for name, feature in features.items():
        one = getattr(feature, "feature", feature)
        if isinstance(one, (datasets.Image, datasets.Audio, datasets.Video)):
            media[name] = "" if one is feature and type(one) not in kinds else prefix_of(name)
            kinds.add(type(one))
        elif "binary" in str(features.arrow_schema.field(name).type):
            left.append(name)
        elif isinstance(feature, datasets.ClassLabel):
            labels[name] = tuple(feature.names)
        elif dtype := _numbers(feature):
            arrays[name] = (prefix_of(name) + "npy" if arrays else "npy", dtype)
        elif getattr(feature, "dtype", "") in ("string", "large_string"):
            texts.append(name)
    if caption is not None and caption not in texts:
        raise SystemExit(
            f"{root} has no text column {caption!r}; it has {', '.join(texts) or 'none'}; give one of them as --caption"
        )
    text = caption or next((c for g in (*CAPTIONS, *SPOKEN) for c in texts if c.lower() == g), None)
    return Plan(media, arrays, text, labels, tuple(left))


def _numbers(feature: Any) -> str:
    """The dtype of a (nested) list of numbers or an array, else ""."""
    depth = 0
    while hasattr(feature, "feature"):  # a list
        feature, depth = feature.feature, depth + 1
    dtype = str(getattr(feature, "dtype", ""))
    array = depth or hasattr(feature, "shape")
    return dtype if array and dtype.startswith(("float", "int", "uint")) else ""


def row_members(root: str, split: str | None, row: int, plan: Plan) -> dict[str, bytes]:
    """The members of one row; facts in .json."""
    import numpy as np

    values = _open(root, split)[row].to_pylist()[0]
    members: dict[str, bytes] = {}
    for column, prefix in plan.media.items():
        stored = values.pop(column)
        for number, one in enumerate(stored if isinstance(stored, list) else [stored]):
            if one:
                extension, content = _stored(one, column)
                members[f"{prefix}{number}.{extension}" if isinstance(stored, list) else prefix + extension] = content
    for column, (extension, dtype) in plan.arrays.items():
        if (numbers := values.pop(column)) is not None:
            buffer = io.BytesIO()
            np.save(buffer, np.asarray(numbers, dtype), allow_pickle=False)
            members[extension] = buffer.getvalue()
    for place, (column, names) in enumerate(plan.labels.items()):
        number = values[column]
        if number is not None and number >= 0:  # -1 marks a row without label
            values[column] = names[number]
            if place == 0:
                members |= {"cls": str(number).encode(), "txt": names[number].encode()}
    if plan.text is not None:
        members["txt"] = (values.pop(plan.text) or "").encode()
    for column in plan.left:
        del values[column]
    return {**members, "json": json.dumps(values, ensure_ascii=False, default=str).encode()}


def _stored(stored: dict[str, Any], column: str) -> tuple[str, bytes]:
    """Extension and bytes of a picture, sound or video; read from its path when the row holds only that."""
    path = stored.get("path") or ""
    content = Path(path).read_bytes() if stored.get("bytes") is None else stored["bytes"]
    extension = extension_by_content(content[:HEAD], extension_of(path)) or extension_of(path)
    if KIND.get(extension) not in ("image", "audio", "video"):  # a row must not bring any file of this machine along
        raise ValueError(f"column {column}: {len(content)} bytes of no known kind of picture, sound or video")
    return extension, content
