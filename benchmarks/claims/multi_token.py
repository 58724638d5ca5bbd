"""Looking ahead: a task that next-token training cannot learn is learned by predicting several tokens from each place.

Path-star (Bachmann and Nagarajan 2024, arXiv:2403.06963): the edges of two paths that leave one node, in random order, then that
node and the end of one path; the answer is the path to this end. With the right beginning given, all later nodes follow from
one edge each, so next-token training never learns to look from the end back for the first one. Multi-token prediction
(arXiv:2404.19737) and registers (arXiv:2505.10518) are asked at the first place for later nodes too. The control is next-token
training with the same model, data and steps. Right is a path of which every node is the most probable one.

What the same heads do to the next-token loss on English prose stands beside it; at this size a cost is what other work found.

    python -m benchmarks.claims.multi_token [--quick]
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.claims import trial
from benchmarks.claims.prose import members, prose
from headwater.modalities import Records, Text
from headwater.modalities.record_turns import Template
from headwater.modalities.record_values import FreeText
from headwater.model import Model
from headwater.objectives import Causal, MultiToken, Registers, Roles
from headwater.objectives.objective import Objective
from headwater.pretrainer import Pretrainer
from headwater.tokens import Tokens
from headwater.trunk import Trunk

NODES, STEPS_ON_A_PATH = "ABCDEFGH", 3
TRAIN, TEST = 20_000, 500
PATHS, PROSE, RATE = 2000, 200, 3e-3  # optimizer steps, and their size; chosen on seed 100
ARMS: dict[str, Callable[[Model], Causal]] = {
    "next token": Causal,
    "heads": partial(MultiToken, weights=(1.0, 1.0)),
    "registers": partial(Registers, farthest=2, weight=1.0),
}


def star(draw: random.Random) -> dict[str, str]:
    """One task: edges, start and end, and the path between."""
    nodes = draw.sample(NODES, 1 + 2 * STEPS_ON_A_PATH)
    paths = [nodes[:1] + nodes[1 + k * STEPS_ON_A_PATH :][:STEPS_ON_A_PATH] for k in range(2)]
    edges = [path[i] + path[i + 1] for path in paths for i in range(STEPS_ON_A_PATH)]
    draw.shuffle(edges)
    path = draw.choice(paths)
    return {"graph": "".join(edges) + path[0] + path[-1], "path": "".join(path[1:])}


def made() -> Model:
    """A language model over records."""
    codec = Template("{graph}", "{path}", {"graph": FreeText(), "path": FreeText()})
    return Model({"text": Records(Trunk(64, 3, 4, position="rotary"), codec, length=40)})


@torch.no_grad()
def solved(trained: Pretrainer, asked: Tokens) -> float:
    """Share of the paths of which each node is the most probable one."""
    objective = Roles(trained.backbone)  # asks for the answer alone
    task = objective.task({"text": asked, "seed": torch.arange(len(asked.x))})
    wrong = objective.inner.predict(trained.backbone, task).argmax(-1) != task["answer"]
    return 1 - float((wrong & task["asked"]).any(1).float().mean())


@torch.no_grad()
def nats(trained: Pretrainer, asked: Tokens) -> float:
    """Loss of the next byte on texts that were not trained on."""
    objective = Causal(trained.backbone)
    term = objective(trained.backbone, objective.task({"text": asked, "seed": torch.arange(len(asked.x))}))["causal"]
    return float(term.total / term.number)


def on_paths(seed: int, steps: int) -> dict[str, float]:
    """Share of the test tasks that each arm solves."""
    draw = random.Random(seed)
    tasks = [{"json": json.dumps(star(draw)).encode()} for _ in range(TRAIN + TEST)]
    asked = trial.signals(made().encoder("text").reader, tasks[TRAIN:])
    with trial.written(tasks[:TRAIN]) as shards:
        wrapped: dict[str, Callable[[Model], Objective]] = {arm: partial(Roles, inner=inner) for arm, inner in ARMS.items()}
        return {arm: solved(trial.pretrain(made(), make, shards, steps, seed, rate=RATE), asked) for arm, make in wrapped.items()}


def on_prose(seed: int, steps: int) -> dict[str, float]:
    """Test loss of each arm, lower is better."""
    known, held_out = prose(seed, 128)
    encoder = partial(Text, length=128)
    asked = trial.signals(encoder(Trunk(16, 1)).reader, members(held_out[:300]))
    with trial.written(members(known)) as shards:
        models = {arm: Model({"text": encoder(Trunk(64, 2, 4, position="rotary"))}) for arm in ARMS}
        return {
            arm: nats(trial.pretrain(models[arm], make, shards, steps, seed, batch_size=32, rate=RATE), asked)
            for arm, make in ARMS.items()
        }


def main() -> None:
    """Print a row per arm and the claim as a line of JSON."""
    quick = trial.options(__doc__ or "")
    arms: dict[str, list[float]] = {arm: [] for arm in ARMS}
    losses: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in range(2 if quick else 3):
        for found, into in ((on_paths(seed, 20 if quick else PATHS), arms), (on_prose(seed, 5 if quick else PROSE), losses)):
            for arm, value in found.items():
                into[arm].append(value)
    rounded = {arm: [round(v, 4) for v in values] for arm, values in losses.items()}
    claim = "heads that look ahead solve path-star, next-token training does not"
    trial.verdict("multi_token", claim, "share of 500 paths", arms, "heads", "next token", quick, prose_nats_per_byte=rounded)


if __name__ == "__main__":
    main()
