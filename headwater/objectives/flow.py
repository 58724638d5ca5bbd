"""Denoising of vectors: flow matching and diffusion. The signal is hidden behind noise, and its head says what leads out of it.

With the process that a model has by itself this is rectified flow (Liu et al. 2022, arXiv:2209.03003; Lipman et al. 2022,
arXiv:2210.02747) with the logit-normal times of Esser et al. 2024 (arXiv:2403.03206); with others it is DDPM (Ho et al. 2020,
arXiv:2006.11239) and its kin.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from headwater import random
from headwater.model import Model
from headwater.objectives.objective import Batch, Objective, Term, check_context, part, squared_error
from headwater.tokens import Tokens


class Times:
    """Where on its way from signal, 0, to noise, 1, a sample is drawn.

    Args:
        spread: deviation of the logit of t; larger = more very early and very late times. None = all times alike.
        mean: of the logit of t; above 0 = more noise.
        shift: above 1 moves times towards the noise, as large pictures need: t' = k t / (1 + (k - 1) t) (arXiv:2403.03206, 5.3.2).
    """

    def __init__(self, spread: float | None = 1.0, mean: float = 0.0, shift: float = 1.0) -> None:
        if (spread is not None and spread <= 0) or shift <= 0:
            raise ValueError(f"found spread {spread} and shift {shift}; expected numbers above 0, or no spread for equal times")
        self.spread, self.mean, self.shift = spread, mean, shift

    def __call__(self, seed: Tensor, name: str) -> Tensor:
        """Seeds (...) -> times (...)."""
        if self.spread is None:
            time = random.uniform(seed, (), name)
        else:
            time = torch.sigmoid(self.mean + self.spread * random.normal(seed, (), name))
        return shifted(time, self.shift)


def shifted(time: Tensor, shift: float) -> Tensor:
    """Times (...) moved towards the noise by a factor on t / (1 - t)."""
    return shift * time / (1 + (shift - 1) * time)


class Flow(Objective):
    """Hides a modality of vectors behind noise. The model's process says along which path, and what of it is asked for.

    The time comes in by `model.at_time`: into the norms of the encoder's trunk where that is `conditional`, else with the tokens.
    For guidance, put it in `Dropped`, so that a share of the samples has no context.

    Args:
        model: its encoder's `unembed` answers, so what is learned here can generate; `processes` says what the answer means.
        modality: what is denoised.
        context: other modalities that may help, as tokens through the model's fusion. Those that the process is `told` need not
            be named.
        past: modalities that unfold in step with it, by `order`: each step sees them, and its own modality, up to itself.
        times: how much noise there is; None = Times().
        each: a "sample" has one time, or every "step" of it, by `order`, has its own (Chen et al. 2024, arXiv:2407.01392).
        most: bound of the signal-to-noise ratio in min-SNR weights, 5 in the paper; None = all times weigh the same.
    """

    def __init__(
        self,
        model: Model,
        modality: str = "image",
        context: list[str] | None = None,
        past: list[str] | None = None,
        times: Times | None = None,
        each: Literal["sample", "step"] = "sample",
        most: float | None = None,
    ) -> None:
        super().__init__()
        if model.encoder(modality).vocab is not None:
            raise ValueError(f"{modality} is made of ids; flow matching needs vectors. Use DiscreteDiffusion or Causal for ids")
        if most is not None and most <= 0:
            raise ValueError(f"found most {most}; expected a bound above 0 of the signal-to-noise ratio, or none for equal weights")
        self.modality, self.process, self.times = modality, model.process(modality), times or Times()
        self.each, self.most, self.context, self.past = each, most, tuple(context or ()), tuple(past or ())
        self.needs = tuple(dict.fromkeys((modality, *self.context, *self.past, *self.process.told)))
        check_context(model, modality, (*self.context, *self.past))
        if past and model.fusion is not None and not model.fusion.keeps_order:
            raise ValueError(
                f"{type(model.fusion).__name__} mixes in no order, so {', '.join(past)} cannot unfold in it; take JointTokens"
            )
        for name in self.process.told:
            if model.encoder(name).dim != model.encoder(modality).width:
                raise ValueError(
                    f"the process of {modality} is told {name}, whose vector has {model.encoder(name).dim} numbers; "
                    f"expected {model.encoder(modality).width}, the width of {modality}"
                )

    def task(self, batch: Batch, hints: None = None) -> Batch:
        raw = batch[self.modality]
        noise = random.normal(random.token_seed(batch["seed"], raw), (raw.x.shape[-1],), f"flow/{self.modality}")
        time = self.process.within(self.times(self._seed(batch["seed"], raw), "flow/time"))
        x, t = raw.x, time[..., None]
        noisy = raw._replace(x=self.process.noisy(x, noise, t))
        hidden = {self.modality: noisy, "time": time, "target": self.process.target(x, noise, t)}
        if self.past:  # what is known from the beginning is seen from every step
            hidden |= {n: batch[n]._replace(order=torch.zeros_like(batch[n].place())) for n in self.context}
        return {**batch, **hidden}

    def _seed(self, seed: Tensor, raw: Tokens) -> Tensor:
        """(B, N) what the time of each token is drawn from. seed: (S,)."""
        own = seed[raw.sample()]
        return own if self.each == "sample" else random.fold(own, raw.place() if raw.order is None else raw.order)

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        return {"flow": batch[self.modality].real().sum()}

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        return self.score(model, self.states(model, batch), batch)

    def states(self, model: Model, batch: Batch) -> Tensor:
        """The vectors (B, N, D) that answer at every place, on what `task` returned."""
        parts, condition = model.at_time(model.embed(part(batch, self.needs)), self.modality, batch["time"])
        return model(parts, bool(self.past), condition)[self.modality].x[:, : batch[self.modality].position.shape[1]]

    def score(self, model: Model, states: Tensor, batch: Batch) -> dict[str, Term]:
        """The term, given the vectors that answer."""
        real = batch[self.modality].real()
        error = squared_error(model.encoder(self.modality).unembed(states).float(), batch["target"])
        if self.most is not None:
            error = error * self.process.min_snr(batch["time"], self.most)
        return {"flow": Term((error * real).sum(), real.sum())}
