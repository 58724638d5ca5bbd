"""The meta data of a LeRobot dataset, v2.0 to v3.0: its episodes, tasks, cameras and named slots, with pyarrow alone.

The format: https://huggingface.co/docs/lerobot, and the files that lerobot 0.3.3 and 0.4.4 write.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from headwater.tools.ingest.slots import Slot, numbered, slots_of
from headwater.tools.ingest.sources import show
from headwater.tools.ingest.splits import split_of

STARTS = {"action": "action", "state": "observation.state"}
CLOCK = ("timestamp", "frame_index", "index", "task_index", "episode_index")


class Dataset(NamedTuple):
    """The meta data of one dataset. episodes, tasks: by number; columns: those of "action" and of "state"; cameras: their dtype."""

    root: Path
    info: dict[str, Any]
    episodes: dict[int, dict[str, Any]]
    tasks: dict[int, str]
    columns: dict[str, list[str]]
    cameras: dict[str, str]


def roots(root: Path) -> list[Path]:
    """The datasets at a path: itself, or the folders right below it."""
    folders = [root] if (root / "meta/info.json").is_file() else sorted(root.glob("[!.]*/"))
    infos = {folder: folder / "meta/info.json" for folder in folders}
    return [folder for folder, info in infos.items() if info.is_file() and "codebase_version" in info.read_text("utf-8", "replace")]


def load(root: Path) -> Dataset:
    """Read meta/. Raises SystemExit when it is not whole or of another version."""
    try:
        info = json.loads((root / "meta/info.json").read_text("utf-8"))
        if not (version := str(info["codebase_version"])).startswith(("v2.", "v3.")):
            raise ValueError(f"codebase_version is {version}; expected v2.0, v2.1 or v3.0; lerobot has scripts that convert")
        new = version.startswith("v3.")
        episodes = {e["episode_index"]: e for e in (_episodes_v3(root) if new else _lines(root / "meta/episodes.jsonl"))}
        if version == "v2.1":
            for line in _lines(root / "meta/episodes_stats.jsonl"):
                means = {f"stats/{name}/mean": stats["mean"] for name, stats in line["stats"].items()}
                episodes.get(line["episode_index"], {}).update(means)
        tasks = {t["task_index"]: t["task"] for t in (_tasks_v3(root) if new else _lines(root / "meta/tasks.jsonl"))}
        kinds = {name: feature["dtype"] for name, feature in info["features"].items()}
        media = {name: kind for name, kind in kinds.items() if kind in ("video", "image")}
        numbers = [name for name, kind in kinds.items() if kind not in ("video", "image", "string")]
        columns = {of: [c for c in numbers if c == start or c.startswith(f"{start}.")] for of, start in STARTS.items()}
        if not columns["action"]:
            raise ValueError(f"it has the columns {', '.join(kinds)}; expected one named action")
        return Dataset(root, info, episodes, tasks, columns, media)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise SystemExit(f"{show(root)} is no whole LeRobot dataset: {what}; download or copy its meta folder again") from error


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def _episodes_v3(root: Path) -> Iterator[dict[str, Any]]:
    """Rows of meta/episodes without the statistics, of which only the means are used."""
    from pyarrow import parquet

    paths = sorted((root / "meta/episodes").glob("*/*.parquet"))
    if not paths:
        raise ValueError("meta/episodes holds no Parquet file")
    for path in paths:
        names = parquet.read_schema(path).names
        wanted = [name for name in names if not name.startswith("stats/") or name.endswith("/mean")]
        yield from parquet.read_table(path, columns=wanted).to_pylist()


def _tasks_v3(root: Path) -> list[dict[str, Any]]:
    """The text is the index of the pandas table: a column under a name that pandas made up, or "task"."""
    from pyarrow import parquet

    rows = parquet.read_table(root / "meta/tasks.parquet").to_pylist()
    return [row | {"task": next(value for name, value in row.items() if name != "task_index")} for row in rows]


def notes(dataset: Dataset) -> Iterator[str]:
    """What a person should know: columns that are left out, episodes that are missing."""
    used = {*CLOCK, *dataset.cameras, *(c for columns in dataset.columns.values() for c in columns)}
    if left := [name for name in dataset.info["features"] if name not in used]:
        yield f"columns left out: {', '.join(left)}"
    total = dataset.info.get("total_episodes", len(dataset.episodes))
    if total != len(dataset.episodes):
        yield f"meta/info.json counts {total} episodes, {len(dataset.episodes)} are listed"


def slots(dataset: Dataset, of: str) -> tuple[Slot, ...]:
    """The slots of "action" or "state"; one column of whole numbers is a discrete action."""
    columns = dataset.columns[of]
    features = [dataset.info["features"][column] for column in columns]
    if of == "action" and len(columns) == 1 and "int" in features[0]["dtype"] and math.prod(features[0]["shape"]) == 1:
        return (Slot(_names(features[0], "action")[0], "discrete", ""),)
    names = []
    for column, feature in zip(columns, features):
        begin = column.removeprefix(STARTS[of]).lstrip(".")
        names += [f"{begin}.{n}" if begin else n for n in _names(feature, "" if begin else of)]
    return slots_of(names)


def _names(feature: dict[str, Any], default: str) -> list[str]:
    """Names as list, as {"motors": list} or as {name: number}; numbers where they do not fit the shape."""
    size = math.prod(feature["shape"])
    given = feature.get("names") or []
    if isinstance(given, dict):
        given = [*given] if all(isinstance(v, int) for v in given.values()) else [n for v in given.values() for n in v]
    flat = [str(n) for name in given for n in (name if isinstance(name, list) else [name])]
    return flat if len(flat) == size else numbered(default, size)


def split(dataset: Dataset, number: int) -> str:
    """Where {"train": "0:40", "test": "40:50"} puts an episode; "" when there is one split alone."""
    splits = dataset.info.get("splits") or {}
    for name, span in splits.items() if len(splits) > 1 else ():
        first, _, last = span.partition(":")
        if int(first or 0) <= number < int(last or number + 1):
            return split_of(name)
    return ""
