"""A callback that writes down every batch: what a run saw, step by step, as sample ids and digests of all tensors."""

import hashlib
import json
import os
from pathlib import Path

import lightning.pytorch as pl

from headwater.tokens import Tokens


def digest(batch):
    """One hash of every tensor of a batch."""
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(set(batch) - {"faults"}):
        if isinstance(batch[name], dict):  # a batch within the batch
            state.update(digest(batch[name]).encode())
            continue
        for tensor in batch[name] if isinstance(batch[name], Tokens) else [batch[name]]:
            state.update(name.encode() if tensor is None else tensor.cpu().numpy().tobytes())
    return state.hexdigest()


class Recorder(pl.Callback):
    """Appends one JSON line per step and rank: step, rank, ids, digest. A kill leaves whole lines."""

    def __init__(self, file: str, weights: str | None = None) -> None:
        self.file, self.weights = Path(file), json.loads(weights) if weights else {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        line = {"step": trainer.global_step, "rank": trainer.global_rank, "ids": batch["sample"].tolist(), "digest": digest(batch)}
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, (json.dumps(line) + "\n").encode())
        os.close(descriptor)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if change := self.weights.get(str(trainer.global_step)):
            trainer.datamodule.reweigh(change)


def read(file):
    """step -> {rank: (ids, digest)}; asserts that a step that was made twice was made the same way."""
    seen = {}
    for line in Path(file).read_text().splitlines():
        one = json.loads(line)
        found = seen.setdefault(one["step"], {}).setdefault(one["rank"], (one["ids"], one["digest"]))
        assert found == (one["ids"], one["digest"]), f"step {one['step']} differed the second time"
    return seen
