"""Do the rows and the cameras of an episode go together in time? If not: what do they share?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RATE = 0.02  # the measured rate may differ by so much of the declared one


class Alignment(NamedTuple):
    """How the streams of an episode lie in time.

    rate: measured rows per second, None without a clock; jitter: ms, most that a step is longer or shorter than the median;
    drift: ms, most between a row and its frame; faults: sentences, none = aligned.
    """

    rate: float | None
    jitter: float
    drift: float
    faults: list[str]


class Picked(NamedTuple):
    """What the streams of an episode share. rows: (K,) numbers, ascending; frames: camera -> (K,) the frame of each row."""

    rows: np.ndarray
    frames: dict[str, np.ndarray]


def check(length: int, time: np.ndarray | None, shown: dict[str, np.ndarray], fps: float | None) -> Alignment:
    """Is the clock of the rows steady, is the rate as declared, does each camera have a frame at the time of each row?

    length: rows, T; time: (T,) seconds, None = no clock; shown: camera -> (F,) seconds at which its frames are shown, NaN = no
    clock, then only numbers are compared; fps: rows per second as declared, None = not declared.
    """
    rate, jitter, faults = _clock(time, fps) if time is not None and length > 1 else (None, 0.0, [])
    drift, half = 0.0, 500 / (fps or rate or np.nan)
    for camera, at in shown.items():
        if len(at) != length:
            faults.append(f"camera {camera} has {len(at)} frames for {length} rows")
        elif time is not None and np.isfinite(at).all():
            off = np.abs(at - time) * 1000
            drift = max(drift, float(off.max(initial=0)))
            if (late := np.flatnonzero(off > half)).size:
                found = f"camera {camera} is {off[late[0]]:.0f} ms off at row {late[0]} and {off.max():.0f} at most"
                faults.append(f"{found}; expected {half:.0f}, half a step")
    return Alignment(rate, jitter, drift, faults)


def _clock(time: np.ndarray, fps: float | None) -> tuple[float | None, float, list[str]]:
    """Rate without gaps, jitter in ms, faults."""
    steps = np.diff(time)
    if not np.isfinite(time).all():
        return None, 0.0, ["some timestamps are missing or not finite"]
    median, faults = float(np.median(steps)), []
    if (stuck := np.flatnonzero(steps <= 0)).size:
        i = stuck[0]
        faults.append(f"timestamps do not go on at row {i + 1}: {time[i + 1]:.3f} s after {time[i]:.3f} s")
    if median <= 0:
        return None, 0.0, faults
    if (gaps := np.flatnonzero(steps > 1.5 * median)).size and not stuck.size:
        faults.append(f"{steps[gaps[0]] * 1000:.0f} ms pass before row {gaps[0] + 1}; expected {median * 1000:.0f}")
    rate = 1 / float(np.mean(steps[(steps > 0) & (steps <= 1.5 * median)]))
    if fps and abs(rate / fps - 1) > RATE:
        faults.append(f"{fps:g} rows per second are declared, {rate:.4g} measured")
    return rate, float(np.abs(steps - median).max() * 1000), faults


def pick(length: int, time: np.ndarray | None, shown: dict[str, np.ndarray], interval: float) -> Picked | None:
    """The rows for which every camera has a frame, and which; None when each camera has as many frames as there are rows.

    As many frames as rows go together in their order. Otherwise a row takes the frame nearest in time, at most half an
    `interval` (seconds) away; without clocks the streams are taken to begin together. Raises ValueError when nothing is shared.
    """
    if all(len(at) == length for at in shown.values()):
        return None
    near, frames = np.ones(length, bool), {}
    for camera, at in shown.items():
        place = np.arange(length)
        if len(at) != length and len(at) and time is not None and np.isfinite(time).all() and np.isfinite(at).all():
            after = np.searchsorted(at, time).clip(0, len(at) - 1)
            before = (after - 1).clip(0)
            place = np.where(time - at[before] <= at[after] - time, before, after)
            near &= np.abs(at[place] - time) <= 0.501 * interval
            place = np.maximum.accumulate(place)  # frames are read in order
        else:
            near &= place < len(at)
        frames[camera] = place
    rows = np.flatnonzero(near)
    if not rows.size:
        raise ValueError("misaligned: no row has a frame of every camera")
    return Picked(rows, {camera: place[rows] for camera, place in frames.items()})
