"""What recorders write to. A log knows its recorders; of the log they know no more than this."""

from typing import Protocol

from moe_posterior.audit.storage.collect import Item


class Sink(Protocol):
    """A log as its recorders see it; :class:`~moe_posterior.audit.AuditLog` is one."""

    reached_id: int  # no id below was ever given, as far as the log knows; the recorder that gives ids raises it

    @property
    def generation(self) -> int:
        """Rises when the log wants checkpoints to begin a new segment with."""

    def source_of(self, name: str) -> int:
        """The number that stands for a router or gate in the files."""

    def require_open(self) -> None:
        """Raise AuditWriteError where nothing can ever be recorded again."""

    def has_room(self) -> bool:
        """Whether something can be recorded now."""

    def admit(self) -> bool:
        """Whether what is about to happen will be recorded; waits or raises as the log was told to."""

    def put(self, item: Item, size: int = 500) -> None:
        """Record an item of about ``size`` bytes."""

    def count_dropped(self, what: str, count: int) -> None:
        """Note that something was not recorded."""
