"""Signals of any modality from a backbone, given signals of the others or the beginning of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headwater.generation.canvas import Canvas, Layout, Settings, Way, end_of
from headwater.generation.choosing import Allowed, Choices
from headwater.hub.backbone import Backbone
from headwater.model import Model
from headwater.samplers import Solver
from headwater.tokens import Tokens


def generate(
    backbone: Backbone | Model,
    to: str = "text",
    way: Way | None = None,
    layout: Layout = "causal",
    length: int | None = None,
    begin: int | None = None,
    context: Sequence[str] | None = None,
    seed: int = 0,
    samples: int = 1,
    guidance: float = 1.0,
    without: Sequence[str] | None = None,
    steps: int | None = None,
    solver: Solver = "heun",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    beams: int = 1,
    choices: Sequence[Any] | None = None,
    allowed: Sequence[int] | Allowed | None = None,
    **signals: Sequence[Any],
) -> list[Any]:
    """Signals of one modality, one per row of what is given.

    Draws are a function of (seed, row, step), so a row does not depend on what else is made beside it.

    Args:
        backbone: what `load_backbone` gives, or a model.
        to: the modality that is made. A signal that is given of it is the beginning of what is made ("" or None = none).
        way: "causal" = token by token, each drawn from the ids (or, for vectors, said to be) next; "flow" = vectors out of noise;
            "diffusion" = ids out of hidden ones. None = flow where the trunk takes a time or the model has a process, else causal.
        layout: where what is given stands, as the objective that trained the model had it. "causal" = other modalities before or
            beside, the beginning as what was made so far (`Causal`). "prefixed" = the same, and the beginning sees itself in both
            directions (`Prefixed`). "denoising" = what is given of `to` is a source, which is answered (`Denoising`).
            "interleaved" = others come before, span by span, as in documents (`Interleaved`, and vectors behind ids after
            `Transfusion`).
        length: the most tokens; None = as many as the reader's longest signal has, and no more than unfold beside it.
        begin: how many tokens of a given beginning are kept; None = all.
        context: what unfolds in step, as it did in `Causal`; the others are known from the beginning. None = those with an order
            of their own (frames, states), where `to` has one too (actions).
        seed: of all draws.
        samples: signals per row of what is given, or in all where nothing is.
        guidance: g in u + g (c - u), of answers c with and u without the other modalities (Ho and Salimans 2022,
            arXiv:2207.12598; for ids Sanchez et al. 2023, arXiv:2306.17806). It needs a model that has seen both (`Dropped`).
        without: those that the guidance leaves out in u; None = all others.
        steps: of flow and diffusion; None = 50 and 16. solver: of flow, see headwater.samplers.
        temperature: logits are divided by it; 0 = the likeliest.
        top_k, top_p: only so many ids, or the likeliest that have this probability together, are drawn from.
        beams: above 1, the likeliest of so many sequences that are kept at every place; nothing is drawn.
        choices: one of these signals, or of these endings of a given text, is what is made.
        allowed: ids that may be drawn, or a function of the ids so far, (B, n) -> (B, V) True = may come next.
        signals: modality -> list of raw signals, one per row.

    Returns:
        What the reader restores: strings, pictures, log-mel spectrograms, steps of actions.
    """
    settings = Settings(
        way=way,
        layout=layout,
        length=length,
        begin=begin,
        context=context,
        seed=seed,
        samples=samples,
        guidance=guidance,
        without=without,
        steps=steps,
        solver=solver,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        beams=beams,
        choices=choices,
        allowed=allowed,
    )
    *_, made = stream(backbone, to, settings, signals)
    encoder = (backbone.model if isinstance(backbone, Backbone) else backbone).encoder(to)
    return [encoder.restore(alone(made, row)) for row in range(len(made.x))]


def alone(t: Tokens, row: int) -> Tokens:
    """One row, without what it has no token for."""
    mine = t.map(lambda field: field[row : row + 1])
    return mine.map(lambda field: field[:, mine.real()[0]])


@torch.no_grad()
def stream(backbone: Backbone | Model, to: str, settings: Settings, signals: Mapping[str, Sequence[Any]]) -> Iterator[Tokens]:
    """What there is after every step, (B, n) Tokens as `Encoder.prepare` gives them; the last one is whole. See `generate`."""
    backbone = backbone if isinstance(backbone, Backbone) else Backbone(backbone, {})
    counts = {name: len(values) for name, values in signals.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"found signals of different number: {counts}; expected one of each modality per row")
    rows = settings.samples * next(iter(counts.values()), 1)
    given = {name: [v for v in values for _ in range(settings.samples)] for name, values in signals.items()}
    begins, choices = given.pop(to, [None] * rows), None
    source = settings.layout == "denoising"
    values = [beginning(backbone, to, signal, source) for signal in begins]
    if settings.choices is not None:
        choices = chosen(backbone, to, settings.choices, [None] * rows if source else begins)
        if not source:
            values = [row[0, :common] for row, common in zip(choices.sequences, choices.common, strict=True)]
    yield from fill(backbone.model, to, settings, rows, backbone.batch(given), values, choices)


@torch.no_grad()
def fill(
    model: Model,
    to: str,
    settings: Settings,
    rows: int,
    given: Mapping[str, Tokens],
    begins: Sequence[Tensor | None] | None = None,
    choices: Choices | None = None,
) -> Iterator[Tokens]:
    """`stream` for prepared tokens, in evaluation mode; see Canvas."""
    training = model.training
    model.eval()
    try:
        yield from Canvas(model, to, settings, rows, given, begins, choices).fill()
    finally:
        model.train(training)


def beginning(backbone: Backbone, to: str, signal: Any, whole: bool) -> Tensor | None:
    """The values of a signal, (n,) or (n, F); unless it is whole, without the mark behind them."""
    if signal is None or (isinstance(signal, str) and not signal.strip()):
        return None
    t, end = backbone.batch({to: [signal]})[to], end_of(backbone.model.encoder(to))
    x = t.x[0][t.real()[0]]
    return x[:-1] if not whole and end is not None and len(x) and int(x[-1]) == end else x


def chosen(backbone: Backbone, to: str, choices: Sequence[Any], begins: Sequence[Any]) -> Choices:
    """Each choice as the ids of a whole signal, behind the beginning of each row."""
    encoder = backbone.model.encoder(to)
    if not len(choices) or len({str(choice) for choice in choices}) < len(choices) or encoder.vocab is None:
        kind = "vectors" if encoder.vocab is None else "ids"
        raise ValueError(f"found choices {list(choices)[:6]} for {to}, made of {kind}; expected one or more that differ, of ids")
    whole = [f"{begin or ''}{c}" if isinstance(c, str) else c for begin in begins for c in choices]
    t = backbone.batch({to: whole})[to]
    lengths, places = t.real().sum(1), encoder.blank().position.shape[1]
    if int(lengths.max()) >= places and len(t.x[: len(choices)].unique(dim=0)) < len(choices):
        raise ValueError(f"choices of {to} have more than {places} tokens, and what differs was cut off; raise its reader's length")
    return Choices(t.x.unflatten(0, (len(begins), -1)), lengths.unflatten(0, (len(begins), -1)), encoder.vocab)
