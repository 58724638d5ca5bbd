"""V-Pretraining on sound: a few labelled speakers tell which pairs of clips are worth comparing.

Two encoders of speech learn by contrast which clips belong together (InfoNCE, van den Oord et al. 2018, arXiv:1807.03748), from
three collections of pairs: two clips of one speaker with other words, as a recording gives them (25 %); the same words of two
speakers, as parallel recordings do (45 %); and pairs that a crawler joined at random (30 %). Feedback: who of six speaks in 12 %
of the clips; its loss is contrastive too, with all clips of a speaker as answers of each other (SupCon). Asked for is who speaks
in titles that are in no collection, by a linear probe fitted to the same few labels. Controls: uniform weights (plain, also for
as long as V-Pretraining takes), a designer that moves at random, feedback with shuffled labels. References: an oracle that has
the pairs of one speaker alone, and training on pairs of the feedback directly. Beside it, as an unrelated probe: whether the
title that is spoken is a long one.

With a cross-fitted linear probe as the feedback (`Probed`) the right collection has the largest value too, on average over
batches, but the cosines of gradients are 0.03 in place of 0.75, and a designer that follows single batches goes astray.

    python -m benchmarks.claims.vpretraining.audio [--quick]
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from io import BytesIO

import numpy as np
import soundfile

from benchmarks.claims import trial
from benchmarks.claims.vpretraining.mixture import Judge, Mixture, Sets
from headwater import init
from headwater.modalities import Audio, Category
from headwater.model import Model
from headwater.objectives import Contrastive
from headwater.objectives.contrast.positives import SameLabel
from headwater.trunk import Trunk

SPOKEN = ("embedded:things-train-*.tar", "embedded:speech-train-*.tar")  # some titles by two speakers
SPEAKERS = ["en-gb+f2", "en-gb-x-rp+m7", "en-us+f4", "en-gb-scotland+m1", "en-us+m3", "en-us-nyc+f5"]
LONG = 12  # letters of a title


def clips(shards: str) -> list[trial.Members]:
    """Spoken titles as plain samples, which are read faster, and what is known of them."""
    found = []
    for members in trial.samples(shards):
        file = BytesIO()
        soundfile.write(file, *soundfile.read(BytesIO(members["ogg"])), format="wav")
        found.append({"wav": file.getvalue(), "txt": members["txt"], "json": members["json"]})
    return found


def voices(members: Sequence[trial.Members]) -> list[str]:
    """Who speaks."""
    return [fact["voice"] for fact in trial.facts(members)]


def same_speaker(members: Sequence[trial.Members], draw: np.random.Generator) -> list[trial.Members]:
    """Each clip beside another one with the same label."""
    who, partner = np.array(voices(members)), np.arange(len(members))
    for speaker in SPEAKERS:
        mine = draw.permutation(np.flatnonzero(who == speaker))
        partner[mine] = np.roll(mine, 1)
    return [{**clip, "other.wav": members[row]["wav"]} for clip, row in zip(members, partner.tolist(), strict=True)]


def collections(seed: int) -> Sets:
    """The three sources, the feedback, the same with shuffled labels, and clips of titles that are in none of them."""
    first, second = map(clips, SPOKEN)
    draw = np.random.default_rng(seed)
    titles = sorted({clip["txt"] for clip in first})
    held = {titles[row] for row in draw.permutation(len(titles))[: len(titles) // 4]}
    known = [clip for clip in (*first, *second) if clip["txt"] not in held]
    again = {clip["txt"]: clip for clip in second}
    twice = [clip for clip in first if clip["txt"] in again and clip["txt"] not in held]
    few = [known[row] for row in draw.permutation(len(known))[: round(0.12 * len(known))]]
    wrong = [{**clip, "json": few[row]["json"]} for clip, row in zip(few, draw.permutation(len(few)), strict=True)]
    return {
        "speaker": same_speaker(known, draw),
        "parallel": [{**clip, "other.wav": again[clip["txt"]]["wav"]} for clip in twice],
        "crawled": [
            {**clip, "other.wav": known[row]["wav"]} for clip, row in zip(known, draw.permutation(len(known)), strict=True)
        ],
        "feedback": same_speaker(few, draw),
        "shuffled": same_speaker(wrong, draw),
        "known": known,
        "test": [clip for clip in (*first, *second) if clip["txt"] in held],
    }


def made(seed: int) -> Model:
    """One encoder for each clip of a pair, with first weights of their own."""
    model = Model({name: Audio(Trunk(64, 2, 2), seconds=1.3) for name in ("audio", "other")})
    model.encoder("other").reader.extensions = ("other.wav",)  # type: ignore[misc]
    init.initialise(model, seed, init.Normal())
    return model


class Listening:
    """Two linear probes of held-out titles: who speaks, by as few labels as the feedback has, and whether the title is long."""

    def __init__(self, sets: Sets) -> None:
        self.sets = sets

    def __call__(self, model: Model) -> dict[str, float]:
        reader, sets = model.encoder("audio").reader, self.sets
        few, known, test = (trial.features(model, "audio", trial.signals(reader, sets[n])) for n in ("feedback", "known", "test"))
        long = [[len(clip["txt"]) >= LONG for clip in sets[name]] for name in ("known", "test")]
        return {
            "speaker": trial.probe(few, voices(sets["feedback"]), test, voices(sets["test"]), strength=0.1),
            "length": trial.probe(known, long[0], test, long[1], strength=0.1),
        }


def split(seed: int) -> tuple[Sets, Judge]:
    """Sources, feedback and judge of a seed."""
    sets = collections(seed)
    return sets, Listening(sets)


TASK = Mixture(
    {"speaker": 0.25, "parallel": 0.45, "crawled": 0.3},
    made,
    partial(Contrastive, a="audio", b="other"),
    partial(Contrastive, a="audio", b="other", positives=partial(SameLabel, label=Category(SPEAKERS, "voice"))),
    64,
    150.0,
    {"every": 5, "after": 5},
    ["audio", "other"],
    split,
)

if __name__ == "__main__":
    TASK.report(
        "vpretraining_audio",
        "speakers of 12 % of the clips tell which pairs of clips to compare",
        "accuracy of a linear probe: who says held-out words",
        trial.options(__doc__ or ""),
    )
