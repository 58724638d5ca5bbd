"""One model that names pictures and paints names: pairs that come in both directions, as in documents where modalities take turns.

Interleaved with half of the pairs the other way round (Emu, Sun et al. 2023, arXiv:2307.05222; CM3Leon and Chameleon do the same
with ids) on the handwritten digits of scikit-learn and their English names. Every held-out picture is classified twice among the
ten names: by the likelihood of the name behind the picture, and by the squared error of the picture's patches behind the name. The
measure is the mean of both accuracies. The controls see each pair in one direction only, for as many steps; the better of the two
counts.

    python -m benchmarks.claims.both_directions [--quick]
"""

from __future__ import annotations

from functools import partial
from statistics import mean

import torch
from torch import Tensor

from benchmarks.claims import trial
from headwater import init
from headwater.evaluation.likelihood import interleaved_log_p
from headwater.fusion import JointTokens
from headwater.hub.backbone import Backbone
from headwater.modalities import Image, Text
from headwater.model import Model
from headwater.objectives import Interleaved
from headwater.objectives.objective import squared_error
from headwater.tokens import Tokens
from headwater.trunk import Trunk

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WIDTH = 64
FLIPS = {"both ways": 0.5, "pictures first": 0.0, "names first": 1.0}


def learner(seed: int) -> Model:
    """Stems and heads; everything is mixed in one causal trunk."""
    encoders = {"image": Image(Trunk(WIDTH, 0, 4), 8, 4), "text": Text(Trunk(WIDTH, 0, 4), length=8)}
    model = Model(dict(encoders), lambda widths: JointTokens(widths, Trunk(WIDTH, 3, 4, "rotary")))
    init.initialise(model, seed, init.Normal())
    return model


@torch.no_grad()
def errors(model: Model, batch: dict[str, Tokens]) -> Tensor:
    """(S,) squared error of the patches of each picture, given its name and the patches before."""
    objective = Interleaved(model, ["text", "image"])
    task = objective.task(batch)
    answers, states = task["answers"]["image"], objective.states(model, task)["image"]
    return (squared_error(model.encoder("image").unembed(states), answers.x) * answers.real()).sum(1)


def accuracies(model: Model, members: list[dict[str, bytes]], label: Tensor) -> tuple[float, float]:
    """Of the name behind the picture, and of the picture behind the name."""
    model.eval()
    image, named, painted = trial.signals(model.encoder("image").reader, members), [], []
    for name in NAMES:
        pair = {"image": image, "text": Backbone(model, {}).batch({"text": [name] * len(label)})["text"]}
        named.append(interleaved_log_p(model, pair, rows=256).sum(1))
        painted.append(-errors(model, pair))
    return tuple(float((torch.stack(found).argmax(0) == label).float().mean()) for found in (named, painted))  # type: ignore[return-value]


def main() -> None:
    """Print accuracies per arm and seed, and the claim as a line of JSON."""
    quick = trial.options(__doc__ or "")
    seeds, steps = (range(2), 20) if quick else (range(5), 400)
    members, label = trial.digits()
    pairs = [{**m, "txt": NAMES[y].encode()} for m, y in zip(members[:1200], label[:1200].tolist(), strict=True)]
    arms: dict[str, list[float]] = {name: [] for name in (*FLIPS, "one way")}
    each: dict[str, list[tuple[float, float]]] = {name: [] for name in FLIPS}
    with trial.written(pairs) as shards:
        for seed in seeds:
            for name, flip in FLIPS.items():
                objective = partial(Interleaved, flip=flip)
                trained = trial.pretrain(learner(seed), objective, shards, steps, seed, rate=3e-3)
                each[name].append(accuracies(trained.backbone, members[1500:], label[1500:]))
                arms[name].append(mean(each[name][-1]))
            arms["one way"].append(max(arms["pictures first"][-1], arms["names first"][-1]))
    trial.verdict(
        "both_directions",
        "one model that saw half of the pairs the other way round both names pictures and paints names",
        "mean accuracy of both directions, held-out digits",
        arms,
        "both ways",
        "one way",
        quick,
        directions={name: [round(mean(way), 3) for way in zip(*found, strict=True)] for name, found in each.items()},
    )


if __name__ == "__main__":
    main()
