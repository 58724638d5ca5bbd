"""Read LeRobot datasets (v2.0, v2.1, v3.0) into episodes, with pyarrow and PyAV alone.

The format: https://huggingface.co/docs/lerobot. v2 has one Parquet file per episode and one video per episode and camera; v3 has
many episodes in one file, and meta/episodes says where each of them lies.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from headwater.tools.ingest.episodes import Episode, Rows, gather
from headwater.tools.ingest.frames import cut, times
from headwater.tools.ingest.lerobot_meta import CLOCK, STARTS, Dataset, load, notes, roots, slots, split
from headwater.tools.ingest.sources import Found, Skip, show


class Stretch(NamedTuple):
    """Frames of a video file that are one episode. length: None = to the end; start: seconds in the file at which it begins."""

    path: Path
    first: int = 0
    length: int | None = None
    start: float = 0.0


def matches_lerobot(root: Path) -> bool:
    """Is this a LeRobot dataset, or a folder of such?"""
    return bool(roots(root))


def read_lerobot(root: Path, allow_misaligned: bool = False) -> Found:
    """One sample per episode of a LeRobot dataset, or of all datasets in a folder, whose slots are joined by name.

    Members: CAMERA.mp4 (mp4, when there is one camera), action.npy, state.npy, txt (the task), json. The columns `action` and
    `observation.state`, and those below them such as `action.arm`, are the slots; the report names columns that are left out.
    Raises SystemExit when the meta data cannot be read. Episodes that cannot be read are skipped with the reason.
    """
    datasets = [load(folder) for folder in roots(root)]
    episodes: list[Episode] = []
    skipped: list[Skip] = []
    told: list[str] = []
    for dataset in datasets:
        begin = "" if dataset.root == root else f"{show(dataset.root.name)}/"
        told += [f"{begin}{note}" for note in notes(dataset)]
        for number, entry in dataset.episodes.items():
            name = f"{begin}episode_{number:06d}"
            try:
                episodes.append(_episode(dataset, number, entry, name))
            except KeyError as error:
                skipped.append(Skip(name, f"meta data of the episode lack {error}"))
            except Exception as error:  # a video that is missing or broken
                skipped.append(Skip(name, str(error) or type(error).__name__))
    versions = ", ".join(sorted({dataset.info["codebase_version"] for dataset in datasets}))
    kind = f"LeRobot {versions}{f', {len(datasets)} datasets' if len(datasets) > 1 else ''}"
    found = gather(kind, episodes, skipped, allow_misaligned)
    return found._replace(report=[*found.report, *told])


def _episode(dataset: Dataset, number: int, entry: dict[str, Any], name: str) -> Episode:
    root, info = dataset.root, dataset.info
    data = root / _inside(info["data_path"].format(**_place(info, number, entry, "data")))
    stretches = {camera: _stretch(dataset, number, entry, camera) for camera, kind in dataset.cameras.items() if kind == "video"}
    frames: dict[str, Any] = {camera: partial(cut, at.path, at.first, at.length) for camera, at in stretches.items()}
    frames |= {camera: partial(_pictures, root, data, camera, number) for camera in dataset.cameras if camera not in stretches}
    return Episode(
        name=name,
        slots={of: slots(dataset, of) for of in STARTS},
        read=partial(_rows, data, number, entry, dataset.columns, dataset.tasks),
        shown=partial(_shown, stretches),
        frames=frames,
        files={camera: at.path for camera, at in stretches.items() if at.length is None},
        fps=float(info["fps"]),
        facts={"dataset": show(root.name), "episode": number, "robot": info.get("robot_type")},
        split=split(dataset, number),
    )


def _place(info: dict[str, Any], number: int, entry: dict[str, Any], of: str) -> dict[str, Any]:
    """What the path of an episode's file is made from. of: "data" or "videos/CAMERA"."""
    if info["codebase_version"].startswith("v3."):
        return {"chunk_index": entry[f"{of}/chunk_index"], "file_index": entry[f"{of}/file_index"]}
    return {"episode_chunk": number // info.get("chunks_size", 1000), "episode_index": number}


def _stretch(dataset: Dataset, number: int, entry: dict[str, Any], camera: str) -> Stretch:
    """The frames of an episode. A v3 file in which there are no others is the episode's own, as every v2 file is."""
    place = _place(dataset.info, number, entry, f"videos/{camera}")
    path = dataset.root / _inside(dataset.info["video_path"].format(video_key=camera, **place))
    if not path.is_file():
        raise ValueError(f"missing file {show(path)}")
    if not dataset.info["codebase_version"].startswith("v3."):
        return Stretch(path)
    at = times(path)
    half = float(np.median(np.diff(at))) / 2 if len(at) > 1 else 0.0  # of the file's own step: the declared one may be wrong
    start, stop = (entry[f"videos/{camera}/{end}_timestamp"] for end in ("from", "to"))
    first, last = np.searchsorted(at, [start - half, stop - half]).tolist()
    return Stretch(path, start=start) if last - first == len(at) else Stretch(path, first, last - first, start)


def _inside(path: str) -> str:
    """A path out of meta data, refused when it leads out of the dataset."""
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError(f"found the path {path} in meta/info.json; expected one inside the dataset")
    return path


def _shown(stretches: dict[str, Stretch]) -> dict[str, np.ndarray]:
    return {
        camera: times(path)[first : None if length is None else first + length] - start
        for camera, (path, first, length, start) in stretches.items()
    }


def _rows(data: Path, number: int, entry: dict[str, Any], columns: dict[str, list[str]], tasks: dict[int, str]) -> Rows:
    import pyarrow.compute as compute

    if not data.is_file():
        raise ValueError(f"missing file {show(data)}")
    names = [name for of in columns.values() for name in of]
    table = _table(data, (*CLOCK, *names), data.stat().st_mtime_ns)
    if missing := [name for name in ("episode_index", "timestamp", *names) if name not in table.column_names]:
        raise ValueError(f"{show(data.name)} has no column {', '.join(missing)}")
    table = table.filter(compute.equal(table["episode_index"], number))
    values = {name: _numbers(table[name], name) for name in table.column_names}
    time = values["timestamp"][:, 0].astype(np.float64)
    faults = [f"{len(time)} rows, meta declares {entry['length']}"] if entry.get("length", len(time)) != len(time) else []
    for name in (n for n in ("frame_index", "index") if n in values):
        if (gap := np.flatnonzero(np.diff(values[name][:, 0]) != 1)).size:
            before, after = values[name][gap[0] : gap[0] + 2, 0]
            faults.append(f"{name} goes from {before} to {after} at row {gap[0] + 1}")
    odd = [name for name in names if not _agrees(values[name], entry.get(f"stats/{name}/mean"))]
    indices = dict.fromkeys(values["task_index"][:, 0].tolist()) if "task_index" in values else {}
    texts = [tasks[index] for index in indices if index in tasks] or entry.get("tasks") or []
    joined = {of: np.concatenate([np.zeros((len(time), 0), np.float32), *(values[c] for c in columns[of])], 1) for of in columns}
    return Rows(joined, time, "; ".join(texts), faults, [f"{name} has another mean than in meta" for name in odd])


@lru_cache(maxsize=2)  # a v3 file holds many episodes, one after the other
def _table(path: Path, columns: tuple[str, ...], changed: int) -> Any:
    from pyarrow import parquet

    present = {*parquet.read_schema(path).names}
    return parquet.read_table(path, columns=[column for column in columns if column in present])


def _numbers(column: Any, name: str) -> np.ndarray:
    """(T,) numbers or lists of any depth -> (T, D)."""
    import pyarrow as pa

    chunks = [getattr(chunk, "storage", chunk) for chunk in column.chunks]  # datasets registers types for 2-D and more
    array = pa.concat_arrays(chunks) if chunks else pa.array([], pa.float32())
    while hasattr(array, "flatten") and pa.types.is_nested(array.type):
        array = array.flatten()
    values = array.to_numpy(zero_copy_only=False)
    if len(column) and (not len(values) or len(values) % len(column)):
        raise ValueError(f"column {name} has {len(values)} numbers in {len(column)} rows; expected the same number in each")
    return values.reshape(len(column), -1) if len(column) else values.reshape(0, 1)


def _agrees(values: np.ndarray, mean: Any) -> bool:
    """Whether the rows have the mean that was noted when they were recorded."""
    if mean is None or not len(values):
        return True
    x = values.astype(np.float64)
    return np.allclose(x.mean(0), np.ravel(mean), rtol=1e-3, atol=1e-3 * float(np.nanstd(x)) + 1e-6, equal_nan=True)


def _pictures(root: Path, data: Path, column: str, number: int) -> Iterator[np.ndarray]:
    """Frames that are kept as encoded pictures in the Parquet file, or beside it."""
    from PIL import Image
    from pyarrow import parquet

    for cell in parquet.read_table(data, columns=[column], filters=[("episode_index", "=", number)])[column].to_pylist():
        source = io.BytesIO(cell["bytes"]) if cell["bytes"] else root / _inside(cell["path"])
        with Image.open(source) as picture:
            yield np.asarray(picture.convert("RGB"))
