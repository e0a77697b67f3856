"""Checkpoints and notes: settings as JSON, arrays as bytes. Nothing that is read can run code.

A checkpoint's payload is a length, a JSON head and the arrays one after the other; the head names each array's dtype and shape.
"""

import json
import struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_posterior.audit.frames import MAX_PAYLOAD
from moe_posterior.errors import AuditError

_SIZE = struct.Struct("<Q")
_DTYPES = {name: np.dtype(name) for name in ("float64", "float32", "int64", "int32", "uint32", "bool")}


class Checkpoint(NamedTuple):
    """All of one source at one moment.

    ``settings``: source, name, kind, reason, time, num_experts, num_clusters, top_k, knobs and, of a router, options and next_id.
    ``arrays``: of a gate with a belief ``alpha``, ``beta`` (C, E), ``versions`` (C,), ``active`` (E,); of a router also its state:
    ``gate.…``, ``tenure``, ``pending.…``.
    """

    settings: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


def encode_json(value: Any) -> bytes:
    """The one way to write a value, so that it can be compared byte by byte."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=True).encode()


def decode_json(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        AuditError: it is none.
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
    return Checkpoint(settings, arrays)
