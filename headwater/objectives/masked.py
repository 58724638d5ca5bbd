"""Masked prediction in any modality, or in several at once: hide tokens, ask what they were.

mode "drop": encoders see only what is kept, and a decoder that sees all of it asks at the hidden places (MAE, He et al. 2021,
arXiv:2111.06377, https://github.com/facebookresearch/mae; of several modalities MultiMAE, Bachmann et al. 2022,
arXiv:2204.01678). So a modality that is hidden as a whole is painted from the others. mode "substitute": a learned vector stands
at the hidden places (BERT, Devlin et al. 2018, arXiv:1810.04805). mode "locate": values stay seen and lose their places, which
are asked for (DropPos, Wang et al. 2023, arXiv:2309.03576).

What is hidden is a policy (`masks.policies`), what is asked for a target (`targets`), how it is scored a loss (`targets.errors`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headwater import random
from headwater.init import OUTPUT, Rule
from headwater.model import Model
from headwater.objectives.likelihood import Likelihood
from headwater.objectives.masks.amounts import ratios, spared
from headwater.objectives.masks.asking import Drop, Locate, Substitute
from headwater.objectives.masks.policies import Policy, Uniform, indices, number
from headwater.objectives.masks.salient import attended
from headwater.objectives.objective import Batch, Objective, Schedule, Term, at, check_context, wide
from headwater.objectives.targets.errors import error, select
from headwater.objectives.targets.target import Asked, Target, Values
from headwater.tokens import Tokens

Make = Callable[[Model, str], Target]
Ratio = float | Schedule
Loss = Literal["likelihood", "squared", "absolute", "smooth", "cosine", "select"]


class Masked(Objective):
    """Hides tokens of one or several modalities and asks for them.

    ratio, policy and loss are one for all modalities that are hidden, or a dict from modalities to their own. A sample of which
    nothing would be seen anywhere is not asked for.

    Args:
        model: gives widths; in mode "drop" encoders must be `maskable`.
        modality: what is hidden, one name or several.
        ratio: share of each sample's real tokens that is hidden; a number, or a function of the run's progress. 1 = the modality
            is never seen, only painted from others, and its encoder does not train.
        mode: "drop", "substitute" or "locate", see above.
        context: other modalities that are seen whole; without mode "drop" they come in through the model's fusion.
        depth, width: the decoder of mode "drop".
        policy: which tokens are hidden; None = each as likely as any other.
        target: what is asked for; None = the values themselves. targets: modality -> its own, where it has another one.
        loss: None = likelihood (cross entropy) for ids and squared error for vectors. "select" picks the right vector among
            those of the sample's hidden places.
        temperature: of "select".
        likelihood: how ids are scored; None = -log p. An anchor or soft answers are not for masked prediction.
        weights: modality -> factor on its loss.
        keep, swap: in mode "substitute", shares of the hidden tokens that are left as they are, or become a random id (BERT: 0.1
            each).
        whole: share of the samples of which one modality, drawn among the hidden ones that they have, is hidden as a whole.
        deal: a sample's visible tokens, the share 1 - ratio of all, are dealt out to its modalities by a draw from the flat
            Dirichlet distribution (MultiMAE). `ratio` must be one.
    """

    def __init__(
        self,
        model: Model,
        modality: str | list[str] = "image",
        ratio: dict[str, float] | Ratio = 0.75,
        mode: Literal["drop", "substitute", "locate"] = "drop",
        context: list[str] | None = None,
        depth: int = 1,
        width: int = 64,
        policy: Policy | dict[str, Policy] | None = None,
        target: Make | None = None,
        targets: dict[str, Make] | None = None,
        loss: dict[str, Loss] | Loss | None = None,
        temperature: float = 0.1,
        likelihood: Likelihood | None = None,
        weights: dict[str, float] | None = None,
        keep: float = 0.0,
        swap: float = 0.0,
        whole: float = 0.0,
        deal: bool = False,
    ) -> None:
        super().__init__()
        self.hides = (modality,) if isinstance(modality, str) else tuple(modality)
        self.signals = tuple(dict.fromkeys((*self.hides, *(context or ()))))
        self.likelihood = likelihood or Likelihood()
        self.readers = dict(self.likelihood.readers)
        self.needs = (*self.signals, *self.readers)
        self.ratio: dict[str, Ratio] = self._each("ratio", ratio, 0.75)
        self.policy: dict[str, Policy] = self._each("policy", policy, Uniform())
        self.whole, self.deal, self.temperature = whole, deal, temperature
        self._check(model, mode, keep, swap)
        ways: dict[str, Callable[[], Drop | Substitute]] = {
            "drop": lambda: Drop(model, self.hides, [n for n in self.signals if self.ratio.get(n) != 1], depth, width),
            "substitute": lambda: Substitute(model, self.hides, self.signals, keep, swap),
            "locate": lambda: Locate(model, self.hides, self.signals),
        }
        self.way = ways[mode]()
        widths = self.way.widths
        made = {name: make(model, name) for name, make in self._each("targets", targets, target or Values).items()}
        self.targets: Any = nn.ModuleDict(made)
        self.out = nn.ModuleDict({n: nn.Linear(widths[n], t.size) for n, t in made.items()})
        self.loss: dict[str, Loss] = {n: loss_of(made[n], kind, n) for n, kind in self._each("loss", loss).items()}
        self.weights: dict[str, float] = self._each("weights", weights, 1.0)
        self.coupled = any(t.coupled for t in made.values())
        self.classes = made[self.hides[0]].size if len(made) == 1 and made[self.hides[0]].ids else None

    def _each(self, what: str, value: Any, default: Any = None) -> dict[str, Any]:
        """Modality -> its own value, the default where it has none."""
        value = value if isinstance(value, Mapping) else dict.fromkeys(self.hides, value)
        if stray := set(value) - set(self.hides):
            raise ValueError(f"{what} names {', '.join(stray)}; what is hidden is {', '.join(self.hides)}")
        return {name: default if value.get(name) is None else value[name] for name in self.hides}

    def _check(self, model: Model, mode: str, keep: float, swap: float) -> None:
        """Refuse what cannot work."""
        if mode != "drop":
            check_context(model, self.hides[0], self.signals[1:])
        for name in self.hides:
            encoder, ratio = model.encoder(name), at(self.ratio[name], 0.0)
            if mode == "drop" and not encoder.maskable:
                raise ValueError(
                    f"the encoder of {name} ({type(encoder).__name__}) cannot work on a subset of its tokens, which mode 'drop' "
                    "needs; use mode: substitute or a patch transformer"
                )
            if not 0 < ratio <= 1 or all(self.ratio.get(n) == 1 for n in self.signals):
                raise ValueError(
                    f"found ratio {ratio} for {name}; expected a share above 0 and below 1, for example 0.75, or 1 where other "
                    "modalities are seen"
                )
            if swap and encoder.vocab is None:
                raise ValueError(f"found swap {swap} for {name}, which is made of vectors; only ids can become other ids")
            if self.likelihood.drop and encoder.vocab is None:
                raise ValueError(f"found a drop in the likelihood and {name}, which is made of vectors; only ids can be hashed")
        if self.likelihood.anchor or self.likelihood.soft:
            raise ValueError("found anchor or soft in the likelihood of Masked; they need a reference that generates: use Causal")
        if (keep or swap) and mode != "substitute":
            raise ValueError(f"found keep {keep}, swap {swap} in mode {mode!r}; they belong to mode 'substitute'")
        if min(keep, swap, self.whole) < 0 or keep + swap > 1 or self.whole > 1:
            raise ValueError(f"found keep {keep}, swap {swap}, whole {self.whole}; expected shares, keep + swap up to 1")
        if (self.whole or self.deal) and len(self.signals) == 1:
            raise ValueError(f"found whole or deal with {self.hides[0]} alone; name several modalities")
        if self.deal and len(set(self.ratio.values())) > 1:
            raise ValueError("found deal with several ratios; one says how many tokens of all modalities are seen")

    def init_rules(self) -> dict[str, Rule]:
        return {f"out.{name}.weight": OUTPUT for name in self.out}

    def start(self, model: Model) -> None:
        for target in self.targets.values():
            target.start(model)

    def after_step(self, model: Model, progress: float) -> None:
        for target in self.targets.values():
            target.after_step(model, progress)

    def look(self, model: Model, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """What targets see of the whole signal, and the scores that policies go by; modalities without any are left out."""
        found = {name: target.look(model, batch) for name, target in self.targets.items()}
        looked = {name: x for name, x in found.items() if x is not None}
        kinds = {name: kind for name in self.hides if (kind := self.policy[name].score) is not None}
        scores = {n: self._losses(model, batch, n, looked) for n, kind in kinds.items() if kind == "loss"}
        scores |= {n: attended(model.encoder(n), batch[n]) for n, kind in kinds.items() if kind == "attention"}
        return {"looked": looked, "scores": scores}

    def _losses(self, model: Model, batch: Batch, name: str, looked: dict[str, Tensor]) -> Tensor:
        """(B, N) the error at each token when it is hidden, of two passes that hide one half of the tokens each."""
        first = Uniform()(batch[name], batch["seed"], 0.5, f"half/{name}")
        errors = torch.zeros(first.shape, device=first.device)
        for half in (first, ~first & batch[name].real()):
            hidden = {n: half if n == name else torch.zeros_like(batch[n].real()) for n in self.hides}
            task = self._hide(batch, hidden, looked)
            wrong = (self._errors(model, task)[name][0] * self._asked(task, name).real()).float()
            errors = errors.scatter_add(1, task["places"][name].column, wrong)
        return errors

    def task(self, batch: Batch, hints: dict[str, dict[str, Tensor]] | None = None) -> Batch:
        hints = hints or {"looked": {}, "scores": {}}
        signals, hidden = {name: batch[name] for name in self.signals}, {}
        fixed = {name: at(ratio, batch.get("progress", 0.0)) for name, ratio in self.ratio.items()}
        for name, ratio in ratios(signals, batch["seed"], fixed, self.whole, self.deal).items():
            hidden[name] = self.policy[name](batch[name], batch["seed"], ratio, f"mask/{name}", hints["scores"].get(name))
        counts = {name: None if self.whole or self.deal else self._count(name, batch[name], fixed[name]) for name in hidden}
        return self._hide(batch, spared(signals, hidden, len(batch["seed"])), hints["looked"], counts)

    def _hide(
        self,
        batch: Batch,
        hidden: dict[str, Tensor],
        looked: dict[str, Tensor],
        counts: Mapping[str, int | None] = MappingProxyType({}),
    ) -> Batch:
        """The batch with the columns of what is asked for, and of what is seen.

        hidden: modality -> (B, N); counts: how many tokens every row loses, where that is known.
        """
        places, kept, seeds = {}, {}, {}
        asked = {n: chosen & self.likelihood.keeps(batch[n]) if self.likelihood.drop else chosen for n, chosen in hidden.items()}
        for name, chosen in hidden.items():
            t, count = batch[name], counts.get(name)
            places[name] = indices(asked[name], None if self.likelihood.drop else count)
            kept[name] = indices(t.real() & ~chosen, None if count is None else chosen.shape[1] - count)
            seeds[name] = random.fold(random.token_seed(batch["seed"], t), name).gather(1, places[name].column)
        found = {"hidden": hidden, "asked": asked, "places": places, "kept": kept, "seeds": seeds, "looked": looked}
        return {**batch, **found}

    def _count(self, name: str, t: Tokens, ratio: float) -> int | None:
        """How many tokens every row loses, where that is known without waiting for the device."""
        alike = t.valid is None and t.document is None and t.position.shape[1] > 1 and self.policy[name].exact
        return int(number(torch.tensor([float(t.position.shape[1])]), ratio)) if alike and ratio < 1 else None

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, asked in batch["asked"].items():
            found |= {self.term_of(name, extra): asked.sum() for extra in ("", *self.targets[name].terms)}
        return found

    def term_of(self, name: str, extra: str = "") -> str:
        """masked, or masked/image of several modalities; behind them the extra terms of a target."""
        return "/".join(["masked", *([name] if len(self.hides) > 1 else []), *([extra] if extra else [])])

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        terms: dict[str, Term] = {}
        for name, (wrong, extra) in self._errors(model, batch).items():
            weight = self.weights[name]
            total = (wrong * self._worth(batch, name)).sum()
            terms[self.term_of(name)] = Term(total, batch["asked"][name].sum(), weight)
            terms |= {self.term_of(name, n): term._replace(weight=term.weight * weight) for n, term in extra.items()}
        return terms

    def predict(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """What is answered on what `task` returned: modality -> logits or vectors (B, K, size) at its K hidden places."""
        features, _ = self.way(model, batch)
        return {name: self.out[name](x) for name, x in features.items()}

    def _asked(self, batch: Batch, name: str) -> Tokens:
        """Raw tokens (B, K) of the hidden places."""
        return batch[name].take(*batch["places"][name])

    def _worth(self, batch: Batch, name: str) -> Tensor:
        """(B, K): whether a place is asked for, and what its error counts where a designer says so."""
        real = self._asked(batch, name).real()
        said = batch.get("worth", {}).get(name)  # (B, N)
        return real if said is None else real * at_index(said, batch["places"][name].column)

    def _errors(self, model: Model, batch: Batch) -> dict[str, tuple[Tensor, dict[str, Term]]]:
        """Modality -> error per hidden place (B, K), and the extra terms of its target."""
        found = {}
        features, embedded = self.way(model, batch)
        for name, x in features.items():
            raw, index, target = self._asked(batch, name), batch["places"][name].column, self.targets[name]
            whole = {"embedded": None, "seen": batch["looked"].get(name)}
            if target.embeds:
                whole["embedded"] = embedded[name] if name in embedded else model.embed({name: batch[name]})[name].x
            here = {key: None if field is None else at_index(field, index) for key, field in whole.items()}
            asked = Asked(raw, batch["seeds"][name], here["embedded"], here["seen"], batch.get("progress", 0.0))
            wanted, extra = target.answer(asked)
            found[name] = self._score(name, x, raw._replace(x=wanted), batch), extra
        return found

    def _score(self, name: str, x: Tensor, wanted: Tokens, batch: Batch) -> Tensor:
        """(B, K) of the vectors (B, K, D) that answer."""
        loss = self.loss[name]
        if loss == "likelihood":
            return self.likelihood.score(self.out[name], x, wanted, wanted.real(), batch)
        predicted = wide(self.out[name](x))
        return select(predicted, wanted, self.temperature) if loss == "select" else error(loss, predicted, wanted.x)


def at_index(field: Tensor, index: Tensor) -> Tensor:
    """(B, N, ...) at the columns (B, K) -> (B, K, ...)."""
    return field.take_along_dim(index.reshape(*index.shape, *[1] * (field.ndim - 2)), 1)


def loss_of(target: Target, loss: Loss | None, name: str) -> Loss:
    """The loss that fits a target."""
    if loss is None:
        return "likelihood" if target.ids else "squared"
    if (loss == "likelihood") != target.ids:
        raise ValueError(
            f"found loss {loss} for {name}, whose target {type(target).__name__} gives {'ids' if target.ids else 'vectors'}; "
            "likelihood is for ids, the others for vectors"
        )
    return loss
