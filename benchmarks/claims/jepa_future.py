"""A world model in latent space: what a frame will look like to the encoder, from the frames before, the actions and the mission.

Latent with `ahead` as in the recipe action_jepa, on the embedded episodes (V-JEPA 2-AC, Assran et al. 2025, arXiv:2506.09985);
the teacher keeps its first weights, so that targets stand still. On held-out episodes the prediction of every cell of a frame is
compared with what the teacher sees there. The control is the better of two that need no learning: the same cell of the frame
before, and the mean of that cell over all frames of training episodes. The same predictor, when each episode is told the actions
of another one, stands beside them.

    python -m benchmarks.claims.jepa_future [--quick]
"""

from __future__ import annotations

from functools import partial
from statistics import mean

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.claims import trial
from headwater import init
from headwater.modalities import Action, Text, Video
from headwater.model import Model
from headwater.objectives import Latent
from headwater.pretrainer import Pretrainer
from headwater.tokens import Tokens
from headwater.trunk import Trunk

TRAIN, HELD_OUT = "embedded:episodes-train-*.tar", "embedded:episodes-test-*.tar"
SIDE, PATCH, FRAMES, WIDTH = 56, 14, 8, 96
CELLS = (SIDE // PATCH) ** 2


def world(seed: int) -> Model:
    """Encoders of films, missions and actions, with first weights of their own."""
    encoders = {
        "video": Video(Trunk(WIDTH, 2, 3), SIDE, PATCH, FRAMES),
        "text": Text(Trunk(WIDTH, 1, 3), length=64),
        "action": Action(Trunk(WIDTH, 1, 3), choices=7, steps=FRAMES),
    }
    model = Model(dict(encoders))
    init.initialise(model, seed, init.Normal())
    return model


@torch.no_grad()
def compare(trained: Pretrainer, known: dict[str, Tokens], asked: dict[str, Tokens], shift: int = 0) -> dict[str, float]:
    """Mean cosine with what the teacher sees, over the cells of all later frames: of predictions, and of what needs none.

    shift: each episode is told the actions of the one so many places further.
    """
    model, objective = trained.backbone, trained.objective
    told = asked["action"].map(lambda field: field.roll(shift, 0))
    task = objective.task({**asked, "action": told, "seed": torch.arange(len(told.x))})
    predicted, wanted, seen = objective.answers(model, task)  # type: ignore[operator]
    there = wanted.real()
    before = seen[:, : seen.shape[1] - CELLS]  # frames are in order, so the same cell lies CELLS places further on
    return {
        "predicted": cosine(predicted[there], wanted.x[there]),
        "last frame": cosine(before[:, : there.shape[1]][there], wanted.x[there]),
        "mean": cosine(typical(trained, known)[: there.shape[1]].expand_as(wanted.x)[there], wanted.x[there]),
        "rank": trial.rank(seen[asked["video"].real()]),
    }


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=-1).mean())


def typical(trained: Pretrainer, known: dict[str, Tokens]) -> Tensor:
    """(N, D) the mean of the teacher's vectors of each cell, in frames of the training episodes."""
    seen = trained.objective._target(trained.backbone, known)  # type: ignore[operator]
    real = known["video"].real().unflatten(1, (-1, CELLS))[..., None]
    cells = (seen.unflatten(1, (-1, CELLS)) * real).sum((0, 1)) / real.sum((0, 1))
    return cells.repeat(FRAMES, 1)


def main() -> None:
    """Print cosines per arm and seed, and the claim as a line of JSON."""
    quick = trial.options(__doc__ or "")
    seeds, steps = (range(2), 15) if quick else (range(3), 200)
    readers = world(0).readers
    known, asked = ({n: trial.signals(r, trial.samples(shards)) for n, r in readers.items()} for shards in (TRAIN, HELD_OUT))
    options = {"ahead": 1, "prefix": ["text"], "context": ["action"], "teacher": "start", "distance": "squared", "depth": 3}
    objective = partial(Latent, modality="video", **options)
    arms: dict[str, list[float]] = {"predicted": [], "last frame": [], "mean": [], "better of both": [], "other actions": []}
    ranks = []
    for seed in seeds:
        trained = trial.pretrain(world(seed), objective, TRAIN, steps, seed, batch_size=16, rate=3e-3)
        found = compare(trained, known, asked)
        found["better of both"] = max(found["last frame"], found["mean"])
        found["other actions"] = compare(trained, known, asked, shift=1)["predicted"]
        ranks.append(found.pop("rank"))
        for name, value in found.items():
            arms[name].append(value)
    trial.verdict(
        "jepa_future",
        "predicted features of the next frame are nearer to it than the last frame's and the mean",
        "cosine with the teacher's features, held-out episodes",
        arms,
        "predicted",
        "better of both",
        quick,
        rank=round(mean(ranks), 1),
    )


if __name__ == "__main__":
    main()
