"""The only LightningModule: it trains any model with any objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.distributed.tensor import DTensor

from headwater import distributed, fused, random
from headwater.init import Normal, factors, initialise
from headwater.model import Model, Reader
from headwater.objectives.objective import Batch, Objective, Schedule, Term, count, weighted_sum
from headwater.objectives.probe import Probe
from headwater.tokens import Tokens
from headwater.training.checkpoints import check_tensors
from headwater.training.fused_ops import Fused
from headwater.training.groups import Groups, check_options
from headwater.training.guard import Guard, unchanged
from headwater.training.meters import Meters
from headwater.training.schedules import Cosine
from headwater.training.sharding import Sharded, shard
from headwater.training.start import Start, ask_again, check_groups, record, settings


class Pretrainer(pl.LightningModule):
    """One optimizer step = one batch: every term is normalised by its number of targets in the whole step.

    A batch may be cut into `micro` pieces to save memory: numbers are counted over all pieces and all ranks first, and losses
    that compare samples get the whole batch's vectors with the activations of one piece at a time, so the result equals that
    of the uncut batch. That is why Lightning's own gradient accumulation is refused.

    Args:
        backbone: what is trained and exported.
        objective: built around the backbone; thrown away after training.
        optimizer: made from parameter groups; None = torch.optim.AdamW.
        schedule: factor on the learning rate as a function of progress; None = Cosine().
        micro: pieces per batch.
        clip: largest norm of the gradient; 0 = no bound.
        seed: of everything random outside the data.
        init: how parameters start (Normal, FanIn, MuP), as a function of `seed` alone, and how fast each learns; weights of other
            libraries stay. None = all stay as they were built or loaded. Recipes on the command line have Normal.
        groups: what is treated alike, with which rate and decay; None = Groups(): matrices decay, the rest does not.
        weight_decay: factor on the weight decay of every group as a function of progress; None = it stays.
        guard: what becomes of steps that are not finite, and of spikes; None = Guard().
        start: what is taken over from an earlier run; None = nothing.
    """

    trainer: Any  # Lightning's own annotation lacks datamodule

    def __init__(
        self,
        backbone: Model,
        objective: Callable[[Model], Objective],
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule | None = None,
        micro: int = 1,
        clip: float = 1.0,
        seed: int = 0,
        init: Normal | None = None,
        groups: Groups | None = None,
        weight_decay: Schedule | None = None,
        guard: Guard | None = None,
        start: Start | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.backbone, self.objective = backbone, objective(backbone)
        self.make_optimizer, self.groups = optimizer or torch.optim.AdamW, groups or Groups()
        self.schedule, self.weight_decay = schedule or Cosine(), weight_decay
        self.micro, self.clip, self.seed = micro, clip, seed
        self.backbone.chunks = micro
        self.init, self.guard, self.start = init, guard or Guard(), start
        self.asked: list[dict[str, Any]] = []  # settings of the optimizer, before schedules
        self.before: dict[str, Any] | None = None  # what a checkpoint that is resumed tells of its optimizer
        self.spent = 0.0  # share of the time that the run has
        self.step: Step | None = None
        if init is not None:
            initialise(self, seed, init)

    @property
    def readers(self) -> dict[str, Reader]:
        """Of every modality, every view that the objective asks for, and its labels."""
        every = {**self.backbone.readers, **self.objective.readers}
        return every | {name: every[name.partition("@")[0]] for name in self.objective.views}

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1: of its steps, or of `trainer.max_time` where that is further."""
        return self.share(self.global_step)

    def share(self, steps: int) -> float:
        """Progress after so many steps."""
        return min(1.0, max(self.spent, steps / self.trainer.max_steps if self.trainer.max_steps > 0 else 0.0))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = self.groups.of(self, factors(self, self.init))
        optimizer = self.make_optimizer(groups)
        check_options(optimizer, groups)
        self.asked = settings(optimizer)
        return optimizer

    def configure_callbacks(self) -> list[pl.Callback]:
        """The first hook that a Trainer calls: refuse its options that this module serves in its own way, and add meters,
        and kernels of NVIDIA's apex where it is installed."""
        if self.trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"found trainer.accumulate_grad_batches={self.trainer.accumulate_grad_batches}; a batch here is the whole "
                "optimizer step. Set model.micro to cut it into pieces with exact normalisation"
            )
        if self.trainer.gradient_clip_val:
            raise ValueError(
                f"found trainer.gradient_clip_val={self.trainer.gradient_clip_val}; set model.clip, the largest gradient norm"
            )
        usual = [Meters, *([] if fused.absent() else [Fused])]
        return [kind() for kind in usual if not any(isinstance(callback, kind) for callback in self.trainer.callbacks)]

    def configure_model(self) -> None:
        """Under FSDP2 the parameters are split over the ranks."""
        if isinstance(self.trainer.strategy, Sharded):
            shard(self, self.device_mesh["data_parallel"])  # type: ignore[index]

    def setup(self, stage: str) -> None:
        if stage == "fit":
            check_needs(self.objective, self.trainer.datamodule.provides)
            start = None if self.trainer.ckpt_path else self.start  # the checkpoint of a run that resumes has it all
            if start:
                start.model(self)
            self.objective.start(self.backbone)
            if start:
                start.rest(self)

    def on_fit_start(self) -> None:
        optimizer = self.trainer.optimizers[0]
        if self.start and not self.trainer.ckpt_path:
            self.start.optimizer(self, optimizer)
        if self.before:
            check_groups(self.before, record(self, optimizer, self.asked))

    def prepare(self, batch: Batch) -> Batch:
        """Floats and normalisation, or the codes of a tokeniser, on the device; of a batch within the batch likewise."""
        labels = {name: reader.prepare(batch[name]) for name, reader in self.objective.readers.items() if name in batch}
        within = {name: self.prepare(value) for name, value in batch.items() if isinstance(value, dict)}
        return self.backbone.prepare(batch) | labels | within

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.spent = time_spent(self.trainer)
        self.apply_schedules(optimizer)
        batch = {**batch, "progress": self.progress, "step": self.global_step}
        for form in self.backbone.forms:
            form.at(self.backbone, self.progress)
        optimizer.zero_grad()
        seed = random.seed_of(self.seed, self.global_step, self.global_rank)
        torch.manual_seed(seed)  # dropout too is a function of the step
        probe = Probe(self, self.backbone, self.call, seed, self.global_step, self.micro)
        batch = self.objective.before_step(probe, batch)
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
        self.step = Step(batch, pieces, means(totals, numbers), numbers, probe)
        optimizer.step()
        with nullcontext() if self.step.taken else unchanged(self):  # either way what it waits with is gone
            self.objective.after_step(self.backbone, self.progress)
        self.report(self.step, totals)
        self.report_data(batch)
        self.step = None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Guard and clip here: Lightning calls this after it has taken fp16's loss scale out of the gradients."""
        if self.step is None:
            return
        probe = self.step.probe
        probe.give(apart=False)
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm: Any = fused.gradient_norm(gradients)
        self.step.norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        scaled = self.trainer.precision == "16-mixed"  # where a scale that was too large is its scaler's affair
        if not scaled or self.step.norm.isfinite():
            self.step.taken = self.guard.allows(self, optimizer)
        if self.step.taken and self.clip:
            fused.scale_gradients(gradients, self.clip, norm)
        if self.step.taken:
            probe.give(apart=True, clip=self.clip)

    def call(self, function: Callable[[], Any]) -> Any:
        """What the function returns, which may use all weights."""
        return function()

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

    def apply_schedules(self, optimizer: torch.optim.Optimizer) -> None:
        """Rates and weight decay of the step that begins: those of its end, so that the last step has the last value."""
        progress = self.share(self.global_step + 1)
        rate = self.schedule(progress) * self.guard.factor(self.global_step)
        decay = 1.0 if self.weight_decay is None else self.weight_decay(progress)
        for group, asked in zip(optimizer.param_groups, self.asked, strict=True):
            group["lr"] = asked["lr"] * rate * group.get("factor", 1.0)
            if "weight_decay" in asked:
                group["weight_decay"] = asked["weight_decay"] * decay

    def report(self, step: Step, totals: dict[str, list[Term]]) -> None:
        """Log each term's mean over all its targets on all ranks, and the norm of the gradient before it was clipped."""
        for name, value in step.values.items():
            self.log(f"train/{name}", value, prog_bar=True)
            for key, metric in totals[name][-1].metrics.items():
                self.log(f"train/{name}/{key}", metric)
        for name, told in step.probe.told.items():
            self.log(f"train/{name}", told)
        if step.norm is not None:
            self.log("train/gradient_norm", step.norm)
        self.log("train/rate", max(group["lr"] for group in self.trainer.optimizers[0].param_groups))

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
        checkpoint["guard"] = self.guard.state_dict()
        if self.asked:
            checkpoint["optimizer"] = record(self, self.trainer.optimizers[0], self.asked)
            self.guard.remember(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "state_dict" in checkpoint:  # under FSDP2 the strategy has taken it out, and looked at it
            check_tensors(checkpoint["state_dict"], self)
        self.guard.load_state_dict(checkpoint["guard"])
        self.before = checkpoint["optimizer"]

    def on_train_start(self) -> None:
        if self.before:
            ask_again(self.trainer.optimizers[0], self.before["settings"], self.asked)
        self.guard.remember(self)
        self.learning(True)

    def on_train_end(self) -> None:
        self.learning(False)

    def learning(self, on: bool) -> None:
        """Optimizers that learn at one point and are judged at another, as schedule-free ones, move the weights between the two."""
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        if hasattr(optimizer, "train") and hasattr(optimizer, "eval"):
            (optimizer.train if on else optimizer.eval)()

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Pooled vectors of every modality, {"sample": (S,), modality: (S, dim)}; zeros where a sample lacks it."""
        out = {"sample": batch["sample"]}
        for name, pooled in self.backbone.represent({k: t for k, t in batch.items() if isinstance(t, Tokens)}).items():
            out[name] = pooled.x.new_zeros(len(batch["sample"]), pooled.x.shape[-1]).index_copy(0, pooled.sample, pooled.x)
        return out

    def on_validation_start(self) -> None:
        """Callbacks call parts of the model: under FSDP2 what is not in blocks is gathered for as long as they do."""
        if self.trainer.state.fn == "fit":
            self.learning(False)
        if isinstance(self.trainer.strategy, Sharded):
            self.unshard()  # type: ignore[operator]

    def on_validation_end(self) -> None:
        if isinstance(self.trainer.strategy, Sharded):
            self.reshard()  # type: ignore[operator]
        if self.trainer.state.fn == "fit":
            self.learning(True)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Evaluation callbacks read the batch; nothing is scored here."""

    test_step = validation_step


@dataclass
class Step:
    """One optimizer step: the batch of this rank, the pieces that the objective was asked, each term's mean over its targets on
    all ranks and how many these are, what was asked ahead of it, the norm of the gradient, and whether it is taken or left out
    by the guard."""

    batch: Batch
    pieces: list[Batch]
    values: dict[str, Tensor]
    numbers: dict[str, Tensor]
    probe: Probe
    norm: Tensor | None = None
    taken: bool = True


def means(totals: dict[str, list[Term]], numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each term over all its targets on all ranks: name -> ()."""
    local = [sum((t.total.detach().float() for t in terms), torch.zeros(())) for terms in totals.values()]
    sums = distributed.total(torch.stack(local))
    return {name: value / numbers[name].clamp(min=1) for name, value in zip(totals, sums, strict=True)}


def time_spent(trainer: Any) -> float:
    """Share of `trainer.max_time` that is over, by the clock of the first rank; 0 where there is no such limit."""
    for callback in trainer.callbacks:
        if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None:
            done = torch.tensor([callback.time_elapsed()], dtype=torch.float64, device=trainer.strategy.root_device)
            elapsed = float(distributed.gather(done)[0][0])
            return elapsed / (callback.time_elapsed() + left)
    return 0.0


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
