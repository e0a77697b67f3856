"""An arm's files read back: its configuration, its checkpoints, the trained model and its data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moe_posterior.errors import DamagedFileError, InvalidArgumentError
from moe_posterior.files.reading import decoding, one_line, read_mapping
from moe_posterior.files.torchfile import load_plain, read_plain_file
from moe_posterior.training.data import ClassificationData
from moe_posterior.training.lightning_cli import ExperimentCLI
from moe_posterior.training.module import MoEClassifier
from moe_posterior.training.modules import module_class
from moe_posterior.training.runs import Arm

__all__ = ["load_data", "load_model", "read_checkpoint", "read_config"]

PARTS = {  # of a checkpoint that training resumes from, and their types
    "state_dict": Mapping,
    "epoch": int,
    "global_step": int,
    "loops": Mapping,
    "callbacks": Mapping,
    "optimizer_states": list,
    "lr_schedulers": list,
    "pytorch-lightning_version": str,
}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint of an arm, read without running code from it.

    Raises:
        MissingDataError: there is none.
        DamagedFileError, InvalidArgumentError: it is damaged, or not a checkpoint of an arm.
    """
    advice = "delete it, or train anew with --overwrite"
    with decoding(path, "a checkpoint that can be read", advice, InvalidArgumentError):
        content = load_plain(read_plain_file(path), path)
    for name, kind in PARTS.items():
        if not isinstance(content, Mapping) or not isinstance(content.get(name), kind):
            raise DamagedFileError(f"{path} must be a checkpoint of an arm; it holds no {name}; {advice}")
    if not all(isinstance(value, torch.Tensor) for value in content["state_dict"].values()):
        raise DamagedFileError(f"{path} must hold tensors alone in its state_dict; {advice}")
    return dict(content)


def read_config(arm: Arm) -> dict[str, Any]:
    """The configuration that an arm was trained with.

    Raises:
        MissingDataError: there is none. DamagedFileError: it cannot be read.
    """
    return read_mapping(arm.config, "the fit command that made the run writes it again")


def require_classifier(arm: Arm) -> None:
    """Raise InvalidArgumentError unless the arm trained a classifier of this library; its class is imported to find out."""
    trained = module_class(read_config(arm))
    if not issubclass(trained, MoEClassifier):
        raise InvalidArgumentError(
            f"evaluate reports on a MoEClassifier or a class derived from it; arm {arm.name!r} trained a {trained.__name__}: load "
            f"{arm.checkpoint} into it, and measure its probabilities with moe_posterior.metrics"
        )


def _configured(arm: Arm) -> list[str]:
    """The words that make an arm's classes again, without its logger: reading an arm must not open a run with a tracking server."""
    return ["--config", str(arm.config), "--trainer.logger", "false"]


def load_model(arm: Arm) -> MoEClassifier:
    """The trained classifier of an arm, in evaluation mode, with the weights of its last checkpoint.

    Raises:
        InvalidArgumentError: the arm trained a module of another kind, or the configuration or the checkpoint does not fit this
            version's model.
        MissingDataError, DamagedFileError: the checkpoint is missing or cannot be read.
    """
    require_classifier(arm)
    model = ExperimentCLI(arm, _configured(arm), run=False).model
    try:
        model.load_state_dict(read_checkpoint(arm.checkpoint)["state_dict"])
    except RuntimeError as error:
        raise InvalidArgumentError(
            f"{arm.checkpoint} does not fit this version's model; train it anew with --overwrite. {one_line(error)}"
        ) from error
    return model.eval()


def load_data(arm: Arm) -> ClassificationData:
    """The data module that an arm was trained on, set up.

    Raises:
        InvalidArgumentError: the configuration cannot be used. MissingDataError: its files are not there.
    """
    require_classifier(arm)
    data = ExperimentCLI(arm, _configured(arm), run=False).datamodule
    if not isinstance(data, ClassificationData):
        raise InvalidArgumentError(
            f"data must be a ClassificationData to be evaluated: it says which rows are hard and how they shift; arm {arm.name!r} "
            f"was trained on a {type(data).__name__}"
        )
    data.setup()
    return data
