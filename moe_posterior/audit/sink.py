"""What recorders write to: all they know of the log."""

from typing import Protocol

from moe_posterior.audit.storage.collect import Item


class Sink(Protocol):
    """A log as its recorders see it; :class:`~moe_posterior.audit.AuditLog` is one."""

    reached_id: int  # every id given so far is below this; the recorder that gives ids raises it

    @property
    def generation(self) -> int:
        """Rises when the log needs checkpoints to begin a new segment."""

    def source_of(self, name: str) -> int:
        """The number of a router or gate in the files."""

    def require_open(self) -> None:
        """Raise AuditWriteError where nothing can ever be recorded again."""

    def has_room(self) -> bool:
        """Whether something can be recorded now."""

    def admit(self) -> bool:
        """Whether the next event will be recorded; waits or raises as the log was configured."""

    def put(self, item: Item, size: int = 500) -> None:
        """Record an item of about ``size`` bytes."""

    def count_dropped(self, what: str, count: int) -> None:
        """Note that something was not recorded."""
