"""Whether a log is what was written: its chain of hashes; :mod:`moe_posterior.audit.recompute` checks the choices it holds."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from moe_posterior.audit.recompute import Recomputed, verify_decisions
from moe_posterior.audit.storage.chain import Chain, beside_upkeep
from moe_posterior.audit.storage.compact import read_compacted
from moe_posterior.audit.storage.files import DISK, FileSystem
from moe_posterior.audit.storage.frames import Frame, Kind
from moe_posterior.audit.storage.marks import Note, Position
from moe_posterior.audit.storage.state import decode_json
from moe_posterior.audit.storage.tables import split
from moe_posterior.errors import AuditError

__all__ = ["Recomputed", "Verification", "verify", "verify_decisions"]


@dataclass
class Verification:
    """What :func:`verify` found."""

    problem: str | None = None  # the first record that is not as it was written
    records: int = 0
    segments: int = 0
    totals: Counter[str] = field(default_factory=Counter)  # rows of decisions, outcomes, refusals, posterior
    removed: Counter[str] = field(default_factory=Counter)  # the same, for segments removed by retention
    closed: bool = False
    head: Position | None = None
    torn: str | None = None  # how an unclosed log ends, if not with a whole record
    torn_bytes: int = 0
    cut_bytes: int = 0

    @property
    def sound(self) -> bool:
        """Whether nothing was altered."""
        return self.problem is None


def verify(
    folder: Path, key: bytes | None = None, *, head: str | None = None, files: FileSystem = DISK
) -> Verification:
    """Walk the chain and check every hash.

    Args:
        folder: of the log.
        key: what it was written with.
        head: a digest (hexadecimal) that the log once ended with, kept elsewhere: it must occur in the chain.
        files: for tests: the calls that touch the disk.

    Problems do not raise; the first one is named in the result.
    """
    found = Verification()

    def walk() -> None:
        found.__dict__.update(Verification().__dict__)
        _walk(Chain(folder, key, files=files), head, found)

    try:
        beside_upkeep(folder, walk)
    except AuditError as error:
        found.problem = str(error)
    except OSError as error:
        found.problem = f"{folder} cannot be read: {error.strerror or error}"
    return found


def _walk(chain: Chain, head: str | None, found: Verification) -> None:
    notes: dict[str, str] = {}  # digest: what it is of
    vouched: set[str] = set()
    digests = {chain.end.digest.hex()}
    for frame in chain:
        if isinstance(frame, Note):
            vouched |= _check_note(chain, frame, found)
            notes[frame.digest] = f"the note of removed segments up to {frame.segment}"
            if not frame.removed:
                notes[frame.digest] = f"the note of segment {frame.segment}"
            digests.add(frame.end.hex())
            continue
        found.records += 1
        found.segments += frame.kind == Kind.SEGMENT
        digests.add(frame.digest.hex()) if head else None
        vouched |= _count(frame, found)
    found.closed, found.head = chain.closed, chain.end
    found.torn, found.torn_bytes, found.cut_bytes = chain.torn, chain.torn_bytes, chain.cut_bytes
    for digest, of in notes.items():
        if digest not in vouched:
            raise AuditError(f"no record vouches for {of}: it was replaced")
    if head is not None and head.lower() not in digests:
        raise AuditError(f"no record has the hash {head}: the log was cut before it, or rewritten")


def _count(frame: Frame, found: Verification) -> set[str]:
    """Count a frame's rows; returns the digests of the notes that it vouches for."""
    try:
        if frame.kind == Kind.GROUP:
            for table, _, _, rows, _ in split(frame.payload()):
                found.totals[table] += rows
        elif frame.kind == Kind.EVENT:
            return {str(decode_json(frame.payload()).get("note"))}
    except AuditError as error:
        raise AuditError(f"segment {frame.segment}, record {frame.number}: {error}") from error
    return set()


def _check_note(chain: Chain, note: Note, found: Verification) -> set[str]:
    if note.removed:
        found.removed.update(
            {name: note.totals.get(name, 0) for name in ("segments", "decisions", "outcomes", "refusals")}
        )
        return set()
    vouched = set()
    for record in read_compacted(chain.folder, note, chain.key, events_only=True, files=chain.files):
        if isinstance(record, dict):
            vouched.add(str(record.get("note")))
    found.segments += 1
    found.totals.update({name: note.totals.get(name, 0) for name in ("decisions", "outcomes", "refusals", "posterior")})
    return vouched
