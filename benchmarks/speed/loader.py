"""How fast batches come: headwater beside other loaders, on the same samples, in one run.

    python -m benchmarks.speed.loader [--quick] [--case jpeg|decode|write|video|audio|text|action|all] [--workers N]

The last line is JSON. Only ratios on one machine mean something. Peers: `pip install 'headwater[bench]'`; one that is not
installed is named and left out.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import json
import os
import pstats
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.speed import media, ours, pictures, writing
from benchmarks.speed.samples import SIDE, Corpus, corpus
from benchmarks.speed.stopwatch import Row, Timing, measure, ratio
from headwater.modalities.image import ImageReader
from headwater.modalities.text import TextReader

OURS = "headwater"
# how many times a peer's speed as shipped: what is required, what is aimed for
TARGETS = {"webdataset": (4.0, 6.0), "energon": (6.0, 9.0), "litdata": (1.3, 1.8), "streaming": (2.0, 2.5), "plain": (1.0, 1.0)}
WRITE, SHARE = (8.0, 8.0), (0.8, 0.8)
LARGE = 384


class Plan(NamedTuple):
    """How much is measured: samples of a corpus; batches not timed and timed in each repeat; loader processes."""

    samples: int
    warm: int
    timed: int
    repeats: int
    workers: int

    def over(self, number: int) -> Plan:
        """The same for samples that are `number` times as slow."""
        return self._replace(
            samples=max(200, self.samples // number), warm=max(2, self.warm // number), timed=max(8, self.timed // number)
        )


def main(words: list[str] | None = None) -> None:
    """Run the named case and print its rows, verdicts and one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.loader", description=__doc__.split("\n")[0])
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples, two repeats: does it run, not how fast")
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="only where headwater's own time goes, with pictures")
    asked = parser.parse_args(words)
    plan = Plan(1200, 2, 12, 2, asked.workers) if asked.quick else Plan(20_000, 32, 256, asked.repeats, asked.workers)
    if asked.profile:
        return profile(plan)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {plan}")
    result: dict[str, Any] = {"bench": "loader", "ratios": {}, "workers": plan.workers, "repeats": plan.repeats}
    for name, case in CASES.items():
        if asked.case in (name, "all"):
            result |= case(plan)
    print(json.dumps(result))


def jpeg(plan: Plan) -> dict[str, Any]:
    """Pictures of 64 x 64 with captions, all peers."""
    data = corpus("jpeg", plan.samples)
    truth = contents(data, "jpg")
    timings = run(f"jpeg, {SIDE} px", [picture_row(data, SIDE, plan, truth), *pictures.rows(data, plan.workers, truth)], plan)
    found = ratios(timings)
    for name, target in TARGETS.items():
        if name in found:
            verdict(f"{name} as shipped", found[name], *target)
    faster = [name for name in TARGETS if found.get(name, 1) < 1]
    print(f"  {'missed' if faster else 'reached'}: above every peer as shipped{', but for ' * bool(faster)}{', '.join(faster)}")
    return {
        "ratios": {name: found[name] for name in TARGETS if name in found},
        "ratios_same_decoder": {name: found[f"{name} + simplejpeg"] for name in TARGETS if f"{name} + simplejpeg" in found},
        "rows": {name: round(t.median) for name, t in timings.items() if isinstance(t, Timing)},
        "first_batch": {name: round(statistics.median(t.first), 3) for name, t in timings.items() if isinstance(t, Timing)},
        "left_out": {name: t for name, t in timings.items() if isinstance(t, str)},
    }


def decode(plan: Plan) -> dict[str, Any]:
    """headwater's loader against the JPEG decoder on its own, for small and large pictures."""
    share = {}
    for kind, side, plan_ in (("jpeg", SIDE, plan), ("large", LARGE, plan.over(10))):
        data = corpus(kind, plan_.samples)
        truth = contents(data, "jpg")
        alone = writing.bare(list(truth.values()), pictures.BATCH)
        timings = run(f"decode, {side} px", [picture_row(data, side, plan_, truth), alone], plan_)
        share[side] = ratios(timings)[alone.name]
        verdict(f"share of the bare decoder at {side} px", share[side], *SHARE)
    return {"decode_share": share}


def write(plan: Plan) -> dict[str, Any]:
    """Tars of 1,000 samples written from memory, with headwater's index."""
    timings = run("write", writing.rows(list(corpus("jpeg", plan.samples).samples())), plan)
    found = ratios(timings)["webdataset"]
    verdict("webdataset's writer", found, *WRITE)
    return {"write": found}


def signal(kind: str, slower: int = 1) -> Callable[[Plan], dict[str, Any]]:
    """A case of one kind of signal against webdataset with hand-written decoding; `slower`: than small pictures."""

    def case(plan: Plan) -> dict[str, Any]:
        plan = plan.over(slower)
        data = corpus(kind, plan.samples)
        truth = contents(data, media.CASES[kind].extension)
        return {kind: ratios(run(kind, media.rows(kind, data, plan.workers, truth), plan)).get("webdataset")}

    return case


def text(plan: Plan) -> dict[str, Any]:
    """Texts packed into rows, against webdataset with simple packing code."""
    plan = plan.over(2)
    timings = run("text, packed", media.text_rows(corpus("text", plan.samples), plan.workers), plan)
    return {"text": ratios(timings).get("webdataset")}


CASES = {
    "jpeg": jpeg,
    "decode": decode,
    "write": write,
    "video": signal("video", 10),
    "audio": signal("audio", 4),
    "text": text,
    "action": signal("action"),
}


def picture_row(data: Corpus, side: int, plan: Plan, truth: dict[str, bytes]) -> Row:
    """headwater on JPEG pictures: one token is the whole picture, so that the pixels are those of the peers."""
    readers = {"image": ImageReader(side, side), "text": TextReader()}

    def check(stream: Any) -> str:
        batch = next(stream)
        found = zip(ours.texts(batch["text"]), ours.pixels(batch["image"], side), strict=True)
        return pictures.compare(dict(found), truth)

    return Row(OURS, lambda: ours.load(data.shards, readers, plan.workers, pictures.BATCH), ours.size, check)


def contents(data: Corpus, extension: str) -> dict[str, bytes]:
    """Text -> the member that a loader should deliver with it."""
    return {sample.text: sample.members[extension] for sample in data.samples()}


def run(title: str, rows: list[Row], plan: Plan) -> dict[str, Timing | str]:
    """Measure and print a table; a row of headwater that fails ends the program."""
    print(f"\n{title}", flush=True)
    timings = measure(rows, plan.warm, plan.timed, plan.repeats, lambda line: print(line, flush=True))
    us = timings[OURS]
    if isinstance(us, str):
        sys.exit(f"headwater itself did not work: {us}")
    print(f"  {'':28}{'samples/s':>10}{'lowest':>9}{'highest':>9}{'ours is':>9}{'first batch':>13}{'processor':>12}")
    for name, t in timings.items():
        if isinstance(t, Timing):
            times, first, used = ratio(us, t), statistics.median(t.first), statistics.median(t.processor)
            speeds = f"{t.median:10.0f}{min(t.speed):9.0f}{max(t.speed):9.0f}"
            print(f"  {name:28}{speeds}{times:8.2f}x{first:11.3f} s{used * 1e6:9.1f} us")
        else:
            print(f"  {name:28}{t}")
    return timings


def ratios(timings: dict[str, Timing | str]) -> dict[str, float]:
    """Row -> headwater's speed as a multiple of it."""
    ran = {name: t for name, t in timings.items() if isinstance(t, Timing)}
    return {name: round(ratio(ran[OURS], t), 3) for name, t in ran.items() if name != OURS}


def verdict(what: str, found: float, target: float, aim: float) -> None:
    """One line: reached or missed, with the figures."""
    said = "missed" if found < target else "reached"
    far = "" if aim == target else f", aim {aim:g} {'reached' if found >= aim else 'missed'}"
    print(f"  {said}: {found:.2f} x {what}, target {target:g}{far}", flush=True)


def profile(plan: Plan) -> None:
    """Where the time of headwater's own loop goes, without loader processes."""
    data = corpus("jpeg", plan.samples)
    stream = picture_row(data, SIDE, plan._replace(workers=0), {}).open()
    for _ in itertools.islice(stream, plan.warm):
        pass
    with cProfile.Profile() as found:
        for _ in itertools.islice(stream, plan.timed):
            pass
    pstats.Stats(found).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
