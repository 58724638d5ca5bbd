"""Codes of a token as the target of masked prediction: sounds and pictures become classes, as words are.

The codes come from clusters (HuBERT), from a random projection (BEST-RQ), or from a quantiser that is learned on the way
(wav2vec 2.0).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from headwater import distributed, random
from headwater.codes import diversity, nearest, perplexity, select_code
from headwater.init import TABLE, ZERO, Rule, constant, initialise
from headwater.model import Encoder, Model
from headwater.objectives.objective import Batch, Schedule, Term, at
from headwater.objectives.targets.features import layers, same_signal, standardised, trunk_of
from headwater.objectives.targets.target import Asked, Target
from headwater.teacher import Teacher
from headwater.tokens import Tokens

FEW, POINTS = 8, 256  # tokens per cluster: fewer give poor means, and more move them little


def kmeans(x: Tensor, size: int, seed: int = 0, steps: int = 20) -> Tensor:
    """(T, F) vectors -> (size, F) means of their clusters: k-means++ (Arthur and Vassilvitskii 2007), then Lloyd's steps.

    The result depends on the order of the vectors. A cluster that loses all of its vectors stays where it was.
    """
    draw = random.uniform(torch.tensor(seed, device=x.device), (size,), "kmeans")
    chosen, distance = [], x.new_ones(len(x))
    for number in range(size):
        reach = distance.double().cumsum(0)
        place = torch.searchsorted(reach, draw[number].double() * reach[-1], right=True).clamp(max=len(x) - 1)
        chosen.append(x[place])
        away = (x - x[place]).square().sum(-1)
        distance = away if number == 0 else distance.minimum(away)
    centres = torch.stack(chosen)
    for _ in range(steps):
        own = nearest(x, centres)
        count = own.bincount(minlength=size)[:, None]
        centres = torch.where(count > 0, torch.zeros_like(centres).index_add(0, own, x) / count.clamp(min=1), centres)
    return centres


def read_centres(file: str) -> Tensor:
    """(K, F) from what `headwater clusters` wrote."""
    if not Path(file).is_file():
        raise FileNotFoundError(
            f"found no clusters at {file}; make them with `headwater clusters SHARDS {file} --recipe RECIPE`, or leave "
            "`file` out, so that they are fitted to the first batch"
        )
    with safe_open(file, "pt") as opened:
        if "centres" not in (names := list(opened.keys())):
            raise ValueError(f"{file} holds {names}; expected a tensor `centres` (K, F) from `headwater clusters`")
        return opened.get_tensor("centres")


class Clusters(Target):
    """The number of the nearest of K cluster centres (HuBERT, Hsu et al. 2021, arXiv:2106.07447).

    The clusters are of the raw tokens, as in HuBERT's first iteration, or of what a trained tower makes of them, as in the later
    ones. They come from a file, or are fitted to the first batch (of `micro` pieces the first), over all ranks, and then stay.

    Args:
        model: its reader says what tokens are.
        modality: whose tokens are hidden; vectors, not ids.
        size: K, where there is no file.
        file: safetensors with `centres` (K, F), by `headwater clusters`.
        tower: a trained encoder, for example {class_path: headwater.hub.pretrained, init_args: {name: runs/hubert/backbone}}.
        layer: of the tower whose blocks are clustered, from 1; 0 = the output of the whole tower.
        seed: of k-means.
    """

    ids = True
    centres: Tensor
    fitted: Tensor

    def __init__(
        self,
        model: Model,
        modality: str,
        size: int = 100,
        file: str | None = None,
        tower: Encoder | None = None,
        layer: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(model, modality)
        encoder = model.encoder(modality)
        only_vectors(encoder, modality)
        if tower is not None:
            same_signal(encoder, tower, modality)
        if layer and (tower is None or not 0 < layer <= len(trunk_of(tower).blocks)):
            raise ValueError(f"found layer {layer}; expected the number of a block of a `tower`, from 1, or 0 for its output")
        features = tower.width if tower is not None else encoder.features
        centres = torch.zeros(size, features) if file is None else read_centres(file)
        if centres.ndim != 2 or centres.shape[1] != features or len(centres) < 2:
            raise ValueError(f"found centres {tuple(centres.shape)} for {modality}; expected (2 or more, {features})")
        self.size, self.layer, self.seed = len(centres), layer, seed
        self.tower: Any = None if tower is None else Teacher(tower)
        if tower is not None:
            self.tower.settled = True  # what was trained before is not drawn anew when training starts
        self.given = file is not None
        self.register_buffer("centres", centres)
        self.register_buffer("fitted", torch.tensor(self.given))
        self.ready = self.given  # what `fitted` says, known without asking the device

    def init_rules(self) -> dict[str, Rule]:
        """Centres of a file stay as they are."""
        return {"fitted": constant(float(self.given))} | ({} if self.given else {"centres": ZERO})

    def vectors(self, raw: Tokens) -> Tensor:
        """(B, N, F) what is clustered; an absent slot (NaN) counts as zero."""
        if self.tower is None:
            return raw.x.nan_to_num(nan=0.0)
        if self.layer:
            return layers(self.tower.module, raw, [self.layer - 1], "block")[0]
        return self.tower(self.tower.embed(raw)).x[:, : raw.position.shape[1]]

    def look(self, model: Model, batch: Batch) -> Tensor:
        raw = batch[self.modality]
        x = self.vectors(raw)
        if not self.ready and not self.fitted:
            self.fit(x[raw.real()], random.token_seed(batch["seed"], raw)[raw.real()])
        self.ready = self.ready or bool(self.fitted)
        return nearest(x, self.centres)

    def fit(self, x: Tensor, seed: Tensor) -> None:
        """Take the means of clusters of all ranks' tokens, in the order of their seeds: x (T, F), seed (T,)."""
        x, order = distributed.gather(x)[0], distributed.gather(seed)[0].argsort()
        if not len(x):
            return  # no sample had this modality: the next batch may
        if len(x) < FEW * self.size and distributed.rank() == 0:
            warnings.warn(
                f"{self.size} clusters of {self.modality} are fitted to the {len(x)} tokens of the first batch; {FEW} or more for "
                "each are better: raise `batch_size`, lower `size`, or fit them before with `headwater clusters`",
                stacklevel=2,
            )
        centres = kmeans(x[order[: POINTS * self.size]], self.size, self.seed)
        own = centres if distributed.rank() == 0 else torch.zeros_like(centres)
        self.centres.copy_(distributed.total(own))  # sums on a device differ in their last digits; all ranks take those of one
        self.fitted.fill_(True)

    def answer(self, asked: Asked) -> tuple[Tensor, dict[str, Term]]:
        return looked_up(asked, self), {}


class RandomProjection(Target):
    """The number of the nearest of K random codes, seen through a random projection; neither is trained.

    BEST-RQ (Chiu et al. 2022, arXiv:2202.01855, section 3.1): argmin_i |norm(c_i) - norm(A x)| with Xavier-uniform A and normal c.
    Each feature of x has mean 0 and deviation 1 over the sample first, without which few codes are used.

    Args:
        model: its reader says what tokens are.
        modality: whose tokens are hidden; vectors, not ids.
        size: K, the number of codes.
        width: of the projection and the codes.
        seed: of both.
    """

    ids = True
    projection: Tensor
    codes: Tensor

    def __init__(self, model: Model, modality: str, size: int = 8192, width: int = 16, seed: int = 0) -> None:
        super().__init__(model, modality)
        only_vectors(model.encoder(modality), modality)
        if size < 2 or width < 1:
            raise ValueError(f"found {size} codes of width {width}; expected 2 or more, of width 1 or more")
        self.size, self.seed = size, seed
        self.register_buffer("projection", torch.empty(width, model.encoder(modality).features))
        self.register_buffer("codes", torch.empty(size, width))
        initialise(self)

    def init_rules(self) -> dict[str, Rule]:
        def projection() -> Tensor:
            draw = random.uniform(torch.tensor(self.seed, device="cpu"), self.projection.shape, "projection")
            return (2 * draw - 1) * (6 / sum(draw.shape)) ** 0.5

        def codes() -> Tensor:
            return F.normalize(random.normal(torch.tensor(self.seed, device="cpu"), self.codes.shape, "codes"), dim=-1)

        return {"projection": Rule("fixed", projection), "codes": Rule("fixed", codes)}

    def look(self, model: Model, batch: Batch) -> Tensor:
        raw = batch[self.modality]
        x = standardised(raw._replace(x=raw.x.nan_to_num(nan=0.0)), len(batch["seed"]))
        with torch.autocast(x.device.type, enabled=False):
            y = F.linear(x, self.projection)
        return nearest(F.normalize(y, dim=-1), self.codes)

    def answer(self, asked: Asked) -> tuple[Tensor, dict[str, Term]]:
        return looked_up(asked, self), {}


class Quantiser(Target):
    """Vectors from books of codes, chosen by what the stem makes of a token; all of it is learned on the way.

    The product quantiser of wav2vec 2.0 (Baevski et al. 2020, arXiv:2006.11477, section 2), meant for the loss "select" among the
    hidden places of the sample. One code of each book, together projected. The extra term keeps all codes in use at the
    hidden places of the whole batch, which is therefore not cut into `micro` pieces.

    Args:
        model: its stem is read.
        modality: whose tokens are hidden.
        books: G, how many codes make a vector.
        codes: V, in each book.
        size: of the vector.
        temperature: of the choice; it may fall over the run (2 to 0.5 in the paper).
        weight: of the diversity term.
    """

    embeds = True
    terms = ("diversity",)
    coupled = True

    def __init__(
        self,
        model: Model,
        modality: str,
        books: int = 2,
        codes: int = 320,
        size: int = 256,
        temperature: float | Schedule = 2.0,
        weight: float = 0.1,
    ) -> None:
        super().__init__(model, modality)
        if books < 1 or codes < 2 or size < books or size % books:
            raise ValueError(f"found {books} books of {codes} codes for vectors of {size}; expected a size that books divide")
        if at(temperature, 0.0) <= 0 or at(temperature, 1.0) <= 0:
            raise ValueError(f"found temperature {at(temperature, 0.0)} to {at(temperature, 1.0)}; expected above 0")
        self.size, self.books, self.temperature, self.weight = size, books, temperature, weight
        self.choose = nn.Linear(model.encoder(modality).embedded, books * codes)
        self.codes = nn.Parameter(torch.empty(books, codes, size // books))
        self.out = nn.Linear(size, size)
        initialise(self)

    def init_rules(self) -> dict[str, Rule]:
        """Scores start with deviation 1, so that noise tries every code. The official code's is some 20: here few codes stay."""
        return {"codes": TABLE._replace(std=1.0)}

    def answer(self, asked: Asked) -> tuple[Tensor, dict[str, Term]]:
        if asked.embedded is None:
            raise ValueError("Quantiser was asked without the stem's output; pass `embedded`, as its `embeds` says")
        logits = self.choose(F.layer_norm(asked.embedded, asked.embedded.shape[-1:])).unflatten(-1, self.codes.shape[:2])
        noise = random.gumbel(asked.seed, self.codes.shape[:2], "quantiser")
        picked = select_code(logits, noise, at(self.temperature, asked.progress))
        vector = torch.einsum("bkgv,gvd->bkgd", picked, self.codes).flatten(2)
        return self.out(vector), {"diversity": self._even(logits, asked.raw.real())}

    def _even(self, logits: Tensor, real: Tensor) -> Term:
        """logits: (B, K, G, V). One number for all tokens of all ranks, times those of this rank."""
        own = real.sum()
        share = logits.softmax(-1) * real[..., None, None]
        mean = distributed.summed(share.sum((0, 1))) / distributed.total(own).clamp(min=1)
        return Term(diversity(mean) * own, own, self.weight, {"perplexity": perplexity(mean.detach()).mean()})


def looked_up(asked: Asked, target: Target) -> Tensor:
    """(B, K) the codes that `look` found."""
    if asked.seen is None:
        raise ValueError(
            f"{type(target).__name__} was asked before it looked; call `look` on the batch and pass its hints to `task`"
        )
    return asked.seen


def only_vectors(encoder: Encoder, modality: str) -> None:
    """Ids are codes already."""
    if encoder.vocab is not None:
        raise ValueError(f"found {modality}, which is made of ids, where vectors shall become codes; take the ids: target Values")
