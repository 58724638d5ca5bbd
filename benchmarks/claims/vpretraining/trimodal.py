"""V-Pretraining on pictures, titles and spoken titles: a few true triples tell which collection of triples deserves trust.

One space for three modalities is learned by contrast from a mixture of three collections of the same things: one in which
picture, title and speech belong together (25 %), one whose sound track slipped by some places, so that each thing is called by
the name of another one (45 %), and one in which pictures and sounds were mixed up (30 %). Feedback: 12 % of the true triples; its
loss is contrastive too, and the direction that it asks for is taken against that of the same triples with exchanged sounds: what
any sounds would ask for, such as vectors that lie apart, is left out. Asked for is retrieval among 250 things with pictures of
another vendor and voices that no training sound has; 90 of them are concepts of which nothing was seen. Controls: uniform weights
(plain, also for as long as V-Pretraining takes), a designer that moves at random, feedback whose pictures and sounds are
shuffled. References: an oracle that has the true triples alone, and training on the feedback directly. Beside it, as an unrelated
probe: which of six voices speaks. At this size pictures and names of new drawings are hardly found; nearly all of the recall is
between titles and speech.

    python -m benchmarks.claims.vpretraining.trimodal [--quick]
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
from io import BytesIO
from itertools import combinations

import numpy as np
import soundfile

from benchmarks.claims import trial
from benchmarks.claims.vpretraining.mixture import Judge, Mixture, Sets
from headwater import init
from headwater.modalities import Audio, Image, Text
from headwater.model import Model
from headwater.objectives import Contrastive
from headwater.trunk import Trunk

PAIRS = [(a, b, 1.0) for a, b in combinations(("image", "text", "audio"), 2)]


def speech(shards: str) -> list[trial.Members]:
    """Things, with what is spoken as plain samples, which are read faster."""
    found = []
    for members in trial.samples(shards):
        file = BytesIO()
        soundfile.write(file, *soundfile.read(BytesIO(members["ogg"])), format="wav")
        found.append({"wav": file.getvalue(), **{name: value for name, value in members.items() if name != "ogg"}})
    return found


def exchanged(members: list[trial.Members], partners: Mapping[str, np.ndarray]) -> list[trial.Members]:
    """Each thing with some members of others. partners: member -> (S,) whose."""
    return [{**thing, **{name: members[other[row]][name] for name, other in partners.items()}} for row, thing in enumerate(members)]


def collections(known: list[trial.Members], seed: int) -> Sets:
    """The three sources, the feedback, and the feedback with everything in it shuffled."""
    draw = np.random.default_rng(seed)
    count = len(known)
    few = [known[row] for row in draw.permutation(count)[: round(0.12 * count)]]
    slip = (np.arange(count) + draw.integers(1, count)) % count
    return {
        "true": known,
        "slipped": exchanged(known, {"wav": slip}),
        "mixed": exchanged(known, {name: draw.permutation(count) for name in ("png", "wav")}),
        "feedback": few,
        "shuffled": exchanged(few, {name: draw.permutation(len(few)) for name in ("png", "wav")}),
    }


def made(seed: int) -> Model:
    """Encoders of three modalities and the space that they share, with first weights of their own."""
    encoders = {
        "image": Image(Trunk(64, 2, 2), 64, 16),
        "text": Text(Trunk(64, 2, 2), length=24),
        "audio": Audio(Trunk(64, 2, 2), seconds=1.3),
    }
    model = Model(dict(encoders), space=64)
    init.initialise(model, seed, init.Normal())
    return model


class Retrieval:
    """Retrieval among things that are known, and who speaks."""

    def __init__(self, known: list[trial.Members]) -> None:
        self.gallery = [thing for part in ("seen", "unseen") for thing in speech(f"embedded:things-{part}-*.tar")]
        self.known, self.others = known, speech("embedded:speech-train-*.tar")

    def __call__(self, model: Model) -> dict[str, float]:
        x = {n: trial.features(model, n, trial.signals(reader, self.gallery)) for n, reader in model.readers.items()}
        recalls = [(trial.recall(x[a], x[b], k=5) + trial.recall(x[b], x[a], k=5)) / 2 for a, b, _ in PAIRS]
        heard = [trial.features(model, "audio", trial.signals(model.encoder("audio").reader, m)) for m in (self.known, self.others)]
        voices = [[fact["voice"] for fact in trial.facts(m)] for m in (self.known, self.others)]
        return {"recall": statistics.mean(recalls), "voice": trial.probe(heard[0], voices[0], heard[1], voices[1])}


def split(seed: int) -> tuple[Sets, Judge]:
    """Sources, feedback and judge of a seed."""
    known = speech("embedded:things-train-*.tar")
    return collections(known, seed), Retrieval(known)


TASK = Mixture(
    {"true": 0.25, "slipped": 0.45, "mixed": 0.3},
    made,
    partial(Contrastive, pairs=PAIRS),
    partial(Contrastive, pairs=PAIRS),
    64,
    100.0,
    {"every": 3, "after": 20, "against": True, "labels": ["audio"]},
    ["image", "audio"],
    split,
)

if __name__ == "__main__":
    TASK.report(
        "vpretraining_trimodal",
        "true triples, 12 % of a source, tell which source of triples to trust",
        "R@5 of pictures, titles and speech that were not seen",
        trial.options(__doc__ or ""),
    )
