"""Labels by the head of a Supervised objective, with the model that was trained with it: what an exported backbone has not."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from headwater.hub.audit import load_weights
from headwater.modalities.label import Category
from headwater.model import Model
from headwater.objectives.label_losses import CrossEntropy
from headwater.objectives.objective import wide
from headwater.objectives.supervised import Supervised
from headwater.tokens import Tokens
from headwater.tools.built import built
from headwater.tools.relabelling.annotator import listed
from headwater.tools.relabelling.labels import Batch, Labels, Voice
from headwater.training.checkpoints import newest
from headwater.view import View

AVERAGE = "average.teacher.module."  # how a run's checkpoint calls the average of its backbone


class Headed(Voice):
    """A Supervised objective with the model that it was trained with."""

    def __init__(self, model: Model, objective: Supervised) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.readers = {name: model.readers[name] for name in objective.asked}

    @property
    def label(self) -> Category:
        """How its labels are read."""
        return self.objective.readers[self.objective.name]  # type: ignore[return-value]

    def forward(self, batch: Batch) -> Tensor:
        raw, objective = batch[self.objective.modality], self.objective
        count = 1 if objective.unit == "sample" else 1 + int(raw.position[..., 0][raw.real()].max())
        place = torch.arange(count, device=raw.position.device).expand(len(raw.x), -1)
        task = objective.task({**self.model.prepare(batch), objective.name: Tokens(torch.zeros_like(place), place[..., None])})
        asked = task["about"] >= 0
        p = torch.full((*asked.shape, objective.loss.size), torch.nan, device=asked.device)
        features = objective.features(self.model, task, objective.task_vector)
        p[asked] = wide(objective.head(features[task["about"][asked]])).softmax(-1)
        return p


class Head(Labels):
    """The head of Supervised, with the model that was trained with it: pseudo-labels (Lee 2013), labels of moments (inverse
    dynamics, Baker et al. 2022, arXiv:2206.11795).

    Args:
        runs: folders of runs, or checkpoints in them; several vote.
        part: `name` of the labels, where a run has several Supervised objectives.
        average: take the average of the weights, where a run keeps one.
        views: random views beside the plain signal, which vote too.
        view: what they are like; none = as each reader finds fit.
    """

    def __init__(
        self, runs: list[str] | str, part: str | None = None, average: bool = True, views: int = 0, view: View | None = None
    ) -> None:
        heads = [Headed(*trained(run, part, average)) for run in listed(runs)]
        first, unit = heads[0].label, heads[0].objective.unit
        if any([*head.label.classes] != [*first.classes] or head.objective.unit != unit for head in heads):
            raise ValueError(f"the heads of {', '.join(listed(runs))} differ in classes or unit; only models of one task can vote")
        super().__init__(heads, [*first.classes], first.field, first.extensions[0], views, view, unit == "token")
        self.models = [{"name": str(checkpoint_of(run))} for run in listed(runs)]


def trained(run: str, part: str | None = None, average: bool = True) -> tuple[Model, Supervised]:
    """The model of a run and one of its Supervised objectives, on the CPU, in evaluation mode; see Head."""
    checkpoint = checkpoint_of(run)
    config = checkpoint.parent.parent / "config.yaml"
    if not config.is_file():
        raise FileNotFoundError(f"found no recipe at {config}, which tells how the objective of {run} is made; give a run's folder")
    weights = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
    made = built({"model": yaml.safe_load(config.read_text(encoding="utf-8"))["model"]}, "cpu")
    name, objective = head_of(made.objective, part, run)
    load(made.backbone, weights, AVERAGE if average and any(key.startswith(AVERAGE) for key in weights) else "backbone.")
    load(objective, weights, ".".join(filter(None, ("objective", name))) + ".")
    return made.backbone.eval(), objective.eval()


def load(module: nn.Module, weights: dict[str, Tensor], prefix: str) -> None:
    """The weights whose names begin so, in place."""
    load_weights(module, {key.removeprefix(prefix): w for key, w in weights.items() if key.startswith(prefix)})


def head_of(objective: nn.Module, part: str | None, run: str) -> tuple[str, Supervised]:
    """The Supervised objective of a run that tells classes, and its place in the run's objective."""
    found = {m.name: (place, m) for place, m in objective.named_modules() if isinstance(m, Supervised)}
    if part not in found and (part is not None or len(found) != 1):
        has = f"those for {', '.join(found)}" if found else "none"
        raise ValueError(f"{run} has the Supervised objectives: {has}; found part {part!r}, expected one of them")
    place, chosen = found[part or next(iter(found))]
    if not isinstance(chosen.loss, CrossEntropy) or not isinstance(chosen.readers[chosen.name], Category):
        raise ValueError(
            f"the head for {chosen.name} of {run} has the loss {type(chosen.loss).__name__}; expected CrossEntropy of a Category, "
            "whose probabilities can vote"
        )
    return place, chosen


def checkpoint_of(run: str) -> Path:
    """The checkpoint that a run folder or path means; the name of the file holds its hash."""
    path = Path(run)
    if path.is_dir():
        found, _ = newest(path / "checkpoints")
        if found is None:
            raise FileNotFoundError(f"found no checkpoint in {path / 'checkpoints'}; expected a run folder such as runs/RECIPE/000")
        return found.resolve()
    if not path.is_file():
        raise FileNotFoundError(f"found no run at {run}; expected a run folder such as runs/RECIPE/000, or a checkpoint in one")
    return path.resolve()
