"""The append-only audit log: every decision accounted for, replayable, and impossible to lose or alter unseen."""

from moe_posterior.audit.log import AuditLog
from moe_posterior.audit.read import Reader
from moe_posterior.errors import AuditError, AuditLockedError, AuditWriteError

__all__ = ["AuditError", "AuditLockedError", "AuditLog", "AuditWriteError", "Reader"]
