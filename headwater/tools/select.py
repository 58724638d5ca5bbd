"""Choose from a pool what helps a target: `headwater select runs/lm/000 'pool/*.tar' 'wanted/*.tar' chosen/ --keep 0.1`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from lightning.fabric.utilities.apply_func import move_data_to_device
from rich.console import Console
from torch import Tensor

from headwater.datamodules.collate import collate
from headwater.datamodules.sources import OpenSource, Source
from headwater.hub.audit import load_weights
from headwater.objectives.objective import Batch, Objective
from headwater.objectives.weighted import Weighted
from headwater.pretrainer import Pretrainer
from headwater.tools.built import built
from headwater.tools.copying import Copied, copy, local, report, staged
from headwater.tools.parts import opened, survey, with_prefixes
from headwater.tools.relabelling.heads import checkpoint_of
from headwater.training.ghost import Ghost
from headwater.training.influence import Measure, Target, aligned, draw, features, oracle, rank_correlation, ridge
from headwater.training.start import by_name, names

SCORES = "scores.parquet"
HELD_OUT = 0.2  # share of the probed samples on which the model that predicts influence is judged


def select(
    run: str,
    pool: str,
    target: str,
    out: str,
    by: Literal["cosine", "product", "oracle", "predicted"] = "cosine",
    keep: float = 0.1,
    temperature: float = 0.0,
    probes: int = 256,
    part: str | None = None,
    aim: str | None = None,
    layers: list[str] | None = None,
    wanted: int = 256,
    rows: int = 32,
    seed: int = 0,
    device: str = "cpu",
    samples: int = 10_000,
    overwrite: bool = False,
) -> None:
    """Score the samples of a pool by what they do for a target, and write those that do most as shards.

    The target's loss is that of the run's objective on the target's samples, or of another part of it, on labels for instance.
    `out` gets scores.parquet, with shard, key, score and whether it was chosen, and the chosen samples with their bytes as they
    are. Call it again with a later checkpoint for the next stage: what helps changes as the model learns.

    Args:
        run: a run folder, or a checkpoint in one.
        pool: the candidates: a tar, a folder, a glob, a brace range or a URL.
        target: samples of what the model shall be good at, likewise.
        out: folder for the scores and the new shards.
        by: cosine or product of a sample's gradient and the target's; oracle = drop of the target's loss after one step of the
            run's optimizer on the sample; predicted = told from its features by a model of the oracle's answers for some (MATES).
        keep: share of the pool that is written; 0 = only the scores.
        temperature: of the Gumbel noise on the scores, in their standard deviations; 0 = the best are taken.
        probes: samples of the pool that are asked about for `predicted`.
        part: of a Weighted objective, by which samples are learned; none = all of it.
        aim: of a Weighted objective, which the target is for; none = as `part`.
        layers: paths in the backbone whose gradients count; none = all.
        wanted: most samples of the target.
        rows: samples that go through the model at a time.
        seed: of what is drawn.
        device: of the model.
        samples: samples per shard.
        overwrite: replace the shards that `out` holds.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"found keep={keep}; expected a share from 0 to 1")
    if wanted < 1 or rows < 1 or probes < 10:
        raise ValueError(f"found wanted={wanted}, rows={rows}, probes={probes}; expected 1 or more, 1 or more, and 10 or more")
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    pretrainer, optimizer = trained(run, device)
    learned, sought = (part_of(pretrainer.objective, name) for name in (part, aim or part))
    candidates = Reading(pretrainer, learned, pool, rows, seed)
    aims = Reading(pretrainer, sought, target, rows, seed)
    goal = Target(pretrainer.backbone, sought, [batch for _, batch in aims.batches(np.arange(min(wanted, aims.source.total)))])
    start = time.perf_counter()
    known = torch.full((candidates.source.total,), torch.nan, dtype=torch.float64)
    if by in ("cosine", "product"):
        scores = by_gradient(candidates, learned, goal, "cosine" if by == "cosine" else "product", layers)
    else:
        every = torch.arange(len(known))
        asked = every if by == "oracle" else draw(torch.zeros(len(known)), min(probes, len(known)), 1.0, seed)
        for index, batch in candidates.batches(asked.numpy()):
            known[index] = oracle(learned, goal, [batch], optimizer)
        scores = known if by == "oracle" else predicted(candidates, known, seed, console)
    spent, count = time.perf_counter() - start, int(scores.isfinite().sum())
    if not count:
        raise ValueError(f"found no sample in {pool} that can be read and has all of {', '.join(learned.needs)}")
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[draw(scores, round(keep * count), temperature, seed)] = True
    write(candidates, {"score": scores, "oracle": known, "chosen": chosen}, Path(out), samples, overwrite, console)
    left = f"; {len(scores) - count:,} lack something" if count < len(scores) else ""
    console.print(f"{count:,} samples scored by {by} in {spent:.1f} s, {1000 * spent / count:.1f} ms each{left}")


def trained(run: str, device: str = "cpu") -> tuple[Pretrainer, torch.optim.Optimizer]:
    """What a run trained, and its optimizer, as its newest checkpoint has them; rates are those of the recipe."""
    checkpoint = checkpoint_of(run)
    config = checkpoint.parent.parent / "config.yaml"
    if not config.is_file():
        raise FileNotFoundError(f"found no recipe at {config}, which tells what the run trains; give the folder of a run")
    found = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
    pretrainer = built({"model": yaml.safe_load(config.read_text(encoding="utf-8"))["model"]}, "cpu")
    for name in ("backbone", "objective"):
        module = getattr(pretrainer, name)
        weights = {key.removeprefix(f"{name}."): w for key, w in found["state_dict"].items() if key.startswith(f"{name}.")}
        if module.state_dict():
            load_weights(module, weights)
    pretrainer.to(device)
    optimizer = pretrainer.configure_optimizers()
    states, _ = by_name(found["optimizer"], found["optimizer_states"][0])
    whole, every = optimizer.state_dict(), chain.from_iterable(names(optimizer, dict(pretrainer.named_parameters())))
    whole["state"] = {number: deepcopy(states[name]) for number, name in enumerate(every) if name in states}
    optimizer.load_state_dict(whole)
    return pretrainer, optimizer


def part_of(objective: Objective, name: str | None) -> Objective:
    """A part of a Weighted objective; None = the objective itself."""
    if name is None:
        return objective
    parts = dict(objective.parts.items()) if isinstance(objective, Weighted) else {}
    if name not in parts:
        raise ValueError(f"found no part {name!r} of the objective; it has {', '.join(parts) or 'none'}")
    return parts[name]


class Reading:
    """The samples of shards in the order of the files, as batches that an objective can be asked about."""

    def __init__(self, pretrainer: Pretrainer, objective: Objective, shards: str, rows: int, seed: int) -> None:
        needs = (*objective.needs, *objective.readers)
        source = OpenSource("pool", Source(shards), pretrainer.readers, seed, 0, views=objective.views, needs=needs)
        if lacking := [name for name in objective.needs if name not in source.readers]:
            raise ValueError(f"found {', '.join(source.members)} in {shards}; the objective needs {', '.join(lacking)} too")
        self.pretrainer, self.source, self.rows = pretrainer, source, rows

    def batches(self, index: np.ndarray) -> Iterator[tuple[Tensor, Batch]]:
        """Prepared batches of these samples, each with their numbers; those that lack something are left out."""
        names = list(self.source.readers)
        for start in range(0, len(index), self.rows):
            here = index[start : start + self.rows]
            read = zip(here.tolist(), self.source.read(here), strict=True)
            whole = [(number, one) for number, one in read if set(names) <= set(one.sample)]
            if not whole:
                continue
            batch: dict[str, Any] = collate([one.sample for _, one in whole], names)
            batch["seed"] = torch.tensor([one.seed for _, one in whole])
            batch["sample"] = torch.tensor([one.number for _, one in whole])
            batch = move_data_to_device(batch, self.pretrainer.device)
            yield torch.tensor([number for number, _ in whole]), self.pretrainer.prepare(batch)


def by_gradient(
    candidates: Reading, objective: Objective, target: Target, by: Measure, layers: Sequence[str] | None = None
) -> Tensor:
    """(K,) how the gradient of every sample agrees with the target's, NaN where a sample lacks something."""
    ghost = Ghost(target.model, objective, layers)
    scores, reference = torch.full((candidates.source.total,), torch.nan, dtype=torch.float64), target.gradient(ghost.names)
    for number, (index, batch) in enumerate(candidates.batches(np.arange(len(scores)))):
        if number == 0:
            ghost.check(batch)
        scores[index] = aligned(ghost, reference, [batch], by).cpu()
    return scores


def predicted(candidates: Reading, known: Tensor, seed: int, console: Console) -> Tensor:
    """(K,) the oracle's answers as a model of the features tells them, fitted to those that are known (K,), elsewhere NaN."""
    model = candidates.pretrainer.backbone
    found = [(index, features(model, batch).cpu()) for index, batch in candidates.batches(np.arange(len(known)))]
    index, x = torch.cat([numbers for numbers, _ in found]), torch.cat([vectors for _, vectors in found])
    probed = known[index].isfinite().nonzero()[:, 0]
    apart = torch.zeros(len(index), dtype=torch.bool)
    apart[probed[draw(torch.zeros(len(probed)), round(HELD_OUT * len(probed)), 1.0, seed + 1)]] = True
    others = probed[~apart[probed]]
    told = rank_correlation(ridge(x[others], known[index[others]])(x[apart]), known[index[apart]])
    console.print(f"features tell the oracle's answers with a rank correlation of {told:.2f} on {int(apart.sum())} others")
    scores = torch.full_like(known, torch.nan)
    scores[index] = ridge(x[probed], known[index[probed]])(x)
    return scores


def write(candidates: Reading, columns: dict[str, Tensor], out: Path, samples: int, overwrite: bool, console: Console) -> None:
    """The columns, (K,) each, as scores.parquet with the shard and key of every sample, and those that are `chosen` as shards."""
    import pyarrow as pa
    from pyarrow import parquet

    source = candidates.source
    paths = [card.path for card in source.cards]
    keys = [opened(path).keys for path in paths]
    named = {"shard": np.repeat(paths, [len(own) for own in keys]), "key": pa.chunked_array(keys, pa.string())}
    kept = np.split(columns["chosen"].numpy(), source.order.before[1:-1])
    with staged(local(str(out)), paths, overwrite) as folder:
        parquet.write_table(pa.table(named | {name: pa.array(x.numpy()) for name, x in columns.items()}), folder / SCORES)
        copied = Copied(Counter(), Counter(), Counter(), [])
        parts = with_prefixes([survey(path).only(mine) for path, mine in zip(paths, kept, strict=True)])
        copy(parts, folder, lambda part, key: "chosen", samples, 1 << 30, "none", copied)
        report(copied, folder, out, console)
