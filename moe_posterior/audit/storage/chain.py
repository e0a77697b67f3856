"""The chain of a log's frames, from its first segment to its end: read with every hash checked before its content is used.

A segment's first frame names the digest it continues. A segment that was compacted to Parquet is vouched for by a note with the
hashes of its files, segments that were removed by one note for all of them; the hash of each note stands in a later frame of the chain.

A closed log is marked three times: in its last record, in a seal that names this record, and in the head. The head is updated first
when the log is reopened; the seal stays, so that nothing up to it can be cut off later unnoticed.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from moe_posterior.audit.storage.files import DISK, HEAD, FileSystem, note_name, segment_name, segment_numbers
from moe_posterior.audit.storage.frames import Frame, Kind, Torn, genesis, read_frame
from moe_posterior.audit.storage.marks import (
    MAX_NOTE,
    REMOVED,
    SEAL,
    Head,
    Note,
    Position,
    read_head,
    read_note,
    read_seal,
)
from moe_posterior.audit.storage.state import decode_json
from moe_posterior.errors import AuditError

_READINGS = 100  # attempts, while the writer compacts and removes segments
_T = TypeVar("_T")
_ZEROS = 512  # zero bytes at the end of a file: what a power cut leaves of a write; no frame ends with so many


def beside_upkeep(folder: Path, read: Callable[[], _T]) -> _T:
    """The result of ``read``, retried if it fails while the writer replaces files.

    Raises:
        AuditError: it fails on unchanged files, or a hundred times.
    """
    for _ in range(_READINGS):
        before = _files_of(folder)
        try:
            return read()
        except AuditError:
            if _files_of(folder) == before:
                raise
    raise AuditError(
        f"{folder} could not be read in one go: its writer changed files during each of {_READINGS} readings"
    )


def _files_of(folder: Path) -> list[Any]:
    """A fingerprint that every change by a writer alters: head and seal only advance, and no segment comes back."""
    found: list[Any] = [segment_numbers(folder) if folder.is_dir() else None]
    for name in (HEAD, REMOVED, SEAL):
        try:
            with open(folder / name, "rb") as file:
                found.append(file.read(MAX_NOTE))
        except OSError:
            found.append(None)
    return found


class Chain:
    """Iterates over a log; its findings about the end are complete once the iteration is.

    Iterating gives frames, and in place of a compacted segment its note, whose files are still to be checked. Notes of removed
    segments are given too.

    The writer may append, rotate, open and close meanwhile. If it compacts a segment that the walk has not reached yet, the walk
    continues until after the record that vouches for it. If it removes one, the walk fails, and :func:`beside_upkeep` starts over.
    """

    def __init__(self, folder: Path, key: bytes | None, *, start: int = 0, files: FileSystem = DISK) -> None:
        self.folder, self.key, self.start, self.files = folder, key, start, files
        self.head, self.seal = self._read_end()
        self.end = Position(0, 0, genesis(key))
        self.end_offset = 0
        self.closed = False  # the last record marks the log as closed
        self.torn: str | None = None  # how the last file ends, if not with a complete frame
        self.torn_bytes = 0
        self.newborn: int | None = None  # a segment without a first frame
        self.cut_bytes = 0  # of failed writes, behind what the next segment continues
        self._tails: set[int] = set()  # segments after whose end a failed disk left bytes that could not be cut off
        self._frames_of_head = 0  # frames in the segment that the head describes

    def __iter__(self) -> Iterator[Frame | Note]:
        removed, segments = self._list()
        first = 0
        if removed is not None:
            first, self.end = removed.segment + 1, Position(removed.segment, 0, removed.end)
            self._compare_on_the_way(whole=True)
            yield removed
        self._require_all(segments, first)
        wanted = [number for number in segments if number >= max(first, self.start)]
        if wanted:
            yield from self._walk(segments, wanted[0], wanted[-1], wanted[0] > first)
        self._compare_with_end(first)

    def _read_end(self) -> tuple[Head, Position | None]:
        """Head and seal, read at the same moment."""
        head = read_head(self.folder, self.key, self.files)
        while True:
            seal = read_seal(self.folder, self.key, self.files)
            again = read_head(self.folder, self.key, self.files)
            if again == head:
                return head, seal
            head = again

    def _list(self) -> tuple[Note | None, dict[int, set[str]]]:
        """The note about removed segments and the remaining segments, read at the same moment."""
        removed = self._note(REMOVED)
        while True:
            segments = segment_numbers(self.folder, self.files)
            again = self._note(REMOVED)
            if again == removed:
                return removed, segments
            removed = again

    def _note(self, name: str) -> Note | None:
        return read_note(self.folder / name, self.key, self.files)

    def _walk(self, segments: dict[int, set[str]], number: int, last: int, on_trust: bool) -> Iterator[Frame | Note]:
        if on_trust and (start := self._start_of(number)) is not None:
            self.end = Position(number, 0, start)  # started here on request: what comes before is trusted
        while number <= last:
            until = None if number == last else self._start_of(number + 1)
            if until is None and number + 1 == last:  # died before the first frame of a new file was whole
                self.newborn, last = last, number
                self.torn = f"segment {self.newborn} is empty"
                stat = self.files.stat(self.folder / segment_name(self.newborn))
                self.torn_bytes = stat.st_size if stat is not None else 0
            file = self._open(number) if "audit" in segments.get(number, {"audit"}) else None
            if file is None:
                yield self._compacted(number)
                if number not in segments or "audit" in segments[number]:  # since the folder was listed
                    last = max(last, *segment_numbers(self.folder, self.files))
                    self.newborn = self.torn = None
                    self.torn_bytes = 0
            else:
                with file:
                    yield from self._frames(file, number, until)
            if number == self.head.position.segment:
                self._frames_of_head = self.end.frames
            number += 1

    def _require_all(self, segments: dict[int, set[str]], first: int) -> None:
        last = max([*segments, self.head.position.segment if self.head.position.frames else first - 1])
        for number in range(first, last + 1):
            if number not in segments:
                raise AuditError(f"segment {number} is missing")

    def _start_of(self, number: int) -> bytes | None:
        """The digest that a segment claims to continue; used only after its own hash was checked."""
        file = self._open(number)
        if file is None:
            note = self._note(note_name(number))
            return None if note is None else note.start
        with file:
            try:
                frame = read_frame(file, number, 0, b"", self.key, unchecked=True)
                if frame is None:
                    return None
                said = decode_json(frame.payload())
                if said.get("tail"):
                    self._tails.add(number - 1)
                return bytes.fromhex(said["previous"])
            except OSError as error:
                raise AuditError(f"segment {number} cannot be read: {error.strerror}") from error
            except (Torn, AuditError, KeyError, TypeError, ValueError):
                return None

    def _open(self, number: int) -> BinaryIO | None:
        """The file of a segment; None where there is none (any more)."""
        try:
            return self.files.read(self.folder / segment_name(number))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise AuditError(f"segment {number} cannot be read: {error.strerror}") from error

    def _frames(self, file: BinaryIO, number: int, until: bytes | None) -> Iterator[Frame]:
        frames, offset = 0, 0
        while until is None or self.end.digest != until or not frames:
            try:
                frame = self._next_frame(file, number, frames)
            except Torn as torn:
                if until is not None:
                    raise AuditError(f"{torn}, though segment {number + 1} continues it") from None
                self.torn, self.torn_bytes = str(torn), self.files.size(file) - offset
                return
            except AuditError as error:
                if until is not None or self.head.closed or not self._ends_in_zeros(file, offset):
                    raise
                self.torn, self.torn_bytes = str(error), self.files.size(file) - offset
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
            self.closed = frame.kind == Kind.CLOSING
            self._compare_on_the_way()
            yield frame
        behind = self.files.size(file) - offset
        if behind and number not in self._tails:
            raise AuditError(f"segment {number}, record {frames}: segment {number + 1} continues what is before it")
        self.cut_bytes += behind

    def _next_frame(self, file: BinaryIO, number: int, frames: int) -> Frame | None:
        try:
            frame = read_frame(file, number, frames, self.end.digest, self.key)
        except OSError as error:
            raise AuditError(f"segment {number}, record {frames} cannot be read: {error.strerror}") from error
        if frame is not None and (frame.kind == Kind.SEGMENT) != (frames == 0):
            raise AuditError(f"segment {number}, record {frames}: of a kind that does not belong there")
        return frame

    def _compacted(self, number: int) -> Note:
        note = self._note(note_name(number))
        if note is None or note.segment != number or note.removed:
            raise AuditError(f"segment {number}: its note is missing or is about another segment")
        if note.start != self.end.digest:
            raise AuditError(f"segment {number}: it does not continue the segment before it")
        self.end = Position(number, 0, note.end)
        self._compare_on_the_way(whole=True)
        return note

    def _compare_on_the_way(self, whole: bool = False) -> None:
        """Check that head and seal name the hash found here; a closing record is the last of its segment (``whole``)."""
        said = self.head.position
        if not whole and self.end[:2] == said[:2] and self.end.digest != said.digest:
            raise AuditError(f"segment {said.segment}, record {said.frames - 1}: {HEAD} names another hash")
        seal = self.seal
        here = seal is not None and (self.end.segment == seal.segment if whole else self.end[:2] == seal[:2])
        if seal is not None and here and self.end.digest != seal.digest:
            raise AuditError(f"segment {seal.segment}, record {seal.frames - 1}: {SEAL} names another hash")

    def _compare_with_end(self, first: int) -> None:
        self.closed = self.closed and self.torn is None
        for name, said in ((HEAD, self.head.position), (SEAL, self.seal)):
            if said is None or not said.frames or said.segment < first:
                continue
            if (self.end.segment, self.end.frames) < (said.segment, said.frames):
                raise AuditError(
                    f"segment {self.end.segment} ends after record {self.end.frames - 1}, but the writer had reached "
                    f"record {said.frames - 1} of segment {said.segment}, says {name}"
                )
        if self.head.sealed and self.seal is None:
            raise AuditError(f"{SEAL} is missing, which says where the log was last closed")
        if not self.head.closed or self._opened_again():
            return
        said = self.head.position
        if self.end != said or self.torn:
            raise AuditError(
                f"the log was closed after record {said.frames - 1} of segment {said.segment} but continues"
            )
        if self.head.format > 1 and not self.closed:
            raise AuditError(f"{HEAD} says that the log was closed, but its last record does not")
        if self.head.sealed and self.seal != said:
            raise AuditError(f"{HEAD} and {SEAL} say that the log was closed at different records")
        self.closed = True

    def _opened_again(self) -> bool:
        """Whether a writer reopened the closed log since the head was read or, in format 1, died before it updated the head."""
        if read_head(self.folder, self.key, self.files) != self.head:
            return True
        said = self.head.position
        behind = self.end.segment > said.segment or (self.newborn is not None and self.end == said)
        return self.head.format == 1 and behind and self._frames_of_head == said.frames

    def _ends_in_zeros(self, file: BinaryIO, offset: int) -> bool:
        file.seek(max(offset, self.files.size(file) - _ZEROS))
        return not any(file.read())
