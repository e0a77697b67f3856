"""What a router tells an audit log; :mod:`moe_posterior.audit` has one.

Dimensions: N queries, k experts per query, J clusters per query.
"""

from typing import Any, Protocol

from numpy.typing import NDArray

from moe_posterior.checks import validation
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.pending import Members
from moe_posterior.router.decisions import Decision, Decisions


class Recorder(Protocol):
    """What a router tells an audit log, under the router's lock; see :mod:`moe_posterior.audit`."""

    def may_change(self, num_experts: int) -> None:
        """The belief, the clusters or the pool are about to change by something else than outcomes, to so many experts; an error
        here says that they must not, for it could never be recorded."""

    def before(self) -> None:
        """Something is about to be decided or learned; an error here says that it must not be, for it could not be recorded."""

    def routed_one(self, decision: Decision, scores: list[float], members: Members | None = None) -> None:
        """One decision and the scores of all its experts; of a query in several clusters, all of them, (1, J)."""

    def routed(self, decisions: Decisions, members: Members | None = None) -> None:  # _, (N, J)
        """A batch of decisions, with consecutive ids."""

    def resolved(self, ids: NDArray, outcomes: NDArray) -> None:  # (N,), (N, k)
        """Outcomes that the belief has taken in."""

    def refused(self, ids: NDArray, outcomes: NDArray, reason: str) -> None:
        """Outcomes that it has not."""

    def changed(self, reason: str) -> None:
        """The belief, the clusters or the pool changed by something else than outcomes."""


class Audit(Protocol):
    """A log that can follow a router."""

    def follow(self, router: Any) -> Recorder:  # a PosteriorRouter
        """Record what this router does from now on."""


def require_audit(audit: Audit | None) -> None:
    """Raise InvalidArgumentError unless this is a log or None."""
    if audit is not None and (isinstance(audit, type) or not callable(getattr(audit, "follow", None))):
        raise InvalidArgumentError(f"audit must be an audit log or None; got {validation.described(audit)}")
