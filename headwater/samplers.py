"""From noise to signals, as pure functions of what a head says: `denoise` for vectors, `unmask` and `refresh` for ids.

`draw` and `draw_ids` make them ask a model, with guidance by what is known beside. Randomness is a function of the seed of each
sample and of the step, so a signal does not depend on what else is made in its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from headwater import random
from headwater.model import Model
from headwater.process import FIRST, Process
from headwater.tokens import Tokens

Said = Callable[[Tensor, Tensor], Tensor]  # x_t (..., D) and t () -> what the head says, (..., D)
Logits = Callable[[Tensor], Tensor]  # ids (B, N) -> (B, N, V)
Solver = Literal["euler", "heun", "ddim"]
Hiding = Literal["linear", "cosine"]


def times(process: Process, steps: int, shift: float = 1.0) -> Tensor:
    """(steps + 1,) float64 from noise, 1, to signal, 0. shift: above 1 puts more of them near the noise."""
    if steps < 1 or shift <= 0:
        raise ValueError(f"found steps {steps} and shift {shift}; expected one step or more, and a shift above 0")
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    moved = process.within(shift * even / (1 + (shift - 1) * even))
    moved[-1] = 0
    return moved


def euler(process: Process, said: Said, x: Tensor, grid: Tensor) -> Tensor:
    """Along the velocity, one question per step. x: (..., D) noise; grid: falling times."""
    for t, then in pairwise(grid):
        x = x + (then - t) * process.velocity(x, said(x, t), t)
    return x


def heun(process: Process, said: Said, x: Tensor, grid: Tensor) -> Tensor:
    """Along the mean of the velocities at both ends of a step: of second order, two questions per step.

    The last step ends where the noise is gone and is one of Euler's (Karras et al. 2022, arXiv:2206.00364, algorithm 1).
    """
    for t, then in pairwise(grid):
        slope = process.velocity(x, said(x, t), t)
        guess = x + (then - t) * slope
        if then > 0:
            slope = (slope + process.velocity(guess, said(guess, then), then)) / 2
        x = x + (then - t) * slope
    return x


def ddim(
    process: Process, said: Said, x: Tensor, grid: Tensor, eta: float = 0.0, fresh: Callable[[int], Tensor] | None = None
) -> Tensor:
    """To the mixture of the same ends at the next time (Song et al. 2020, arXiv:2010.02502, equation 12, for any path).

    eta: share of new noise: 0 = none, 1 = DDPM's own steps. fresh: number of a step -> noise of the shape of x.
    """
    for number, (t, then) in enumerate(pairwise(grid)):
        signal, noise = process.ends(x, said(x, t), t)
        (a, s), (fewer, less) = process.shown(t), process.shown(then)
        new = eta * less / s * (s.square() - (a / fewer * less).square()).clamp(min=0).sqrt()
        x = fewer * signal + (less.square() - new.square()).clamp(min=0).sqrt() * noise
        if eta and fresh is not None:
            x = x + new * fresh(number)
    return x


def denoise(
    process: Process,
    said: Said,
    seed: Tensor,
    features: int,
    steps: int = 50,
    solver: Solver = "heun",
    shift: float = 1.0,
    eta: float = 0.0,
) -> Tensor:
    """Seeds (...) of tokens -> signals (..., features), from standard normal noise."""
    if solver not in ("euler", "heun", "ddim") or (eta and solver != "ddim"):
        raise ValueError(f"found solver {solver!r} with eta {eta}; expected euler or heun, or ddim, which alone takes new noise")
    grid, x = times(process, steps, shift), random.normal(seed, (features,), "denoise")
    if solver == "ddim":
        return ddim(process, said, x, grid, eta, lambda step: random.normal(random.fold(seed, step), (features,), "denoise/new"))
    return (euler if solver == "euler" else heun)(process, said, x, grid)


def guided(known: Callable[..., Tensor], free: Callable[..., Tensor], scale: float) -> Callable[..., Tensor]:
    """What is said without the context, moved by `scale` times what it changes (Ho and Salimans 2022, arXiv:2207.12598)."""

    def said(*asked: Tensor) -> Tensor:
        without = free(*asked)
        return without + scale * (known(*asked) - without)

    return said


def left(total: Tensor, progress: float, hiding: Hiding) -> Tensor:
    """How many of (...) tokens are open at this progress, 0 to 1: all at 0, none at 1."""
    return (total * (1 - progress if hiding == "linear" else math.cos(progress * math.pi / 2)) + 1e-6).floor()


def answers(logits: Tensor, seed: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Ids drawn from logits (..., V), the likeliest at temperature 0, and their log-probability at temperature 1. seed: (...)."""
    log_p = logits.float().log_softmax(-1)
    noisy = log_p if not temperature else log_p / temperature + random.gumbel(seed, (logits.shape[-1],), "answers")
    ids = noisy.argmax(-1)
    return ids, log_p.gather(-1, ids[..., None])[..., 0]


def unmask(
    logits: Logits,
    ids: Tensor,
    free: Tensor,
    seed: Tensor,
    mask: int,
    steps: int = 16,
    temperature: float = 1.0,
    spread: float = 0.0,
    hiding: Hiding = "cosine",
) -> Tensor:
    """All free places are hidden; in every step the surest answers stay (MaskGIT, Chang et al. 2022, arXiv:2202.04200).

    Args:
        logits: asked once per step. ids: (B, N); free: (B, N) True = to be found, the others are given. seed: (B, N).
        mask: the id of what is hidden.
        temperature: of the answers; 0 = the likeliest.
        spread: factor on Gumbel noise that joins log p in saying how sure an answer is; it falls to 0 over the steps.
        hiding: how many are still hidden; "linear" = equally many are found in every step (LLaDA, arXiv:2502.09992).
    """
    ids, total = torch.where(free, mask, ids), free.sum(1, keepdim=True)
    for step in range(steps):
        drawn = random.fold(seed, step)
        found, sure = answers(logits(ids), drawn, temperature)
        sure = sure + spread * (1 - (step + 1) / steps) * random.gumbel(drawn, (), "unmask")
        stay = lowest(-sure.masked_fill(~free, -math.inf), free.sum(1, keepdim=True) - left(total, (step + 1) / steps, hiding))
        ids, free = torch.where(stay & free, found, ids), free & ~stay
    return ids


def refresh(
    logits: Logits,
    ids: Tensor,
    free: Tensor,
    seed: Tensor,
    kinds: int,
    steps: int = 16,
    temperature: float = 1.0,
    hiding: Hiding = "linear",
) -> Tensor:
    """Free places begin as any of `kinds` ids; in every step the least likely are drawn anew, all at first, ever fewer later.

    For models that learned to correct ids (SUNDAE, Savinov et al. 2021, arXiv:2112.06749). Other arguments as in `unmask`.
    """
    ids, total = torch.where(free, (random.uniform(seed, (), "refresh") * kinds).long(), ids), free.sum(1, keepdim=True)
    for step in range(steps):
        drawn, said = random.fold(seed, step), logits(ids)
        found, _ = answers(said, drawn, temperature)
        sure = said.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        again = lowest(sure.masked_fill(~free, math.inf), left(total, step / steps, hiding))
        ids = torch.where(again & free, found, ids)
    return ids


def lowest(x: Tensor, count: Tensor) -> Tensor:
    """(B, N) True = among the `count` (B, 1) smallest of its row; of equal ones the first."""
    order = x.argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(x.shape[1], device=x.device).expand_as(order))
    return rank < count


@torch.no_grad()
def draw(
    model: Model,
    name: str,
    canvas: Tokens,
    seed: Tensor,
    others: Mapping[str, Tokens] | None = None,
    guidance: float = 1.0,
    without: Sequence[str] | None = None,
    steps: int = 50,
    solver: Solver = "heun",
    shift: float = 1.0,
    eta: float = 0.0,
    past: Sequence[str] = (),
    free: Tensor | None = None,
) -> Tokens:
    """The canvas with values that the model's head denoised.

    Args:
        model: in evaluation mode.
        name: the modality of vectors that is made.
        canvas: its places, (B, N); values count where they are not `free`.
        seed: (S,) of the samples.
        others: prepared tokens of what is known beside.
        guidance: factor on what they change; 1 = none, 0 = as if they were not there.
        without: those that the unguided half does not see; None = all of them.
        steps, solver, shift, eta: see `denoise`.
        past: those of the others that unfold in step with it, as they did in `Flow`.
        free: (B, N) True = to be found, None = all; the others are shown as they are, at time 0, which only models know whose
            steps had times of their own (`each: step`).
    """
    if past:
        known = {n: t._replace(order=torch.zeros_like(t.place())) for n, t in (others or {}).items() if n not in past}
        others = {**(others or {}), **known}
    process, dtype = model.process(name), next(model.parameters()).dtype
    exact, free = torch.promote_types(dtype, torch.float32), canvas.real() if free is None else free & canvas.real()

    def field(beside: Mapping[str, Tokens]) -> Said:
        def said(x: Tensor, t: Tensor) -> Tensor:
            time = torch.where(free, float(t), FIRST)
            shown = torch.where(free[..., None], x.to(dtype), canvas.x.to(dtype))
            parts = model.embed({name: canvas._replace(x=shown), **beside})
            return answer(model, name, *model.at_time(parts, name, time), canvas, bool(past)).to(exact)

        return said

    said = asked(field, others or {}, guidance, without)
    x = denoise(process, said, random.token_seed(seed, canvas), model.encoder(name).features, steps, solver, shift, eta)
    return canvas._replace(x=torch.where(free[..., None], x.to(dtype), canvas.x.to(dtype)))


@torch.no_grad()
def draw_ids(
    model: Model,
    name: str,
    canvas: Tokens,
    free: Tensor,
    seed: Tensor,
    others: Mapping[str, Tokens] | None = None,
    guidance: float = 1.0,
    without: Sequence[str] | None = None,
    steps: int = 16,
    temperature: float = 1.0,
    spread: float = 0.0,
    hiding: Hiding = "cosine",
    masked: bool = True,
) -> Tokens:
    """The canvas with ids where it is free, by a model that learned discrete diffusion.

    Args:
        model, name, canvas, seed, others, guidance, without: as in `draw`; guidance acts on logits.
        free: (B, N) True = to be found; the canvas has the others, such as a prompt, or what stands around a gap.
        steps, temperature, spread, hiding: see `unmask`.
        masked: places begin as hidden, for corruption by masks; else as any ids, which `refresh` mends.
    """
    encoder = model.encoder(name)
    may, drawn, free = encoder.allowed(canvas.position), random.token_seed(seed, canvas), free & canvas.real()

    def field(beside: Mapping[str, Tokens]) -> Logits:
        return lambda ids: answer(model, name, model.embed({name: canvas._replace(x=ids), **beside}), {}, canvas)

    unruled = asked(field, others or {}, guidance, without)

    def said(ids: Tensor) -> Tensor:
        return unruled(ids) if may is None else unruled(ids).masked_fill(~may, -math.inf)

    if not masked:
        return canvas._replace(x=refresh(said, canvas.x, free, drawn, int(encoder.vocab or 0), steps, temperature, hiding))
    return canvas._replace(x=unmask(said, canvas.x, free, drawn, int(encoder.start or 0), steps, temperature, spread, hiding))


def answer(
    model: Model, name: str, parts: dict[str, Tokens], condition: dict[str, Tensor], canvas: Tokens, causal: bool = False
) -> Tensor:
    """What the head says at every place of the canvas, (B, N, V or features)."""
    return model.encoder(name).unembed(model(parts, causal, condition)[name].x[:, : canvas.position.shape[1]])


def asked(
    field: Callable[[Mapping[str, Tokens]], Callable[..., Tensor]],
    others: Mapping[str, Tokens],
    guidance: float,
    without: Sequence[str] | None,
) -> Callable[..., Tensor]:
    """The field that `others` make, guided away from the one where those of `without` are not there."""
    if guidance == 1:
        return field(others)
    gone = [*others] if without is None else without
    if not gone or set(gone) - set(others):
        raise ValueError(f"found guidance {guidance} by {sorted(gone)}; expected some of what is given: {[*others]}")
    free = {n: t._replace(valid=torch.zeros_like(t.real())) if n in gone else t for n, t in others.items()}
    return guided(field(others), field(free), guidance)
