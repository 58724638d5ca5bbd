"""Where an objective's teacher comes from, and how it moves: the frozen start, a moving average, or another model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from headwater.model import Encoder, Model
from headwater.objectives.objective import Schedule, at
from headwater.teacher import Teacher

Source = Literal["start", "average", "compatible"] | Encoder | Model


class Guide(Teacher):
    """A teacher that knows its source. No gradient reaches it.

    source: "start" = the student as training begins, weights that were loaded included; "average" = a moving average of it (mean
    teacher, Tarvainen and Valpola 2017, arXiv:1703.01780); "compatible" = one that follows the student and its start in equal
    parts, so that it fits vectors of both (CTP, Zhu et al. 2023, arXiv:2308.07146); or another encoder or model, larger or trained
    before, such as `load_backbone(NAME).model`. In a recipe: {class_path: headwater.hub.pretrained, init_args: {name: NAME}}.

    Args:
        model: the student.
        source: see above. A single encoder is that of the first name.
        names: modalities whose encoders are copied from the student; another model must have them.
        momentum: share of itself that the average keeps in a step.
        fusion: copy the student's fusion too.
    """

    def __init__(
        self, model: Model, source: Source, names: Sequence[str], momentum: float | Schedule = 0.996, fusion: bool = False
    ) -> None:
        if isinstance(source, str) and source not in ("start", "average", "compatible"):
            raise ValueError(f"found teacher {source!r}; expected start, average, compatible, an encoder or a model")
        if not 0 <= at(momentum, 0.0) <= 1:
            raise ValueError(f"found momentum {at(momentum, 0.0)}; expected the share, 0 to 1, that the average keeps of itself")
        if isinstance(source, str):
            super().__init__(model.only(names, fusion))
        else:
            super().__init__(Model({names[0].partition("@")[0]: source}) if isinstance(source, Encoder) else source)
            for name in names:
                self.encoder(name)  # says what is missing
        self.source = source if isinstance(source, str) else "other"
        self.settled = self.source == "other"  # what was loaded is not drawn anew when training starts
        self.names, self.momentum, self.fused = tuple(names), momentum, fusion
        self.origin = Teacher(self.module) if source == "compatible" else None

    @property
    def model(self) -> Model:
        """The teacher itself."""
        return self.module  # type: ignore[return-value]

    def start(self, model: Model) -> None:
        """Take over the student's weights, now that they are loaded; call it in `Objective.start`."""
        if self.source != "other":
            self.copy(model.only(self.names, self.fused))
        if self.origin is not None:
            self.origin.copy(self.module)

    def after_step(self, model: Model, progress: float) -> None:
        """Move the average; call it in `Objective.after_step`."""
        if self.source == "average":
            self.follow(model.only(self.names, self.fused), at(self.momentum, progress))
        if self.origin is not None:  # m e + (1 - m) / 2 of each, as two steps
            m = at(self.momentum, progress)
            self.follow(model.only(self.names, self.fused), 2 * m / (1 + m))
            self.follow(self.origin.module, (1 + m) / 2)
