"""A causal language model goes on as a diffusion model: less loss than from scratch, and answers in fewer questions than tokens.

Han et al. 2024, arXiv:2401.17181. Sequences are eight digits and the same digits again. A model learns them by next-token
prediction; then it is opened, and `DiscreteDiffusion` goes on with its weights, while another model starts from nothing and takes
as many steps. The loss is that of held-out second halves, of which a share is hidden. Exact match: the second half given the first,
from left to right by the causal model, and with three questions by the converted one. Reported seeds are 0 to 2; everything else
was chosen on seed 100.

    python -m benchmarks.claims.text_diffusion [--quick]
"""

from __future__ import annotations

import statistics
from functools import partial
from io import BytesIO

import numpy as np
import torch
from torch import Tensor

from benchmarks.claims import trial
from headwater.generation import generate
from headwater.modalities import Action
from headwater.model import Model
from headwater.objectives import Causal, DiscreteDiffusion
from headwater.samplers import draw_ids
from headwater.tokens import Tokens
from headwater.trunk import Trunk

HALF, QUESTIONS = 8, 3


def rows(count: int, seed: int) -> np.ndarray:
    """(count, 16) digits, the second half the first again."""
    first = np.random.default_rng(seed).integers(0, 10, (count, HALF))
    return np.concatenate([first, first], 1)


def members(sequences: np.ndarray) -> list[trial.Members]:
    found = []
    for sequence in sequences:
        file = BytesIO()
        np.save(file, sequence)
        found.append({"npy": file.getvalue()})
    return found


def model() -> Model:
    return Model({"action": Action(Trunk(64, depth=2, heads=2), choices=10)})


def signals(net: Model, sequences: np.ndarray) -> Tokens:
    return trial.signals(net.encoder("action").reader, members(sequences))


@torch.no_grad()
def loss(net: Model, held: Tokens) -> float:
    """Of second halves of which a share is hidden, in nats per hidden digit; the first halves are there."""
    objective = DiscreteDiffusion(net, "action", weight="equal")
    batch = objective.task({"action": held, "seed": torch.arange(len(held.x))})
    asked = batch["asked"] & (held.place() >= HALF)
    shown = batch["action"]._replace(x=torch.where(asked, batch["action"].x, held.x))
    term = objective.eval()(net.eval(), {**batch, "action": shown, "asked": asked})["diffusion"]
    return float(term.total / term.number)


def matched(found: Tensor) -> float:
    """Share of rows (B, 16) whose halves are the same."""
    return float((found[:, HALF:] == found[:, :HALF]).all(1).float().mean())


def by_diffusion(net: Model, held: Tokens, questions: int) -> float:
    free = (held.place() >= HALF).expand(held.x.shape)
    seed = torch.arange(len(held.x))
    return matched(draw_ids(net, "action", held, free, seed, steps=questions, temperature=0.0).x)


def by_order(net: Model, sequences: np.ndarray) -> float:
    made = generate(net, "action", action=[s[:HALF] for s in sequences], length=2 * HALF, temperature=0.0)
    return matched(torch.from_numpy(np.stack(made)))


def main() -> None:
    quick = trial.options(__doc__ or "")
    seeds, first, then = ([100], 20, 20) if quick else (range(3), 300, 200)
    held = rows(200, 10**6)
    arms: dict[str, list[float]] = {"converted": [], "from scratch": []}
    match: dict[str, list[float]] = {"left to right": [], f"{QUESTIONS} questions": []}
    for seed in seeds:
        with trial.written(members(rows(8000, seed))) as shards:
            causal = trial.pretrain(model(), partial(Causal, modality="action"), shards, first, seed, rate=3e-3).backbone
            match["left to right"].append(by_order(causal, held))
            for part in (causal, *causal.encoders.values()):
                part.settled = True  # these weights are kept
            for arm, net in (("converted", causal), ("from scratch", model())):
                objective = partial(DiscreteDiffusion, modality="action")
                net = trial.pretrain(net, objective, shards, then, seed, rate=3e-3).backbone
                arms[arm].append(-loss(net, signals(net, held)))
                if arm == "converted":
                    match[f"{QUESTIONS} questions"].append(by_diffusion(net, signals(net, held), QUESTIONS))
        print(seed, {name: round(values[-1], 3) for name, values in (arms | match).items()}, flush=True)
    for name, values in match.items():
        print(f"{name:>28}  {statistics.mean(values):8.4f}   " + "  ".join(f"{v:.4f}" for v in values))
    apart = statistics.mean(match["left to right"]) - statistics.mean(match[f"{QUESTIONS} questions"])
    trial.verdict(
        "text_diffusion",
        "a converted causal model has less denoising loss than one from scratch after as many steps",
        "- nats per hidden digit",
        arms,
        "converted",
        "from scratch",
        quick,
        exact_match={name: [round(v, 3) for v in values] for name, values in match.items()},
        within_5_points=apart <= 0.05,
    )


if __name__ == "__main__":
    main()
