"""Where things are in an HDF5 robot log: its episodes, their numbers, cameras and clocks, and what its attributes tell.

robomimic: data/demo_N/{actions, obs/NAME}; pictures lie among the observations. https://robomimic.github.io/docs/datasets/overview.html
ALOHA: /action, /observations/{qpos, qvel, images/CAMERA}, pictures raw or as rows of JPEG. https://github.com/tonyzhaozh/act
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import numpy as np

from headwater.tools.ingest.slots import Slot, numbered, slots_of
from headwater.tools.ingest.splits import split_of

ACTIONS = ("actions", "action")
OBSERVATIONS = ("obs", "observations")
TIMES = ("timestamps", "timestamp", "time")
RATES = ("fps", "frequency", "control_freq")
TEXTS = ("language_instruction", "instruction", "language_raw", "language", "task")
PICTURE = (b"\xff\xd8\xff", b"\x89PNG")  # how JPEG and PNG begin


class Layout(NamedTuple):
    """Where things are below the group of one episode: names of HDF5 datasets. state, cameras, clocks (of cameras): by name."""

    group: str
    action: str
    time: str | None
    state: dict[str, str]
    cameras: dict[str, str]
    clocks: dict[str, str]
    left: list[str]


class About(NamedTuple):
    """What attributes tell of an episode, as far as they do."""

    slots: dict[str, tuple[Slot, ...]]
    fps: float | None
    robot: str | None
    world: str | None
    text: str


def groups(file: Any) -> list[str]:
    """The groups that are episodes, demo_2 before demo_10. ValueError when there is none."""
    if _first(file, ACTIONS):
        return ["/"]
    found = [f"/data/{name}" for name, group in file.get("data", {}).items() if hasattr(group, "keys") and _first(group, ACTIONS)]
    if not found:
        raise ValueError(f"it holds {', '.join(file) or 'nothing'}; expected data/demo_N/actions (robomimic) or /action (ALOHA)")
    return sorted(found, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def splits(file: Any) -> dict[str, str]:
    """Name of a demo -> split, by the lists mask/train, mask/valid and mask/test; one list alone is none."""
    lists = {of: file[f"mask/{of}"] for of in ("train", "valid", "test") if f"mask/{of}" in file}
    return {_text(one): split_of(of) for of, names in lists.items() for one in names} if len(lists) > 1 else {}


def layout_of(group: Any) -> Layout:
    """Sort the datasets of an episode by what they look like. ValueError when the action is no array of steps."""
    action, outer = str(_first(group, ACTIONS)), _first(group, OBSERVATIONS)
    if group[action].ndim not in (1, 2):
        raise ValueError(f"{group.name}/{action} has the shape {group[action].shape}; expected (T, slots)")
    found = {name: group[name] for name in TIMES if name in group}
    if outer:
        group[outer].visititems(lambda name, item: found.update({f"{outer}/{name}": item}))
    layout = Layout(group.name, action, next((n for n in found if n.rpartition("/")[2] in TIMES), None), {}, {}, {}, [])
    for name, item in found.items():
        plain = name.removeprefix(f"{outer}/")
        if not hasattr(item, "shape") or plain.endswith(TIMES) or plain in TEXTS:
            continue
        if _pictures(item):
            short = re.sub(r"^images/|_(image|rgb)$", "", plain)
            camera = plain if short in layout.cameras else short
            layout.cameras[camera] = name
            if clock := _first(group, tuple(f"{name}_{time}" for time in TIMES)):
                layout.clocks[camera] = clock
        elif item.ndim in (1, 2) and item.dtype.kind in "fiub":
            layout.state[plain] = name
        else:
            layout.left.append(plain)
    return layout


def about(group: Any, layout: Layout) -> About:
    """Names, rate, robot and task: from attributes of the episode, of the group that holds it, of the file."""
    places = [group, *(group[name] for name in OBSERVATIONS if name in group), group.parent, group.file]
    arguments = _object(group.parent.attrs.get("env_args"))  # robomimic and robosuite
    given = arguments.get("env_kwargs") or {}
    robot, fps = _attribute(places, ("robot", "robot_type")), _attribute(places, RATES) or given.get("control_freq")
    action = slots_of(_names("action", group[layout.action]))
    if len(action) == 1 and group[layout.action].dtype.kind in "iu":
        action = (action[0]._replace(kind="discrete"),)
    state = slots_of(name for plain, place in layout.state.items() for name in _names(plain, group[place]))
    robots = robot or ", ".join(np.atleast_1d(given.get("robots", [])).tolist()) or None
    return About({"action": action, "state": state}, float(fps) if fps else None, robots, arguments.get("env_name"), _task(places))


def content(row: Any) -> bytes:
    """The bytes of one row, whether HDF5 has them as numbers, as opaque data or as a string."""
    if isinstance(row, (bytes, str)):
        return row.encode() if isinstance(row, str) else bytes(row)
    return np.asarray(row).tobytes()


def _first(group: Any, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in group), None)


def _pictures(item: Any) -> bool:
    """(T, H, W, 3) uint8, or T rows of bytes that begin like a JPEG or PNG file."""
    if item.ndim == 4:
        return item.dtype == np.uint8 and item.shape[3] == 3
    rows = item.ndim in (1, 2) and len(item) and (item.dtype == np.uint8 or item.dtype.kind in "OSV")
    return bool(rows) and content(item[0]).startswith(PICTURE)


def _names(name: str, item: Any) -> list[str]:
    """Names of the columns, from an attribute that fits or by number."""
    size = item.shape[1] if item.ndim == 2 else 1
    given = [_text(one) for of in ("names", "joint_names") for one in np.atleast_1d(item.attrs.get(of, []))]
    return given if len(given) == size else numbered(name, size)


def _attribute(places: list[Any], names: tuple[str, ...]) -> str | None:
    return next((_text(place.attrs[name]) for place in places for name in names if name in place.attrs), None)


def _task(places: list[Any]) -> str:
    """An attribute, a dataset of one text, or the problem of LIBERO; the innermost counts."""
    for place in places:
        items = [place[name] for name in TEXTS if name in place and hasattr(place[name], "shape")]
        texts = [_attribute([place], TEXTS), *(_text(item[()]) for item in items if item.dtype.kind in "OS")]
        texts.append(_text(_object(place.attrs.get("problem_info")).get("language_instruction", "")))
        if told := next((text.strip() for text in texts if text and text.strip()), ""):
            return told
    return ""


def _text(value: Any) -> str:
    """A text or a number, also when it is the first of an array or is given as bytes."""
    value = np.ravel(np.asarray(value, object))[0] if np.size(value) else ""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _object(value: Any) -> dict[str, Any]:
    """A JSON object in an attribute; {} for anything else."""
    try:
        found = json.loads(_text(value))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
