"""Load what a swapped model saved: the model by transformers, the belief by us.

The file formats are described in :mod:`~moe_posterior.huggingface.saving`.
"""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moe_posterior.errors import DamagedFileError, InvalidArgumentError, MissingDataError
from moe_posterior.files.tensorfile import load_tensors
from moe_posterior.huggingface.saving import ENTRY, FILE, KIND, MARKER, VERSION, libraries
from moe_posterior.huggingface.swap import SwappedModel, restore_gates, swap_gates, swapped_gates


def load_swapped(path: str | os.PathLike[str], auto_class: Any = None, **options: Any) -> Any:
    """Load a folder that a swapped model's ``save_pretrained`` wrote: the model, its clusters and its belief.

    A plain ``from_pretrained`` of that folder loads the model without the belief, and warns about a tensor whose name says so.

    Args:
        path: the folder.
        auto_class: the class whose ``from_pretrained`` loads the model; None (default) takes the class it was saved from.
        options: passed to ``from_pretrained``, such as ``dtype``; the belief stays in float64.

    Raises:
        MissingDataError: the folder holds no belief: load it with transformers alone. DamagedFileError: a file in it is
            truncated or altered. InvalidArgumentError: the belief does not belong to the model.
    """
    transformers, _ = libraries()
    _read(path)
    if auto_class is None:
        auto_class = getattr(transformers, transformers.AutoConfig.from_pretrained(path).architectures[0])
    with _marker_expected():
        model, found = auto_class.from_pretrained(path, output_loading_info=True, **options)
    found["unexpected_keys"] = set(found["unexpected_keys"]) - {MARKER}
    wrong = {name: sorted(map(str, keys)) for name, keys in found.items() if keys}
    if wrong:
        warnings.warn(f"{path} does not fit {type(model).__name__} exactly: {wrong}", stacklevel=2)
    load_belief(model, path)
    vars(model.config).pop(
        ENTRY, None
    )  # it describes that folder; a model restored and saved elsewhere must not carry it along
    return model


def load_belief(model: nn.Module, directory: str | os.PathLike[str]) -> SwappedModel:
    """Swap a model the way the saved one was swapped, and load the saved belief, bit for bit.

    Raises:
        MissingDataError: the folder holds no belief. DamagedFileError: a file in it is truncated or altered.
            InvalidArgumentError: the belief is for other routers than this model's, or not the one that the folder's
            ``config.json`` names. The model stays unswapped.
    """
    recipe, belief = _read(directory)
    swapped = swap_gates(model, recipe["num_clusters"], recipe["mode"], **recipe["knobs"])
    try:
        _fill(model, belief)
        for name, gate in swapped_gates(model):
            if configured := recipe["configured"].get(name):
                gate.configure(**configured)
    except BaseException:
        restore_gates(model)
        raise
    return swapped


def _read(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """How the model was swapped, and the belief."""
    path = Path(directory) / FILE
    if not path.is_file():
        raise MissingDataError(f"{path} must hold the belief of a swapped model; there is no such file")
    config = path.with_name("config.json")
    if config.is_file() and _digest_in(config) != hashlib.sha256(path.read_bytes()).hexdigest():
        raise InvalidArgumentError(f"{path} must be the belief that config.json names; it is another one, or damaged")
    belief, recipe = load_tensors(path, KIND)
    del recipe["kind"]
    if recipe.pop("version") != VERSION:
        raise DamagedFileError(f"{path} must be of version {VERSION}; another version of this library wrote it")
    return recipe, belief


def _digest_in(config: Path) -> str | None:
    try:
        entry = json.loads(config.read_text()).get(ENTRY)
    except ValueError as error:
        raise DamagedFileError(f"{config} cannot be read: {error}") from error
    return entry.get("sha256") if isinstance(entry, dict) else None


def _fill(model: nn.Module, belief: Mapping[str, Tensor]) -> None:
    gates = dict(swapped_gates(model))
    states: dict[str, dict[str, Tensor]] = {name: {} for name in gates}
    for key, tensor in belief.items():
        owner = next((name for name in gates if key.startswith(f"{name}.")), None)
        if owner is None:
            raise InvalidArgumentError(f"belief must be for this model's routers, {list(gates)}; got {key!r}")
        states[owner][key.removeprefix(f"{owner}.")] = tensor
    for name, gate in gates.items():
        try:
            gate.load_state_dict(states[name])
        except RuntimeError as error:
            raise InvalidArgumentError(f"belief must fit router {name!r}; got {error}") from error


@contextmanager
def _marker_expected() -> Iterator[None]:
    """Inside, transformers' report of mismatched weights is not printed if it names the marker; we check it right after."""

    def without_marker(record: logging.LogRecord) -> bool:
        return MARKER not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(without_marker)
    try:
        yield
    finally:
        logger.removeFilter(without_marker)
