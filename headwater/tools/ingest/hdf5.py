"""Read robot logs in HDF5 into episodes: many in one file as robomimic has them, or one per file as ALOHA and ACT have them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from headwater.tools.ingest.episodes import Episode, Rows, gather
from headwater.tools.ingest.hdf5_layout import About, Layout, about, content, groups, layout_of, splits
from headwater.tools.ingest.sources import Found, Skip, show

SUFFIXES = (".hdf5", ".h5")
BLOCK = 32  # raw pictures that are read at a time


def read_hdf5(root: Path, allow_misaligned: bool = False) -> Found:
    """One sample per episode of an HDF5 file, or of all such files below a folder.

    Members: CAMERA.mp4 (mp4, when there is one camera; H.264, encoded from the pictures, which are taken as RGB), action.npy,
    state.npy (all observations that are numbers), txt (the task, where one is told), json. The report names what is left out.
    Raises SystemExit when there is no HDF5 file, or no h5py. What cannot be read is skipped with the reason.
    """
    try:
        import h5py  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"{show(root)} is HDF5; to read it, pip install 'headwater[data]'") from error
    paths = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise SystemExit(f"{show(root)} holds no HDF5 file; expected names that end in {' or '.join(SUFFIXES)}; check the path")
    read = [one for path in paths for one in _episodes(path, show(path.name if path == root else path.relative_to(root)))]
    skipped = [one for one in read if isinstance(one, Skip)]
    return gather("HDF5 robot logs", [one for one in read if isinstance(one, Episode)], skipped, allow_misaligned)


def _episodes(path: Path, name: str) -> Iterator[Episode | Skip]:
    import h5py

    try:
        with h5py.File(path) as file:
            split = splits(file)
            for place in groups(file):
                own = name if place == "/" else f"{name}{place}"
                try:
                    layout = layout_of(file[place])
                    yield _episode(path, own, layout, about(file[place], layout), split.get(place.rpartition("/")[2], ""))
                except Exception as error:  # h5py raises nearly anything on broken files
                    yield Skip(own, str(error) or type(error).__name__)
    except Exception as error:
        yield Skip(name, str(error) or type(error).__name__)


def _episode(path: Path, name: str, layout: Layout, told: About, split: str) -> Episode:
    return Episode(
        name=name,
        slots=told.slots,
        read=partial(_rows, path, layout, told.text),
        shown=partial(_shown, path, layout),
        frames={camera: partial(_frames, path, f"{layout.group}/{place}") for camera, place in layout.cameras.items()},
        files={},
        fps=told.fps,
        facts={"file": show(path.name), "robot": told.robot, "world": told.world},
        split=split,
    )


def _rows(path: Path, layout: Layout, text: str) -> Rows:
    """Observations of another length than the action are cut, or filled with NaN, and named as a fault."""
    import h5py

    with h5py.File(path) as file:
        group = file[layout.group]
        action = _matrix(group[layout.action])
        parts = {plain: _matrix(group[place]) for plain, place in layout.state.items()}
        time = _seconds(group[layout.time]) if layout.time else None
    length = len(action)
    lengths = {plain: len(part) for plain, part in parts.items()} | ({} if time is None else {str(layout.time): len(time)})
    faults = [f"{plain} has {n} rows, {layout.action} {length}" for plain, n in lengths.items() if n != length]
    state = np.full((length, sum(part.shape[1] for part in parts.values())), np.nan, np.float32)
    column = 0
    for part in parts.values():
        state[: len(part), column : column + part.shape[1]] = part[:length]
        column += part.shape[1]
    clock = time if time is not None and len(time) == length else None
    return Rows({"action": action, "state": state}, clock, text, faults, [f"left out: {name}" for name in layout.left])


def _matrix(item: Any) -> np.ndarray:
    """(T,) or (T, D) -> (T, D)."""
    values = item[()]
    return values[:, None] if values.ndim == 1 else values


def _seconds(item: Any) -> np.ndarray:
    """A clock (T,) in seconds. Whole numbers count ms, us or ns: whichever makes it between 2 and 2000 steps per second."""
    values = np.ravel(item[()])
    step = float(np.median(np.diff(values))) if len(values) > 1 else 0.0
    units = (1e-3, 1e-6, 1e-9) if values.dtype.kind in "iu" else ()
    return values * next((unit for unit in units if 5e-4 <= step * unit <= 0.5), 1.0)


def _shown(path: Path, layout: Layout) -> dict[str, np.ndarray]:
    """By the clock of the camera where it has one for each picture, such as front_timestamps beside front."""
    import h5py

    shown = {}
    with h5py.File(path) as file:
        group = file[layout.group]
        for camera, place in layout.cameras.items():
            none = np.full(len(group[place]), np.nan)
            at = _seconds(group[layout.clocks[camera]]) if camera in layout.clocks else none
            shown[camera] = at if len(at) == len(none) else none
    return shown


def _frames(path: Path, place: str) -> Iterator[np.ndarray]:
    """Pictures in order, uint8 (H, W, 3)."""
    import h5py
    from PIL import Image

    with h5py.File(path) as file:
        item = file[place]
        for start in range(0, len(item), BLOCK):
            for row in item[start : start + BLOCK]:
                if item.ndim == 4:
                    yield row
                    continue
                with Image.open(io.BytesIO(content(row))) as picture:
                    yield np.asarray(picture.convert("RGB"))
