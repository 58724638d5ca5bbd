"""A run of several stages: `stages:` of a recipe lists what each changes of the recipe, and what it takes over from the one before.

Every stage is a run of its own, in runs/RECIPE/NNN/STAGE/, that starts from the last checkpoint of the stage before. So a plan that
is run as one job equals the same stages as jobs of their own (`--stage NAME`), and each of them resumes as any run does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console
from rich.table import Table

from headwater.hub.audit import Report, Row, compare
from headwater.pretrainer import Pretrainer
from headwater.tools.cost import longest
from headwater.tools.run_folder import SUMMARY, is_unused, new_folder, unfinished
from headwater.training.freezing import Freezing
from headwater.training.start import LAST, Part

TAKEN = ("--config", "--stage", "--resume")  # options of the plan, with one value each; the others are those of every stage

CARRIED: tuple[Part, ...] = ("model", "objective", "optimizer")  # unless a stage says otherwise


@dataclass
class Stage:
    """One stage of a plan.

    Args:
        name: of its folder.
        model: what differs from the recipe's `model`, in the same form; so are `data` and `trainer`. A mapping is merged with the
            recipe's, unless it has another class_path; a source that is null is left out.
        data: see model.
        trainer: see model.
        carry: what is taken over from the stage before; see training.start.Start. None = model, objective and optimizer, and the
            order of samples if both read the same. Where it does not go on, the order begins anew with another seed.
    """

    name: str
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    carry: list[Part] | None = None


def merged(base: Any, change: Any) -> Any:
    """A recipe with what another one changes: mappings key by key, but those of another class, and everything else, as a whole."""
    if not isinstance(base, dict) or not isinstance(change, dict):
        return change
    if change.get("class_path", base.get("class_path")) != base.get("class_path"):
        return change
    return base | {key: merged(base.get(key), value) for key, value in change.items()}


def recipe_of(given: list[str]) -> dict[str, Any]:
    """What all recipes of a translated command line say together, the later ones over the earlier."""
    whole: dict[str, Any] = {}
    for path in (given[i + 1] for i, part in enumerate(given[:-1]) if part == "--config"):
        with open(path, encoding="utf-8") as file:
            whole = merged(whole, yaml.safe_load(file) or {})
    return whole


def stages_of(recipe: dict[str, Any]) -> list[Stage]:
    """The stages of a recipe, none if it has no plan. ValueError names what is wrong with them."""
    if not recipe.get("stages"):
        return []
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--stages", type=list[Stage])
    try:
        stages: list[Stage] = parser.instantiate(parser.parse_object({"stages": recipe["stages"]})).stages
    except ArgumentError as error:
        raise ValueError(f"found stages that cannot be read; each has name, model, data, trainer, carry. ({error})") from error
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names) or not all(name and Path(name).name == name for name in names):
        raise ValueError(f"found stages called {', '.join(names)}; expected different names that folders can have")
    return stages


def arguments(given: list[str], stages: Sequence[Stage], number: int, folder: Path | None) -> list[str]:
    """The command line of a stage: its recipe, then all options that were given, which win.

    folder: of the plan. None = nothing is loaded yet.
    """
    options = [word for k, word in enumerate(given) if k and not {word.partition("=")[0], given[k - 1]} & {*TAKEN}]
    if any(word.startswith("--model.start") for word in options):
        raise ValueError("found --model.start for a plan, where each stage has another; set it in the `model` of its first stage")
    recipe = recipe_of(given)
    recipe.pop("stages")
    now: dict[str, Any] = {}
    carry: list[Part] = []
    seed = int((recipe.get("data") or {}).get("seed", 0))
    for k, stage in enumerate(stages[: number + 1]):
        before, now = now, whole(recipe, stage)
        goes_on = reads(before) == reads(now) if stage.carry is None else "data" in stage.carry
        carry = stage.carry if stage.carry is not None else [*CARRIED, "data"] if goes_on else [*CARRIED]
        seed = stage.data.get("seed", seed if goes_on or not k else seed + 1)
    now["data"]["seed"] = seed
    if number and "start" not in stages[number].model:
        path = (folder or Path()) / stages[number - 1].name / LAST
        now["model"]["start"] = {"checkpoint": str(path), "carry": carry}
    return [given[0], "--config", json.dumps(now), *options]


def whole(recipe: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """The recipe of a stage."""
    made = merged({"model": {}, "data": {}} | recipe, {"model": stage.model, "data": stage.data, "trainer": stage.trainer})
    for kind in ("train", "held_out"):
        if made["data"].get(kind):
            made["data"][kind] = {name: source for name, source in made["data"][kind].items() if source is not None}
    return made


def reads(recipe: dict[str, Any]) -> dict[str, Any]:
    """What of a recipe the order of samples depends on."""
    return {key: value for key, value in (recipe.get("data") or {}).items() if key not in ("held_out", "workers", "seed")}


def value_of(given: list[str], option: str) -> str | None:
    """Of an option of a command line, None where it is not given."""
    pairs = [word.split("=", 1) for word in given if word.startswith(f"{option}=")]
    pairs += [list(pair) for pair in pairwise(given) if pair[0] == option]
    return pairs[-1][1] if pairs else None


def begin(root: Path, recipe: str, stages: Sequence[Stage], resume: str | None, only: str | None) -> Path:
    """The folder of a plan: a new one, that of --resume, or for --stage the newest in which the stage before is finished."""
    names = [stage.name for stage in stages]
    if only is not None and only not in names:
        raise ValueError(f"found --stage {only}; expected one of {', '.join(names)}")
    if resume is not None:
        folder = unfinished(root, recipe) if resume == "newest" else Path(resume)
        folder = folder.parent if folder.name in names and not (folder / names[0]).is_dir() else folder
        if not folder.is_dir():
            raise ValueError(f"--resume found no folder {folder}; expected one of a plan, such as {root / recipe / '000'}")
        return folder
    if only in (None, names[0]):
        return new_folder(root, recipe)
    before = names[names.index(only) - 1]
    ready = sorted((p for p in (root / recipe).glob("*") if (p / before / SUMMARY).exists()), key=lambda p: p.name.zfill(9))
    if not ready:
        raise ValueError(
            f"found no plan in {root / recipe} whose stage {before!r} is finished, from which {only!r} starts; run it first"
        )
    return ready[-1]


def check_new(folder: Path) -> None:
    """ValueError where a stage that is to begin has been run already."""
    if folder.is_dir() and not is_unused(folder):
        raise ValueError(f"{folder} has been run already; add --resume {folder} to go on with it, or start the plan anew")


def finish(folder: Path, stages: Sequence[Stage]) -> None:
    """Once every stage is finished: one metrics.csv, a link to the last backbone, the last summary with the steps of all."""
    summaries = {s.name: folder / s.name / SUMMARY for s in stages}
    if not all(path.exists() for path in summaries.values()):
        return
    told = {name: json.loads(path.read_text()) for name, path in summaries.items()}
    first, rows = 0, []
    for name, summary in told.items():
        metrics = folder / name / "metrics.csv"
        lines = metrics.read_text().splitlines()[1:] if metrics.exists() else []
        rows += [f"{int(line.partition(',')[0]) + first},{line.partition(',')[2]}" for line in lines]
        first += summary["step"]
    (folder / "metrics.csv").write_text("\n".join(["step,name,value", *rows]) + "\n")
    link = folder / "backbone"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(stages[-1].name, "backbone"))
    last = told[stages[-1].name]
    (folder / SUMMARY).write_text(json.dumps(last | {"stages": {name: s["step"] for name, s in told.items()}}, indent=2))


class Line(NamedTuple):
    """A row of the table of a plan, in words."""

    stage: str
    length: str
    begins: str
    objective: str
    rate: str
    data: str
    tokens: str
    trains: str


def line(stages: Sequence[Stage], number: int, config: Any, pretrainer: Pretrainer) -> Line:
    """What a stage will do. config: its parsed command line; pretrainer: built by it, on the meta device or not."""
    stage, data, objective = stages[number], config.data, pretrainer.objective
    start = pretrainer.start
    begins = "anew" if start is None else ", ".join(start.carry)
    if start is not None and "start" in stage.model:
        begins += f" of {start.checkpoint}"
    time, steps = config.trainer.max_time, config.trainer.max_steps
    parts = getattr(objective, "parts", {type(objective).__name__: None})
    rates = [group["lr"] for group in pretrainer.configure_optimizers().param_groups]
    along = [pretrainer.schedule((k + 1) / 100) for k in range(100)]
    shape = getattr(pretrainer.schedule, "__name__", type(pretrainer.schedule).__name__)
    train = {name: source.weight for name, source in (data.train or {}).items()} or {str(data.path): 1.0}
    whole = sum(train.values())
    tokens = {n: longest(pretrainer.readers[n], objective.views.get(n)) for n in objective.needs}
    counts = [(p.numel(), p.requires_grad) for p in pretrainer.parameters()]
    return Line(
        stage.name,
        (f"{steps} steps" if steps > 0 else "") + (f" or {time}" if time and steps > 0 else str(time or "")),
        begins,
        ", ".join(parts),
        f"{shape}: " + " to ".join(f"{max(rates) * x:.2g}" for x in (along[0], max(along), along[-1])),
        ", ".join(f"{name} {weight / whole:.0%}" for name, weight in train.items()) + f"; {data.batch_size} a step",
        ", ".join(f"{name} {count or 'as it comes'}" for name, count in tokens.items()),
        f"{sum(n for n, trains in counts if trains):,} of {sum(n for n, _ in counts):,}",
    )


def freeze(pretrainer: Pretrainer, config: Any) -> None:
    """What the Freezing callbacks of a stage hold fixed from its start on."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Freezing])
    given = config.trainer.callbacks if isinstance(config.trainer.callbacks, list) else [config.trainer.callbacks]
    wanted = [callback for callback in given if callback is not None and callback.class_path.endswith(f".{Freezing.__name__}")]
    for callback in parser.instantiate(parser.parse_object({"callbacks": wanted})).callbacks:
        callback.setup(None, pretrainer, "fit")


def check_carry(before: Pretrainer, after: Pretrainer, stage: Stage) -> None:
    """ValueError, before any training, where the weights of one stage do not fit those of the next."""
    for part, name in (("model", "backbone"), ("objective", "objective")):
        if after.start is None or "start" in stage.model or part not in after.start.carry:
            continue
        own, found = getattr(after, name).state_dict(), getattr(before, name).state_dict()
        rows = [compare(key, own.get(key), key, w) for key, w in found.items()]
        rows += [Row("missing", key, "", tuple(w.shape)) for key, w in own.items() if key not in found]
        if rows:
            try:
                Report(tuple(rows)).accept(after.start.coverage, f"what stage {stage.name!r} carries over as its {part}")
            except ValueError as error:
                raise ValueError(f"{error}; or name in `carry` of the stage only what fits") from error


def show(lines: Sequence[Line]) -> None:
    """Print the plan, where there is one."""
    if not lines:
        return
    heads = ("stage", "length", "takes over", "objective", "learning rate", "data", "tokens", "trains")
    table = Table(*heads, title="Plan", title_justify="left")
    for one in lines:
        table.add_row(*one)
    Console(width=None if sys.stdout.isatty() else 180, markup=False, highlight=False).print(table)
