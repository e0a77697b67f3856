"""The files of a log that is being written: append, sync, rotate, and go on behind a failure without trusting what it left."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from moe_posterior.audit.chain import FORMAT, Chain, Head, Position, head_bytes
from moe_posterior.audit.collect import Raw
from moe_posterior.audit.files import HEAD, FileSystem, segment_name
from moe_posterior.audit.frames import Kind, compress, genesis, pack
from moe_posterior.audit.state import encode_json


class Segments:
    """Where the chain ends on disk, and the file that it goes on in.

    After any failure the file is given up: a disk that refused a sync may have lost part of it, whatever it says later. What was
    not acknowledged is then written again, to a new file that continues the last synced frame.
    """

    def __init__(
        self,
        folder: Path,
        key: bytes | None,
        files: FileSystem,
        position: Position,
        describe: Callable[[], dict[str, Any]],
    ) -> None:
        self.folder, self.key, self.files, self.describe = folder, key, files, describe
        self.position = position  # the last synced frame
        self.size = 0  # bytes of the current file
        self.opened = 0.0  # when it was made
        self.done = 0
        self._file: BinaryIO | None = None
        self._pending = position
        self._synced_size = 0
        self._head_is_old = False
        self._left_tail = False  # behind the last synced frame, because it could not be cut

    def commit(self, frames: list[Raw]) -> None:
        """Write the frames and return once they are on the disk; on OSError the first ``done`` of them are."""
        self.done = 0
        try:
            batch: list[bytes] = []
            for index, frame in enumerate(frames):
                if self._file is None or (frame.rotate and self._pending.frames > 1):
                    self._write(batch)
                    self._finish()
                    self.done = index
                    batch = [self._begin()]
                batch.append(self._place(frame.kind, frame.payload))
            self._write(batch)
            self._sync()
            self.done = len(frames)
        except OSError:
            self._give_up()
            raise

    def close(self) -> None:
        """Say that the log ends here."""
        try:
            self._sync()
            self.files.replace(self.folder / HEAD, head_bytes(Head(self.position, True), self.key))
        finally:
            self._release()

    def _begin(self) -> bytes:
        number = 0 if self.position.frames == 0 and self.position.segment == 0 else self.position.segment + 1
        path = self.folder / segment_name(number)
        if not self.position.frames and not number:
            self.files.replace(self.folder / HEAD, head_bytes(Head(self.position, False), self.key))
        self.files.remove(path)  # left by a failed attempt: nothing in it was acknowledged
        self._file = self.files.append(path)
        self.size, self.opened = 0, time.monotonic()
        self._pending = Position(number, 0, self.position.digest)
        said = {"format": FORMAT, "segment": number, "previous": self.position.digest.hex(), "made": time.time()}
        if self._left_tail:
            said["tail"] = True
        return self._place(Kind.SEGMENT, encode_json(said | self.describe()))

    def _place(self, kind: Kind, payload: bytes) -> bytes:
        number, frames, digest = self._pending
        stored = compress(payload)
        head, digest = pack(kind, frames, stored, len(payload), digest, self.key)
        self._pending = Position(number, frames + 1, digest)
        return head + stored

    def _write(self, batch: list[bytes]) -> None:
        if batch and self._file is not None:
            data = b"".join(batch)
            self.files.write(self._file, data)
            self.size += len(data)

    def _sync(self) -> None:
        if self._file is None:
            return
        self.files.sync(self._file)
        if self._pending.segment != self.position.segment or not self.position.frames:
            self.files.sync_folder(self.folder)
            self._head_is_old = True
            self._left_tail = False
        self.position, self._synced_size = self._pending, self.size
        if self._head_is_old:  # the chain itself says where it ends; that its head follows late must fail nothing
            with contextlib.suppress(OSError):
                self.files.replace(self.folder / HEAD, head_bytes(Head(self.position, False), self.key))
                self._head_is_old = False

    def _finish(self) -> None:
        self._sync()
        self._release()

    def _give_up(self) -> None:
        if self._file is None:
            return
        path = self.folder / segment_name(self._pending.segment)
        kept = self._pending.segment == self.position.segment and self.position.frames > 0
        self._release()
        try:
            if kept:
                self.files.truncate(path, self._synced_size)
            else:
                self.files.remove(path)
        except OSError:  # the next segment says so, and continues what was synced
            self._left_tail |= kept

    def _release(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def reopen(folder: Path, files: FileSystem, chain: Chain) -> int:
    """Cut what a crash left behind the end of a walked chain; how many bytes that was."""
    if not chain.torn:
        return 0
    last = chain.end.segment
    newborn = folder / segment_name(last + 1)
    if newborn.exists():
        files.remove(newborn)
        files.sync_folder(folder)
    else:
        files.truncate(folder / segment_name(last), chain.end_offset)
    return chain.torn_bytes


def first_position(key: bytes | None) -> Position:
    """Where an empty log ends."""
    return Position(0, 0, genesis(key))
