"""A modality that is missing is painted from another one: the actions of an episode from its film.

Masked autoencoding of films and actions of the embedded episodes, with one of the two hidden as a whole in half of the episodes.
Tested on episodes of other levels whose actions are missing as a whole. The figure is minus the cross entropy per action, in nats.
Controls: the mean of the modality, which for ids is the frequency of each in training; and the same training on films with the
actions of another episode.

    python -m benchmarks.claims.crossmodal_mae [--quick]
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.claims.trial import Members, interval, options, pretrain, samples, signals, verdict, written
from headwater import random
from headwater.fusion import JointTokens
from headwater.modalities import Action, Video
from headwater.model import Model
from headwater.objectives import Masked
from headwater.objectives.objective import cross_entropy
from headwater.tokens import Tokens
from headwater.trunk import Trunk

STEPS = 400  # these, the rate and the ratios were chosen on seed 100 and 80 training episodes that were held out


def made() -> Model:
    encoders = {
        "video": Video(Trunk(width=96, depth=1, heads=3), size=56, patch=14, frames=12, tubelet=2),
        "action": Action(Trunk(width=96, depth=1, heads=3), choices=7, steps=12),
    }
    return Model(encoders, partial(JointTokens, trunk=Trunk(width=96, depth=1, heads=3)))


def paired(members: list[Members], seed: int | None) -> list[Members]:
    """Films with their actions, or with those of another episode by a seed."""
    order = range(len(members)) if seed is None else random.uniform(torch.tensor(seed), (len(members),), "pairs").argsort().tolist()
    return [{"mp4": members[k]["mp4"], "npy": members[other]["npy"]} for k, other in enumerate(order)]


@torch.no_grad()
def cost(model: Model, objective: Masked, films: Tokens, actions: Tokens) -> float:
    """Nats per action of episodes of which no action was seen."""
    objective.ratio, objective.whole = {"video": 0.0, "action": 1.0}, 0.0
    batch = objective.task({"video": films, "action": actions, "seed": torch.arange(len(films.x))})
    wanted = actions.take(*batch["places"]["action"])
    return float(cross_entropy(objective.predict(model, batch)["action"], wanted.x)[wanted.real()].mean())


def main() -> None:
    """Print a row per arm and the claim as a line of JSON."""
    quick = options(__doc__ or "")
    train, test = samples("embedded:episodes-train-*.tar"), samples("embedded:episodes-test-*.tar")
    readers = made().readers
    films, actions = (signals(readers[name], test) for name in ("video", "action"))
    seen = signals(readers["action"], train)
    share = (seen.x[seen.real()].bincount(minlength=7).float() + 0.5).log()
    share = share - share.logsumexp(0)
    mean = float(share[actions.x[actions.real()]].mean())
    objective = partial(Masked, modality=["video", "action"], ratio={"video": 0.2, "action": 0.5}, whole=0.5, depth=2, width=96)
    arms: dict[str, list[float]] = {name: [] for name in ("own film", "film of another", "mean")}
    for seed in range(2 if quick else 3):
        arms["mean"].append(mean)
        for arm, dealt in (("own film", None), ("film of another", seed)):
            with written(paired(train, dealt)) as shards:
                model = made()
                trained = pretrain(model, objective, shards, 20 if quick else STEPS, seed, batch_size=32, rate=2e-3)
                arms[arm].append(-cost(model, trained.objective, films, actions))  # type: ignore[arg-type]
    more = interval([a - b for a, b in zip(arms["own film"], arms["film of another"], strict=True)])
    verdict(
        "crossmodal_mae",
        "actions that are missing are painted from the film better than by their mean",
        "minus nats per action",
        arms,
        "own film",
        "mean",
        quick,
        over_film_of_another=[round(v, 4) for v in more],
    )


if __name__ == "__main__":
    main()
