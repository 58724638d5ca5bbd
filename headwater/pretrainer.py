"""The only LightningModule: it trains any model with any objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from headwater import distributed, random
from headwater.init import Normal, factors, initialise
from headwater.model import Model, Reader
from headwater.objectives.objective import Batch, Objective, Term, weighted_sum
from headwater.tokens import Tokens
from headwater.training.meters import Meters
from headwater.training.schedules import Cosine
from headwater.training.sharding import Sharded, shard


class Pretrainer(pl.LightningModule):
    """One optimizer step = one batch: every term is normalised by its number of targets in the whole step.

    A batch may be cut into `micro` pieces to save memory: numbers are counted over all pieces and all ranks first, and losses
    that compare samples get the whole batch's vectors with the activations of one piece at a time, so the result equals that
    of the uncut batch. That is why Lightning's own gradient accumulation is refused.

    Args:
        backbone: what is trained and exported.
        objective: built around the backbone; thrown away after training.
        optimizer: made from parameter groups.
        schedule: factor on the learning rate as a function of progress; None = Cosine().
        micro: pieces per batch.
        clip: largest norm of the gradient; 0 = no bound.
        seed: of everything random outside the data.
        init: how parameters start (Normal, FanIn, MuP), as a function of `seed` alone, and how fast each learns; weights of other
            libraries stay. None = all stay as they were built or loaded. Recipes on the command line have Normal.
    """

    trainer: Any  # Lightning's own annotation lacks datamodule

    def __init__(
        self,
        backbone: Model,
        objective: Callable[[Model], Objective],
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Callable[[float], float] | None = None,
        micro: int = 1,
        clip: float = 1.0,
        seed: int = 0,
        init: Normal | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.backbone, self.objective = backbone, objective(backbone)
        self.make_optimizer, self.schedule = optimizer, schedule or Cosine()
        self.micro, self.clip, self.seed = micro, clip, seed
        self.backbone.chunks = micro
        self.init = init
        if init is not None:
            initialise(self, seed, init)

    @property
    def readers(self) -> dict[str, Reader]:
        """Of every modality, every view that the objective asks for, and its labels."""
        every = {**self.backbone.readers, **self.objective.readers}
        return every | {name: every[name.partition("@")[0]] for name in self.objective.views}

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        return min(1.0, self.global_step / max(1, self.trainer.max_steps))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(decay_groups(self, factors(self, self.init)))

    def configure_callbacks(self) -> list[pl.Callback]:
        """The first hook that a Trainer calls: refuse its options that this module serves in its own way, and add meters."""
        if self.trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"found trainer.accumulate_grad_batches={self.trainer.accumulate_grad_batches}; a batch here is the whole "
                "optimizer step. Set model.micro to cut it into pieces with exact normalisation"
            )
        if self.trainer.gradient_clip_val:
            raise ValueError(
                f"found trainer.gradient_clip_val={self.trainer.gradient_clip_val}; set model.clip, the largest gradient norm"
            )
        return [] if any(isinstance(callback, Meters) for callback in self.trainer.callbacks) else [Meters()]

    def configure_model(self) -> None:
        """Under FSDP2 the parameters are split over the ranks."""
        if isinstance(self.trainer.strategy, Sharded):
            shard(self, self.device_mesh["data_parallel"])  # type: ignore[index]

    def setup(self, stage: str) -> None:
        if stage == "fit":
            check_needs(self.objective, self.trainer.datamodule.provides)
            self.objective.start(self.backbone)

    def prepare(self, batch: Batch) -> Batch:
        """Floats and normalisation, or the codes of a tokeniser, on the device."""
        labels = {name: reader.prepare(batch[name]) for name, reader in self.objective.readers.items() if name in batch}
        return self.backbone.prepare(batch) | labels

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(random.seed_of(self.seed, self.global_step, self.global_rank))  # dropout too is a function of the step
        optimizer: Any = self.optimizers()
        self.apply_schedule(optimizer)
        batch = {**batch, "progress": self.progress, "step": self.global_step}
        optimizer.zero_grad()
        pieces = [self.hide(piece) for piece in self.objective.pieces(batch, self.micro)]
        numbers = count([self.objective.numbers(piece) for piece in pieces])
        totals: dict[str, list[Term]] = {name: [] for name in numbers}
        alone = distributed.world() == 1 or isinstance(self.trainer.strategy, Sharded)  # no gradients, or shares of them, to add up
        with explain_memory(batch):
            for number, piece in enumerate(pieces):
                last = number == len(pieces) - 1
                with nullcontext() if last or alone else self.trainer.strategy.block_backward_sync():
                    terms = self.ask(piece)
                    loss = weighted_sum(terms, numbers, distributed.world())
                    self.manual_backward(self.touch_all(loss) if last and not alone and len(pieces) > 1 else loss)
                for name, term in terms.items():
                    totals[name].append(term)
        optimizer.step()
        self.objective.after_step(self.backbone, self.progress)
        self.report(totals, numbers)
        self.report_data(batch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip here: Lightning calls this after it has taken fp16's loss scale out of the gradients."""
        if self.clip:
            self.clip_gradients(optimizer, self.clip, "norm")

    def hide(self, batch: Batch) -> Batch:
        """The objective's task, without gradient."""
        with torch.no_grad():
            return self.objective.task(batch, self.objective.look(self.backbone, batch))

    def ask(self, batch: Batch) -> dict[str, Term]:
        """The objective's terms."""
        return self.objective(self.backbone, batch)

    def touch_all(self, loss: Tensor) -> Tensor:
        """Zero times every parameter: DDP must reduce what only earlier micro-batches used, and learns of it in the last."""
        return loss + 0 * torch.stack([p.sum() for p in self.parameters() if p.requires_grad and p.grad is not None]).sum()

    def apply_schedule(self, optimizer: torch.optim.Optimizer) -> None:
        progress = (self.global_step + 1) / max(1, self.trainer.max_steps)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * self.schedule(progress) * group.get("factor", 1.0)

    def report(self, totals: dict[str, list[Term]], numbers: dict[str, Tensor]) -> None:
        """Log each term's mean over all its targets on all ranks."""
        local = [sum((t.total.detach().float() for t in terms), torch.zeros(())) for terms in totals.values()]
        sums = distributed.total(torch.stack(local))
        for name, value in zip(totals, sums, strict=True):
            self.log(f"train/{name}", value / numbers[name].clamp(min=1), prog_bar=True)
            for key, metric in totals[name][-1].metrics.items():
                self.log(f"train/{name}/{key}", metric)

    def report_data(self, batch: Batch) -> None:
        """Log the share of samples that each source gave, and of this rank's places that real tokens fill."""
        for name, share in self.trainer.datamodule.shares().items():
            self.log(f"data/share/{name}", share)
        for name, t in batch.items():
            if isinstance(t, Tokens) and t.valid is not None:
                self.log(f"data/filled/{name}", t.valid.float().mean())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """How to make the backbone again, so that its weights can be loaded from a checkpoint alone."""
        checkpoint["model"] = self.backbone.spec

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Pooled vectors of every modality, {"sample": (S,), modality: (S, dim)}; zeros where a sample lacks it."""
        out = {"sample": batch["sample"]}
        for name, pooled in self.backbone.represent({k: t for k, t in batch.items() if isinstance(t, Tokens)}).items():
            out[name] = pooled.x.new_zeros(len(batch["sample"]), pooled.x.shape[-1]).index_copy(0, pooled.sample, pooled.x)
        return out

    def on_validation_start(self) -> None:
        """Callbacks call parts of the model: under FSDP2 what is not in blocks is gathered for as long as they do."""
        if isinstance(self.trainer.strategy, Sharded):
            self.unshard()  # type: ignore[operator]

    def on_validation_end(self) -> None:
        if isinstance(self.trainer.strategy, Sharded):
            self.reshard()  # type: ignore[operator]

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Evaluation callbacks read the batch; nothing is scored here."""

    test_step = validation_step


@contextmanager
def explain_memory(batch: Batch) -> Iterator[None]:
    """Out of memory names the batch, its tokens and what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
            raise
        shapes = {name: tuple(t.position.shape[:2]) for name, t in batch.items() if isinstance(t, Tokens)}
        raise MemoryError(
            f"out of memory with {len(batch['sample'])} samples on this rank, tokens (rows, length): {shapes}. "
            "Lower data.batch_size, raise model.micro (pieces per batch, same result), or shorten the signals (size, frames, "
            f"seconds or length of the encoders). The allocator said: {str(error).splitlines()[0]}"
        ) from error


def decay_groups(module: nn.Module, factors: dict[str, float] | None = None) -> list[dict]:
    """Matrices decay; vectors, scalars and embeddings do not. Every trainable parameter is in exactly one group.

    factors: parameter -> factor on its learning rate, which its group keeps as "factor"; 1 where a name is missing.
    """
    still = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for name, p in module.named_parameters():
        if p.requires_grad:
            groups.setdefault((p.ndim > 1 and id(p) not in still, (factors or {}).get(name, 1.0)), []).append(p)
    decay: dict[bool, dict] = {True: {}, False: {"weight_decay": 0.0}}
    return [{"params": p, **decay[decays], **({} if f == 1 else {"factor": f})} for (decays, f), p in groups.items()]


def count(numbers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Targets per term, over pieces and ranks."""
    local: dict[str, Tensor] = {}
    for piece in numbers:
        for name, number in piece.items():
            local[name] = local.get(name, 0) + number.long()
    return dict(zip(local, distributed.total(torch.stack(list(local.values()))), strict=True))


def check_needs(objective: Objective, provides: dict[str, tuple[str, ...]]) -> None:
    """Every objective, or every part of a weighted one, finds all its modalities in one source; every source serves one."""
    parts = getattr(objective, "parts", {"objective": objective})
    for name, part in parts.items():
        if not any(set(part.needs) <= set(given) for given in provides.values()):
            raise ValueError(
                f"{name} ({type(part).__name__}) needs {', '.join(part.needs)} in one sample, but the data provides "
                + "; ".join(f"{source}: {', '.join(given)}" for source, given in provides.items())
                + ". Add shards with these members, or take the objective out"
            )
    for source, given in provides.items():
        if not any(set(part.needs) <= set(given) for part in parts.values()):
            raise ValueError(
                f"source {source} provides {', '.join(given)}, which serves no objective: "
                + "; ".join(f"{name} needs {', '.join(part.needs)}" for name, part in parts.items())
                + ". Take the source out, or add an objective that uses it"
            )
