"""Where a writer resumes in a folder, and which names and ids are taken there."""

from typing import NamedTuple

from moe_posterior.audit.storage.chain import Chain
from moe_posterior.audit.storage.files import HEAD, segment_name, segment_numbers
from moe_posterior.audit.storage.frames import Frame, Kind, genesis
from moe_posterior.audit.storage.marks import FORMAT, Head, Note, Position
from moe_posterior.audit.storage.segments import Place, Start, number_after
from moe_posterior.audit.storage.state import decode_checkpoint, decode_json
from moe_posterior.audit.storage.tables import decode
from moe_posterior.errors import AuditError


class Resumed(NamedTuple):
    """A folder that is ready to be written to."""

    start: Start
    cut: int  # bytes of a torn end that were cut off
    names: dict[str, int]  # of routers and gates, and the numbers that stand for them
    reached_id: int  # every id the log knows of is below this


def resume(place: Place) -> Resumed:
    """Prepare a folder, empty or with a log in it, for writing.

    Raises:
        AuditError: the folder holds no valid log.
    """
    numbers = [n for n, suffixes in segment_numbers(place.folder, place.files).items() if "audit" in suffixes]
    if place.files.stat(place.folder / HEAD) is None:
        if numbers:
            raise AuditError(f"{place.folder} holds segments and no {HEAD}: verify it before writing to it")
        return Resumed(Start(Position(0, 0, genesis(place.key))), 0, {}, 0)
    chain = Chain(place.folder, place.key, start=numbers[-2] if len(numbers) > 1 else 0, files=place.files)
    names, reached_id = _taken(chain)
    if not chain.closed:  # ids may have been given that no durable record holds
        reached_id += 1 << 32
    return Resumed(*_go_on_from(place, chain), names, reached_id)


def _taken(chain: Chain) -> tuple[dict[str, int], int]:
    """Read a log to its end; returns which names and ids are taken."""
    names: dict[str, int] = {}
    reached = 0
    for frame in chain:
        if isinstance(frame, Note):
            continue
        if frame.kind == Kind.SEGMENT:
            said = decode_json(frame.payload())
            names.update(said.get("sources", {}))
            reached = max(reached, said.get("reached", 0))
        elif frame.kind == Kind.CHECKPOINT:
            settings = decode_checkpoint(frame.payload()).settings
            names[settings["name"]] = settings["source"]
            reached = max(reached, settings.get("next_id", 0))
        elif frame.kind == Kind.GROUP:
            reached = max(reached, _reached_in(frame))
    return names, reached


def _reached_in(frame: Frame) -> int:
    ids = [group.decision_ids() for group in decode(frame.payload())]
    return max((int(found[-1]) + 1 for found in ids if len(found)), default=0)


def _go_on_from(place: Place, chain: Chain) -> tuple[Start, int]:
    """Prepare a log that was read to its end for resuming: where it resumes, and how many bytes of a torn end were cut off.

    The head of a closed log is updated first and synced before anything else changes: a crash at any later moment then leaves a
    log that was open.
    """
    if chain.head.closed or chain.head.format != FORMAT:
        place.write_head(Head(chain.end, False, chain.head.sealed))
    start = Start(chain.end, sealed=chain.head.sealed or chain.seal is not None, clean=chain.closed)
    if not chain.torn and chain.end.frames:
        return start, 0
    if chain.newborn is not None or not chain.end.frames:
        place.files.remove(place.folder / segment_name(number_after(chain.end)))
        place.files.sync_folder(place.folder)
    else:
        place.files.truncate(place.folder / segment_name(chain.end.segment), chain.end_offset)
    return start, chain.torn_bytes
