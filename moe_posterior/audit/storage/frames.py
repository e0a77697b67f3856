"""The frame: the unit that is written, hashed and read back.

A frame is a head (magic, kind, lengths, number, checksum), a 32-byte digest and a zstd-compressed payload. The digest is BLAKE2b over
the digest before it, the head and the stored payload, keyed if there is a key: so each frame commits to all frames before it. The
head's checksum distinguishes an altered head from a truncated file.
"""

import hashlib
import struct
import zlib
from enum import IntEnum
from typing import BinaryIO, NamedTuple

from moe_posterior.audit.storage.arrow import pyarrow as pa
from moe_posterior.errors import AuditError, InvalidArgumentError

MAGIC = b"MPA1"
MAX_PAYLOAD = 256 << 20  # bytes, stored or decompressed: a reader allocates no more, whatever a file claims
_MAX_SEGMENT_HEAD = 1 << 20  # it is read before its hash is checked
_HEAD = struct.Struct("<4sB3xIIQ")  # magic, kind, stored bytes, raw bytes, number in its segment
_CHECK = struct.Struct("<I")
_DIGEST = 32
OVERHEAD = _HEAD.size + _CHECK.size + _DIGEST


class Kind(IntEnum):
    """What a frame holds."""

    SEGMENT = 1  # the first of a file: its number, and what it continues
    GROUP = 2  # decisions, outcomes and posterior rows, see moe_posterior.audit.storage.tables
    CHECKPOINT = 3  # the whole belief and configuration of one source, see moe_posterior.audit.storage.state
    EVENT = 4  # anything rare, as JSON
    CLOSING = 5  # the last of a log that was closed: when


class Torn(Exception):
    """The file ends inside a frame."""


class Frame(NamedTuple):
    """One frame with a verified digest."""

    segment: int
    number: int
    kind: Kind
    stored: bytes
    raw_size: int
    digest: bytes
    end: int  # offset in its file

    def payload(self) -> bytes:
        """The payload, decompressed."""
        if not self.raw_size:
            return b""
        try:
            return pa.Codec("zstd").decompress(self.stored, self.raw_size, asbytes=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise AuditError(
                f"segment {self.segment}, record {self.number}: cannot be decompressed ({error})"
            ) from error


def check_key(key: bytes | None) -> bytes | None:
    """The key, if it is one."""
    if key is not None and (not isinstance(key, bytes) or not 16 <= len(key) <= 64):
        raise InvalidArgumentError("key must be 16 to 64 bytes, or None")
    return key


def keyed_hash(key: bytes | None, *parts: bytes) -> bytes:
    """BLAKE2b of the parts, 32 bytes; a MAC if there is a key.

    >>> keyed_hash(None, b"ab", b"c") == keyed_hash(None, b"abc") != keyed_hash(b"k" * 16, b"abc")
    True
    """
    state = hashlib.blake2b(key=key or b"", digest_size=_DIGEST)
    for part in parts:
        state.update(part)
    return state.digest()


def genesis(key: bytes | None) -> bytes:
    """The digest that the first frame of a log builds on."""
    return keyed_hash(key, b"moe-posterior audit log, format 1")


def compress(raw: bytes, level: int = 1) -> bytes:
    """zstd; what :func:`pack` takes."""
    if len(raw) > MAX_PAYLOAD:
        raise AuditError(f"a record of {len(raw)} bytes is longer than the {MAX_PAYLOAD} a reader accepts")
    return pa.Codec("zstd", compression_level=level).compress(raw, asbytes=True) if raw else b""


def pack(
    kind: Kind, number: int, stored: bytes, raw_size: int, previous: bytes, key: bytes | None
) -> tuple[bytes, bytes]:
    """A frame's bytes before the payload, and its digest."""
    head = _HEAD.pack(MAGIC, kind, len(stored), raw_size, number)
    head += _CHECK.pack(zlib.crc32(head))
    digest = keyed_hash(key, previous, head, stored)
    return head + digest, digest


def read_frame(
    file: BinaryIO, segment: int, number: int, previous: bytes, key: bytes | None, *, unchecked: bool = False
) -> Frame | None:
    """The frame at the file's position; None at the end of the file. ``unchecked`` leaves the digest for later.

    Raises:
        Torn: the file ends inside the frame. AuditError: the frame is malformed or is not the one that belongs here.
    """
    head = file.read(OVERHEAD)
    if not head:
        return None
    where = f"segment {segment}, record {number}"
    if len(head) < OVERHEAD:
        raise Torn(f"{where}: the file ends inside its head")
    fixed, check, digest = head[: _HEAD.size], head[_HEAD.size : -_DIGEST], head[-_DIGEST:]
    magic, kind, stored_size, raw_size, written_number = _HEAD.unpack(fixed)
    if magic != MAGIC or _CHECK.pack(zlib.crc32(fixed)) != check:
        raise AuditError(f"{where}: its head was altered or is not one")
    if kind == Kind.SEGMENT and raw_size > _MAX_SEGMENT_HEAD:
        raise AuditError(f"{where}: longer than a segment's first record can be")
    if kind not in set(Kind) or max(stored_size, raw_size) > MAX_PAYLOAD:
        raise AuditError(f"{where}: of unknown kind {kind} or longer than {MAX_PAYLOAD} bytes")
    stored = file.read(stored_size)
    if len(stored) < stored_size:
        raise Torn(f"{where}: the file ends inside its payload")
    right = unchecked or keyed_hash(key, previous, fixed, check, stored) == digest
    if written_number != number or not right:
        raise AuditError(f"{where}: its hash does not match: altered, moved, or written under another key")
    return Frame(segment, number, Kind(kind), stored, raw_size, digest, file.tell())
