"""Compaction of sealed segments to Parquet, and removal of the oldest. The chain stays verifiable through both.

In both cases a note takes the place of the segment: first the new files, then a record in the log that vouches for the note, and only
then are the old files removed. A crash in between leaves extra files, never missing ones.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from moe_posterior.audit.storage.chain import Chain
from moe_posterior.audit.storage.clock import believed
from moe_posterior.audit.storage.compact import BEGUN, SegmentTables, begun_of, read_compacted
from moe_posterior.audit.storage.files import note_name, parquet_name, segment_name, segment_numbers
from moe_posterior.audit.storage.frames import Kind, genesis, read_frame
from moe_posterior.audit.storage.marks import REMOVED, Note, note_bytes, note_digest, read_note
from moe_posterior.audit.storage.segments import Place
from moe_posterior.audit.storage.state import Checkpoint, decode_json
from moe_posterior.audit.storage.tables import TABLES
from moe_posterior.errors import AuditError

_COUNTED = ("decisions", "outcomes", "refusals")


class Upkeep:
    """Compaction and retention in a folder whose writer is us.

    Args:
        place: the log's folder, checked before every change for still being ours.
        tell: puts an event into the log and returns once it is on disk.
    """

    def __init__(self, place: Place, tell: Callable[[dict[str, Any]], None]) -> None:
        self.folder, self.key, self.files, self.lock, self.tell = place.folder, place.key, place.files, place.lock, tell

    def compact(self) -> int:
        """Convert every sealed segment to Parquet; returns how many."""
        done, number, start, end = 0, -1, b"", b""
        tables = SegmentTables()
        last = max(self._numbers(), default=-1)
        for frame in self._chain():
            if isinstance(frame, Note):
                continue
            if frame.kind == Kind.SEGMENT:
                if number >= 0:
                    self._put_parquet(Note(number, start, end, {}, {}, False, ""), tables)
                    done += 1
                if frame.segment == last:
                    break
                number, tables = frame.segment, SegmentTables()
                start = bytes.fromhex(decode_json(frame.payload())["previous"])
            tables.add(frame)
            end = frame.digest
        return done

    def retain(self, max_bytes: int | None, max_seconds: float | None, elapsed: float) -> int:
        """Remove the oldest sealed segments beyond a size or an age; returns how many. The last began ``elapsed`` seconds ago."""
        sizes, ages = self._sizes(), self._ages(elapsed) if max_seconds is not None else {}
        numbers, total, up_to = sorted(sizes), sum(sizes.values()), None
        for number in numbers[:-1]:
            too_large = max_bytes is not None and total > max_bytes
            too_old = max_seconds is not None and ages[number] > max_seconds
            if not (too_large or too_old):
                break
            total -= sizes[number]
            up_to = number
        while up_to is not None and up_to >= numbers[0] and not self._begins_with_checkpoint(up_to + 1):
            up_to -= 1
        if up_to is None or up_to < numbers[0]:
            return 0
        return self.remove(up_to)

    def remove(self, up_to: int) -> int:
        """Remove all segments up to this one, and record it; returns how many segments had files.

        Raises:
            AuditError: what would be left does not begin with a sealed segment's successor and its checkpoint.
        """
        before = self._note(REMOVED)
        gone = -1 if before is None else before.segment
        numbers = [n for n in self._numbers() if gone < n <= up_to]  # anything below is left from a crash
        if not numbers or not self._begins_with_checkpoint(up_to + 1):
            raise AuditError(f"segment {up_to + 1} does not begin with a checkpoint: what is before it is still needed")
        totals, counted, end = Counter(before.totals if before else {}), SegmentTables(), b""
        for frame in self._chain():
            if isinstance(frame, Note):
                if frame.removed or frame.segment > up_to:
                    continue
                totals.update({name: frame.totals.get(name, 0) for name in _COUNTED})
                end = frame.end
            elif frame.segment > up_to:
                break
            else:
                counted.add(frame)
                counted.groups, counted.others = [], []
                end = frame.digest
        totals.update({name: counted.totals[name] for name in _COUNTED})
        totals["segments"] += len(numbers)
        note = Note(up_to, genesis(self.key), end, {}, dict(totals), True, "")
        waiting = self.folder / (REMOVED + ".next")
        self.lock.require()
        self.files.replace(waiting, note_bytes(note, self.key))
        self.tell({"event": "removed", "up_to": up_to, "note": note_digest(note, self.key), "totals": dict(totals)})
        self.files.rename(waiting, self.folder / REMOVED)
        self.files.sync_folder(self.folder)
        self.sweep()
        return len(numbers)

    def sweep(self) -> None:
        """Remove files that a note has taken the place of, also those that a crash has left."""
        self.lock.require()
        removed = self._note(REMOVED)
        for number in self._numbers():
            if removed is not None and number <= removed.segment:
                tables = [
                    parquet_name(table, number) for table in (*TABLES, "others")
                ]  # also without a note, after a crash
                for name in [*tables, segment_name(number), note_name(number)]:
                    self.files.remove(self.folder / name)
        self.files.sync_folder(self.folder)

    def _put_parquet(self, note: Note, tables: SegmentTables) -> None:
        self.lock.require()
        note = note._replace(
            files=tables.write(self.folder, note.segment, self.key, self.files), totals=dict(tables.totals)
        )
        self.files.replace(self.folder / note_name(note.segment), note_bytes(note, self.key))
        self.tell({"event": "compacted", "segment": note.segment, "note": note_digest(note, self.key)})
        self.files.remove(self.folder / segment_name(note.segment))
        self.files.sync_folder(self.folder)

    def _numbers(self) -> dict[int, set[str]]:
        return segment_numbers(self.folder, self.files)

    def _chain(self, start: int = 0) -> Chain:
        return Chain(self.folder, self.key, start=start, files=self.files)

    def _note(self, name: str) -> Note | None:
        return read_note(self.folder / name, self.key, self.files)

    def _begins_with_checkpoint(self, number: int) -> bool:
        """Whether nothing in a segment, events apart, comes before a checkpoint."""
        for frame in self._chain(start=number):
            if isinstance(frame, Note):
                if frame.removed or frame.segment < number:
                    continue
                records = read_compacted(self.folder, frame, self.key, files=self.files)
                return isinstance(next((r for r in records if not isinstance(r, dict)), None), Checkpoint)
            if frame.kind in (Kind.GROUP, Kind.CHECKPOINT):
                return frame.kind == Kind.CHECKPOINT
        return False

    def _sizes(self) -> dict[int, int]:
        sizes = {}
        for number in self._numbers():
            names = [segment_name(number)]
            if (note := self._note(note_name(number))) is not None:
                names += note.files
            found = [stat for name in names if (stat := self.files.stat(self.folder / name)) is not None]
            sizes[number] = sum(stat.st_size for stat in found)
        return sizes

    def _ages(self, elapsed: float) -> dict[int, float]:
        """Seconds since each segment was sealed, as far as the log shows that they passed; no clock alone can make one old."""
        numbers = sorted(self._numbers())
        begun = {number: self._begun(number) for number in numbers}
        ages, age = {}, elapsed  # of the segment before the last: the last began when it was sealed
        for number in reversed(numbers[:-1]):
            ages[number] = age
            made, (next_made, after) = begun[number][0], begun.get(number + 1, (0.0, 0.0))
            age += believed(made, next_made, after)
        return ages

    def _begun(self, number: int) -> tuple[float, float | None]:
        """When a segment was begun by the clock, and how long after the one before it, if the same run of the writer began both."""
        path = self.folder / segment_name(number)
        if self.files.stat(path) is None:
            note = self._note(note_name(number))
            said = (
                {}
                if note is None
                else {name: note.totals[f"{name}_time"] / 1e6 for name in BEGUN if f"{name}_time" in note.totals}
            )
        else:
            with self.files.read(path) as file:
                frame = read_frame(file, number, 0, b"", self.key, unchecked=True)
            said = {} if frame is None else begun_of(decode_json(frame.payload()))
        return said.get("made", 0.0), said.get("after")
