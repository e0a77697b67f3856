"""LightningCLI for the experiments: the classes a configuration is read into, and the trainer defaults of every arm."""

import shlex
import warnings
from argparse import ArgumentError
from collections.abc import Iterator
from typing import Any

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from moe_posterior.errors import InvalidArgumentError, MoEPosteriorError
from moe_posterior.files.reading import one_line, read_mapping
from moe_posterior.training.belief import BeliefCallback
from moe_posterior.training.callbacks import CompetenceUpdates, WarmupCheckpoint, WholeCheckpoints
from moe_posterior.training.divergence import StopWhereDiverged
from moe_posterior.training.log import MetricsFile
from moe_posterior.training.module import MoEClassifier
from moe_posterior.training.modules import module_class
from moe_posterior.training.runs import Arm

__all__ = ["ExperimentCLI"]


UNION = "Does not validate against any of the Union subtypes"  # how the parser begins a list of what it tried in vain
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
    """LightningCLI with any data module and any LightningModule: a MoEClassifier, with the competence updates, unless the
    configuration names another, with a :class:`~moe_posterior.training.belief.BeliefCallback`.

    Args:
        arm: whose configuration is read, and where it is trained.
        args: the words for LightningCLI.
        run: whether the first of them is a subcommand, to be run.
        module: the class of the model; None (default) takes the one that the arm's configuration names.
    """

    def __init__(
        self, arm: Arm, args: list[str], *, run: bool, module: type[lightning.LightningModule] | None = None
    ) -> None:
        self.arm = arm
        config = read_mapping(arm.config, "fit writes it again") if arm.config.is_file() else {}
        module = module_class(config) if module is None else module
        self.classifies = issubclass(module, MoEClassifier)
        named = module is not MoEClassifier or isinstance(config.get("model"), str) or "class_path" in _of_model(config)
        self.model_key = "model.init_args" if named else "model"
        # LightningCLI warns if the command line has arguments too; ours are parsed already.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
        super().__init__(
            MoEClassifier if self.classifies else lightning.LightningModule,
            lightning.LightningDataModule,
            subclass_mode_model=named,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=42,
            trainer_defaults={
                "default_root_dir": str(arm.folder),
                "callbacks": [_Progress(), StopWhereDiverged(f"arm {arm.name!r}"), *self._checkpoints()],
                "plugins": [{"class_path": f"{WholeCheckpoints.__module__}.{WholeCheckpoints.__name__}"}],
                "logger": [_metrics_file(arm), _tensorboard(arm)],
            },
            args=args,
            run=run,
            parser_kwargs={"exit_on_error": False, "fit": {"exit_on_error": False}}
            if run
            else {"exit_on_error": False},
        )

    def _checkpoints(self) -> list[lightning.Callback]:
        """The last state, from which an arm resumes; of a classifier also the best, and the one at the end of the warm-up."""
        folder = self.arm.folder / "checkpoints"
        # Not by save_last: beside a monitored best, Lightning writes that only where the best improved.
        last = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
        if not self.classifies:
            return [last]
        return [WarmupCheckpoint(folder), last, ModelCheckpoint(folder, monitor="val/nll", filename="best")]

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read the configuration; a mistake in it is reported in one line.

        Raises:
            InvalidArgumentError: it is not a configuration of a model, its data and its trainer.
        """
        try:
            super().parse_arguments(parser, args)
        except (ArgumentError, TypeError, ValueError, ImportError, AttributeError) as error:
            where = self.arm.config if self.arm.config.is_file() else shlex.join(args)
            raise InvalidArgumentError(f"{where} cannot be used: {one_line(error)}") from error

    def instantiate_classes(self) -> None:
        """Make the classes; a package that one of them misses, what a logger refuses, and a mistake that this library finds, are
        reported in one line.

        Raises:
            InvalidArgumentError: the cause, without what the parsers around it say.
        """
        try:
            super().instantiate_classes()
        except (ArgumentError, TypeError, ValueError, ImportError) as error:
            causes = list(_causes(error))
            known = (each for each in causes if isinstance(each, (MoEPosteriorError, ImportError)))
            cause: BaseException | None = next(known, None)
            if cause is None and f"{Logger.__module__}.{Logger.__name__}" in str(error):
                cause = next((each for each in causes if not str(each).startswith(UNION)), None)
            if cause is None or cause is error:
                raise
            raise InvalidArgumentError(f"{self.arm.config} cannot be used: {one_line(cause)}") from error

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
        except (MisconfigurationException, TypeError, ValueError, RuntimeError) as error:
            raise InvalidArgumentError(f"the trainer settings cannot be used: {one_line(error)}") from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The callback that keeps the belief; a classifier also learns from its data how many classes there are."""
        if not self.classifies:
            parser.add_lightning_class_args(BeliefCallback, "belief")
            return
        for name, of in (("num_classes", _num_classes), ("num_groups", _num_groups)):
            parser.link_arguments("data", f"{self.model_key}.{name}", compute_fn=of, apply_on="instantiate")
        parser.add_lightning_class_args(CompetenceUpdates, "competence")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _of_model(config: dict[str, Any]) -> dict[str, Any]:
    model = config.get("model")
    return model if isinstance(model, dict) else {}


def _num_classes(data: lightning.LightningDataModule) -> int:
    number = getattr(data, "num_classes", None)
    if not isinstance(number, int):
        raise InvalidArgumentError(
            f"data must have an int attribute num_classes, or model a class_path of your own; {type(data).__name__} has none"
        )
    return number


def _num_groups(data: lightning.LightningDataModule) -> int:
    return int(getattr(data, "num_groups", 0))
