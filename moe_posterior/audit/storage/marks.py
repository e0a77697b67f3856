"""The small files beside a log's segments, each with its own hash: where it ends, where it was closed, what became of old segments."""

from pathlib import Path
from typing import Any, NamedTuple

from moe_posterior.audit.storage.files import DISK, HEAD, FileSystem
from moe_posterior.audit.storage.frames import keyed_hash
from moe_posterior.audit.storage.state import decode_json, encode_json
from moe_posterior.errors import AuditError

REMOVED = "removed.json"
SEAL = "seal.json"
FORMAT = 2  # the version written; format 1 has no closing records and no seals, is still read, and continues as 2
_FORMATS = (1, 2)
MAX_NOTE = 1 << 20  # bytes


class Position(NamedTuple):
    """A place in the chain: after how many frames of which segment, and the digest there."""

    segment: int
    frames: int
    digest: bytes


class Head(NamedTuple):
    """What the writer last recorded about the end of its log."""

    position: Position
    closed: bool
    sealed: bool = False  # a seal exists from the last time the log was closed
    format: int = FORMAT


class Note(NamedTuple):
    """The note about one compacted segment, or (``removed``) about all removed segments up to this one."""

    segment: int
    start: bytes  # digest before its first frame
    end: bytes  # digest of its last frame
    files: dict[str, str]  # name: hash
    totals: dict[str, int]  # decisions, outcomes, refusals, and first and last time
    removed: bool
    digest: str  # of the note itself: what a later frame must hold


def sealed_json(value: dict[str, Any], key: bytes | None) -> bytes:
    """A JSON file with its own hash in it."""
    return encode_json({**value, "check": keyed_hash(key, encode_json(value)).hex()})


def read_sealed(path: Path, key: bytes | None, files: FileSystem = DISK) -> dict[str, Any] | None:
    """What :func:`sealed_json` made; None where there is no such file.

    Raises:
        AuditError: the file was altered.
    """
    try:
        with files.read(path) as file:
            data = file.read(MAX_NOTE)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise AuditError(f"{path.name} cannot be read: {error.strerror}") from error
    value = decode_json(data)
    value.pop("check", None)
    if sealed_json(value, key) != data:
        raise AuditError(f"{path.name}: its hash does not match: altered, or written under another key")
    return value


def head_bytes(head: Head, key: bytes | None) -> bytes:
    """The file of the head."""
    said = {**_said(head.position), "format": head.format, "closed": head.closed, "keyed": key is not None}
    return sealed_json(said | ({"sealed": True} if head.sealed else {}), key)


def seal_bytes(position: Position, key: bytes | None) -> bytes:
    """The file that says where the log was last closed."""
    return sealed_json({**_said(position), "format": FORMAT}, key)


def _said(position: Position) -> dict[str, Any]:
    return {"segment": position.segment, "frames": position.frames, "digest": position.digest.hex()}


def _position(value: dict[str, Any]) -> Position:
    segment, frames = value["segment"], value["frames"]
    if type(segment) is not int or type(frames) is not int or min(segment, frames) < 0:
        raise ValueError("not a position in a log")
    return Position(segment, frames, bytes.fromhex(value["digest"]))


def read_seal(folder: Path, key: bytes | None, files: FileSystem = DISK) -> Position | None:
    """Where the log was last closed, or None where it never was.

    Raises:
        AuditError: the file was altered.
    """
    value = read_sealed(folder / SEAL, key, files)
    try:
        return None if value is None else _position(value)
    except (KeyError, TypeError, ValueError) as error:
        raise AuditError(f"{SEAL} is malformed: {error!r}") from error


def read_head(folder: Path, key: bytes | None, files: FileSystem = DISK) -> Head:
    """The writer's last record of the end.

    Raises:
        AuditError: there is no log, or the file was altered.
    """
    try:
        value = read_sealed(folder / HEAD, key, files)
    except AuditError as error:
        if key is None and _is_keyed(folder / HEAD, files):
            raise AuditError(f"{folder} is sealed with a key: pass it") from error
        raise
    if value is None:
        raise AuditError(f"{folder} has no {HEAD}: it is not an audit log, or its end is unknown")
    try:
        if value["format"] not in _FORMATS:
            raise AuditError(f"{folder} has format {value['format']}; this version reads {_FORMATS}")
        return Head(_position(value), bool(value["closed"]), bool(value.get("sealed")), value["format"])
    except (KeyError, TypeError, ValueError) as error:
        raise AuditError(f"{HEAD} is malformed: {error!r}") from error


def _is_keyed(path: Path, files: FileSystem) -> bool:
    try:
        with files.read(path) as file:
            return b'"keyed":true' in file.read(MAX_NOTE)
    except OSError:
        return False


def note_bytes(note: Note, key: bytes | None) -> bytes:
    """The file of a note."""
    value = note._asdict() | {"start": note.start.hex(), "end": note.end.hex()}
    del value["digest"]
    return sealed_json(value, key)


def read_note(path: Path, key: bytes | None, files: FileSystem = DISK) -> Note | None:
    """A note, or None where there is no such file.

    Raises:
        AuditError: the file was altered.
    """
    value = read_sealed(path, key, files)
    if value is None:
        return None
    try:
        value["start"], value["end"] = bytes.fromhex(value["start"]), bytes.fromhex(value["end"])
        names, totals = value["files"], value["totals"]
        if not all(isinstance(item, str) and Path(item).name == item for item in names):
            raise AuditError(f"{path.name} names files outside its folder")
        if not all(isinstance(total, int) for total in totals.values()):
            raise AuditError(f"{path.name} has malformed totals")
        note = Note(**value, digest="")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AuditError(f"{path.name} is malformed: {error!r}") from error
    return note._replace(digest=note_digest(note, key))


def note_digest(note: Note, key: bytes | None) -> str:
    """What a later record holds to vouch for a note."""
    return keyed_hash(key, note_bytes(note, key)).hex()
