"""Reader, Encoder, Fusion and Model: what turns signals into meaning, and what is kept after pretraining."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from headwater.forms.form import Form
from headwater.init import INPUT, OUTPUT, TIED, Rule
from headwater.pooling import POOLINGS, AttentionPool, Pooling
from headwater.position import sincos
from headwater.process import Process
from headwater.spec import Described, plain
from headwater.tokens import Pooled, Tokens, cat_rows, split_rows
from headwater.trunk import Trunk
from headwater.view import View

Signal = Any  # what a reader decodes to: a uint8 picture (H, W, 3), a waveform, a string, an array of actions


class Reader(Described):
    """From the bytes of a sample to tokens. Plain and picklable, no parameters; it travels with the weights.

    extensions: shard members that it reads, the first one present wins. vocab: number of ids, or None for vectors of
    `features` numbers. follows: the modality whose random views this one goes through too, such as the picture that boxes
    lie on; None = it has draws of its own. end: the id that ends a signal; None = signals fill their canvas. extras: ids that
    no signal has, which objectives use as marks (of hidden spans, of tasks).
    """

    extensions: ClassVar[tuple[str, ...]] = ()
    follows: str | None = None
    features: int = 0
    vocab: int | None = None
    end: int | None = None
    extras: range = range(0)

    def member(self, names: Iterable[str]) -> str | None:
        """The member among `names` that this reader would read, or None."""
        held = names if isinstance(names, dict) else set(names)
        for extension in self.extensions:  # asked several times per sample
            if extension in held:
                return extension
        return None

    def decode(self, members: dict[str, bytes]) -> Signal:
        """Worker: bytes -> native array or str. Raises ValueError or the decoder's own error when it cannot."""
        raise NotImplementedError(f"{type(self).__name__} does not decode")

    def tokens(self, signal: Signal, view: View | None = None) -> Tokens:
        """Worker: one sample's tokens, without the row dimension, compact (uint8 where the signal is).

        view: a random view of the signal, in the way that the reader's docstring tells; None = the plain signal.
        """
        raise NotImplementedError(f"{type(self).__name__} makes no tokens")

    def length(self, facts: dict[str, float]) -> int | None:
        """How many tokens one sample will have, with or without a view, never fewer; None = not known before it is decoded.

        facts: of the member that is read. "size" in bytes is always there; others where the index has them: "width", "height",
        "seconds", "frames", "fps", "steps", "words" and `tokens-<digest>`, the ids of a text by the tokenizer of that digest.
        """
        return None

    def prepare(self, t: Tokens) -> Tokens:
        """Device, once per batch: float and normalised."""
        return t

    def restore(self, t: Tokens) -> Signal:
        """The inverse of tokens and prepare for one sample (row 0 of a prepared batch): pictures, generation."""
        raise NotImplementedError(f"{type(self).__name__} does not restore signals")

    def blank(self) -> Tokens:
        """The canvas that generation fills, one row: the places of the longest plain signal, with empty values."""
        raise NotImplementedError(f"{type(self).__name__} does not tell where the tokens of a new signal lie")

    def allowed(self, position: Tensor) -> Tensor | None:
        """Which ids may stand at these places: (..., P) -> (..., vocab) bool; None = all of them everywhere."""
        return None

    def canvas(self, position: Tensor, order: Tensor | None = None) -> Tokens:
        """Empty values at these coordinates (N, P) -> one row; `order` (N,) as `tokens` gives it."""
        x = position.new_zeros(len(position), dtype=torch.long) if self.vocab else torch.zeros(len(position), self.features)
        return Tokens(x, position, order=order).map(lambda field: field[None])

    def files(self) -> dict[str, Path]:
        """Constructor argument -> the file that it names, for files that must travel with the weights."""
        return {}

    def example(self, n: int, seed: int) -> list[Tokens]:
        """n samples of varied length made from `seed`: what the contract suite trains on."""
        raise NotImplementedError(f"{type(self).__name__} has no examples")


class Encoder(nn.Module, Described):
    """One modality's tokens -> vectors with meaning: a stem, a trunk, and the head that generation needs.

    Adapters to other libraries override the four verbs; objectives use nothing else.
    width: D. embedded: the size of what `embed` gives, D unless a tower says otherwise. dim: size of the pooled vector.
    maskable: forward may be given a subset of the tokens. pointwise: `embed` looks at each token alone, so it may be given one too.
    settled: its weights were trained before, and `headwater.init` leaves them alone.
    cacheable: in causal passes `embed` and `forward` may be given a sequence piece by piece, within a Cache.

    Args:
        reader: how signals become tokens.
        trunk: the transformer.
        pooling: of contextual tokens into one vector: their mean, the class token (the trunk's first register), the mean of all
            registers, the last token, or attention by a learned query.
        pooled_norm: normalise what was pooled.
        causal: attention never looks ahead, whoever asks (language models).
        tied: the head that gives ids is the table that embeds them (Press and Wolf 2017, arXiv:1608.05859).
        head_bias: the head has a bias.
        start: the id that stands where nothing is known: before the first token in causal prediction, in place of what discrete
            diffusion has hidden (ids only); None = one of its own, behind all others.
        values: whose `vocab` and `features` tell what a token holds once it is prepared; None = the reader.
    """

    settled: bool = False
    maskable: bool = True
    pointwise: bool = True
    cacheable: bool = True

    reader: Reader
    width: int
    embedded: int
    dim: int
    features: int
    vocab: int | None
    start: int | None = None

    def __init__(
        self,
        reader: Reader,
        trunk: Trunk,
        pooling: Pooling = "mean",
        pooled_norm: bool = False,
        causal: bool = False,
        tied: bool = False,
        head_bias: bool = True,
        start: int | None = None,
        values: Any = None,
    ) -> None:
        super().__init__()
        values = values or reader
        if pooling in ("class", "registers") and trunk.registers is None:
            raise ValueError(f"found pooling: {pooling} on a trunk without registers; set `registers: 1` or more on the trunk")
        if tied and values.vocab is None:
            raise ValueError(f"found tied on {type(values).__name__}, which gives vectors; only ids have a table to share")
        self.reader, self.width, self.embedded, self.dim = reader, trunk.width, trunk.width, trunk.width
        self.features, self.vocab, self.start = values.features, values.vocab, values.vocab if start is None else start
        if values.vocab is None:
            self.stem: nn.Module = nn.Linear(values.features, trunk.width)
        else:
            self.stem = nn.Embedding(values.vocab + (start is None), trunk.width)
        self.trunk = trunk
        self.head = None if tied else nn.Linear(trunk.width, values.vocab or values.features, bias=head_bias)
        self.pooling, self.causal = pooling, causal
        self.pooler = AttentionPool(trunk) if pooling == "attention" else None
        self.pooled_norm = trunk.make_norm(trunk.width) if pooled_norm else nn.Identity()

    def init_rules(self) -> dict[str, Rule]:
        """A stem of several layers has its own."""
        found = {} if self.head is None else {"head.weight": OUTPUT}
        if self.head is None and isinstance(self.stem, nn.Embedding):
            found["stem.weight"] = TIED
        return found | ({"stem.weight": INPUT} if isinstance(self.stem, nn.Linear) else {})

    def prepare(self, raw: Tokens) -> Tokens:
        """On the device, once per batch: what the reader gave -> what objectives hide and ask for."""
        return self.reader.prepare(raw)

    def restore(self, t: Tokens) -> Signal:
        """The inverse for one sample (row 0 of a prepared batch)."""
        return self.reader.restore(t)

    def blank(self) -> Tokens:
        """The canvas that generation fills, one row: the places of a prepared signal, with empty values."""
        return self.reader.blank()

    def allowed(self, position: Tensor) -> Tensor | None:
        """Which ids may stand at these places: (..., P) -> (..., vocab) bool; None = all of them everywhere."""
        return self.reader.allowed(position)

    def embed(self, raw: Tokens) -> Tokens:
        """Values -> vectors, tokens do not mix. raw.x: (B, N) ids or (B, N, features) -> (B, N, D)."""
        return raw._replace(x=self.stem(raw.x))

    def forward(self, t: Tokens, causal: bool = False, condition: Tensor | None = None) -> Tokens:
        """Embedded tokens, all or some -> contextual tokens, (B, N, D). condition: (B, N or 1, D).

        A tower with class or register tokens returns them behind the N it was given, so that places stay what they were.
        """
        return self.trunk(t, causal or self.causal, condition)

    def pool(self, t: Tokens) -> Pooled:
        """Contextual tokens -> one vector per sample, (S, dim)."""
        pooled = self.pooler(t) if self.pooler is not None else POOLINGS[self.pooling](t)
        return pooled._replace(x=self.pooled_norm(pooled.x))

    def unembed(self, x: Tensor) -> Tensor:
        """Contextual vectors (..., D) -> logits (..., vocab) or values (..., features)."""
        return self.head(x) if self.head is not None else F.linear(x, self.stem.weight[: self.vocab])  # type: ignore[index]


class Fusion(nn.Module, Described):
    """Makes modalities aware of each other. Built by the Model with the widths of its encoders.

    widths: modality -> D of what comes out; same keys as the input, unless a fusion says otherwise.
    last: the modality whose encoder runs behind the fusion: it comes in embedded, with what others add to it, such as pictures
    before the words of a language model. None = all encoders run first.
    keeps_order: False = what it mixes has lost its order, and causal passes are refused.
    cacheable: causal passes may come piece by piece, within a Cache.
    """

    last: str | None = None
    keeps_order: bool = True
    cacheable: bool = False

    def __init__(self, widths: dict[str, int]) -> None:
        super().__init__()
        self.widths = dict(widths)

    def forward(self, parts: dict[str, Tokens], causal: bool = False) -> dict[str, Tokens]:
        """Any subset of the modalities; with causal, no later `order` may reach an earlier one across them."""
        raise NotImplementedError(f"{type(self).__name__} does not fuse")


class Model(nn.Module):
    """Encoders joined by a fusion: what is kept and exported.

    Args:
        encoders: name -> Encoder, or the name of a tower of another library ("timm/vit_tiny_patch16_224"), which starts
            untrained; `headwater.hub.pretrained` gives one that was trained before.
        fusion: makes the fusion from {name: width}; None = the modalities stay apart.
        space: size of a shared embedding space: each encoder's pooled vector is projected into it. None = no projection.
        frozen: names of encoders that do not train and stay in evaluation mode; not part of what is exported.
        processes: modality of vectors -> how it becomes noise, and what its head says of it; see `process`.
        forms: what stands in place of linear layers, one after the other: low-rank, sparse, ternary; see `headwater.forms`.
    """

    chunks: int = 1  # pieces of `represent`; set by who trains, not part of what is exported

    def __init__(
        self,
        encoders: dict[str, Encoder | str],
        fusion: Callable[[dict[str, int]], Fusion] | None = None,
        space: int | None = None,
        frozen: Sequence[str] = (),
        processes: dict[str, Process] | None = None,
        forms: Sequence[Form] = (),
    ) -> None:
        super().__init__()
        if not encoders:
            raise ValueError("the model has no encoder; name at least one, for example encoders: {image: ...}")
        made = {name: tower(e) if isinstance(e, str) else e for name, e in encoders.items()}
        self.encoders: Any = nn.ModuleDict(made)
        self.fusion = fusion({name: e.width for name, e in made.items()}) if fusion else None
        self.space = space
        self.projections = nn.ModuleDict({n: nn.Linear(e.dim, space, bias=False) for n, e in made.items()} if space else {})
        self.processes = dict(processes or {})
        for name in (n for key, p in self.processes.items() for n in (key, *p.told)):
            self.encoder(name)
        self.forms = tuple(forms)
        for form in self.forms:
            form(self)
        self.frozen = tuple(frozen)
        for name in self.frozen:
            self.encoder(name).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Model:
        """Training mode, but not for what is frozen."""
        super().train(mode)
        for name in self.frozen:
            self.encoder(name).eval()
        return self

    @property
    def spec(self) -> dict[str, Any]:
        """How to make this model again, as plain data."""
        parts = {name: plain(e) for name, e in self.encoders.items()}
        processes, forms = plain(self.processes), plain(self.forms)
        return {"encoders": parts, "fusion": plain(self.fusion), "space": self.space, "processes": processes, "forms": forms}

    @property
    def readers(self) -> dict[str, Reader]:
        """The reader of every encoder."""
        return {name: e.reader for name, e in self.encoders.items()}

    def encoder(self, name: str) -> Encoder:
        """The encoder of a modality or of a view of it ("image@local0")."""
        if name.partition("@")[0] not in self.encoders:
            raise ValueError(f"the model has no encoder for {name!r}; it has {', '.join(self.encoders)}. Add one to `encoders`")
        return self.encoders[name.partition("@")[0]]

    def width(self, name: str) -> int:
        """D of a modality's tokens after fusion."""
        return self.fusion.widths[name.partition("@")[0]] if self.fusion is not None else self.encoder(name).width

    def dim(self, name: str) -> int:
        """Size of a modality's pooled vector, in the shared space if there is one."""
        encoder = self.encoder(name)
        return self.space or encoder.dim

    def process(self, name: str) -> Process:
        """How a modality of vectors becomes noise; a straight line, with the velocity asked for, where nothing else was said."""
        return self.processes.get(name.partition("@")[0]) or Process()

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Tokens of modalities and their views as their encoders prepare them; everything else as it is."""
        known = {name for name, t in batch.items() if isinstance(t, Tokens) and name.partition("@")[0] in self.encoders}
        return {name: self.encoder(name).prepare(t) if name in known else t for name, t in batch.items()}

    def embed(self, batch: dict[str, Any]) -> dict[str, Tokens]:
        """Raw tokens of the modalities that have an encoder -> embedded tokens."""
        return {name: self.encoder(name).embed(t) for name, t in batch.items() if name.partition("@")[0] in self.encoders}

    def encode(
        self, parts: dict[str, Tokens], causal: bool = False, condition: dict[str, Tensor] | None = None
    ) -> dict[str, Tokens]:
        """Each modality alone; views of one modality and shape in one pass. condition: modality -> (B, N or 1, D)."""
        condition, out = condition or {}, {}
        for names in alike(parts, condition):
            if len(names) == 1:
                out[names[0]] = self.encoder(names[0])(parts[names[0]], causal, condition.get(names[0]))
            else:
                whole, first = self.encoder(names[0])(cat_rows([parts[name] for name in names]), causal), 0
                for name in names:
                    rows = parts[name].position.shape[0]
                    out[name] = whole.map(lambda field, start=first, count=rows: field[start : start + count])  # type: ignore[misc]
                    first += rows
        return {name: out[name] for name in parts}

    def at_time(self, parts: dict[str, Tokens], name: str, time: Tensor) -> tuple[dict[str, Tokens], dict[str, Tensor]]:
        """Embedded parts, of which `name` is noisy -> parts and condition for `forward`, which tell how noisy.

        time: (B, N) from 0, the signal, to 1, the noise. A conditional trunk takes its sines, and the pooled vectors of what its
        process is `told`, into its norms (DiT, Peebles and Xie 2023, arXiv:2212.09748); else they are added to the tokens, so
        that encoders without blocks serve too (Transfusion, Zhou et al. 2024, arXiv:2408.11039), less those of time 0: a signal
        without noise is the same whether this was called or not.
        """
        t, trunk, parts = parts[name], getattr(self.encoder(name), "trunk", None), dict(parts)
        code = sincos(1000 * time[..., None], t.x.shape[-1]).flip(-1).to(t.x.dtype)  # beside positions, which have the other end
        sample = t.sample().contiguous()
        for other in [other for other in self.process(name).told if other in parts]:
            pooled = self.encoder(other).pool(self.encode({other: parts.pop(other)})[other])
            seat = torch.searchsorted(pooled.sample, sample).where(torch.isin(sample, pooled.sample), len(pooled.sample))
            code = code + F.pad(pooled.x, (0, 0, 0, 1))[seat]  # a sample without it is told nothing
        if trunk is not None and trunk.conditional and len(trunk.blocks):
            return parts, {name: code}
        clean = sincos(time.new_zeros(1, 1, 1), t.x.shape[-1]).flip(-1).to(t.x.dtype)
        return {**parts, name: t._replace(x=t.x + code - clean)}, {}

    def forward(
        self, parts: dict[str, Tokens], causal: bool = False, condition: dict[str, Tensor] | None = None
    ) -> dict[str, Tokens]:
        """Encode, then fuse EMBEDDED tokens; the modality that the fusion wants `last` is encoded behind it."""
        if self.fusion is None:
            return self.encode(parts, causal, condition)
        waiting = [name for name in parts if name.partition("@")[0] == self.fusion.last]
        ready = self.encode({name: t for name, t in parts.items() if name not in waiting}, causal, condition)
        fused = self.fusion({name: ready.get(name, t) for name, t in parts.items()}, causal)
        return fused | self.encode({name: fused[name] for name in waiting}, causal, condition)

    def represent(self, batch: dict[str, Tokens]) -> dict[str, Pooled]:
        """Raw tokens -> one vector per sample and modality, (S, dim), each modality alone."""
        return self.in_pieces(self._represent, batch)

    def in_pieces(self, ask: Callable[[dict[str, Tokens]], dict[str, Pooled]], batch: dict[str, Tokens]) -> dict[str, Pooled]:
        """`ask` of a batch, whose answers are vectors of samples; with `chunks` > 1 of pieces of its rows, one after the other.

        Backward asks for each piece again, so that memory holds the activations of one piece only and losses that compare
        all samples have their exact gradient (GradCache, Gao et al. 2021, arXiv:2101.06983).

        A sample may have several vectors. batch: Tokens only, which are cut by rows; a mask (B, N) goes as Tokens of which it is x.
        """
        if self.chunks == 1 or not torch.is_grad_enabled():
            return ask(batch)
        pieces = split_rows(batch, self.chunks)
        made = [checkpoint(ask, piece, use_reentrant=False) for piece in pieces]
        rows = [next(iter(piece.values())).position.shape[0] for piece in pieces]
        packed = any(t.document is not None for t in batch.values())
        first = [0 if packed else sum(rows[:i]) for i in range(len(pieces))]
        out = {}
        for name in made[0]:
            sample = torch.cat([piece[name].sample + start for piece, start in zip(made, first, strict=True)])
            order = sample.argsort(stable=True)
            out[name] = Pooled(torch.cat([piece[name].x for piece in made])[order], sample[order])
        return out

    def only(self, names: Sequence[str], fusion: bool = False) -> Model:
        """A model of some of the encoders, with or without the fusion, that shares them with this one: what a teacher copies."""
        kept = list(dict.fromkeys(name.partition("@")[0] for name in names))
        made = Model({name: self.encoder(name) for name in kept}, frozen=[name for name in kept if name in self.frozen])
        made.processes = {n: p for n, p in self.processes.items() if {n, *p.told} <= set(kept)}
        made.fusion, made.space = self.fusion if fusion else None, self.space
        made.projections = nn.ModuleDict({name: self.projections[name] for name in kept} if self.space else {})
        return made.train(self.training)

    def _represent(self, batch: dict[str, Tokens]) -> dict[str, Pooled]:
        encoded = self.encode(self.embed(batch))
        return {name: self.pool(name, t) for name, t in encoded.items()}

    def pool(self, name: str, t: Tokens) -> Pooled:
        """Contextual tokens of one modality, before fusion -> one vector per sample, (S, dim)."""
        pooled = self.encoder(name).pool(t)
        return pooled._replace(x=self.projections[name.partition("@")[0]](pooled.x)) if self.space else pooled


def alike(parts: dict[str, Tokens], condition: dict[str, Tensor]) -> list[list[str]]:
    """Names whose tokens can go through their encoder in one pass: views of one modality, of equal shape, one sample per row."""
    groups: dict[tuple, list[str]] = {}
    for name, t in parts.items():
        alone = t.document is not None or name in condition
        key = (name,) if alone else (name.partition("@")[0], t.x.shape[1:], t.position.shape[1:], t.order is None)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def tower(name: str) -> Encoder:
    """The adapter for "library/model", such as "timm/vit_tiny_patch16_224": `headwater.modalities.<library>_tower`."""
    library, _, model = name.partition("/")
    try:
        make = importlib.import_module(f"headwater.modalities.{library}_tower").make
    except ModuleNotFoundError as error:
        raise ValueError(
            f"no encoder is called {name!r} ({error}); expected a class such as headwater.modalities.Image or a tower such as "
            "timm/vit_tiny_patch16_224 or open_clip/ViT-B-32#image"
        ) from error
    return make(model)
