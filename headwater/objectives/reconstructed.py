"""Autoencoding: a signal goes through a bottleneck and is asked for again. It trains tokenisers (modalities/autoencoder.py).

VQ-VAE, FSQ, residual VQ and KL autoencoders differ in the bottleneck of the model alone. VQGAN adds a distance of features and a
discriminator; here each is a part that a recipe names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater import distributed
from headwater.codes import perplexity
from headwater.init import OUTPUT, Rule
from headwater.model import Encoder, Model
from headwater.objectives.distances import Distance, distance_of
from headwater.objectives.objective import Batch, Objective, Schedule, Term, at, cross_entropy, part, wide
from headwater.objectives.targets.errors import error
from headwater.objectives.targets.features import same_signal
from headwater.teacher import Teacher
from headwater.tokens import Tokens
from headwater.trunk import Trunk


class Perceptual(nn.Module):
    """How far a frozen encoder finds the rebuilt signal from the real one (Johnson et al. 2016, arXiv:1603.08155).

    Args:
        model, modality: whose signal it is.
        tower: a trained encoder that reads the signal as the model's encoder does.
        weight: of the term, a number or a function of progress.
        distance: between its tokens.
    """

    def __init__(
        self, model: Model, modality: str, tower: Encoder, weight: float | Schedule = 1.0, distance: Distance = "cosine"
    ) -> None:
        super().__init__()
        same_signal(model.encoder(modality), tower, modality)
        self.tower, self.weight, self.distance = Teacher(tower), weight, distance_of(distance)
        self.settled = True  # it keeps its weights when training starts

    def forward(self, raw: Tokens, rebuilt: Tokens) -> Tensor:
        """(B, N). Gradient flows to what was rebuilt."""
        tower: Any = self.tower.module
        real, made = (tower(tower.embed(t)).x[:, : raw.position.shape[1]] for t in (raw, rebuilt))
        return self.distance(wide(made), wide(real.detach()))


class Adversary(nn.Module):
    """A discriminator that judges every token as real or rebuilt (PatchGAN, Isola et al. 2016, arXiv:1611.07004) by hinge losses.

    It learns max(0, 1 - D(x)) + max(0, 1 + D(x')), and the model -D(x') (VQGAN, Esser et al. 2020, arXiv:2012.09841), both in the
    same step of one optimizer: neither gradient reaches the other's weights.

    Args:
        model, modality: whose signal it is.
        trunk: sees all tokens of the signal; nothing in it may be random.
        weight: of both terms, a number or a function of progress; best 0 until the picture is there (schedules.Step).
    """

    def __init__(self, model: Model, modality: str, trunk: Trunk, weight: float | Schedule = 0.1) -> None:
        super().__init__()
        if trunk.drop_path:
            raise ValueError(
                f"found drop_path {trunk.drop_path} on a discriminator; it must judge the same the same way: leave it out"
            )
        self.stem = nn.Linear(model.encoder(modality).features, trunk.width)
        self.trunk, self.weight = trunk, weight
        self.head = nn.Linear(trunk.width, 1)

    def init_rules(self) -> dict[str, Rule]:
        return {"head.weight": OUTPUT}

    def score(self, t: Tokens) -> Tensor:
        """(B, N) how real each token looks."""
        y = self.trunk(t._replace(x=self.stem(t.x.nan_to_num(nan=0.0))))
        return wide(self.head(y.x[:, : t.position.shape[1]])[..., 0])

    def forward(self, raw: Tokens, rebuilt: Tokens) -> tuple[Tensor, Tensor]:
        """(B, N) what the model pays, with gradient to `rebuilt` alone, and what the discriminator pays, to its weights alone."""
        copy = self.score(rebuilt._replace(x=rebuilt.x.detach()))
        fooled = self.score(rebuilt) - copy  # on the weights both have the same gradient, which is thereby taken back
        return -fooled - copy.detach(), F.relu(1 - self.score(raw)) + F.relu(1 + copy)


class Reconstructed(Objective):
    """Hides nothing; what is asked for has to pass the bottleneck of an `Autoencoder`.

    Args:
        model: has an Autoencoder for the modality.
        modality: what is rebuilt.
        distance: of vectors; ids are scored by -log p.
        weight: of the bottleneck's own loss, a number or a function of progress.
        perceptual: adds a distance of features.
        adversary: adds a discriminator.
    """

    def __init__(
        self,
        model: Model,
        modality: str = "image",
        distance: Distance = "squared",
        weight: float | Schedule = 1.0,
        perceptual: Callable[[Model, str], Perceptual] | None = None,
        adversary: Callable[[Model, str], Adversary] | None = None,
    ) -> None:
        super().__init__()
        encoder: Any = model.encoder(modality)
        if not hasattr(encoder, "rebuild"):
            raise ValueError(f"the encoder of {modality} is {type(encoder).__name__}; expected an Autoencoder around it")
        self.ids = encoder.vocab is not None
        if self.ids and (perceptual or adversary):
            raise ValueError(
                f"found perceptual or adversary for {modality}, which is made of ids; they need values with a gradient"
            )
        distance_of(distance)
        self.modality, self.needs, self.distance, self.weight = modality, (modality,), distance, weight
        self.costs, self.queries = encoder.bottleneck.costs, encoder.queries
        self.perceptual = perceptual(model, modality) if perceptual else None
        self.adversary = adversary(model, modality) if adversary else None

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        raw = batch[self.modality]
        real = raw.real().sum()
        codes = real if self.queries is None else real.new_tensor(len(raw.samples()) * self.queries)
        found = {"reconstructed": real} | ({"bottleneck": codes} if self.costs else {})
        if self.perceptual is not None:
            found["perceptual"] = real
        return found | ({"fooled": real, "discriminator": real} if self.adversary is not None else {})

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        raw, progress = part(batch, self.needs)[self.modality], batch.get("progress", 0.0)
        encoder: Any = model.encoder(self.modality)
        made = encoder.rebuild(raw, batch["seed"], progress)
        real, coded, kept = raw.real(), made.coded, made.latent.real()
        if torch.is_grad_enabled():
            encoder.bottleneck.observe(made.latent.x, coded, kept, made.seed)
        wrong = cross_entropy(made.values, raw.x) if self.ids else error(self.distance, wide(made.values), raw.x)
        used = {} if coded.ids is None else usage(coded.ids, kept, encoder.bottleneck.vocab // encoder.bottleneck.books)
        numbers = self.numbers(batch)
        totals = {"reconstructed": ((wrong * real).sum(), 1.0)}
        if coded.loss is not None:
            totals["bottleneck"] = (coded.loss * kept).sum(), at(self.weight, progress)
        rebuilt = raw if self.ids else raw._replace(x=torch.where(raw.x.isnan(), raw.x, made.values.to(raw.x.dtype)))
        if self.perceptual is not None:
            totals["perceptual"] = (self.perceptual(raw, rebuilt) * real).sum(), at(self.perceptual.weight, progress)
        if self.adversary is not None:
            fooled, told = self.adversary(raw, rebuilt)
            weight = at(self.adversary.weight, progress)
            totals |= {"fooled": ((fooled * real).sum(), weight), "discriminator": ((told * real).sum(), weight)}
        return {n: Term(x, numbers[n], w, used if n == "reconstructed" else {}) for n, (x, w) in totals.items()}

    def after_step(self, model: Model, progress: float) -> None:
        encoder: Any = model.encoder(self.modality)
        encoder.bottleneck.move()


@torch.no_grad()
def usage(ids: Tensor, real: Tensor, codes: int) -> dict[str, Tensor]:
    """Of all ranks' ids (B, N, G), each below `codes`, where real (B, N): the share of codes that occur, and the perplexity.

    Both are averages over the G codebooks.
    """
    books = ids.shape[-1]
    number = (ids + codes * torch.arange(books, device=ids.device)).flatten()
    once = real[..., None].expand_as(ids).flatten().float()
    count = distributed.total(once.new_zeros(books * codes).index_add(0, number, once)).view(books, codes)
    share = count / count.sum(1, keepdim=True).clamp(min=1)
    return {"usage": (count > 0).float().mean(), "perplexity": perplexity(share).mean()}
