"""The files of a log being written: append, sync, rotate, and continue after a failure without trusting what it left."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from moe_posterior.audit.storage.clock import now
from moe_posterior.audit.storage.collect import Raw
from moe_posterior.audit.storage.files import HEAD, FileSystem, FolderLock, identity, segment_name, segment_numbers
from moe_posterior.audit.storage.frames import Kind, compress, pack
from moe_posterior.audit.storage.marks import FORMAT, REMOVED, SEAL, Head, Position, head_bytes, read_note, seal_bytes
from moe_posterior.audit.storage.state import encode_json
from moe_posterior.errors import AuditError, AuditWriteError


class Place:
    """A log's folder as its one writer has it: the key, the calls that change files, and the lock."""

    def __init__(self, folder: Path, key: bytes | None, files: FileSystem) -> None:
        self.folder, self.key, self.files = folder, key, files
        self.lock = FolderLock(folder, files)

    def write_head(self, head: Head) -> None:
        """Record durably where the log ends; the folder must still be ours."""
        self.lock.require()
        self.files.replace(self.folder / HEAD, head_bytes(head, self.key))


class Start:
    """Where a writer resumes: the position, and what earlier writers left."""

    def __init__(self, position: Position, *, sealed: bool = False, clean: bool = True) -> None:
        self.position, self.sealed, self.clean = position, sealed, clean


class Segments:
    """The end of the chain on disk, and the file that continues it.

    After any failure the file is abandoned: a disk that failed a sync may have lost part of it, whatever it reports later. What was
    not acknowledged is written again, to a new file that continues the last synced frame. If folder, lock or file are no longer
    ours, AuditError says what happened, and nothing there is touched.
    """

    def __init__(self, place: Place, start: Start, describe: Callable[[], dict[str, Any]]) -> None:
        self.place, self.folder, self.files, self.describe = place, place.folder, place.files, describe
        self.position = start.position  # the last synced frame
        self.size = 0  # bytes of the current file
        self.opened: float | None = None  # when it was created, by the monotonic clock
        self.done = 0
        self._file: BinaryIO | None = None
        self._made: tuple[int, int] | None = None  # an abandoned file that was not removed yet
        self._pending = start.position
        self._synced_size = 0
        self._sealed = start.sealed
        self._head_is_old = False
        # there may be more after the last synced frame: it could not be cut, or a writer presumed dead is alive
        self._left_tail = not start.clean

    def commit(self, frames: list[Raw]) -> None:
        """Write the frames and return once they are on disk; on OSError the first ``done`` of them are."""
        self.done = 0
        self._settle()
        self.require()
        try:
            batch: list[bytes] = []
            for index, frame in enumerate(frames):
                if self._file is None or (frame.rotate and self._pending.frames > 1):
                    self._write(batch)
                    self._sync(index)
                    self._settle()
                    self._release()
                    batch = [self._begin()]
                batch.append(self._place(frame.kind, frame.payload))
            self._write(batch)
            self._sync(len(frames))
        except OSError:
            self._give_up()
            raise
        self._settle()

    def close(self, last: Raw) -> None:
        """Mark the log as closed here: in its last record, in the seal, in the head."""
        try:
            self.commit([last])
            self.files.replace(self.folder / SEAL, seal_bytes(self.position, self.place.key))
            self._sealed = True
            self.place.write_head(self._head(closed=True))
        finally:
            self._release()

    def require(self) -> None:
        """Return if what was synced is still in place.

        Raises:
            AuditError: folder, lock or the current file were removed, renamed, replaced or changed by somebody else.
        """
        self.place.lock.require()
        if self._file is None:
            return
        name = segment_name(self._pending.segment)
        ours = self.files.call(os.fstat, self._file.fileno())
        there = self.files.stat(self.folder / name)
        if there is None:
            how = "removed" if not ours.st_nlink else "renamed"
            raise AuditError(
                f"{self.folder}: {name} was {how} while it was written: its records are no longer in the log"
            )
        if identity(there) != identity(ours):
            raise AuditError(f"{self.folder}: another file was put in the place of {name} while it was written")
        if ours.st_size != self.size:
            raise AuditError(
                f"{self.folder}: somebody else changed {name} while it was written: it has {ours.st_size} bytes, and "
                f"{self.size} were written"
            )

    def _begin(self) -> bytes:
        number = number_after(self.position)
        self._require_all_before(number)
        path = self.folder / segment_name(number)
        if not self.position.frames and not number:
            self.place.write_head(self._head())
        self._remove_what_was_given_up(path)
        try:
            self._file = self.files.append(path)
        except FileExistsError as error:
            raise AuditError(
                f"{self.folder}: {path.name} exists and is not ours: another process is writing here"
            ) from error
        self.size, before, self.opened = 0, self.opened, time.monotonic()
        self._pending = Position(number, 0, self.position.digest)
        said = {"format": FORMAT, "segment": number, "previous": self.position.digest.hex(), "made": now() / 1e6}
        if (
            before is not None
        ):  # seconds that passed since this writer began the segment before, whatever the clock shows
            said["after"] = self.opened - before
        if self._left_tail:
            said["tail"] = True
        return self._place(Kind.SEGMENT, encode_json(said | self.describe()))

    def _require_all_before(self, number: int) -> None:
        """Check that only retention removed segments: it removes the oldest, and records that first."""
        try:
            numbers = segment_numbers(self.folder, self.files)
            first = min(numbers, default=number)
            removed = read_note(self.folder / REMOVED, self.place.key, self.files) if first else None
        except AuditError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            raise AuditWriteError(str(error)) from error  # the disk failed, not its content: retried
        first = 0 if removed is None else min(first, removed.segment + 1)
        for wanted in range(first, number):
            if wanted not in numbers:
                raise AuditError(
                    f"{self.folder}: segment {wanted} was removed by somebody else while this log was open"
                )

    def _place(self, kind: Kind, payload: bytes) -> bytes:
        number, frames, digest = self._pending
        stored = compress(payload)
        head, digest = pack(kind, frames, stored, len(payload), digest, self.place.key)
        self._pending = Position(number, frames + 1, digest)
        return head + stored

    def _write(self, batch: list[bytes]) -> None:
        if batch and self._file is not None:
            data = b"".join(batch)
            self.files.write(self._file, data)
            self.size += len(data)

    def _sync(self, done: int) -> None:
        """Sync what is written; the first ``done`` frames of the commit are then on disk."""
        if self._file is None:
            return
        self.files.sync(self._file)
        if self._pending.segment != self.position.segment or not self.position.frames:
            self.files.sync_folder(self.folder)
        self.require()
        if self._pending.segment != self.position.segment or not self.position.frames:
            self._head_is_old = True
            self._left_tail = False
        self.position, self._synced_size = self._pending, self.size
        self.done = done

    def _settle(self) -> None:
        """Record a new segment in the head; until that succeeds, nothing more is acknowledged."""
        if self._head_is_old:
            self.place.write_head(self._head())
            self._head_is_old = False

    def _head(self, closed: bool = False) -> Head:
        return Head(self.position, closed, self._sealed)

    def _give_up(self) -> None:
        if self._file is None:
            return
        path = self.folder / segment_name(self._pending.segment)
        kept = self._pending.segment == self.position.segment and self.position.frames > 0
        self._made = identity(os.fstat(self._file.fileno()))
        self._release()
        try:
            if kept:
                self._require_made(path)
                self.files.truncate(path, self._synced_size)
                self._made = None
            else:
                self._remove_what_was_given_up(path)
        except OSError:  # the next segment records it and continues what was synced
            self._left_tail |= kept
            self._made = None if kept else self._made

    def _remove_what_was_given_up(self, path: Path) -> None:
        """Remove a file of ours in which nothing was acknowledged."""
        if self._made is not None:
            if self.files.stat(path) is not None:
                self._require_made(path)
                self.files.remove(path)
            self._made = None

    def _require_made(self, path: Path) -> None:
        self.place.lock.require()
        there = self.files.stat(path)
        if there is None or identity(there) != self._made:
            raise AuditError(
                f"{self.folder}: {path.name} was removed or replaced by somebody else while it was written"
            )

    def _release(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def number_after(position: Position) -> int:
    """The number of the segment that comes after this end of a log."""
    return position.segment + 1 if position.frames or position.segment else 0
