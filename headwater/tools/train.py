"""LightningCLI with a run folder: `headwater fit|validate|test|predict`."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import sys
import warnings
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from safetensors.torch import save_file

from headwater.datamodules.datamodule import ShardDataModule
from headwater.evaluation.results import by_sample
from headwater.pretrainer import Pretrainer
from headwater.tools import stages as plan
from headwater.tools.built import INIT, built, explain
from headwater.tools.changes import tell_changes
from headwater.tools.run_folder import CHECKPOINTS, LAST, SUMMARY, RunFolder, is_unused, new_folder, results_of, show, unfinished
from headwater.training.board import Board
from headwater.training.checkpoints import newest
from headwater.training.metrics import MetricsFile
from headwater.training.progress import Progress
from headwater.training.watchdog import Watchdog, end_with_parent

STEPS = 1000  # of a run that does not say how many
FOLDER = "HEADWATER_RUN"  # tells the other ranks of a run which folder the first one made


class HeadwaterCLI(LightningCLI):
    """Adds the run folder and --resume, and lets two devices mean DDP that allows unused encoders.

    Args:
        given: the command line.
        stage: of a plan: its folder, and whether to go on from what is in it. None = as --resume says.
    """

    def __init__(self, given: list[str], stage: tuple[Path, bool] | None = None) -> None:
        self.given, self.stage = given, stage
        warnings.filterwarnings(
            "ignore", message=".*args parameter is intended to run from within Python.*"
        )  # stages have their own
        super().__init__(
            Pretrainer,
            ShardDataModule,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=given,
            trainer_defaults={
                "max_steps": STEPS,
                "check_val_every_n_epoch": None,
                "val_check_interval": None,
                "num_sanity_val_steps": 0,
                "limit_val_batches": None,
                "log_every_n_steps": 5,
                "enable_model_summary": False,
                "enable_checkpointing": False,
                "use_distributed_sampler": False,
            },
        )

    def init_parser(self, **kwargs):
        """Errors come back as exceptions: `headwater.cli` prints them as one message."""
        return super().init_parser(exit_on_error=False, **kwargs)

    def add_arguments_to_parser(self, parser) -> None:
        """--resume, --runs, --stage and those about checkpoints beside Lightning's own."""
        parser.add_argument(
            "--resume", type=str | None, default=None, help="go on with the newest unfinished run, or with this one"
        )
        parser.add_argument("--runs", type=str, default="runs", help="folder of all run folders")
        parser.add_argument("--out", type=str, default="predictions", help="folder that `predict` writes to")
        parser.add_argument("--stages", type=list[dict[str, Any]] | None, default=None, help="see docs/training.md")
        parser.add_argument("--stage", type=str | None, default=None, help="run this stage of the recipe's plan alone")
        parser.add_argument("--checkpoint_every", type=int, default=200, help="steps between checkpoints")
        parser.add_argument("--keep_checkpoints", type=int, default=2, help="newest checkpoints that are kept")
        parser.add_argument(
            "--stop_after",
            type=timedelta | None,
            default=None,
            help="time (HH:MM:SS) after which a checkpoint is written and the run ends as on SIGTERM",
        )
        parser.set_defaults(INIT)

    def before_instantiate_classes(self) -> None:
        """Choose the run folder and fill in what follows from it."""
        config = self.config[self.subcommand]
        config.trainer.strategy = self._strategy(config.trainer)
        config.weights_only = True
        if self.subcommand != "fit" and not config.get("ckpt_path"):
            raise ValueError(
                f"`{self.subcommand}` needs a checkpoint; add --ckpt_path, for example runs/{recipe_name(self.given)}/000/{LAST}"
            )
        if self.subcommand != "fit":
            config.trainer.logger = False
            return
        if config.stage is not None:
            raise ValueError(f"found --stage {config.stage}, but the recipe has no `stages`")
        self.folder, resumes = self._folder(config)
        if self.stage is None:
            os.environ[FOLDER] = str(self.folder)
        config.trainer.default_root_dir = str(self.folder)
        checkpoint = self._checkpoint() if resumes else None
        if not _later_rank():
            (self.folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            merged = config.clone()
            for name in ("resume", "stage", "stages"):
                merged.pop(name)  # what is saved starts the same run anew
            saved = self.folder / "config.yaml"
            before = saved.read_text("utf-8") if checkpoint and saved.exists() else None
            self._parser("fit").save(merged, str(saved), overwrite=True, skip_none=False, multifile=False)
            if before is not None:
                tell_changes(before, self._recipe_alone(), saved.read_text("utf-8"))
        if checkpoint:
            config.ckpt_path = str(checkpoint)

    def _recipe_alone(self) -> str:
        """The configuration without what the command line says beside its recipes."""
        recipes = [word for pair in pairwise(self.given) if pair[0] == "--config" for word in pair]
        if not recipes:
            return "{}"
        alone = Parsed([self.given[0], *recipes])
        return alone._parser("fit").dump(alone.config.fit, skip_none=False)

    @staticmethod
    def _strategy(trainer) -> str:
        several = str(trainer.devices) not in ("1", "auto") or (trainer.devices == "auto" and torch.cuda.device_count() > 1)
        many = several or int(trainer.num_nodes) > 1
        return "ddp_find_unused_parameters_true" if trainer.strategy == "auto" and many else trainer.strategy

    def _folder(self, config) -> tuple[Path, bool]:
        """The run folder, and whether to go on from what is in it."""
        if self.stage is not None:
            return self.stage
        root, recipe = Path(config.runs), recipe_name(self.given)
        if _later_rank() and (FOLDER in os.environ or config.resume is None):
            folder = Path(os.environ.get(FOLDER, root / recipe))  # only the first rank writes
        elif config.resume is None:
            return new_folder(root, recipe), False
        else:
            folder = unfinished(root, recipe) if config.resume == "newest" else Path(config.resume)
        if config.resume is not None and not folder.is_dir():
            raise ValueError(f"--resume found no run folder {folder}; expected one such as {root / recipe / '000'}")
        return folder, config.resume is not None

    def _checkpoint(self) -> Path | None:
        """The newest whole checkpoint of the run folder."""
        checkpoint, damaged = newest(self.folder / CHECKPOINTS)
        if not _later_rank():
            for name in damaged:
                print(f"checkpoint {name} is damaged: its content has not the hash in its name; going on from the one before it")
            found = f"from {checkpoint}" if checkpoint else "from its start: it has no checkpoint yet"
            print(f"resuming {self.folder} {found}", flush=True)
        return checkpoint

    def instantiate_trainer(self, **kwargs):
        """Loggers and callbacks of the run folder join those of the recipe."""
        if self.subcommand != "fit":
            return super().instantiate_trainer(**kwargs)
        config = self.config[self.subcommand]
        self.run_folder = RunFolder(self.folder, config.checkpoint_every, config.stop_after, config.keep_checkpoints)
        given = self.config_init[self.subcommand].trainer.callbacks or []
        watch = [] if any(isinstance(callback, Watchdog) for callback in given) else [Watchdog()]
        self.trainer_defaults["callbacks"] = [self.run_folder, Progress(), *watch]
        if self.config_init[self.subcommand].trainer.logger is None:
            kwargs["logger"] = [MetricsFile(self.folder), Board(self.folder, name="", version="tensorboard")]
        return super().instantiate_trainer(**kwargs)

    def after_validate(self) -> None:
        """Print the held-out figures."""
        if self.trainer.is_global_zero:
            show(results_of(self.trainer), dict(self.datamodule.faults))

    after_test = after_validate

    def predict(self, **kwargs) -> None:
        """Write each held-out source's sample ids and pooled vectors."""
        if self.trainer.world_size > 1:
            raise ValueError(f"found {self.trainer.world_size} devices; `predict` writes from one. Add --trainer.devices 1")
        every: Any = self.trainer.predict(**kwargs)
        batches = every if len(self.datamodule.validation) > 1 else [every]
        target = Path(self.config[self.subcommand].out)
        target.mkdir(parents=True, exist_ok=True)
        for source, made in zip(self.datamodule.validation, batches):
            every_row = {name: torch.cat([batch[name] for batch in made]) for name in made[0]}
            columns = dict(zip(["sample", *(n for n in every_row if n != "sample")], by_sample(*every_row.values()), strict=True))
            save_file(columns, str(target / f"{source.name}.safetensors"))
            print(f"{target / source.name}.safetensors: " + ", ".join(f"{k} {tuple(v.shape)}" for k, v in columns.items()))

    def after_fit(self) -> None:
        """Evaluate on the held-out parts and end the run folder."""
        if self.trainer.interrupted:
            return
        if self.datamodule.held_out and self.trainer.limit_val_batches != 0:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False, weights_only=True)
        self.run_folder.finish(self.trainer)


class Parsed(HeadwaterCLI):
    """A command line that is only read: `config` holds what it says, and nothing is made or run."""

    def _set_seed(self) -> None: ...

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


def _later_rank() -> bool:
    """Not the first rank, whoever started it: Lightning, torchrun or srun."""
    return any(int(os.environ.get(name, "0")) > 0 for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID"))


def recipe_name(given: list[str]) -> str:
    """The bare name of the last recipe on a translated command line."""
    named = [Path(given[i + 1]).stem for i, part in enumerate(given[:-1]) if part == "--config"]
    return named[-1] if named else "run"


def run(given: list[str]) -> None:
    """Parse and run; `given` starts with the command. Other ranks are started with the same sys.argv."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*Total length of.*")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # teachers, and what is frozen
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if _later_rank() and FOLDER in os.environ:
        end_with_parent()
    sys.argv[1:] = given
    try:
        stages = plan.stages_of(plan.recipe_of(given)) if given[0] == "fit" else []
        if stages:
            run_stages(given, stages)
        else:
            HeadwaterCLI(given)
    except ArgumentError as error:
        raise ValueError(explain(str(error))) from error
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except SIGTERMException:
        sys.exit(128 + signal.SIGTERM)
    finally:
        folder = "" if _later_rank() else os.environ.pop(FOLDER, "")
        if folder and all(is_unused(one) for one in (Path(folder), *Path(folder).glob("*/"))):
            shutil.rmtree(folder)  # it stopped before its first step; --resume should not find it


def run_stages(given: list[str], stages: list[plan.Stage]) -> None:
    """One stage after the other, each a Trainer of its own, in this process and on all of its ranks."""
    only, resume = plan.value_of(given, "--stage"), plan.value_of(given, "--resume")
    runs, made = read_stages(given, stages)
    root, recipe, later = Path(runs[0].runs), recipe_name(given), _later_rank()
    if not later:
        plan.show([plan.line(stages, k, run, made[k]) for k, run in enumerate(runs)])
    del made
    if later and (FOLDER in os.environ or (resume is None and only in (None, stages[0].name))):
        folder = Path(os.environ.get(FOLDER, root / recipe))
    else:
        folder = plan.begin(root, recipe, stages, resume, only)
    os.environ[FOLDER] = str(folder)
    done = [stage.name for stage in stages if resume is not None and (folder / stage.name / SUMMARY).exists()]
    for number, stage in enumerate(stages):
        if stage.name in done or only not in (None, stage.name):
            continue
        if resume is None and not later:
            plan.check_new(folder / stage.name)
        run = HeadwaterCLI(plan.arguments(given, stages, number, folder), (folder / stage.name, resume is not None))
        if run.trainer.interrupted:
            return
        del run
        gc.collect()  # the memory of its weights is the next one's
    if not later:
        plan.finish(folder, stages)


def read_stages(given: list[str], stages: list[plan.Stage]) -> tuple[list[Any], list[Pretrainer]]:
    """The configuration of every stage, and what it builds, without memory; ValueError for what would stop a later stage."""
    runs = [Parsed(plan.arguments(given, stages, k, None)).config.fit for k in range(len(stages))]
    made = [built({"model": run.model}) for run in runs]
    for run, pretrainer in zip(runs, made, strict=True):
        plan.freeze(pretrainer, run)
    for number in range(1, len(stages)):
        plan.check_carry(made[number - 1], made[number], stages[number])
    return runs, made
