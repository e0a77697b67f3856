"""What every gate is: hidden states in, a Routing out, outcomes back.

Dimensions: N tokens, D hidden size, E experts, k experts per token.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_posterior.checks import validation
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.memberships import Memberships
from moe_posterior.precision import require_all_loadable


class Routing(NamedTuple):
    """Which experts each token goes to, with what weight, and why.

    It can be observed once, at any later time: delayed outcomes are normal.
    """

    expert_indices: Tensor  # (N, k) int64, best first
    routing_weights: Tensor  # (N, k), rows sum to 1
    cluster_ids: Tensor  # (N,) int64; 0 for gates without clusters
    scores: Tensor  # (N, k) what the gate ranked the experts by
    distance: Tensor  # (N,) to the centroid; 0 for gates without clusters, inf for a row that holds NaN or inf

    @property
    def members(self) -> Memberships | None:
        """The clusters of tokens that belong to several, including ``cluster_ids``; None where each token has one cluster."""
        return None

    @property
    def logits(self) -> Tensor | None:  # (N, E)
        """The log odds of success that a learned prior gave every expert; None where the cluster decides what is expected."""
        return None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Routing":
        """The routing with ``change`` applied to every tensor, to move it to a device or select rows."""
        return Routing(*(change(part) for part in self))

    def abstain(self, threshold: float) -> Tensor:  # -> (N,) bool
        """Which tokens to escalate rather than answer: those whose best score stays below the threshold, or is NaN.

        Source: *Bayesian Posterior Routing in Multi-Agent Systems*, tiered invocation.
        """
        return ~(self.scores[:, 0] >= threshold)


class SharedRouting(Routing):
    """A :class:`Routing` of tokens that belong to several clusters. The five fields are the same; the memberships are attached.

    They survive :meth:`Routing.map`, ``_replace``, copies and pickles; a routing rebuilt from the five fields alone has lost
    them, and its gate refuses to observe it.
    """

    @property
    def members(self) -> Memberships | None:
        return self.__dict__.get("_members")

    @staticmethod
    def of(routing: Routing, members: Memberships) -> "SharedRouting":
        """The routing with these memberships."""
        shared = SharedRouting(*routing)
        shared.__dict__["_members"] = members
        return shared

    def map(self, change: Callable[[Tensor], Tensor]) -> Routing:
        mapped = Routing(*self).map(change)
        return mapped if self.members is None else SharedRouting.of(mapped, Memberships(*map(change, self.members)))

    def _replace(self, **changes: Any) -> Routing:  # type: ignore[override]
        replaced = Routing(*self)._replace(**changes)
        return replaced if self.members is None else SharedRouting.of(replaced, self.members)


class ForeseenRouting(Routing):
    """A :class:`Routing` by a learned prior. The five fields are the same; the prior's expectation of every expert is attached.

    It survives :meth:`Routing.map`, ``_replace``, copies and pickles. A routing rebuilt from the five fields alone, as a compiled
    graph returns, has lost it: its outcomes are then compared with the prior's mean in the token's cluster.
    """

    @property
    def logits(self) -> Tensor | None:
        return self.__dict__.get("_logits")

    @staticmethod
    def of(routing: Routing, logits: Tensor) -> "ForeseenRouting":  # (N, E)
        """The routing with what was expected, in log odds."""
        foreseen = ForeseenRouting(*routing)
        foreseen.__dict__["_logits"] = logits
        return foreseen

    def map(self, change: Callable[[Tensor], Tensor]) -> Routing:
        mapped = Routing(*self).map(change)
        return mapped if self.logits is None else ForeseenRouting.of(mapped, change(self.logits))

    def _replace(self, **changes: Any) -> Routing:  # type: ignore[override]
        replaced = Routing(*self)._replace(**changes)
        return replaced if self.logits is None else ForeseenRouting.of(replaced, self.logits)


class Gate(nn.Module, ABC):
    """A rule that chooses ``top_k`` of ``num_experts`` experts for every token.

    ``forward`` decides and changes nothing; ``observe`` learns from outcomes; ``fit`` prepares what must be known before the
    first decision. Gates that need no preparation, or learn by gradient alone, inherit the last two unchanged.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: k, from 1 to E.

    Raises:
        InvalidArgumentError: a size below one, or ``top_k`` above ``num_experts``.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.hidden_size = validation.count("hidden_size", hidden_size)
        self.num_experts = validation.count("num_experts", num_experts)
        whole = validation.real(top_k)  # None if it is not a number
        if whole is None or not whole.is_integer() or not 1 <= whole <= self.num_experts:
            raise InvalidArgumentError(f"top_k must lie in [1, num_experts={num_experts}]; got {top_k!r}")
        self.top_k = int(whole)

    @abstractmethod
    def forward(self, hidden: Tensor) -> Routing:  # (N, D)
        """Choose experts for every token; changes no state."""

    @property
    def fitted(self) -> bool:
        """Whether the gate can decide yet."""
        return True

    def fit(self, hidden: Tensor, *, generator: torch.Generator | None = None) -> None:  # (..., D)
        """Prepare the gate on representative hidden states; nothing to do for most gates."""

    def observe(self, routing: Routing, outcome: Tensor, *, dense: bool | None = None) -> None:  # (N, k) or (N, E)
        """Learn how the experts did; gates that learn by gradient alone only check the arguments.

        Args:
            routing: what this gate returned, now or earlier.
            outcome: competence signals in [0, 1], NaN where not observed: ``(N, k)``, one a slot, or ``(N, E)``, one an expert.
            dense: True says column e belongs to expert e, False says column j belongs to slot j. None infers it from the shape,
                which is impossible where k = E.

        Raises:
            InvalidArgumentError: wrong shape, an outcome outside [0, 1], or k = E without ``dense``; nothing has changed.
        """
        routing, outcome = self.read(routing, outcome)
        self.slots_of(routing, outcome, dense)
        validation.outcomes("outcome", outcome)

    def read(self, routing: Routing, outcome: Tensor) -> tuple[Routing, Tensor]:
        """What :meth:`observe` is given, of whatever type, as the tensors it counts by: indices in int64, outcomes floating.

        The belief checks that values are in range, because under torch.distributed all ranks must learn of an error together.

        Raises:
            InvalidArgumentError: not a Routing, or a wrong type or shape.
        """
        if not isinstance(routing, Routing):
            raise InvalidArgumentError(f"routing must be a Routing of this gate; got {validation.described(routing)}")
        experts = validation.integers("routing.expert_indices", routing.expert_indices, ("N", "k"))
        clusters = validation.integers("routing.cluster_ids", routing.cluster_ids, (len(experts),))
        distance = validation.floats("routing.distance", routing.distance, (len(experts),))
        outcome = validation.floats("outcome", outcome).detach()
        return routing._replace(expert_indices=experts, cluster_ids=clusters, distance=distance), outcome

    @property
    def reweighs(self) -> bool:
        """Whether the gate has a rule to weigh a given choice, so that :meth:`reweigh` works."""
        return False

    def reweigh(self, hidden: Tensor, routing: Routing, expert_indices: Tensor) -> Routing:  # (N, D), _, (N, k)
        """This gate's ``routing`` of ``hidden`` with its choice replaced, weighted by its own rule, with gradient if the rule has one.

        Raises:
            InvalidArgumentError: the gate has no rule to weigh a given choice.
        """
        raise InvalidArgumentError(
            f"weights must be 'recorded' for a {type(self).__name__}: it has no rule to weigh a given choice"
        )

    def require_observable(self) -> None:
        """Raise NotFittedError where :meth:`observe` would, without clusters to hold the evidence."""

    def adapt(self, hidden: Tensor) -> None:  # (N, D)
        """Learn from the inputs just routed, without outcomes; only gates that follow the traffic do anything here."""

    def loss(self, hidden: Tensor, outcome: Tensor) -> Tensor | None:  # (N, D), (N, E) -> ()
        """What a training loss must add so that the gate learns from its experts' own outcomes; None for a gate that does not."""
        return None

    @property
    def individual(self) -> float:
        """The weight of every expert's own loss on every row in a training loss, so that experts that are not chosen stay competent."""
        return 0.0

    def begin_step(self, step: int, epoch: int) -> None:
        """Called by the trainer as a training step begins; only gates with a schedule or random draws use it."""

    def expected_outcome(self, routing: Routing) -> Tensor:  # -> (N, k)
        """The gate's estimate, as of now, of each chosen expert's outcome: what its calibration is measured on.

        The scores themselves, unless the gate ranks by something other than an estimate of success (a bound, an index, a margin).
        """
        return routing.scores

    @property
    def num_configurations(self) -> int:
        """How many routing configurations there can be: the ordered pairs of experts, unless a gate says otherwise."""
        return self.num_experts**2

    def configurations(self, routing: Routing) -> Tensor:  # -> (N,) int64 in [0, num_configurations)
        """The routing configuration of every token: the pair of the two experts that weigh most, in order.

        With a soft gate that is the finite part of an infinite configuration.
        """
        second = routing.expert_indices[:, 1] if self.top_k > 1 else routing.expert_indices[:, 0]
        return routing.expert_indices[:, 0] * self.num_experts + second

    def slots_of(self, routing: Routing, outcome: Tensor, dense: bool | None) -> Tensor | None:  # -> (N, k) or None
        """The experts that the columns of ``outcome`` belong to; None if the columns are all experts in order."""
        if dense is not None and not isinstance(dense, bool):
            raise InvalidArgumentError(f"dense must be True, False or None; got {validation.described(dense)}")
        num_tokens, top_k = routing.expert_indices.shape
        slots, experts = (num_tokens, top_k), (num_tokens, self.num_experts)
        shape = tuple(outcome.shape)
        if dense is None:
            if top_k == self.num_experts and shape == slots:
                raise InvalidArgumentError(
                    f"outcome of shape {shape} is ambiguous with top_k = num_experts = {top_k}: pass dense=True if column e "
                    f"belongs to expert e, dense=False if column j belongs to slot j of routing.expert_indices"
                )
            dense = shape == experts
        if shape != (experts if dense else slots):
            raise InvalidArgumentError(
                f"outcome must have shape {slots} (one a slot) or {experts} (one an expert); got {shape}, dense={dense}"
            )
        return None if dense else routing.expert_indices

    def validate_hidden(self, hidden: Tensor) -> None:
        """Raise InvalidArgumentError unless ``hidden`` is a floating (N, D)."""
        if not isinstance(hidden, Tensor) or hidden.is_meta or hidden.layout != torch.strided:
            raise InvalidArgumentError(
                f"hidden must be a floating tensor, dense and with values, of shape "
                f"(N, {self.hidden_size}); got {validation.described(hidden)}"
            )
        if hidden.ndim != 2 or hidden.shape[1] != self.hidden_size or not hidden.is_floating_point():
            raise InvalidArgumentError(
                f"hidden must be floating point of shape (N, {self.hidden_size}); got {hidden.dtype} of shape "
                f"{tuple(hidden.shape)}"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        require_all_loadable(
            self, state_dict, prefix
        )  # clusters loaded without their belief are worse than loading neither
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}"


def refuse_export() -> None:
    """Call before drawing: the draws of each batch use their own generator, which an exported graph cannot hold.

    Raises:
        InvalidArgumentError: the gate is being exported.
    """
    if torch.compiler.is_exporting():
        raise InvalidArgumentError(
            "a gate that draws (Thompson sampling, exploration) cannot be exported; export one with score='lcb', 'mean' or "
            "'quantile' and exploration=0"
        )
