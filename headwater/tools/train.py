"""LightningCLI with a run folder: `headwater fit|validate|test|predict`."""

from __future__ import annotations

import inspect
import logging
import os
import re
import shutil
import signal
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from safetensors.torch import save_file

from headwater import evaluation, fusion, modalities, objectives  # importing them lets recipes name their classes barely
from headwater.datamodules.datamodule import ShardDataModule
from headwater.evaluation.results import by_sample
from headwater.pretrainer import Pretrainer
from headwater.tools.run_folder import LAST, RunFolder, is_unused, new_folder, results_of, show, unfinished
from headwater.training.metrics import MetricsFile
from headwater.training.progress import Progress

INIT = {"model.init": {"class_path": "headwater.init.Normal"}}  # a recipe starts as a function of model.seed alone
FOLDER = "HEADWATER_RUN"  # tells the other ranks of a run which folder the first one made


class HeadwaterCLI(LightningCLI):
    """Adds the run folder and --resume, and lets two devices mean DDP that allows unused encoders."""

    def __init__(self, given: list[str]) -> None:
        self.given = given
        super().__init__(
            Pretrainer,
            ShardDataModule,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            trainer_defaults={
                "max_steps": 1000,
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
        """--resume, --runs and --checkpoint_every beside Lightning's own."""
        parser.add_argument(
            "--resume", type=str | None, default=None, help="go on with the newest unfinished run, or with this one"
        )
        parser.add_argument("--runs", type=str, default="runs", help="folder of all run folders")
        parser.add_argument("--out", type=str, default="predictions", help="folder that `predict` writes to")
        parser.add_argument("--checkpoint_every", type=int, default=200, help="steps between checkpoints")
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
        self.folder, checkpoint = self._folder(config)
        os.environ[FOLDER] = str(self.folder)
        config.trainer.default_root_dir = str(self.folder)
        if not _later_rank():
            (self.folder / "checkpoints").mkdir(exist_ok=True)
            merged = config.clone()
            merged.pop("resume")  # what is saved starts the same run anew
            self._parser("fit").save(merged, str(self.folder / "config.yaml"), overwrite=True, skip_none=False, multifile=False)
        if checkpoint:
            config.ckpt_path = str(checkpoint)

    @staticmethod
    def _strategy(trainer) -> str:
        several = str(trainer.devices) not in ("1", "auto") or (trainer.devices == "auto" and torch.cuda.device_count() > 1)
        many = several or int(trainer.num_nodes) > 1
        return "ddp_find_unused_parameters_true" if trainer.strategy == "auto" and many else trainer.strategy

    def _folder(self, config) -> tuple[Path, Path | None]:
        """The run folder, and the checkpoint to go on from."""
        root, recipe = Path(config.runs), recipe_name(self.given)
        if _later_rank() and (FOLDER in os.environ or config.resume is None):
            folder = Path(os.environ.get(FOLDER, root / recipe))  # only the first rank writes
        elif config.resume is None:
            return new_folder(root, recipe), None
        else:
            folder = unfinished(root, recipe) if config.resume == "newest" else Path(config.resume)
        if config.resume is None:
            return folder, None
        if not folder.is_dir():
            raise ValueError(f"--resume found no run folder {folder}; expected one such as {root / recipe / '000'}")
        checkpoint = folder / LAST
        if not _later_rank():
            print(
                f"resuming {folder} "
                + (f"from {checkpoint}" if checkpoint.exists() else "from its start: it has no checkpoint yet")
            )
        return folder, checkpoint if checkpoint.exists() else None

    def instantiate_trainer(self, **kwargs):
        """Loggers and callbacks of the run folder join those of the recipe."""
        if self.subcommand != "fit":
            return super().instantiate_trainer(**kwargs)
        config = self.config[self.subcommand]
        self.run_folder = RunFolder(self.folder, config.checkpoint_every)
        self.trainer_defaults["callbacks"] = [self.run_folder, Progress()]
        if self.config_init[self.subcommand].trainer.logger is None:
            kwargs["logger"] = [MetricsFile(self.folder), TensorBoardLogger(self.folder, name="", version="tensorboard")]
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


def _later_rank() -> bool:
    return int(os.environ.get("LOCAL_RANK", "0")) > 0 or int(os.environ.get("RANK", "0")) > 0


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
    sys.argv[1:] = given
    try:
        HeadwaterCLI(given)
    except ArgumentError as error:
        raise ValueError(explain(str(error))) from error
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except SIGTERMException:
        sys.exit(128 + signal.SIGTERM)
    finally:
        folder = "" if _later_rank() else os.environ.pop(FOLDER, "")
        if folder and is_unused(Path(folder)):
            shutil.rmtree(folder)  # it stopped before its first step; --resume should not find it


def explain(message: str) -> str:
    """What would have been accepted, for a class or option that is not."""
    after = re.search(r"Option '([^']+)' is not accepted.*?class_path='([^']+)'", message, re.DOTALL)
    before = re.search(r"class_path '([^']+)':\s+Option '([^']+)' is not accepted", message)
    if after or before:
        option, path = (after[1], after[2]) if after else (before[2], before[1])  # type: ignore[index]
        module, _, name = path.rpartition(".")
        accepted = ", ".join(list(inspect.signature(getattr(import_module(module), name).__init__).parameters)[1:])
        return f"found the option {option!r} for {name}; expected one of: {accepted}"
    if key := re.search(r"Key '([^']+)' is not expected|Unrecognized arguments: (\S+)", message):
        return f"found {key[1] or key[2]}, which is no setting; `headwater fit --help` lists all. ({message.strip()})"
    if unknown := re.search(r"Expected a dot import path string: (\S+)", message):
        every = [n for m in (modalities, fusion, objectives, evaluation) for n in m.__all__]
        accepted = f"a dotted path of your own class or one of: {', '.join(every)}"
        return f"found the class {unknown[1]!r}; expected {accepted}. ({message.strip()})"
    return message
