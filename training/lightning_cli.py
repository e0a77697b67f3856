"""LightningCLI for the experiments: the classes a configuration is read into, and the trainer defaults of every arm."""

import shlex
import warnings
from argparse import ArgumentError
from typing import Any

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.files.reading import one_line
from moe_posterior.training.callbacks import CompetenceUpdates, WarmupCheckpoint, WholeCheckpoints
from moe_posterior.training.data import ClassificationData
from moe_posterior.training.divergence import StopWhereDiverged
from moe_posterior.training.log import MetricsFile
from moe_posterior.training.module import MoEClassifier
from moe_posterior.training.runs import Arm

__all__ = ["ExperimentCLI"]


REFUSED = (  # settings of the trainer, and what to set instead
    (
        "barebones",
        True,
        "leave it out; --trainer.enable_progress_bar false and --trainer.enable_model_summary false save time",
    ),
    ("enable_checkpointing", False, "leave it out"),
)


class _Progress(RichProgressBar):
    """A progress bar without the logger's version number, which says nothing about the run."""

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


def _metrics_file(arm: Arm) -> dict[str, Any]:
    return {"class_path": f"{MetricsFile.__module__}.{MetricsFile.__name__}", "init_args": {"folder": str(arm.figures)}}


def _tensorboard(arm: Arm) -> dict[str, Any]:
    folder = {"save_dir": str(arm.folder), "name": "", "version": "tensorboard"}
    return {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": folder}


class ExperimentCLI(LightningCLI):
    """LightningCLI with a MoEClassifier, any ClassificationData, and the competence updates."""

    def __init__(self, arm: Arm, args: list[str], *, run: bool) -> None:
        self.arm = arm
        # LightningCLI warns if the command line has arguments too; ours are parsed already.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
        super().__init__(
            MoEClassifier,
            ClassificationData,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=42,
            trainer_defaults={
                "default_root_dir": str(arm.folder),
                "callbacks": [
                    _Progress(),
                    StopWhereDiverged(f"arm {arm.name!r}"),
                    WarmupCheckpoint(arm.folder / "checkpoints"),
                    ModelCheckpoint(arm.folder / "checkpoints", save_last=True, monitor="val/nll", filename="best"),
                ],
                "plugins": [{"class_path": f"{WholeCheckpoints.__module__}.{WholeCheckpoints.__name__}"}],
                "logger": [_metrics_file(arm), _tensorboard(arm)],
            },
            args=args,
            run=run,
            parser_kwargs={"exit_on_error": False, "fit": {"exit_on_error": False}}
            if run
            else {"exit_on_error": False},
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read the configuration; a mistake in it is reported in one line.

        Raises:
            InvalidArgumentError: it is not a configuration of a MoEClassifier, its data and its trainer.
        """
        try:
            super().parse_arguments(parser, args)
        except (ArgumentError, TypeError, ValueError, ImportError, AttributeError) as error:
            where = self.arm.config if self.arm.config.is_file() else shlex.join(args)
            raise InvalidArgumentError(f"{where} cannot be used: {one_line(error)}") from error

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """The trainer, without a progress bar where none is wanted.

        Raises:
            InvalidArgumentError: a setting that Lightning refuses, or with which the arm could be neither resumed nor evaluated.
        """
        config = self.config_init[self.subcommand] if self.subcommand else self.config_init
        for name, refused, instead in REFUSED:
            if config.trainer.get(name) == refused:
                raise InvalidArgumentError(
                    f"trainer.{name} must not be {str(refused).lower()}: fit resumes an arm, and evaluate reads it, from its last "
                    f"checkpoint; {instead}"
                )
        if config.trainer.enable_progress_bar is False:
            callbacks = self.trainer_defaults["callbacks"]
            self.trainer_defaults["callbacks"] = [one for one in callbacks if not isinstance(one, _Progress)]
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise InvalidArgumentError(f"the trainer settings cannot be used: {one_line(error)}") from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.num_groups", "model.num_groups", apply_on="instantiate")
        parser.add_lightning_class_args(CompetenceUpdates, "competence")
