"""What a calibration report says of an audit log: where it lies, how it ends, and whether it is as it was written."""

from pathlib import Path

from moe_posterior.audit.verify import verify
from moe_posterior.errors import MissingDataError
from moe_posterior.report.schema import AuditEvidence

__all__ = ["evidence_of"]


def evidence_of(folder: str | Path, key: bytes | None = None) -> AuditEvidence:
    """Walk the log's chain; whatever is wrong with it becomes the evidence's ``problem``.

    Args:
        folder: of the log.
        key: what it was written with.

    Raises:
        MissingDataError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise MissingDataError(f"there is no audit log {folder}: give the folder that the log was written to")
    found = verify(Path(folder), key)
    evidence: AuditEvidence = {
        "path": str(folder),
        "verified": found.sound,
        "decisions": found.totals["decisions"] + found.removed["decisions"],
    }
    if found.head is not None:
        evidence["head"] = found.head.digest.hex()
    if found.problem is not None:
        evidence["problem"] = found.problem
    return evidence
