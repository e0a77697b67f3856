"""Load what a swapped model saved: the model by transformers, the belief by us.

The file formats are described in :mod:`~moe_posterior.huggingface.saving`.
"""

import copy
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_posterior.errors import DamagedFileError, InvalidArgumentError, MissingDataError
from moe_posterior.files.tensorfile import load_tensors
from moe_posterior.huggingface.gates import HostedGate
from moe_posterior.huggingface.host import swapped_routers
from moe_posterior.huggingface.saving import (
    ENTRY,
    FILE,
    KIND,
    MARKER,
    VERSION,
    belief_of,
    libraries,
    transformers_version,
)
from moe_posterior.huggingface.swap import SwappedModel, report_of, restore_gates, swap_gates, swapped_gates


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
    read_belief(path)
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

    A model that is swapped already, in the same way, takes the saved belief in place of its own. The saved model may have been this
    one without its head or with it, or inside a PEFT wrapper or not.

    Raises:
        MissingDataError: the folder holds no belief. DamagedFileError: a file in it is truncated or altered.
            InvalidArgumentError: the belief is for other routers than this model's, is not the one that belongs to the folder's
            weights, or the model was swapped in another way. The model stays as it was.
    """
    recipe, belief = read_belief(directory)
    return _load(model, recipe, belief)


def copy_belief(source: nn.Module, target: nn.Module) -> SwappedModel:
    """Swap ``target`` the way ``source`` was swapped, and give it a copy of its belief: for a reference or a teacher model.

    Raises:
        InvalidArgumentError: ``source`` is not swapped, or its belief does not fit ``target``, which stays as it was.
    """
    belief, recipe = belief_of(source)
    return _load(target, recipe, belief)


def _load(model: nn.Module, recipe: dict[str, Any], belief: Mapping[str, Tensor]) -> SwappedModel:
    recipe = dict(recipe)
    configured, proved = recipe.pop("configured"), recipe.pop("proved", None)
    routers = swapped_routers(model, required=False)
    for name, router in routers.items():
        if router.moe_posterior.recipe != recipe:
            raise InvalidArgumentError(
                f"model must be swapped as the saved one was, with {recipe}; router {name!r} was with {router.moe_posterior.recipe}"
            )
    if not routers:
        swap_gates(model, recipe["num_clusters"], recipe["mode"], **recipe["knobs"])
    gates = dict(swapped_gates(model))
    before = {name: copy.deepcopy(gate.state_dict()) for name, gate in gates.items()} if routers else {}
    try:
        _fill(gates, belief, configured)
    except BaseException:
        for name, state in before.items():
            gates[name].load_state_dict(state)
        if not routers:
            restore_gates(model)
        raise
    if proved is not None and proved == transformers_version():
        _trust(model)
    return report_of(model)


def _trust(model: nn.Module) -> None:
    """Let routers of transformers run as they are from the first call on, also compiled: the same code has shown that adapters fit."""
    for router in swapped_routers(model).values():
        binding = router.moe_posterior
        binding.proved = binding.proved or binding.original.__module__.startswith("transformers.")


def read_belief(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """How the model that was saved in a folder had been swapped, and its belief; errors as :func:`load_belief`."""
    path = Path(directory) / FILE
    if not path.is_file():
        raise MissingDataError(f"{path} must hold the belief of a swapped model; there is no such file")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if any(named != digest for named in _digests_in(path.parent)):
        raise InvalidArgumentError(
            f"{path} must be the belief that belongs to the weights in this folder; it is another one, or damaged"
        )
    belief, recipe = load_tensors(path, KIND)
    del recipe["kind"]
    if recipe.pop("version") != VERSION:
        raise DamagedFileError(f"{path} must be of version {VERSION}; another version of this library wrote it")
    return recipe, belief


def _digests_in(folder: Path) -> Iterator[str | None]:
    """What the weights in a folder, and a config.json of release 0.1, say is their belief's digest; None where they have none."""
    config = folder / "config.json"
    old = None
    if config.is_file():
        try:
            old = json.loads(config.read_text()).get(ENTRY)
        except ValueError as error:
            raise DamagedFileError(f"{config} cannot be read: {error}") from error
    if isinstance(old, dict):
        yield old.get("sha256")
        return
    shards = sorted(folder.glob("model*.safetensors"))
    if shards:
        yield _marker_in(shards)


def _marker_in(shards: Sequence[Path]) -> str | None:
    from safetensors import SafetensorError, safe_open

    for shard in shards:
        try:
            with safe_open(shard, "pt") as file:
                if MARKER in file.keys():  # noqa: SIM118, it is no mapping
                    return bytes(file.get_tensor(MARKER).to(torch.uint8).tolist()).hex()
        except SafetensorError as error:
            raise DamagedFileError(f"{shard} cannot be read: {error}") from error
    return None


def _fill(gates: Mapping[str, HostedGate], belief: Mapping[str, Tensor], configured: Mapping[str, Any]) -> None:
    """Load every gate's part of the belief, and the knobs that were configured after the swap."""
    parts = sorted({key for gate in gates.values() for key in gate.state_dict()}, key=len, reverse=True)
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in belief.items():
        part = next((part for part in parts if key.endswith(f".{part}")), None)
        if part is None:
            raise InvalidArgumentError(f"belief must be for gates that hold {sorted(parts)}; got {key!r}")
        states.setdefault(key.removesuffix(f".{part}"), {})[part] = tensor
    for saved, name in _aligned(states, gates):
        try:
            gates[name].load_state_dict(states[saved])
        except RuntimeError as error:
            raise InvalidArgumentError(f"belief must fit router {name!r}; got {error}") from error
        if saved in configured:
            gates[name].configure(**configured[saved])


def _aligned(saved: Iterable[str], own: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs of the same router in the saved model and in this one, where one of the two may lie inside another model."""
    saved, own = sorted(saved), sorted(own)
    for outer, inner in ((saved, own), (own, saved)):
        prefix = outer[0].removesuffix(inner[0])
        nested = outer[0].endswith(inner[0]) and (not prefix or prefix.endswith("."))
        if nested and [prefix + name for name in inner] == outer:
            return zip(saved, own, strict=True)
    raise InvalidArgumentError(f"belief must be for this model's routers, {own}; got one for {saved}")


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
