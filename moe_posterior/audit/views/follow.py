"""Continues reading a log where the last read ended, while its writer rotates, dies and restarts."""

from collections.abc import Iterator
from pathlib import Path

from moe_posterior.audit.read import Reader, Record, records_of
from moe_posterior.audit.storage.files import segment_name, segment_numbers
from moe_posterior.audit.storage.frames import Torn, read_frame
from moe_posterior.audit.storage.marks import Position
from moe_posterior.audit.storage.state import Checkpoint
from moe_posterior.errors import AuditError


class Follower(Reader):
    """The records of a log as they arrive; call :meth:`poll` repeatedly.

    It begins one segment before the last, whose checkpoints hold the belief; what came before is trusted. If the log no longer
    continues what was read (a failed write was undone, or the log was recreated), it starts over: ``restarts`` rises.
    """

    def __init__(self, folder: Path, key: bytes | None = None) -> None:
        super().__init__(folder, key)
        self.restarts = -1
        self._end: Position | None = None
        self._offset = 0

    def poll(self) -> Iterator[Record]:
        """The records written since the last call; none if there is no log yet.

        Raises:
            AuditError: the log is malformed or altered; the next call starts over.
        """
        if self._end is None:
            yield from self._begin()
            return
        try:
            yield from self._go_on()
        except (AuditError, OSError):  # perhaps undone by the writer; if not, reading from the start finds it
            self._end = None
            yield from self._begin()

    def _begin(self) -> Iterator[Record]:
        numbers = list(segment_numbers(self.folder)) if self.folder.is_dir() else []
        if not numbers:
            return
        self.start = numbers[-2] if len(numbers) > 1 else 0
        self.restarts += 1
        yield from self
        if self.chain is not None:
            self._end, self._offset = self.chain.end, self.chain.end_offset

    def _go_on(self) -> Iterator[Record]:
        while self._end is not None:
            number, frames, digest = self._end
            following = self.folder / segment_name(number + 1)
            sealed = (
                following.exists() and following.stat().st_size > 0
            )  # checked first: nothing more is added here then
            with open(self.folder / segment_name(number), "rb") as file:
                file.seek(self._offset)
                try:
                    frame = read_frame(file, number, frames, digest, self.key)
                except Torn:
                    frame = None  # incomplete: being written, or the writer died
            if frame is None:
                if not sealed:
                    return
                self._end, self._offset = Position(number + 1, 0, digest), 0
                continue
            self._end, self._offset = Position(number, frames + 1, frame.digest), frame.end
            for record in records_of(frame):
                if isinstance(record, Checkpoint):
                    self._note(record)
                yield record
