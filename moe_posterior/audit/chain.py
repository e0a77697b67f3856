"""The chain of a log's frames, from its first segment to its end: walked, with every hash checked, before anything is believed.

A segment's first frame names the digest it continues. A segment that was compacted to Parquet is vouched for by a note with the
hashes of its files, segments that were removed by one note for all of them; the hash of each note stands in a later frame of the chain.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from moe_posterior.audit.files import HEAD, note_name, segment_name, segment_numbers
from moe_posterior.audit.frames import Frame, Kind, Torn, genesis, keyed_hash, read_frame
from moe_posterior.audit.state import decode_json, encode_json
from moe_posterior.errors import AuditError

REMOVED = "removed.json"
FORMAT = 1
_MAX_NOTE = 1 << 20  # bytes
_READINGS = 10  # of a log whose writer compacts and removes segments meanwhile
_T = TypeVar("_T")
_ZEROS = 512  # bytes of them at the end of a file: what a power cut leaves of a write, never the end of a frame


class Position(NamedTuple):
    """A place in the chain: after how many frames of which segment, and the digest there."""

    segment: int
    frames: int
    digest: bytes


class Head(NamedTuple):
    """What the writer last said about the end of its log."""

    position: Position
    closed: bool


class Note(NamedTuple):
    """What became of one segment that was compacted, or (``removed``) of all up to this one."""

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


def read_sealed(path: Path, key: bytes | None) -> dict[str, Any] | None:
    """What :func:`sealed_json` made; None where there is no such file.

    Raises:
        AuditError: the file was altered.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_NOTE)
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
    segment, frames, digest = head.position
    said = {"format": FORMAT, "segment": segment, "frames": frames, "digest": digest.hex(), "closed": head.closed}
    return sealed_json({**said, "keyed": key is not None}, key)


def read_head(folder: Path, key: bytes | None) -> Head:
    """What the writer last said.

    Raises:
        AuditError: there is no log, or the file was altered.
    """
    try:
        value = read_sealed(folder / HEAD, key)
    except AuditError as error:
        if key is None and b'"keyed":true' in (folder / HEAD).read_bytes()[:_MAX_NOTE]:
            raise AuditError(f"{folder} is sealed with a key: pass it") from error
        raise
    if value is None:
        raise AuditError(f"{folder} holds no {HEAD}: no audit log, or one whose end is unknown")
    try:
        if value["format"] != FORMAT:
            raise AuditError(f"{folder} has format {value['format']}; this version reads {FORMAT}")
        position = Position(value["segment"], value["frames"], bytes.fromhex(value["digest"]))
        return Head(position, bool(value["closed"]))
    except (KeyError, TypeError, ValueError) as error:
        raise AuditError(f"{HEAD} is malformed: {error!r}") from error


def note_bytes(note: Note, key: bytes | None) -> bytes:
    """The file of a note."""
    value = note._asdict() | {"start": note.start.hex(), "end": note.end.hex()}
    del value["digest"]
    return sealed_json(value, key)


def read_note(path: Path, key: bytes | None) -> Note | None:
    """A note, or None where there is no such file.

    Raises:
        AuditError: the file was altered.
    """
    value = read_sealed(path, key)
    if value is None:
        return None
    try:
        value["start"], value["end"] = bytes.fromhex(value["start"]), bytes.fromhex(value["end"])
        files, totals = value["files"], value["totals"]
        if not all(isinstance(item, str) and Path(item).name == item for item in files):
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


def beside_upkeep(folder: Path, read: Callable[[], _T]) -> _T:
    """What ``read`` gives; begun again where it failed while the writer took the place of files by others.

    Raises:
        AuditError: it fails on files that stayed where they were, or ten times.
    """
    for _ in range(_READINGS - 1):
        before = _files_of(folder)
        try:
            return read()
        except AuditError:
            if _files_of(folder) == before:
                raise
    return read()


def _files_of(folder: Path) -> list[Any]:
    found: list[Any] = [segment_numbers(folder) if folder.is_dir() else None]
    for name in (HEAD, REMOVED):
        try:
            stat = (folder / name).stat()
            found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
        except OSError:
            found.append(None)
    return found


class Chain:
    """A walk along a log; what it found out about the end is there once it is over.

    Iterating gives frames, and in place of a compacted segment its note, whose files are still to be checked. Notes of removed
    segments are given too.
    """

    def __init__(self, folder: Path, key: bytes | None, *, start: int = 0) -> None:
        self.folder, self.key, self.start = folder, key, start
        self.head = read_head(folder, key)
        self.end = Position(0, 0, genesis(key))
        self.end_offset = 0
        self.torn: str | None = None  # how the last file ends, if not with a whole frame
        self.torn_bytes = 0
        self.cut_bytes = 0  # of failed writes, behind what the next segment continues

    def __iter__(self) -> Iterator[Frame | Note]:
        segments = segment_numbers(self.folder)
        removed = read_note(self.folder / REMOVED, self.key)
        first = 0
        if removed is not None:
            first, self.end = removed.segment + 1, Position(removed.segment, 0, removed.end)
            yield removed
        self._require_all(segments, first)
        numbers = [n for n in segments if n >= max(first, self.start)]
        self._tails: set[int] = set()  # segments behind which a failed disk left something that could not be cut
        starts = {n: self._start_of(n, segments[n]) for n in numbers}
        if len(numbers) > 1 and starts[numbers[-1]] is None:  # died before the first frame of a new file was whole
            self.torn = f"segment {numbers[-1]} is empty"
            self.torn_bytes = (self.folder / segment_name(numbers.pop())).stat().st_size
        if numbers and numbers[0] > first and (start := starts[numbers[0]]) is not None:
            self.end = Position(numbers[0], 0, start)  # asked to begin here: what comes before is taken on trust
        for number, successor in itertools.zip_longest(numbers, numbers[1:]):
            if "audit" in segments[number]:
                yield from self._frames(number, None if successor is None else starts[successor])
            else:
                yield self._compacted(number)
        self._compare_with_head(first)

    def _require_all(self, segments: dict[int, set[str]], first: int) -> None:
        last = max([*segments, self.head.position.segment if self.head.position.frames else first - 1])
        for number in range(first, last + 1):
            if number not in segments:
                raise AuditError(f"segment {number} is missing")

    def _start_of(self, number: int, suffixes: set[str]) -> bytes | None:
        """The digest that a segment says it continues; believed only once its own hash was checked."""
        if "audit" not in suffixes:
            note = read_note(self.folder / note_name(number), self.key)
            return None if note is None else note.start
        with self._open(number) as file:
            try:
                frame = read_frame(file, number, 0, b"", self.key, unchecked=True)
                if frame is None:
                    return None
                said = decode_json(frame.payload())
                if said.get("tail"):
                    self._tails.add(number - 1)
                return bytes.fromhex(said["previous"])
            except (Torn, AuditError, KeyError, TypeError, ValueError):
                return None

    def _open(self, number: int) -> BinaryIO:
        try:
            return open(self.folder / segment_name(number), "rb")
        except OSError as error:
            raise AuditError(f"segment {number} cannot be read: {error.strerror}") from error

    def _frames(self, number: int, until: bytes | None) -> Iterator[Frame]:
        with self._open(number) as file:
            frames, offset = 0, 0
            while until is None or self.end.digest != until or not frames:
                try:
                    frame = read_frame(file, number, frames, self.end.digest, self.key)
                    if frame is not None and (frame.kind == Kind.SEGMENT) != (frames == 0):
                        raise AuditError(f"segment {number}, record {frames}: of a kind that does not belong there")
                except Torn as torn:
                    if until is not None:
                        raise AuditError(f"{torn}, though segment {number + 1} continues it") from None
                    self.torn, self.torn_bytes = str(torn), self._size(file) - offset
                    return
                except AuditError as error:
                    if until is not None or self.head.closed or not self._ends_in_zeros(file, offset):
                        raise
                    self.torn, self.torn_bytes = str(error), self._size(file) - offset
                    return
                if frame is None:
                    if until is not None:
                        raise AuditError(
                            f"segment {number} ends after record {frames - 1}, which is not what segment {number + 1} "
                            f"continues: records are missing, or the first one of segment {number + 1} was altered"
                        )
                    return
                frames, offset = frames + 1, frame.end
                self.end, self.end_offset = Position(number, frames, frame.digest), offset
                self._compare_on_the_way()
                yield frame
            behind = self._size(file) - offset
            if behind and number not in self._tails:
                raise AuditError(f"segment {number}, record {frames}: segment {number + 1} continues what is before it")
            self.cut_bytes += behind

    def _compacted(self, number: int) -> Note:
        note = read_note(self.folder / note_name(number), self.key)
        if note is None or note.segment != number or note.removed:
            raise AuditError(f"segment {number}: its note is missing or speaks of another")
        if note.start != self.end.digest:
            raise AuditError(f"segment {number}: it does not continue the segment before it")
        self.end = Position(number, 0, note.end)
        return note

    def _compare_on_the_way(self) -> None:
        said = self.head.position
        if self.end[:2] == said[:2] and self.end.digest != said.digest:
            raise AuditError(f"segment {said.segment}, record {said.frames - 1}: {HEAD} names another hash")

    def _compare_with_head(self, first: int) -> None:
        said = self.head.position
        if said.frames and (self.end.segment, self.end.frames) < (said.segment, said.frames) and said.segment >= first:
            raise AuditError(
                f"segment {self.end.segment} ends after record {self.end.frames - 1}, but the writer had reached record "
                f"{said.frames - 1} of segment {said.segment}"
            )
        if self.head.closed and (self.end != said or self.torn):
            raise AuditError(f"the log was closed after record {said.frames - 1} of segment {said.segment} and goes on")

    @staticmethod
    def _size(file: BinaryIO) -> int:
        return file.seek(0, 2)

    def _ends_in_zeros(self, file: BinaryIO, offset: int) -> bool:
        size = self._size(file)
        file.seek(max(offset, size - _ZEROS))
        return not any(file.read())
