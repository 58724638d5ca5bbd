"""LightningCLI with a run folder: `headwater fit|validate|test|predict`."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

import headwater.evaluation
import headwater.fusion
import headwater.modalities
import headwater.objectives  # noqa: F401  classes that recipes name by their bare name
from headwater.cli import recipe_name
from headwater.datamodules.datamodule import ShardDataModule
from headwater.pretrainer import Pretrainer
from headwater.training.metrics import MetricsFile
from headwater.training.progress import Progress
from headwater.training.run import LAST, RunFolder, new_folder, unfinished

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
            args=given,
        )

    def add_arguments_to_parser(self, parser) -> None:
        """--resume, --runs and --checkpoint_every beside Lightning's own."""
        parser.add_argument("--resume", type=str | None, default=None, help="go on with the newest unfinished run, or with this one")
        parser.add_argument("--runs", type=str, default="runs", help="folder of all run folders")
        parser.add_argument("--checkpoint_every", type=int, default=200, help="steps between checkpoints")

    def before_instantiate_classes(self) -> None:
        """Choose the run folder and fill in what follows from it."""
        config = self.config[self.subcommand]
        config.trainer.strategy = self._strategy(config.trainer)
        if self.subcommand != "fit":
            config.trainer.logger = False
            return
        self.folder, checkpoint = self._folder(config)
        os.environ[FOLDER] = str(self.folder)
        config.trainer.default_root_dir = str(self.folder)
        if checkpoint:
            config.ckpt_path = str(checkpoint)
        self._dump_config()
        if not _later_rank():
            (self.folder / "checkpoints").mkdir(exist_ok=True)
            self.parser.save(self.config, str(self.folder / "config.yaml"), overwrite=True, skip_none=False, multifile=False)

    @staticmethod
    def _strategy(trainer) -> str:
        several = str(trainer.devices) not in ("1", "auto") or (trainer.devices == "auto" and torch.cuda.device_count() > 1)
        many = several or int(trainer.num_nodes) > 1
        return "ddp_find_unused_parameters_true" if trainer.strategy == "auto" and many else trainer.strategy

    def _folder(self, config) -> tuple[Path, Path | None]:
        """The run folder, and the checkpoint to go on from."""
        root, recipe = Path(config.runs), recipe_name(self.given)
        if _later_rank() and FOLDER in os.environ:
            folder = Path(os.environ[FOLDER])
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
            print(f"resuming {folder} " + (f"from {checkpoint}" if checkpoint.exists() else "from its start: it has no checkpoint yet"))
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

    def after_fit(self) -> None:
        """Evaluate on the held-out parts and end the run folder."""
        if self.trainer.interrupted:
            return
        if self.datamodule.held_out and self.trainer.limit_val_batches != 0:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        self.run_folder.finish(self.trainer)


def _later_rank() -> bool:
    return int(os.environ.get("LOCAL_RANK", "0")) > 0 or int(os.environ.get("RANK", "0")) > 0


def run(given: list[str]) -> None:
    """Parse and run; `given` starts with the command."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*Total length of.*")
    sys.argv = [sys.argv[0]]  # LightningCLI warns when it finds arguments in both places
    HeadwaterCLI(given)
