"""V-Pretraining on video with action: a few moves that are surely right tell which logs deserve trust.

A small model sees two frames that follow each other and tells the action between them (inverse dynamics, as in Baker et al. 2022,
VPT, arXiv:2206.11795). It learns from a mixture of three logs of different episodes: of this robot (25 % of the samples), of
another one whose numbers mean other actions (45 %), and of a recorder that lost the order (30 %). Feedback: 12 % of the right
moves. Asked for is the accuracy in held-out levels. Controls: uniform weights (plain, also for as long as V-Pretraining takes), a
designer that moves at random, feedback with shuffled actions. References: an oracle that has the right log alone, and training on
the feedback directly. Beside it, as an unrelated probe of the frames' features: which colour the mission names.

    python -m benchmarks.claims.vpretraining.action [--quick]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from io import BytesIO
from itertools import pairwise

import av
import numpy as np
import torch

from benchmarks.claims import trial
from benchmarks.claims.vpretraining.mixture import Judge, Mixture, Sets
from headwater import init
from headwater.fusion import JointTokens
from headwater.modalities import Action, Video
from headwater.model import Model
from headwater.objectives import Causal
from headwater.trunk import Trunk

SIDE, CHOICES = 64, 7
OTHER = [2, 0, 1, 3, 4, 5, 6]  # what the other robot writes for left, right, forward, ...


def moves(shards: str) -> Iterator[list[trial.Members]]:
    """Of each episode, its moves: a clip of two frames, the action between them, and the mission."""
    for episode, facts in zip(samples := trial.samples(shards), trial.facts(samples), strict=True):
        with av.open(BytesIO(episode["mp4"])) as film:
            frames = [frame.to_ndarray(format="bgr24") for frame in film.decode(video=0)]
        clips = map(clip, pairwise(frames))
        yield [{**done(action), "avi": two, "txt": episode["txt"]} for two, action in zip(clips, facts["taken"], strict=False)]


def clip(frames: Sequence[np.ndarray]) -> bytes:
    """Frames (64, 64, 3) uint8 as a film that is not compressed."""
    file = BytesIO()
    with av.open(file, "w", format="avi") as film:
        stream = film.add_stream("rawvideo", rate=5, width=SIDE, height=SIDE, pix_fmt="bgr24")
        for frame in frames:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="bgr24")))
        film.mux(stream.encode())
    return file.getvalue()


def done(action: int) -> trial.Members:
    """One action as a member of a sample."""
    file = BytesIO()
    np.save(file, np.array([action]))
    return {"npy": file.getvalue()}


def action_of(move: trial.Members) -> int:
    return int(np.load(BytesIO(move["npy"]))[0])


def shuffled(moves: Sequence[trial.Members], draw: np.random.Generator) -> list[trial.Members]:
    """Moves, each with the action of another one."""
    return [{**move, "npy": moves[row]["npy"]} for move, row in zip(moves, draw.permutation(len(moves)), strict=True)]


def logs(episodes: Sequence[list[trial.Members]], seed: int) -> Sets:
    """The three sources, of different episodes, the feedback, and the feedback with shuffled actions."""
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(episodes))
    right, other, mixed = ([move for row in rows for move in episodes[row]] for rows in np.array_split(order, 3))
    few = right[: round(0.12 * len(right))]
    return {
        "right": right,
        "other": [{**move, **done(OTHER[action_of(move)])} for move in other],
        "random": shuffled(mixed, draw),
        "feedback": few,
        "shuffled": shuffled(few, draw),
    }


def made(seed: int) -> Model:
    """Encoders of films and actions that meet in one trunk, with first weights of their own."""
    encoders = {"video": Video(Trunk(64, 1, 2), SIDE, 8, 2, tubelet=2), "action": Action(Trunk(64, 1, 2), choices=CHOICES, steps=1)}
    model = Model(dict(encoders), partial(JointTokens, trunk=Trunk(64, 2, 2)))
    init.initialise(model, seed, init.Normal())
    return model


class Watching:
    """What was done in held-out levels, and the colour that their mission names, by a linear probe of the clips' features."""

    def __init__(self, known: Sequence[trial.Members]) -> None:
        self.test = [move for episode in moves("embedded:episodes-test-*.tar") for move in episode]
        self.clips, self.colours = (
            (known, self.test),
            [[move["txt"].split()[-2].decode() for move in s] for s in (known, self.test)],
        )

    @torch.no_grad()
    def __call__(self, model: Model) -> dict[str, float]:
        objective = Causal(model.eval(), "action", prefix=["video"])
        raw = {name: trial.signals(reader, self.test) for name, reader in model.readers.items()}
        task = objective.task({**raw, "seed": torch.arange(len(self.test))})
        right = objective.predict(model, task).argmax(-1) == task["answer"]
        x, y = (trial.features(model, "video", trial.signals(model.encoder("video").reader, part)) for part in self.clips)
        return {"accuracy": float(right.float().mean()), "mission": trial.probe(x, self.colours[0], y, self.colours[1])}


def split(seed: int) -> tuple[Sets, Judge]:
    """Sources, feedback and judge of a seed."""
    episodes = list(moves("embedded:episodes-train-*.tar"))
    return logs(episodes, seed), Watching([move for episode in episodes for move in episode])


TASK = Mixture(
    {"right": 0.25, "other": 0.45, "random": 0.3},
    made,
    partial(Causal, modality="action", prefix=["video"]),
    partial(Causal, modality="action", prefix=["video"]),
    32,
    100.0,
    {"every": 5, "after": 50},
    [],
    split,
)

if __name__ == "__main__":
    TASK.report(
        "vpretraining_action",
        "actions of 12 % of the moves tell which log to trust",
        "accuracy of actions in held-out levels",
        trial.options(__doc__ or ""),
    )
