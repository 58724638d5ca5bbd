"""A language model beside transformers' GPT-2 and Llama of the same shape, start, data and order: speed, memory, bits per byte.

    OMP_WAIT_POLICY=passive python -m benchmarks.speed.lm [--quick] [--steps N] [--threads N]

Every pair (ours and its peer) starts from equal weights and takes the same batches of real prose in turns, step by step. The
speed is the median over steps of the ratio of their times; bits per byte are of passages of other documents. Peak memory is that
of a process of its own. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims.prose import prose
from benchmarks.speed.race import OURS, stepping
from benchmarks.speed.trunk import clock
from headwater.hub.transformers_models import from_transformers
from headwater.modalities.text import TextReader
from headwater.model import Model
from headwater.objectives import Causal
from headwater.pretrainer import Pretrainer
from headwater.tokens import Tokens
from headwater.tools.tokenizer import tokenizer
from headwater.training.groups import Groups
from headwater.training.schedules import Cosine

SHAPE = {"vocab": 8192, "length": 256, "width": 256, "depth": 6, "heads": 4, "rows": 16}
QUICK = {"vocab": 512, "length": 32, "width": 32, "depth": 2, "heads": 2, "rows": 4}
PEERS = ("gpt2", "llama")
RATE = 2e-3
SPEED, MEMORY, QUALITY = 1.15, 0.5, 1.01  # at least, at most, at most, beside the peer


def main(words: list[str] | None = None) -> None:
    """Train the pairs, measure memory, print verdicts and one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.lm", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, few steps: does it run, not how fast")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--threads", type=int, default=1, help="of torch, on both sides")
    parser.add_argument("--peak", nargs=2, metavar=("KIND", "ROW"), help="print the peak memory of a few steps and end")
    asked = parser.parse_args(words)
    torch.set_num_threads(asked.threads)
    shape, steps = (QUICK, 4) if asked.quick else (SHAPE, asked.steps)
    if asked.peak:
        print(peak(*asked.peak, shape))
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, threads {asked.threads}")
    train, test = batches(shape, steps)
    found: dict[str, Any] = {"bench": "lm", "ratios": {}, "steps": steps, "threads": asked.threads, "shape": shape}
    for kind in PEERS:
        found[kind] = compare(kind, shape, train, test, ["--quick"] * asked.quick)
        found["ratios"][f"transformers_{kind}"] = found[kind]["speed"]
    found["ratios"]["transformers"] = found["ratios"]["transformers_gpt2"]
    print(json.dumps(found))


def compare(kind: str, shape: dict[str, int], train: Tensor, test: Tensor, options: Sequence[str]) -> dict[str, Any]:
    """One pair: speed, bits per byte and peak memory, of ours and of the peer."""
    ours, theirs = pair(kind, shape)
    rows = {OURS: our_step(ours), kind: their_step(theirs)}
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for number, batch in enumerate(train):
        rate = RATE * Cosine(0.05)((number + 1) / len(train))
        for name in list(rows) if number % 2 == 0 else list(rows)[::-1]:
            seconds[name].append(clock(partial(rows[name], batch, rate), 1, "cpu"))
    used = seconds[OURS][1:], seconds[kind][1:]  # the first step only warms up
    speed = statistics.median(b / a for a, b in zip(*used, strict=True))
    bits = {OURS: our_bits(ours, test), kind: their_bits(theirs, test)}
    memory = {name: measured(kind, name, options) for name in rows}
    share = memory[OURS] / memory[kind]
    say(f"{kind}: speed", speed, SPEED, speed >= SPEED)
    say(f"{kind}: bits per byte", bits[OURS] / bits[kind], QUALITY, bits[OURS] <= QUALITY * bits[kind])
    say(f"{kind}: peak memory", share, MEMORY, share <= MEMORY)
    return {
        "speed": round(speed, 3),
        "seconds": {name: round(statistics.median(s[1:]), 4) for name, s in seconds.items()},
        "bits_per_byte": {name: round(b, 4) for name, b in bits.items()},
        "MiB": memory,
        "share_of_memory": round(share, 3),
        "parameters": sum(p.numel() for p in theirs.parameters()),
    }


def say(what: str, found: float, target: float, held: bool) -> None:
    """A verdict for people."""
    print(f"{what}: {found:.3f} x the peer's, target {target}: {'reached' if held else 'missed'}")


# --- data


@lru_cache(maxsize=1)
def encoded(vocab: int) -> tuple[Tensor, Tensor, float]:
    """Ids of all training passages and of all others, joined, each ended by the reader's mark; and bytes per id of the others."""
    texts = prose(0, 1024)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "train.txt"), Path(folder, "tokenizer.json")
        source.write_text("\n".join(" ".join(text.split()) for text in texts[0]))
        tokenizer(str(source), str(target), size=vocab - 1)
        reader = TextReader(str(target), 1 << 20)
        train, test = (torch.cat([reader.tokens(text).x for text in part]) for part in texts)
    return train, test, sum(len(text.encode()) + 1 for text in texts[1]) / len(test)


def batches(shape: dict[str, int], steps: int) -> tuple[Tensor, Tensor]:
    """Windows of ids in an order drawn once: (steps, rows, length) to train on and (S, length) of other documents."""
    train, test, _ = encoded(shape["vocab"])
    windows = train[: len(train) // shape["length"] * shape["length"]].view(-1, shape["length"])
    order = torch.cat([torch.randperm(len(windows), generator=torch.Generator().manual_seed(k)) for k in range(1000)])
    order = order[: steps * shape["rows"]].view(steps, shape["rows"])
    held = test[: len(test) // shape["length"] * shape["length"]].view(-1, shape["length"])
    return windows[order], held[: 4 * shape["rows"]] if shape is QUICK else held


# --- models


def pair(kind: str, shape: dict[str, int]) -> tuple[Model, Any]:
    """A fresh model of transformers, and ours with its weights. The id before a row is the last of the vocabulary."""
    import transformers

    torch.manual_seed(0)
    start, common = shape["vocab"] - 1, {"vocab_size": shape["vocab"], "tie_word_embeddings": True}
    common |= {"bos_token_id": start, "eos_token_id": start}
    if kind == "gpt2":
        sizes = {"n_embd": shape["width"], "n_layer": shape["depth"], "n_head": shape["heads"], "n_positions": shape["length"] + 1}
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        peer: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **still, **common))
    else:
        hidden = int(8 / 3 * shape["width"] / 32) * 32
        sizes = {"hidden_size": shape["width"], "num_hidden_layers": shape["depth"], "num_attention_heads": shape["heads"]}
        sizes |= {"intermediate_size": hidden, "max_position_embeddings": shape["length"] + 1}
        peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **common))
    reader = TextReader(length=shape["length"], vocab=shape["vocab"])
    return from_transformers(peer, {"text": reader}).model.train(), peer.train()


def our_step(model: Model) -> Any:
    """A batch of ids and a rate -> one step of the Pretrainer."""
    trained = Pretrainer(model, Causal)
    optimizer = torch.optim.AdamW(Groups().of(trained), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95), fused=True)

    def step(ids: Tensor, rate: float) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = rate
        return stepping(trained, tokens(ids), optimizer, clip=1.0)()

    return step


def their_step(model: Any) -> Any:
    """The same with the model's own loss. It drops the first id of the labels, which is why one stands before them."""
    groups = Groups().of(model)
    optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=0.1, betas=(0.9, 0.95), fused=True)

    def step(ids: Tensor, rate: float) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        started = begun(model, ids)
        loss = model(input_ids=started, labels=started, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step


def tokens(ids: Tensor) -> dict[str, Any]:
    """A batch as the loader gives it where nothing is padded."""
    place = torch.arange(ids.shape[1], dtype=torch.int32)[None, :, None].expand(*ids.shape, 1)
    return {"text": Tokens(ids, place), "seed": torch.arange(len(ids)), "sample": torch.arange(len(ids))}


def begun(model: Any, ids: Tensor) -> Tensor:
    """Ids behind the mark that begins every row."""
    return torch.cat([torch.full_like(ids[:, :1], model.config.bos_token_id), ids], 1)


@torch.no_grad()
def our_bits(model: Model, test: Tensor) -> float:
    """Bits per byte of ids (S, N)."""
    objective = Causal(model.eval())
    terms = [objective(model, objective.task(tokens(ids)))["causal"] for ids in test.split(32)]
    return as_bits(sum(float(t.total) for t in terms) / test.numel(), model.encoder("text").vocab)


@torch.no_grad()
def their_bits(model: Any, test: Tensor) -> float:
    model.eval()
    total = sum(float(model(input_ids=(x := begun(model, ids)), labels=x).loss) * ids.numel() for ids in test.split(32))
    return as_bits(total / test.numel(), model.config.vocab_size)


def as_bits(nats: float, vocab: int | None) -> float:
    """Nats per id -> bits per byte."""
    return nats / math.log(2) / encoded(int(vocab or 0))[2]


# --- memory


def peak(kind: str, row: str, shape: dict[str, int]) -> float:
    """Mebibytes that three steps take at most above the models, which lie there on both sides."""
    ours, theirs = pair(kind, shape)
    step = our_step(ours) if row == OURS else their_step(theirs)
    ids = torch.randint(shape["vocab"] - 1, (shape["rows"], shape["length"]), generator=torch.Generator().manual_seed(0))
    step(ids[:1, :8], 0.0)  # what only the first step needs: states of the optimizer, kernels
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = held("VmRSS")
    for _ in range(3):
        step(ids, 0.0)
    return round(max(1, held("VmHWM") - before) / 1024, 1)


def held(what: str) -> int:
    """Memory of this process in KiB, now (VmRSS) or at most (VmHWM); Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def measured(kind: str, row: str, options: Sequence[str]) -> float:
    """`peak` in a process of its own, which gives back what it frees."""
    command = [sys.executable, "-m", "benchmarks.speed.lm", "--peak", kind, row, *options]
    eager = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=eager).stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
