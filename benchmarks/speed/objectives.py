"""How fast objectives train, and how much memory they take: headwater's step beside a peer's own, with equal weights and losses.

    OMP_WAIT_POLICY=passive python -m benchmarks.speed.objectives [--part clip] [--quick] [--repeats N] [--threads N]

Parts: `clip` is a whole training step (forward, loss, backward, AdamW) beside open_clip's towers and loss; `mae` and `dino` are
such steps beside lightly's (lightly_steps); `memory` is the peak of the contrastive loss alone beside the whole matrix. The last
line is JSON. Only ratios on one machine mean something.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from benchmarks.speed import lightly_steps
from benchmarks.speed.race import OURS, Step, product_rate, race, stepping, verdict
from benchmarks.speed.stopwatch import ratio
from headwater import random
from headwater.datamodules.collate import collate
from headwater.init import Normal
from headwater.modalities import Image
from headwater.modalities.text import TextReader
from headwater.model import Encoder, Model
from headwater.objectives import Contrastive
from headwater.objectives.contrast.tiles import softmax_both_ways
from headwater.position import Learned
from headwater.pretrainer import Pretrainer
from headwater.tokens import Tokens
from headwater.training.groups import Groups
from headwater.trunk import Trunk

PEER = "open_clip"


def main(words: list[str] | None = None) -> None:
    """Run the parts and print their rows, verdicts and one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.objectives", description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=sorted(PARTS), action="append", help="one of them, instead of all")
    parser.add_argument("--quick", action="store_true", help="small shapes, two repeats: does it run, not how fast")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="of torch, on both sides")
    parser.add_argument("--peak", nargs=2, metavar=("ROW", "PAIRS"), help="print the peak memory of one loss and end")
    asked = parser.parse_args(words)
    torch.set_num_threads(asked.threads)
    if asked.peak:
        print(peak(asked.peak[0], int(asked.peak[1])))
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, threads {asked.threads}")
    found: dict[str, Any] = {"bench": "objectives", "ratios": {}, "repeats": 2 if asked.quick else asked.repeats}
    found["threads"] = asked.threads
    for part in asked.part or PARTS:
        ratios, more = PARTS[part](asked.quick, found["repeats"])
        found["ratios"] |= ratios
        found[part] = more
    print(json.dumps(found))


# --- clip: a ViT-Ti of patch 16 (and of 8) at 64 pixels, four layers of text, captions of 17 tokens on average in 77 places


def captions(rows: int, vocab: int) -> list[Tensor]:
    """Ids with CLIP's marks at both ends, 17 on average from 8 to 40."""
    draws = random.normal(torch.arange(rows), (), "length")
    lengths = (16.5 * (0.25 * draws).exp()).round().clamp(8, 40).long()
    words = (random.uniform(torch.arange(rows), (40,), "words") * (vocab - 2)).long()
    return [
        torch.cat([torch.tensor([vocab - 2]), w[: n - 2], torch.tensor([vocab - 1])]) for w, n in zip(words, lengths, strict=True)
    ]


def towers(depth: int, patch: int, vocab: int) -> Model:
    """Both towers as open_clip shapes them, on our trunk."""
    vision = Trunk(192, depth, 3, position=Learned((64 // patch, 64 // patch)), registers=1, entry_norm=True, eps=1e-5)
    image = Image(vision, 64, patch, pooling="class")
    language = Trunk(256, 4, 4, position=Learned((77,)), eps=1e-5)
    text = Encoder(TextReader(length=77, vocab=vocab), language, pooling="last", causal=True, tied=True, start=vocab - 2)
    return Model({"image": image, "text": text}, space=256)


def twin(model: Model, depth: int, patch: int, vocab: int) -> Any:
    """The same weights in open_clip's own towers."""
    import open_clip

    from headwater.hub.open_clip_export import LEFT_OUT, added, give, rules

    vision = {"layers": depth, "width": 192, "head_width": 64, "patch_size": patch, "image_size": 64}
    language = {"context_length": 77, "vocab_size": vocab, "width": 256, "heads": 4, "layers": 4}
    peer: Any = open_clip.CLIP(256, vision, language)
    state = dict(model.state_dict())
    places = {"image": model.readers["image"].example(1, 0)[0].position, "text": torch.arange(77)[:, None]}
    for name, position in places.items():
        state[f"encoders.{name}.trunk.position.table"] = added(model.encoder(name), position)  # type: ignore[assignment]
    give(state, peer, rules(peer.state_dict(), model), (*LEFT_OUT, "attn_mask"))
    return peer


def clip(quick: bool, repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """A step of CLIP on both sides; the ratio that counts is that of patch 16."""
    found = {f"patch {patch}": step_of_clip(patch, quick, repeats) for patch in ((16,) if quick else (16, 8))}
    return {PEER: found["patch 16"]["ratio"]}, found


def step_of_clip(patch: int, quick: bool, repeats: int) -> dict[str, Any]:
    """From the same prepared pictures and captions to new weights."""
    rows, depth, vocab = (8, 2, 500) if quick else (64, 12, 49408)
    ids = captions(rows, vocab)
    pictures = random.normal(torch.tensor(0), (rows, 3, 64, 64), "pictures")
    trained = Pretrainer(towers(depth, patch, vocab), Contrastive, init=Normal())
    steps = {
        OURS: ours(trained, pictures, ids, fused=False),
        PEER: theirs(twin(trained.backbone, depth, patch, vocab), pictures, ids),
        f"{OURS}, fused AdamW": ours(copy.deepcopy(trained), pictures, ids, fused=True),
    }
    for tolerance in (1e-5, 1e-2, 1e-2):  # AdamW makes steps of full size of rounding errors, so later ones are only close
        losses = {name: step().item() for name, step in steps.items()}
        if not all(math.isclose(loss, losses[PEER], rel_tol=tolerance) for loss in losses.values()):
            raise AssertionError(f"losses differ by more than {tolerance}: {losses}")
    timings = race(steps, repeats, 1 if quick else 3, rows)
    tokens, longest = (64 // patch) ** 2 + 1, max(map(len, ids))
    flops = 6 * rows * (tokens * depth * 12 * 192**2 + longest * 4 * 12 * 256**2)  # of the matrix products that are computed
    share = timings[OURS].median / rows * flops / product_rate(rows * tokens, 192)
    mean = statistics.mean(map(len, ids))
    print(f"clip: captions of {mean:.1f} tokens, at most {longest}; {share:.2f} of the bare matrix product's rate")
    return {
        "ratio": verdict(f"clip, patch {patch}", timings, PEER, 1.6),
        "fused": round(ratio(timings[f"{OURS}, fused AdamW"], timings[PEER]), 3),
        "samples/s": {name: round(t.median, 2) for name, t in timings.items()},
        "loss": losses,
        "share_of_matrix_product": round(share, 3),
    }


def ours(trained: Pretrainer, pictures: Tensor, ids: list[Tensor], fused: bool) -> Step:
    """What a Pretrainer does in a step: hide, count, ask, backward, update."""
    reader: Any = trained.backbone.readers["image"]
    patches = rearrange(pictures, "b c (h p) (w q) -> b (h w) (p q c)", p=reader.patch, q=reader.patch)
    place = reader.example(1, 0)[0].position
    image = Tokens(patches, place.expand(len(patches), -1, -1))
    text = collate([{"text": Tokens(x, torch.arange(len(x), dtype=torch.int32)[:, None])} for x in ids], ["text"])["text"]
    seed = torch.arange(len(ids))
    batch = {"image": image, "text": text, "seed": seed, "sample": seed}
    optimizer = torch.optim.AdamW(Groups().of(trained), lr=1e-3, weight_decay=0.2, fused=fused)
    return stepping(trained, batch, optimizer)


def theirs(model: Any, pictures: Tensor, ids: list[Tensor]) -> Step:
    """open_clip's training loop (open_clip_train/train.py and main.py): its loss, its groups of AdamW, its bound of the scale."""
    import open_clip

    text = torch.stack([F.pad(x, (0, 77 - len(x))) for x in ids])
    still = [p for n, p in model.named_parameters() if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
    others = [p for p in model.parameters() if not any(p is q for q in still)]
    optimizer = torch.optim.AdamW([{"params": still, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.2}], lr=1e-3)
    score = open_clip.ClipLoss()

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = score(*model(pictures, text))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return loss.detach()

    return step


# --- memory: the loss alone


def whole(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """open_clip's own loss on unit vectors."""
    import open_clip

    return open_clip.ClipLoss()(a, b, scale)


def tiles(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Ours, as the objective calls it."""
    return softmax_both_ways(lambda x: scale * (x @ b.T), (a,), torch.arange(len(a)), len(b), 1 << 23) / len(a)


LOSSES = {OURS: tiles, PEER: whole}


def peak(row: str, pairs: int) -> str:
    """Of forward and backward of one loss in this process: mebibytes above what was there before, seconds, loss and gradient."""
    a, b = (F.normalize(random.normal(torch.tensor(k), (pairs, 64), "peak"), dim=-1).requires_grad_() for k in (0, 1))
    scale = torch.tensor(14.0, requires_grad=True)
    torch.autograd.grad(LOSSES[row](a[:8], b[:8], scale), (a, b))  # what only the first call needs
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    loss = LOSSES[row](a, b, scale)
    gradient, *_ = torch.autograd.grad(loss, (a, b, scale))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    seconds = time.perf_counter() - start
    found = {"MiB": round(used / 1024, 1), "seconds": round(seconds, 2), "loss": loss.item(), "gradient": gradient.norm().item()}
    return json.dumps(found)


def memory(quick: bool, repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Peak of the loss. The whole matrix of 32768 pairs would take tens of gigabytes: it is measured at fewer pairs and squared."""
    pairs, fewer = (4096, 2048) if quick else (32768, 8192)

    def run(row: str, n: int) -> dict[str, float]:
        command = [sys.executable, "-m", "benchmarks.speed.objectives", "--peak", row, str(n)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])

    found = {f"{row} {n}": run(row, n) for row, n in ((OURS, fewer), (PEER, fewer // 2), (PEER, fewer), (OURS, pairs))}
    ours, theirs = found[f"{OURS} {fewer}"], found[f"{PEER} {fewer}"]
    if not math.isclose(ours["loss"], theirs["loss"], rel_tol=1e-4) or not math.isclose(
        ours["gradient"], theirs["gradient"], rel_tol=1e-3
    ):
        raise AssertionError(f"the two losses differ: {ours} and {theirs}")
    needed = theirs["MiB"] * (pairs / fewer) ** 2
    share = found[f"{OURS} {pairs}"]["MiB"] / needed
    for name, row in found.items():
        print(f"memory: {name} pairs: {row}")
    print(f"memory: {'reached' if share <= 1 / 8 else 'missed'}: {share:.4f} of the whole matrix's {needed:.0f} MiB, allowed 1/8")
    return {}, {"rows": found, "pairs": pairs, "share_of_whole": round(share, 4), "whole_MiB_by_square": round(needed)}


PARTS: dict[str, Callable[[bool, int], tuple[dict[str, float], dict[str, Any]]]] = {
    "clip": clip,
    "mae": lightly_steps.mae,
    "dino": lightly_steps.dino,
    "memory": memory,
}

if __name__ == "__main__":
    main()
