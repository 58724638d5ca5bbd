"""What the schedules of a run will do, as numbers and as a picture, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any, NamedTuple

from torch import nn

from headwater.objectives.objective import Schedule
from headwater.pretrainer import Pretrainer
from headwater.training.schedules import areas

POINTS = 1000  # of a curve, where a run has more steps


class Course(NamedTuple):
    """The schedules of one run or stage. steps: None = it ends by time. values: what is scheduled -> value at `at` of the run."""

    stage: str
    steps: int | None
    at: list[float]
    values: dict[str, list[float]]


def is_schedule(value: Any) -> bool:
    """Something that can be called with progress, and with nothing else."""
    if not callable(value) or isinstance(value, nn.Module | type):
        return False
    try:
        return list(signature(value).parameters) == ["progress"]
    except (TypeError, ValueError):  # what is written in C may have no signature
        return False


def schedules(pretrainer: Pretrainer) -> dict[str, Schedule]:
    """Name -> every schedule in the objective and the backbone, in parts that are no modules too."""
    found: dict[str, Schedule] = {}
    seen: set[int] = set()

    def walk(value: Any, name: str) -> None:
        if is_schedule(value):
            found[name] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}".strip("."))
        elif isinstance(value, list | tuple | nn.ModuleList):
            for number, inner in enumerate(value):
                walk(inner, f"{name}.{number}")
        elif type(value).__module__.startswith(("headwater.", "torch.nn.modules.container")) and id(value) not in seen:
            seen.add(id(value))
            inside = getattr(value, "_modules", {})
            walk({key: v for key, v in {**vars(value), **inside}.items() if not key.startswith("_") and key != "spec"}, name)

    walk(pretrainer.objective, "objective")
    walk(pretrainer.backbone, "backbone")
    return found


def rates(pretrainer: Pretrainer) -> dict[str, tuple[float, Schedule]]:
    """ "learning rate", and "weight decay" where it is scheduled -> its largest value over all groups, and the factor on it."""
    groups = pretrainer.configure_optimizers().param_groups
    found: dict[str, tuple[float, Schedule]] = {
        "learning rate": (max(group["lr"] * group.get("factor", 1.0) for group in groups), pretrainer.schedule)
    }
    if pretrainer.weight_decay is not None:
        found["weight decay"] = max(group.get("weight_decay", 0.0) for group in groups), pretrainer.weight_decay
    return found


def course(pretrainer: Pretrainer, steps: int | None, stage: str = "") -> Course:
    """Rates as they are at the end of each step, which is what the step has; all else as it is where the step begins."""
    count = min(steps or POINTS, POINTS)
    every = steps or POINTS
    ends = [max(1, round((k + 1) * every / count)) for k in range(count)]
    values = {name: [peak * along(end / every) for end in ends] for name, (peak, along) in rates(pretrainer).items()}
    values |= {name: [along((end - 1) / every) for end in ends] for name, along in schedules(pretrainer).items()}
    return Course(stage, steps, [end / every for end in ends], values)


class Sums(NamedTuple):
    """S1 and S2 of the learning rate, the latter from its peak on; see schedules.areas."""

    s1: float
    s2: float


def sums(pretrainer: Pretrainer, steps: int) -> Sums:
    """Of a run of so many steps."""
    peak, along = rates(pretrainer)["learning rate"]
    every = [peak * along((k + 1) / steps) for k in range(steps)]
    return Sums(areas(every)[0], areas(every[every.index(max(every)) :])[1])


def plot(courses: Sequence[Course], target: str) -> None:
    """A panel for each schedule, over the steps of all stages one after the other; where a run ends by time, over its share."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for one in courses for name in one.values))
    by_step = all(one.steps for one in courses)
    columns = min(2, len(names))
    shape = (-(-len(names) // columns), columns)
    figure, axes = pyplot.subplots(*shape, figsize=(5.5 * columns, 2.6 * shape[0]), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names):
        first = 0.0
        for one in courses:
            length = (one.steps or 1) if by_step else 1
            if name in one.values:
                axis.plot([first + x * length for x in one.at], one.values[name], color="#08519c", linewidth=1.5)
            if len(courses) > 1:
                axis.axvline(first, color="#cccccc", linewidth=0.8, zorder=0)
                axis.annotate(one.stage, (first, 1.0), xycoords=("data", "axes fraction"), fontsize=7, va="top", color="#666666")
            first += length
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step" if by_step else "share of the run", fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
