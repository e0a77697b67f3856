"""Checkpoints and notes: settings as JSON, arrays as bytes. Nothing that is read can run code.

A checkpoint's payload is a length, a JSON head and the arrays one after the other; the head names each array's dtype and shape.
"""

import json
import struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_posterior.audit.storage.frames import MAX_PAYLOAD
from moe_posterior.errors import AuditError, InvalidArgumentError
from moe_posterior.pending import row_size

MAX_TIME = 253_402_300_800_000_000  # the year 10000, in microseconds
_LARGE = 1e18  # no knob goes there
_SIZE = struct.Struct("<Q")
_DTYPES = {name: np.dtype(name) for name in ("float64", "float32", "int64", "int32", "uint32", "bool")}


class Checkpoint(NamedTuple):
    """The complete state of one source at one moment.

    ``settings``: source, name, kind, reason, time, num_experts, num_clusters, top_k, knobs and, of a router, options and next_id.
    ``arrays``: of a gate with a belief ``alpha``, ``beta`` (C, E), ``versions`` (C,), ``active`` (E,); of a router also its state:
    ``gate.…``, ``tenure``, ``pending.…``.
    """

    settings: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


def encode_json(value: Any) -> bytes:
    """JSON in one canonical form, so that values can be compared byte by byte."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain).encode()
    except (
        RecursionError,
        TypeError,
        ValueError,
    ) as error:  # a cycle, keys of two kinds, an integer of thousands of digits
        raise InvalidArgumentError(f"an audit log holds plain values: {error}") from error


def _plain(value: Any) -> Any:
    """Convert numpy and torch scalars, which knobs may be."""
    if hasattr(value, "item"):
        return value.item()
    raise InvalidArgumentError(f"an audit log holds plain values; got {type(value).__name__} {value!r}")


def decode_json(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        AuditError: it is not one.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AuditError(f"a record's JSON is malformed: {error}") from error
    if not isinstance(value, dict):
        raise AuditError("a record's JSON is not an object")
    return value


def encode_checkpoint(checkpoint: Checkpoint) -> bytes:
    """The raw payload of a checkpoint frame."""
    arrays = {name: np.asarray(array) for name, array in checkpoint.arrays.items()}
    layout = [[name, array.dtype.name, list(array.shape)] for name, array in arrays.items()]
    head = encode_json({"settings": checkpoint.settings, "arrays": layout})
    return b"".join([_SIZE.pack(len(head)), head, *(array.tobytes() for array in arrays.values())])


def decode_checkpoint(payload: bytes) -> Checkpoint:
    """What :func:`encode_checkpoint` was given.

    Raises:
        AuditError: the payload is malformed.
    """
    try:
        (size,) = _SIZE.unpack_from(payload)
        head = decode_json(payload[_SIZE.size : _SIZE.size + size])
        position, arrays = _SIZE.size + size, {}
        for name, dtype, shape in head["arrays"]:
            kind = _DTYPES[dtype]
            if any(not isinstance(n, int) or not 0 <= n <= MAX_PAYLOAD for n in shape) or len(shape) > 8:
                raise AuditError(f"array {name!r} of a checkpoint has an impossible shape")
            count = int(np.prod(shape, dtype=object))
            if count * kind.itemsize > len(payload) - position:
                raise AuditError(f"array {name!r} of a checkpoint is longer than the checkpoint")
            arrays[str(name)] = np.frombuffer(payload, kind, count, position).reshape(shape).copy()
            position += count * kind.itemsize
        settings = head["settings"]
    except (struct.error, KeyError, TypeError, ValueError) as error:
        raise AuditError(f"a checkpoint is malformed: {error!r}") from error
    if position != len(payload) or not isinstance(settings, dict):
        raise AuditError("a checkpoint is longer than it says, or has no settings")
    _check_settings(settings, arrays)
    return Checkpoint(settings, arrays)


def decode_event(data: bytes) -> dict[str, Any]:
    """An event.

    Raises:
        AuditError: it is malformed.
    """
    event = decode_json(data)
    _require("event", isinstance(event.get("event"), str) and is_time(event.get("time")))
    _require("event", isinstance(event.get("name", ""), str))
    return event


def is_time(value: Any) -> bool:
    """Whether this is a number of microseconds with a calendar date."""
    return type(value) is int and 0 <= value < MAX_TIME


def require_knobs(knobs: dict[str, Any]) -> None:
    """Raise InvalidArgumentError for a knob that a reader would refuse: better now than when the log is read."""
    for name, value in decode_json(encode_json(knobs)).items():
        if not _is_knob(name, value):
            raise InvalidArgumentError(f"{name} of an audited gate must be a plain number or None; got {value!r}")


def require_text(name: str) -> str:
    """The name, if it is text that every table can hold."""
    if not isinstance(name, str) or (not name.isascii() and name.encode(errors="replace").decode() != name):
        raise InvalidArgumentError(f"name must be a text without lone surrogates; got {name!r}")
    return name


def _is_knob(name: str, value: Any) -> bool:
    if name == "score":
        return isinstance(value, str)
    number = type(value) in (int, float)
    bounded = number and (abs(value) < _LARGE or (name == "abstain_below" and abs(value) == float("inf")))
    return value is None or bounded  # a value that is only compared may be infinite: always, or never


def _require(what: str, fits: bool) -> None:
    if not fits:
        raise AuditError(f"a {what} holds a value that no writer would put there")


def _check_settings(settings: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
    """Check everything a reader relies on, so that a hostile file is refused here and allocates nothing."""
    sizes = [settings.get(name) for name in ("num_clusters", "num_experts", "top_k", "source")]
    _require("checkpoint", all(type(size) is int and 0 <= size < 1 << 32 for size in sizes))
    num_clusters, num_experts, top_k = sizes[0] or 0, sizes[1] or 0, sizes[2] or 0
    _require("checkpoint", 1 <= top_k <= num_experts <= 1 << 16 and num_clusters >= 1)
    _require("checkpoint", all(isinstance(settings.get(name), str) for name in ("name", "reason", "kind")))
    _require("checkpoint", is_time(settings.get("time")))
    knobs, options = settings.get("knobs"), settings.get("options", {})
    _require("checkpoint", isinstance(knobs, dict) and isinstance(options, dict))
    _require("checkpoint", all(map(_is_knob, knobs or {}, (knobs or {}).values())))
    if "alpha" in arrays:
        _require("checkpoint", arrays["alpha"].shape == (num_clusters, num_experts))
    else:
        _require("checkpoint", num_clusters == 1 and settings["kind"] == "gate")
    if settings["kind"] == "router":
        _check_options(options, num_clusters, num_experts, top_k, arrays)


def _check_options(
    options: dict[str, Any], num_clusters: int, num_experts: int, top_k: int, arrays: dict[str, NDArray[Any]]
) -> None:
    names = ("num_clusters", "num_experts", "hidden_size", "top_k", "max_pending")
    if options.get("num_clusters", 0) is None:  # chosen by a fit; until then the minimum
        options = {**options, "num_clusters": options.get("neighbours", 1)}
    _require("checkpoint", all(type(options.get(name)) is int for name in names))
    clusters, experts, hidden_size, chosen, pending = (int(options[name]) for name in names)
    centroids = arrays.get("gate.clusterer.centroids", np.zeros(0))
    clusterings, neighbours = (options.get(name, 1) for name in ("clusterings", "neighbours"))
    _require("checkpoint", type(clusterings) is type(neighbours) is int and clusterings >= 1 and neighbours >= 1)
    width = clusterings * neighbours if clusterings * neighbours > 1 else 0
    rows = clusters * clusterings
    _require("checkpoint", rows in (num_clusters, num_clusters - 1) and chosen == top_k and experts <= num_experts)
    _require("checkpoint", centroids.shape == (clusters, hidden_size))
    _require("checkpoint", pending >= 1 and pending * row_size(top_k, width) <= MAX_PAYLOAD // 2)
    _check_pending(arrays, num_experts, top_k, width, num_clusters)


def _check_pending(
    arrays: dict[str, NDArray[Any]], num_experts: int, top_k: int, width: int, num_clusters: int
) -> None:
    rows = {name: array for name, array in arrays.items() if name.startswith("pending.")}
    shapes = {"pending.id": 1, "pending.cluster": 1, "pending.experts": 2, "pending.tenure": 2}
    if width:
        shapes |= {"pending.members": 2, "pending.shares": 2}
    _require("checkpoint", {name: array.ndim for name, array in rows.items()} == shapes)
    _require("checkpoint", len({len(array) for array in rows.values()}) == 1)
    _require("checkpoint", rows["pending.experts"].shape[1] == rows["pending.tenure"].shape[1] == top_k)
    within = rows["pending.experts"]
    _require("checkpoint", not within.size or (int(within.min()) >= 0 and int(within.max()) < num_experts))
    _require("checkpoint", not len(rows["pending.id"]) or int(rows["pending.id"].min()) >= 0)
    if width:
        members, shares = rows["pending.members"], rows["pending.shares"]
        _require("checkpoint", members.shape[1] == shares.shape[1] == width)
        _require("checkpoint", bool(((members >= 0) & (members < num_clusters)).all()))
        _require("checkpoint", bool(((shares >= 0) & (shares <= 1)).all()))
