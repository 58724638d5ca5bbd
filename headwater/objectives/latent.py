"""Joint-embedding prediction: features of what is hidden are predicted from features of what is seen, never the signal itself.

I-JEPA (Assran et al. 2023, arXiv:2301.08243; https://github.com/facebookresearch/ijepa), V-JEPA (Bardes et al. 2024,
arXiv:2404.08471; https://github.com/facebookresearch/jepa), A-JEPA (Fei et al. 2023, arXiv:2311.15830), and the future given
the past and what was done: V-JEPA 2-AC (Assran et al. 2025, arXiv:2506.09985).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater import random
from headwater.init import OUTPUT, TABLE, Rule
from headwater.model import Model
from headwater.objectives.distances import Distance, distance_of
from headwater.objectives.guide import Guide, Source
from headwater.objectives.masks.policies import Blocks, Policy, indices, lengths
from headwater.objectives.objective import Batch, Objective, Schedule, Term, at, part, viewed
from headwater.position import sincos
from headwater.tokens import LAST, Tokens, cat
from headwater.trunk import Trunk
from headwater.view import View


def apart(t: Tokens, times: int) -> Tokens:
    """Every row `times` times, the copies of a document as documents of their own: d becomes d * times + copy."""
    if times == 1:
        return t
    copies = torch.arange(times, device=t.position.device).repeat(t.position.shape[0])[:, None]
    t = t.map(lambda field: field.repeat_interleave(times, 0))
    return t if t.document is None else t._replace(document=t.document * times + copies)


def moment(t: Tokens) -> Tensor:
    """(B, N) what causal attention goes by."""
    return t.place() if t.order is None else t.order


class Latent(Objective):
    """Hides tokens of one modality, or its future, and asks for what a teacher who sees everything makes of them.

    A narrow predictor gets the seen tokens of all modalities in `needs`, each through a linear layer of its own, and a query for
    every hidden place that tells only where it is. Targets are the teacher's vectors with mean 0 and deviation 1.

    With `ahead` nothing is hidden: attention is causal in the encoders and in the predictor, and every token whose `order` is t
    is asked for from tokens whose order is at most t - ahead, all steps at once.

    Args:
        model: encodes what is seen. Its encoder of `modality` must be `maskable`, but for `ahead`.
        modality: what is predicted; a view too, such as image@0.
        policy: which tokens are hidden; None = blocks of rows and columns like I-JEPA's.
        ratio: share of each document that one target hides; 1 = all of it, so that only the other modalities tell.
        targets: sets of hidden tokens, drawn and predicted apart; what no set holds is seen.
        window, window_ratio: of what remains, only tokens that this policy chooses are seen, I-JEPA's context block; None = all.
        prefix: modalities known from the beginning (an instruction). context: those that unfold in step (actions beside frames).
            Without `ahead` both are seen whole. Neither needs a fusion, though one may mix them in.
        ahead: how many steps ahead; 0 = tokens are hidden instead.
        teacher: see headwater.objectives.guide; "same" = the model itself, without gradient.
        momentum: of a teacher that is an average.
        distance: I-JEPA's smooth L1, V-JEPA's absolute, squared or cosine; "flow" = the predictor denoises: it is shown the target
            behind noise, and asked for the velocity out of it (VEDIT, Lin et al. 2024, arXiv:2410.03478).
        depth, width: of the predictor.
        views: how the loader makes the views among all these; one that is not named here is the reader's own.
    """

    def __init__(
        self,
        model: Model,
        modality: str = "image",
        policy: Policy | None = None,
        ratio: float | Schedule = 0.175,
        targets: int = 4,
        window: Policy | None = None,
        window_ratio: float = 0.9,
        prefix: list[str] | None = None,
        context: list[str] | None = None,
        ahead: int = 0,
        teacher: Source | Literal["same"] = "average",
        momentum: float | Schedule = 0.996,
        distance: Distance | Literal["flow"] = "smooth",
        depth: int = 2,
        width: int = 64,
        views: dict[str, View] | None = None,
    ) -> None:
        super().__init__()
        self.modality, self.prefix = modality, tuple(prefix or ())
        self.needs = (modality, *self.prefix, *(context or ()))
        self.policy, self.ratio, self.ahead = policy or Blocks((0.2, 0.2), (0.75, 1.5)), ratio, ahead
        self.views = viewed(self.needs, views)
        self.distance = distance_of("squared" if distance == "flow" else distance)
        self.whole = not callable(ratio) and ratio >= 1 and not ahead
        self.targets, self.window, self.window_ratio = 1 if ahead or self.whole else targets, window, window_ratio
        self._check(model)
        self.teacher = None if teacher == "same" else Guide(model, teacher, [modality], momentum)  # type: ignore[arg-type]
        self.size = (model if self.teacher is None else self.teacher).encoder(modality).width
        self.enter = nn.ModuleDict({name: nn.Linear(model.width(name), width) for name in self.seen})
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        self.noisy = nn.Linear(self.size, width) if distance == "flow" else None
        self.predictor = Trunk(width, depth, conditional=distance == "flow")
        self.out = nn.Linear(width, self.size)

    @property
    def seen(self) -> tuple[str, ...]:
        """Modalities of which tokens are seen."""
        return self.needs[1:] if self.whole else self.needs

    def _check(self, model: Model) -> None:
        if not self.seen:
            raise ValueError(f"found ratio {self.ratio} and no context, so nothing of a sample is seen; expected a ratio below 1")
        if self.targets < 1 or self.ahead < 0:
            raise ValueError(f"found targets {self.targets} and ahead {self.ahead}; expected at least 1 and 0")
        if not callable(self.ratio) and self.ratio <= 0:
            raise ValueError(f"found ratio {self.ratio}; expected a share above 0, for example 0.175")
        if not 0 < self.window_ratio <= 1:
            raise ValueError(f"found window_ratio {self.window_ratio}; expected a share above 0 and up to 1, for example 0.9")
        encoder = model.encoder(self.modality)
        if not (self.ahead or self.whole or encoder.maskable):
            raise ValueError(
                f"the encoder of {self.modality} ({type(encoder).__name__}) cannot work on a subset of its tokens; predict the "
                "future (ahead), all of it from other modalities (ratio 1), or take a patch transformer"
            )
        if self.ahead and model.fusion is not None and not model.fusion.keeps_order:
            raise ValueError(f"{type(model.fusion).__name__} mixes in no order, so the future cannot be hidden behind it")

    def init_rules(self) -> dict[str, Rule]:
        return {"query": TABLE, "out.weight": OUTPUT}

    def start(self, model: Model) -> None:
        if self.teacher is not None:
            self.teacher.start(model)

    def task(self, batch: Batch, hints: None = None) -> Batch:
        raw, added = batch[self.modality], {}
        if self.noisy is not None:
            added["noise"] = random.normal(random.token_seed(batch["seed"], raw), (self.size,), f"latent/{self.modality}")
            added["time"] = torch.sigmoid(random.normal(batch["seed"], (), "latent/time"))
        if self.ahead:
            known = {k: batch[k]._replace(order=torch.zeros_like(batch[k].place())) for k in self.prefix}
            return {**batch, **added, **known, "asked": (raw.real() & (moment(raw) >= self.ahead))[:, None]}
        if self.whole:
            return {**batch, **added, "asked": raw.real()[:, None]}
        asked, visible = self._hide(raw, batch["seed"], at(self.ratio, batch.get("progress", 0.0)))
        return {**batch, **added, "asked": asked, "visible": visible}

    def _hide(self, raw: Tokens, seed: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
        """What is asked by each target, (B, targets, N), and what is seen, (B, N)."""
        chosen = [self.policy(raw, seed, ratio, f"latent/{k}") for k in range(self.targets)]
        asked = torch.stack(chosen, 1)
        visible = rest = raw.real() & ~asked.any(1)
        if self.window is not None:
            visible = rest & self.window(raw, seed, self.window_ratio, "latent/window")
        left = [lengths(raw._replace(valid=some), len(seed))[raw.sample()] > 0 for some in (visible, rest)]
        visible = torch.where(left[0], visible, rest)
        asked[:, 1:] &= left[1][:, None]  # a small document that the targets hide wholly keeps the first of them only
        return asked, torch.where(left[1], visible, raw.real() & ~asked[:, 0])

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        return {"latent": batch["asked"].sum()}

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        predicted, wanted, target = self.answers(model, batch)
        there, raw = wanted.real(), batch[self.modality]
        error = self.distance(predicted, wanted.x) * there
        cosine = F.cosine_similarity(predicted, wanted.x, dim=-1)[there].mean().detach()
        spread = target[raw.real()].std(0, correction=0).mean()  # 0 = the teacher has collapsed
        return {"latent": Term(error.sum(), batch["asked"].sum(), metrics={"cosine": cosine, "spread": spread})}

    def answers(self, model: Model, batch: Batch) -> tuple[Tensor, Tokens, Tensor]:
        """On what `task` returned: predictions (B * targets, K, size), what was wanted in their places, and the teacher's vectors
        of all tokens (B, N, size). The places of one target that only fill a row up are not valid."""
        raw, target = batch[self.modality], self._target(model, batch)
        places = indices(batch["asked"].flatten(0, 1))
        wanted = apart(raw._replace(x=target), self.targets).take(*places)
        query, time = wanted._replace(x=self.query.expand(*places.column.shape, -1)), None
        if self.noisy is not None:
            noise, time = apart(raw._replace(x=batch["noise"]), self.targets).take(*places).x, batch["time"]
            here = time[query.sample() // self.targets][..., None]
            query = query._replace(x=query.x + self.noisy((1 - here) * wanted.x + here * noise))
            wanted = wanted._replace(x=noise - wanted.x)
        return self._predict(model, batch, query, time), wanted, target

    @torch.no_grad()
    def _target(self, model: Model, batch: Batch) -> Tensor:
        """(B, N, size) the teacher's vectors of all tokens, normalised. It is asked with everything in sight."""
        raw = batch[self.modality]
        teacher = (model if self.teacher is None else self.teacher.model).encoder(self.modality)
        x = teacher(teacher.embed(raw), self.ahead > 0).x[:, : raw.position.shape[1]]
        return F.layer_norm(x, x.shape[-1:])

    def _see(self, model: Model, batch: Batch) -> Tokens:
        """Everything that is seen, of all modalities, as wide as the predictor."""
        raw, name = part(batch, self.seen), self.modality
        hides = name in raw and not self.ahead
        first = hides and model.encoder(name).pointwise  # then nothing hidden is embedded at all
        if first:
            raw[name] = raw[name].take(*indices(batch["visible"]))
        parts = model.embed(raw)
        if hides and not first:
            parts[name] = parts[name].take(*indices(batch["visible"]))
        seen = model(parts, self.ahead > 0)
        return cat([seen[name]._replace(x=enter(seen[name].x)) for name, enter in self.enter.items()])

    def _predict(self, model: Model, batch: Batch, query: Tokens, time: Tensor | None) -> Tensor:
        """(B * targets, K, size) what the predictor answers at the queries."""
        seen = apart(self._see(model, batch), self.targets)
        if self.ahead:  # queries stand half a step behind the last moment that they may see
            query = query._replace(order=2 * (moment(query) - self.ahead) + 1)
            seen = seen._replace(order=torch.where(seen.given(), 2 * moment(seen), LAST))
        joint = cat([query._replace(x=query.x.to(seen.x.dtype)), seen])
        condition = None
        if time is not None:
            condition = sincos(1000 * time[joint.sample() // self.targets][..., None], joint.x.shape[-1])
        return self.out(self.predictor(joint, self.ahead > 0, condition, first=query.x.shape[1]).x)

    def after_step(self, model: Model, progress: float) -> None:
        if self.teacher is not None:
            self.teacher.after_step(model, progress)
