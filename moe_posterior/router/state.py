"""A router as it is saved: plain values and tensors, checked before any of it is taken over.

The file is a dictionary of :data:`PARTS` in torch's own format.
"""

from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, TypeVar

import torch

from moe_posterior.errors import DamagedFileError, InvalidArgumentError, MoEPosteriorError
from moe_posterior.files.torchfile import load_plain, read_plain_file

PARTS = ("options", "gate", "next_id", "tenure", "pending")
Router = TypeVar("Router")


def load_with(make: Callable[[Mapping[str, Any]], Router], path: str | PathLike[str]) -> Router:
    """What ``make`` makes of the state in a file.

    Raises:
        MissingDataError: there is no such file. DamagedFileError: it is no router's, or cut short.
    """
    state = load_plain(read_plain_file(path), path)
    try:
        return make(state)
    except MoEPosteriorError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DamagedFileError(f"path must be a file that save wrote; {path} holds something else: {error}") from error


def options_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a router was made with, from its state.

    Raises:
        InvalidArgumentError: the state lacks a part. DamagedFileError: its options and its tables do not go together.
    """
    missing = [part for part in PARTS if part not in state]
    if missing:
        raise InvalidArgumentError(f"state must be what a router's state() returned; it lacks {missing}")
    options = {"score": "lcb"} | state[
        "options"
    ]  # files older than the router's own defaults name only what was asked for
    require_sizes(options, state["gate"], state["tenure"])
    return options


def require_sizes(options: Mapping[str, Any], gate: Mapping[str, torch.Tensor], tenure: torch.Tensor) -> None:
    """Raise DamagedFileError for options that describe larger tables than the state holds: they would be allocated first."""
    clusters, experts = gate["posterior.successes"].shape  # novelty="class" has one cluster more than the options say
    dimensions = gate["clusterer.centroids"].shape[1]
    held = {"num_clusters": clusters, "num_experts": experts, "hidden_size": dimensions, "top_k": experts}
    given = {name: options[name] for name in held}
    if given["num_clusters"] is None:  # not fitted yet: the fewest that can be
        given["num_clusters"] = options.get("neighbours", 1)
    wrong = [name for name, most in held.items() if type(given[name]) is not int or not 1 <= given[name] <= most]
    several = options.get("clusterings", 1)
    if not wrong and (type(several) is not int or not 1 <= several * given["num_clusters"] <= clusters):
        raise DamagedFileError(
            f"a router's state speaks of clusterings={several!r}, but its tables hold {clusters} clusters"
        )
    if wrong or tenure.shape != (experts,):
        name = wrong[0] if wrong else "num_experts"
        raise DamagedFileError(f"a router's state speaks of {name}={options[name]!r}, but its tables hold {held[name]}")
