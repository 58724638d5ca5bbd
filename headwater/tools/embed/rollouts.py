"""BabyAI episodes with an expert's action for every frame, as small H.264 clips.

A noisy episode takes a random move now and then; its labels stay what the expert would have done in that state.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

ACTIONS = ("left", "right", "forward", "pickup", "drop", "toggle", "done")
EASY = ("BabyAI-GoToObj-v0", "BabyAI-GoToRedBallGrey-v0", "BabyAI-GoToRedBall-v0")
LEVELS = EASY + EASY[:2] + ("BabyAI-GoToLocal-v0", "BabyAI-PickupLoc-v0")
TEST_SEED = 100_000


class Episode(NamedTuple):
    """frames: (T, 56, 56, 3) uint8, frame t before action t. expert: (T,) int16 labels. taken: the actions done."""

    level: str
    seed: int
    policy: str
    mission: str
    frames: np.ndarray
    expert: np.ndarray
    taken: list[int]
    rewards: list[float]

    @property
    def start(self) -> bytes:
        """First frame and mission: two episodes that share it are the same task."""
        return self.frames[0].tobytes() + self.mission.encode()

    def about(self) -> dict[str, Any]:
        """What the JSON member holds."""
        return {
            "env": self.level,
            "seed": self.seed,
            "policy": self.policy,
            "taken": self.taken,
            "rewards": self.rewards,
            "success": self.rewards[-1] > 0,
            "actions": ACTIONS,
            "licence": "Apache-2.0 (our own roll-out; MiniGrid: MIT)",
        }


def episodes(count: int, first_seed: int, known: set[bytes]) -> Iterator[Episode]:
    """`count` episodes over the levels in turn, half of them noisy; a start in `known` is passed over."""
    import gymnasium
    import minigrid  # noqa: F401  registers the levels

    worlds = {level: gymnasium.make(level) for level in dict.fromkeys(LEVELS)}
    seed = first_seed
    while count:
        level = LEVELS[seed % len(LEVELS)]
        episode = roll(worlds[level], level, seed, noise=0.25 if seed % 2 else 0.0)
        seed += 1
        if episode is not None and episode.start not in known:
            count -= 1
            yield episode


def roll(world: Any, level: str, seed: int, noise: float, limit: int = 12) -> Episode | None:
    """One episode of at most `limit` steps; None when the expert gives up."""
    from minigrid.utils.baby_ai_bot import BabyAIBot

    random = np.random.default_rng(seed)
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):  # rejected level layouts are printed
        start, _ = world.reset(seed=seed)
    bot, action, frames, expert, taken, rewards = BabyAIBot(world), None, [], [], [], []
    for _ in range(limit):
        try:
            advice = int(bot.replan(action))
        except Exception:  # the bot asserts its way out of states that it cannot solve
            return None
        action = world.unwrapped.actions(int(random.integers(3)) if random.random() < noise else advice)
        frames.append(world.unwrapped.get_pov_render(tile_size=8))
        expert.append(advice)
        taken.append(int(action))
        _, reward, ended, cut, _ = world.step(action)
        rewards.append(round(float(reward), 3))
        if ended or cut:
            break
    policy = "noisy" if noise else "expert"
    return Episode(level, seed, policy, start["mission"], np.stack(frames), np.array(expert, np.int16), taken, rewards)


def members(episode: Episode, mp4: bytes) -> dict[str, bytes]:
    """The four files of one sample but for its JSON."""
    labels = io.BytesIO()
    np.save(labels, episode.expert)
    return {"mp4": mp4, "txt": episode.mission.encode(), "npy": labels.getvalue()}


def encode(frames: np.ndarray, rate: int = 8, crf: int = 23) -> bytes:
    """H.264 in MP4, colours at full resolution, no encoder banner: (T, H, W, 3) uint8 -> bytes, the same on each run."""
    import av
    from av.bitstream import BitStreamFilterContext
    from av.codec.context import Flags

    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as clip:
        options = {"crf": str(crf), "preset": "veryslow", "tune": "animation", "bf": "0", "g": "12", "threads": "1"}
        stream = clip.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv444p"
        stream.codec_context.flags |= Flags.bitexact
        without_banner = BitStreamFilterContext("filter_units=remove_types=6", stream)
        for picture in [*(av.VideoFrame.from_ndarray(f, format="rgb24") for f in frames), None]:
            for packet in stream.encode(picture):
                for kept in without_banner.filter(packet):
                    clip.mux(kept)
    return file.getvalue()


def decode(mp4: bytes) -> np.ndarray:
    """(T, H, W, 3) uint8."""
    import av

    with av.open(io.BytesIO(mp4), "r") as clip:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)])


def baselines(train: list[np.ndarray], test: list[np.ndarray]) -> dict[str, float]:
    """What a model must beat, as accuracy on the labels of `test`: the commonest action, and the previous label again."""
    commonest = int(np.bincount(np.concatenate(train)).argmax())
    truth = np.concatenate(test)
    previous = np.concatenate([np.concatenate([[commonest], labels[:-1]]) for labels in test])
    return {
        f"always '{ACTIONS[commonest]}'": float((truth == commonest).mean()),
        "repeat the previous label": float((truth == previous).mean()),
    }


def histogram(labels: list[np.ndarray]) -> dict[str, int]:
    """How often each action is the label."""
    counts = np.bincount(np.concatenate(labels), minlength=len(ACTIONS))
    return {name: int(n) for name, n in zip(ACTIONS, counts) if n}
