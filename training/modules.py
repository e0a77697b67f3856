"""Which LightningModule an arm trains: this library's classifier unless its configuration names another by ``class_path``."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import lightning

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.files.reading import one_line
from moe_posterior.training.module import MoEClassifier

__all__ = ["is_classifier", "module_class"]


def module_class(config: Mapping[str, Any]) -> type[lightning.LightningModule]:
    """The class under ``model``, whose module is imported for it; a plain name is looked up by LightningCLI itself.

    Raises:
        InvalidArgumentError: it cannot be imported, or is no LightningModule.

    >>> module_class({"model": {"num_experts": 4}}).__name__
    'MoEClassifier'
    """
    named = _named(config)
    if named is None or named == MoEClassifier.__name__:
        return MoEClassifier
    module, _, name = named.rpartition(".")
    if not module:
        return lightning.LightningModule
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidArgumentError(f"model.class_path must name a class; got {named!r}: {one_line(error)}") from error
    if not (isinstance(found, type) and issubclass(found, lightning.LightningModule)):
        raise InvalidArgumentError(f"model.class_path must name a lightning.LightningModule; got {named!r}")
    return found


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether it is this library's classifier or one derived from it, which ``evaluate`` can report on."""
    return issubclass(module_class(config), MoEClassifier)


def _named(config: Mapping[str, Any]) -> str | None:
    model = config.get("model")
    named = model.get("class_path") if isinstance(model, Mapping) else model
    return named if isinstance(named, str) else None
