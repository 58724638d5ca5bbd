"""Distillation of relations: who resembles whom in a batch shall be as a teacher has it, whatever the vectors themselves are.

KL between rows of softmaxed similarities (Passalis and Tefas 2018, arXiv:1803.10837; SEED, Fang et al. 2021, arXiv:2101.04731),
within one modality or from one to another, as continual image-text training keeps them (Mod-X, Ni et al. 2023, arXiv:2305.07437).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from headwater.distributed import gather
from headwater.model import Model
from headwater.objectives.guide import Guide, Source
from headwater.objectives.objective import Batch, Objective, Schedule, Term, part
from headwater.tokens import Pooled, join


def relations(a: Tensor, every_b: Tensor, temperature: float, own: Tensor | None = None) -> Tensor:
    """Cosines (S, all S) of rows a (S, D) with every_b (all S, D), over the temperature. own: (S,) columns that are left out."""
    scores = F.normalize(a, dim=-1) @ F.normalize(every_b, dim=-1).T / temperature
    return scores if own is None else scores.scatter(1, own[:, None], torch.finfo(scores.dtype).min / 2)


def relations_apart(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of each of the teacher's softmaxed rows from the student's: scores (S, C), (S, C) -> (S,)."""
    p = teacher.softmax(-1)
    return (torch.xlogy(p, p) - p * student.log_softmax(-1)).sum(-1)


class Related(Objective):
    """Hides nothing: samples are compared with all others of all ranks, by the model and by a teacher.

    Args:
        model: gives pooled vectors.
        teacher: see headwater.objectives.guide. It reads the signals as the model does; its vectors may have another size.
        a: the modality of the rows.
        b: that of the columns, None = the same; then a sample is not compared with itself.
        temperature, teacher_temperature: what cosines are divided by.
        momentum: of a teacher that is an average.
    """

    coupled = True

    def __init__(
        self,
        model: Model,
        teacher: Source,
        a: str = "image",
        b: str | None = None,
        temperature: float = 0.1,
        teacher_temperature: float = 0.1,
        momentum: float | Schedule = 0.996,
    ) -> None:
        super().__init__()
        if min(temperature, teacher_temperature) <= 0:
            raise ValueError(f"found temperatures {temperature} and {teacher_temperature}; expected above 0, for example 0.1")
        self.a, self.b, self.alone = a, b or a, b in (None, a)
        self.needs = (a,) if self.alone else (a, self.b)
        self.teacher = Guide(model, teacher, self.needs, momentum)
        self.temperatures = temperature, teacher_temperature
        for student in (model, self.teacher):
            if student.dim(a) != student.dim(self.b):
                raise ValueError(f"{a} pools to {student.dim(a)} numbers, {b} to {student.dim(self.b)}; expected a shared `space`")
        for name in self.needs:
            if (mine := model.encoder(name).reader.spec) != (theirs := self.teacher.encoder(name).reader.spec):
                raise ValueError(f"the teacher reads {name} as {theirs}, the student as {mine}; give both the same settings")

    def start(self, model: Model) -> None:
        self.teacher.start(model)

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        return {"related": torch.isin(batch[self.a].samples(), batch[self.b].samples()).sum()}

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        given = part(batch, self.needs)
        with torch.no_grad():
            wanted = self._relations(self.teacher.represent(given), self.temperatures[1])
        found = self._relations(model.represent(given), self.temperatures[0])
        return {"related": Term(relations_apart(found, wanted).sum(), self.numbers(batch)["related"])}

    def _relations(self, pooled: dict[str, Pooled], temperature: float) -> Tensor:
        a, b = join(pooled[self.a], pooled[self.b])
        every, first = gather(b)
        own = torch.arange(len(a), device=a.device) + first if self.alone else None
        return relations(a, every, temperature, own)

    def after_step(self, model: Model, progress: float) -> None:
        self.teacher.after_step(model, progress)
