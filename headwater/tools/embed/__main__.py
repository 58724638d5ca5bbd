"""Build the shards that ship inside the package: `python -m headwater.tools.embed --sources DIR --out headwater/embedded`.

Anyone gets the same sources, in the layout that DIR must have, with

    mkdir -p DIR/npm DIR/deb && cd DIR/npm
    npm i --ignore-scripts emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 emojibase-data@17.0.0
    cd ../deb && apt-get download openclipart-png openclipart-svg sonic-pi-samples
    for package in *.deb; do dpkg-deb -x "$package" x; done
    apt-get install espeak-ng && pip install minigrid==3.2.0

A second run on the same machine gives the same bytes. What is in the shards is told by the NOTICE.md beside them, which is
written here too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from headwater.datamodules.index import load_index
from headwater.datamodules.writer import ShardWriter
from headwater.tools.embed import rollouts, speech, things
from headwater.tools.embed.notice import notice
from headwater.tools.index_shards import index_shards

EMOJI, DRAWINGS, SEEN, UNSEEN, SPOKEN, EPISODES, TEST_EPISODES = 460, 90, 160, 90, 160, 380, 90
SPEECH_BITS, SOUND_BITS = 10_000, 20_000
LONGEST_TITLE, LONGEST_SOUND = 1.6, 2.0
LICENCES = {
    "google": "Apache-2.0 (Noto Emoji, Google)",
    "twitter": "CC-BY-4.0 (Twemoji, Twitter, Inc and other contributors)",
    "openclipart": "public domain (Open Clip Art Library)",
}
WORDS = {
    "ambi": "ambient", "bd": "bass drum", "elec": "electric", "guit": "guitar", "misc": "", "perc": "percussion",
    "sn": "snare", "lo": "low", "hi": "high", "mid": "middle", "filt": "filtered", "dnb": "drum and bass", "voxy": "voice",
    "em9": "e minor nine", "cineboom": "cinema boom", "tek": "techno", "haus": "house", "klub": "club",
}  # fmt: skip
Sample = tuple[str, dict[str, bytes]]


def build(sources: Path, out: Path) -> None:
    """Write every shard and the notice into `out`, in place of those that were there."""
    out.mkdir(parents=True, exist_ok=True)
    skipped: Counter[str] = Counter()
    train, seen, unseen, drawings = choose(sources)
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        drawn = [*shown(train, "google", False, skipped), *shown(drawings, "openclipart", False, skipped)]
        write(made, "things-train", drawn)
        write(made, "speech-train", spoken(train[:SPOKEN], skipped))
        write(made, "things-seen", shown(seen, "twitter", True, skipped))
        write(made, "things-unseen", shown(unseen, "twitter", True, skipped))
        for split, files in split_sounds(sources).items():
            write(made, f"sounds-{split}", sounds(files, skipped))
        known: set[bytes] = set()
        for split, count, seed in (("train", EPISODES, 0), ("test", TEST_EPISODES, rollouts.TEST_SEED)):
            rolled = list(rollouts.episodes(count, seed, known))
            known |= {e.start for e in rolled}
            measured[split] = rolled
            write(made, f"episodes-{split}", acted(rolled))
        index_shards(str(made), jobs=1, measure=True)
        shards = sorted(made.glob("*.tar"))
        (made / "NOTICE.md").write_text(notice(table(shards), measures(measured)), "utf-8")
        replace(made, out)
    print("skipped:", dict(skipped) or "nothing")
    print(f"{sum(f.stat().st_size for f in out.iterdir()):,} bytes in {out}")


def choose(sources: Path) -> tuple[list[things.Concept], list[things.Concept], list[things.Concept], list[things.Concept]]:
    """Concepts for training, those of them tested with another vendor and voice, the held-out ones, and drawings.

    No training title holds all words of a held-out one, nor the other way round ("camera", "camera with flash").
    """
    found = things.emoji(sources / "npm/node_modules")
    unseen = found[:UNSEEN]
    apart = [set(c.title.lower().split()) for c in unseen]

    def free(concept: things.Concept) -> bool:
        words = set(concept.title.lower().split())
        return not any(words <= other or other <= words for other in apart)

    train = [c for c in found[UNSEEN:] if free(c)][:EMOJI]
    seen = sorted(train, key=lambda c: things.rank(c.name, "seen"))[:SEEN]
    drawings = things.clipart(sources / "deb/x/usr/share/openclipart", {c.title.lower() for c in found})
    return train, seen, unseen, [c for c in drawings if free(c)][:DRAWINGS]


def shown(concepts: Iterable[things.Concept], vendor: str, held_out: bool, skipped: Counter[str]) -> Iterator[Sample]:
    """One sample per concept: picture, title, the title spoken by one voice, and what is known about them."""
    voices = speech.HELD_OUT_VOICES if held_out else speech.TRAINING_VOICES
    for concept in concepts:
        voice = voices[things.rank(concept.name, "voice") % len(voices)]
        png, ogg = things.picture(concept.vendors[vendor]), say(concept.title, voice)
        if ogg is None or not things.visible(png):
            skipped["silent or too long title" if ogg is None else "empty picture"] += 1
            continue
        about = {**facts(concept, voice), "vendor": vendor, "licence": LICENCES[vendor]}
        yield f"{concept.name}-{vendor}", {"png": png, "txt": concept.title.encode(), "ogg": ogg, "json": dump(about)}


def spoken(concepts: Iterable[things.Concept], skipped: Counter[str]) -> Iterator[Sample]:
    """The title of each concept by another training voice than the one in `things-train`."""
    count = len(speech.TRAINING_VOICES)
    for concept in concepts:
        step = 1 + things.rank(concept.name, "second") % (count - 1)
        voice = speech.TRAINING_VOICES[(things.rank(concept.name, "voice") + step) % count]
        ogg = say(concept.title, voice)
        if ogg is None:
            skipped["silent or too long title"] += 1
            continue
        about = {**facts(concept, voice), "licence": speech.LICENCE}
        yield f"{concept.name}-spoken", {"txt": concept.title.encode(), "ogg": ogg, "json": dump(about)}


def say(title: str, voice: str) -> bytes | None:
    """The title as Opus OGG; None when it is silent or longer than allowed."""
    sound = speech.speak(title, voice)
    return speech.opus(sound, SPEECH_BITS) if 0 < len(sound) <= LONGEST_TITLE * speech.RATE else None


def facts(concept: things.Concept, voice: str) -> dict[str, Any]:
    """The part of the JSON member that pictures and speech share."""
    about = {"concept": concept.name, "title": concept.title, "category": concept.category, "tags": concept.tags}
    return {**about, "voice": voice, "language": voice.partition("+")[0]}


def split_sounds(sources: Path) -> dict[str, list[Path]]:
    """Every fifth sound is for testing, counted through the groups in the order of their rank."""
    found = sources.glob("deb/x/usr/share/sonic-pi/samples/*.flac")
    ordered = sorted(found, key=lambda f: (f.stem.partition("_")[0], things.rank(f.stem)))
    return {"train": [f for i, f in enumerate(ordered) if i % 5 != 4], "test": ordered[4::5]}


def sounds(files: Iterable[Path], skipped: Counter[str]) -> Iterator[Sample]:
    """One sample per Sonic Pi sound: the first seconds and its name in plain words."""
    for file in files:
        sound = speech.fade_cut(speech.trim(speech.load(file.read_bytes())), LONGEST_SOUND)
        if not len(sound):
            skipped["silent sound"] += 1
            continue
        title = sound_title(file.stem)
        about = {"name": file.stem, "title": title, "group": file.stem.partition("_")[0], "licence": "CC0-1.0 (Sonic Pi)"}
        ogg = speech.opus(sound, SOUND_BITS, "audio")
        yield file.stem.replace("_", "-"), {"ogg": ogg, "txt": title.encode(), "json": dump(about)}


def sound_title(stem: str) -> str:
    """'elec_filt_snare' -> 'electric filtered snare', 'glitch_perc1' -> 'glitch percussion 1'."""
    parts = []
    for word in stem.split("_"):
        letters = word.rstrip("0123456789")
        known = WORDS.get(word, WORDS.get(letters, letters))
        parts += [known] if word in WORDS else [known, word[len(letters) :]]
    return " ".join(p for p in parts if p)


def acted(rolled: Iterable[rollouts.Episode]) -> Iterator[Sample]:
    """One sample per episode; the clip must decode to the frames within 3 of 255 on average."""
    for episode in rolled:
        mp4 = rollouts.encode(episode.frames)
        error = float(np.abs(rollouts.decode(mp4).astype(int) - episode.frames).mean())
        if error > 3:
            raise ValueError(f"{episode.level} seed {episode.seed}: decoded frames are {error:.1f} of 255 off; lower the crf")
        key = f"{episode.level.split('-')[1].lower()}-{episode.seed:06d}"
        yield key, {**rollouts.members(episode, mp4), "json": dump(episode.about())}


def measures(rolled: dict[str, list[rollouts.Episode]]) -> list[str]:
    """Action counts and baselines of the episodes, as lines; printed too."""
    labels = {split: [e.expert for e in group] for split, group in rolled.items()}
    lines = []
    for split, group in rolled.items():
        noisy, solved = sum(e.policy == "noisy" for e in group), sum(e.rewards[-1] > 0 for e in group)
        steps = sum(len(e.expert) for e in group)
        lines.append(f"{split}: {len(group)} episodes of {steps} frames in all, {noisy} noisy, {solved} reach their goal")
    lines += [f"labels in {split}: {rollouts.histogram(found)}" for split, found in labels.items()]
    for name, value in rollouts.baselines(labels["train"], labels["test"]).items():
        lines.append(f"accuracy on the test labels, {name}: {value:.3f}")
    print(*lines, sep="\n")
    return lines


def write(folder: Path, name: str, samples: Iterable[Sample]) -> None:
    """The samples as tars of about 4 MB."""
    with ShardWriter(folder / f"{name}-{{:03d}}.tar", size=4 << 20) as writer:
        for key, members in samples:
            writer.write(key, members)


def table(shards: list[Path]) -> list[tuple[str, int, int, str]]:
    """Name, samples, bytes and SHA-256 of each shard; printed too."""
    rows = []
    for shard in shards:
        content = shard.read_bytes()
        rows.append((shard.name, len(load_index(shard)), len(content), hashlib.sha256(content).hexdigest()))
        print(*rows[-1])
    return rows


def replace(made: Path, out: Path) -> None:
    """Move the new files over the old ones; shards that are no longer made go."""
    fresh = {f.name for f in made.iterdir()}
    for old in [*out.glob("*.tar"), *out.glob("*.tar.idx")]:
        if old.name not in fresh:
            old.unlink()
    for name in sorted(fresh):
        shutil.move(made / name, out / name)


def dump(value: dict[str, Any]) -> bytes:
    """JSON as short bytes."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def main() -> None:
    """Read the two folders from the command line and build."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    for part in ("npm/node_modules", "deb/x/usr/share/openclipart", "deb/x/usr/share/sonic-pi"):
        if not (arguments.sources / part).is_dir():
            parser.error(f"{arguments.sources / part} does not exist; the top of {__file__} says how to get the sources")
    build(arguments.sources, arguments.out)


if __name__ == "__main__":
    main()
