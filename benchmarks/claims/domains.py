"""Two domains of real text for claims about what is forgotten: English prose, and program code, both from Python's own library.

The prose is that of `prose.py`, the code is every function of the standard library without its docstring and comments. A small
language model over bytes learns the first and goes on with the second.
"""

from __future__ import annotations

import ast
import logging
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.claims import trial
from benchmarks.claims.prose import SKIPPED, divided, members, prose
from headwater import init
from headwater.datamodules.datamodule import ShardDataModule
from headwater.datamodules.sources import Source
from headwater.modalities import Text
from headwater.model import Model
from headwater.objectives import Causal, Objective
from headwater.pretrainer import Pretrainer
from headwater.trunk import Trunk

LENGTH = 48
HELD_OUT = {"old": "old test", "new": "new test", "known": "known"}
Texts = dict[str, list[str]]  # "old" and "new" to learn from, "old test" and "new test" from other documents


@lru_cache(maxsize=1)
def modules() -> list[str]:
    """Every module of the standard library as the code of its functions, on any machine with this Python in one order."""
    root, found = Path(sysconfig.get_path("stdlib")), []
    for path in sorted(p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts)):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for node in functions:
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        found.append("\n\n".join(ast.unparse(node) for node in functions))
    return [text for text in found if text]


def code(seed: int, length: int, held_out: float = 0.1) -> tuple[list[str], list[str]]:
    """Passages to train on, and passages of other modules, each in an order that the seed draws; see `prose`."""
    return divided(modules(), seed, length, held_out)


@contextmanager
def written(texts: Texts) -> Iterator[dict[str, str]]:
    """All sets as shards for a while: name -> pattern. Some of the old passages that were learned from are "known"."""
    with ExitStack() as stack:
        sets = {**texts, "known": texts["old"][:1024]}
        yield {name: stack.enter_context(trial.written(members(given))) for name, given in sets.items()}


def domains(seed: int, quick: bool = False) -> Texts:
    """Passages of both, to learn from and of other documents."""
    most, test = (500, 64) if quick else (24000, 1024)
    (old, old_test), (new, new_test) = prose(seed, LENGTH - 1), code(seed, LENGTH - 1)
    return {"old": old[:most], "new": new[:most], "old test": old_test[:test], "new test": new_test[:test]}


def writer(seed: int) -> Model:
    """A language model over bytes with first weights of its own."""
    model = Model({"text": Text(Trunk(64, 2, 2, "rotary", norm="rms", activation="silu", gated=True), length=LENGTH)})
    init.initialise(model, seed, init.Normal())
    return model


def learned(
    model: Model,
    shards: Mapping[str, str],
    shares: Mapping[str, float],
    steps: int,
    seed: int,
    rate: float,
    schedule: Callable[[float], float] | None = None,
    objective: Callable[[Model], Objective] = Causal,
    callbacks: Sequence[pl.Callback] = (),
    batch_size: int = 32,
    resume: str | None = None,
) -> Pretrainer:
    """Train in place on a mixture, as `headwater fit` does; callbacks find the held-out sources "old", "new" and "known".

    shards: of `written`. shares: "old" and "new" -> share of the samples; one that is missing is left out.
    """
    optimizer = partial(torch.optim.AdamW, lr=rate, weight_decay=0.05, betas=(0.9, 0.95))
    pretrainer = Pretrainer(model, objective, optimizer, schedule=schedule, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = ShardDataModule(
            train={name: Source(shards[name], weight=share) for name, share in shares.items()},
            held_out={name: Source(shards[where]) for name, where in HELD_OUT.items()},
            batch_size=batch_size,
            unit="sample",
            workers=0,
            notice=1,
            seed=seed,
        )
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            callbacks=list(callbacks),
            enable_model_summary=False,
            use_distributed_sampler=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            **quiet,
        )
        trainer.fit(pretrainer, data, ckpt_path=resume, weights_only=True)
    pretrainer.eval()
    return pretrainer


@torch.no_grad()
def nats(model: Model, texts: Sequence[str]) -> float:
    """Mean of next-byte prediction over held-out passages."""
    objective, reader = Causal(model.eval()), model.encoder("text").reader
    batch = {"text": trial.signals(reader, members(texts)), "seed": torch.arange(len(texts))}
    term = objective(model, objective.task(batch))["causal"]
    return float(term.total / term.number)
