"""Gates that live inside another library's router: they turn its choice into a Routing and hold the belief about its experts.

Dimensions: T tokens, D hidden size, E experts, k experts per token.
"""

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates import BeliefGate, Gate, PosteriorGate, PriorGate, Routing
from moe_posterior.kernels.reference import Assignment


class Choice(NamedTuple):
    """What a router chose by its own rule, and which tokens are real."""

    indices: Tensor  # (T, k) int64
    weights: Tensor  # (T, k); its gradient is the router's own
    real: Tensor | None  # (T,) bool, False for padding; None if all are real
    assignment: Assignment | None  # the tokens' clusters, if they are known already
    stands: bool  # whether this choice is final; if not, a gate in replace mode makes its own


class HostedGate(BeliefGate):
    """The interface through which a router uses the gate inside it."""

    replaces: ClassVar[bool]  # whether it makes the choice itself once clusters are fitted

    @property
    @abstractmethod
    def takes_part(self) -> bool:
        """Whether it currently changes the router's choice."""

    def logits_bias(self, hidden: Tensor) -> tuple[Tensor, Assignment] | None:  # (T, D) -> (T, E)
        """What the evidence adds to the host's logits, and the tokens' clusters; None where it adds nothing."""
        return None

    def observe(self, routing: Routing, outcome: Tensor, *, dense: bool | None = None) -> None:  # (T, k) or (T, E)
        """As :meth:`BeliefGate.observe`; a slot of weight 0 (an expert over capacity) did not take part and is not observed."""
        super().observe(routing, without_idle(self, routing, outcome, dense), dense=dense)


class HostedPriorGate(HostedGate, PriorGate):
    """A :class:`PriorGate` without a router of its own: the host chooses, with this gate's bias on its logits."""

    replaces = False

    @property
    def takes_part(self) -> bool:
        """Whether the evidence moves any logit."""
        return self.biased

    def forward(self, hidden: Tensor, choice: Choice | None = None) -> Routing:  # (T, D)
        """The host's choice as a Routing; padding gets distance inf, so it is never observed."""
        if choice is None:
            return super().forward(hidden)
        ids, distance = self.assign(hidden) if choice.assignment is None else choice.assignment
        return Routing(choice.indices, choice.weights, ids, choice.weights.detach(), _far(distance, choice.real))

    def logits_bias(self, hidden: Tensor) -> tuple[Tensor, Assignment] | None:  # (T, D) -> (T, E)
        if not self.biased:
            return None
        assignment = self.assign(hidden)
        return self.evidence_bias[assignment.cluster_ids], assignment


class HostedPosteriorGate(HostedGate, PosteriorGate):
    """A :class:`PosteriorGate` that chooses in a router's place; its weights sum to what the host's own weights would."""

    replaces = True

    @property
    def takes_part(self) -> bool:
        """Whether there are clusters to choose by."""
        return self.clusterer.fitted

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.members is not None:
            raise InvalidArgumentError(
                "clusterings and neighbours must be 1 for a gate inside a router: fit and warm_start count each token in one cluster"
            )
        if self.prior is not None:
            raise InvalidArgumentError(
                "prior must be None for a gate inside a router: the router's own weights are what it has learned; see mode='prior'"
            )

    def forward(self, hidden: Tensor, choice: Choice | None = None) -> Routing:  # (T, D)
        """This gate's choice in the host's dtype, its weights scaled to the sum of the host's weights for that token.

        Before :meth:`fit` it is the host's own choice, in cluster 0 at distance 0.
        """
        if choice is not None and not self.fitted:
            ids = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
            far = _far(torch.zeros(len(hidden), device=hidden.device), choice.real)
            return Routing(choice.indices, choice.weights, ids, choice.weights.detach(), far)
        routing = super().forward(hidden)
        if choice is None:
            return routing
        if choice.stands:
            distance = _far(routing.distance, choice.real)
            weights = choice.weights
            return routing._replace(
                expert_indices=choice.indices, routing_weights=weights, scores=weights.detach(), distance=distance
            )
        total = choice.weights.sum(dim=-1, keepdim=True)
        weights = (routing.routing_weights * total).to(choice.weights.dtype)
        return routing._replace(routing_weights=weights, distance=_far(routing.distance, choice.real))


def make_gate(
    mode: str, hidden_size: int, num_experts: int, num_clusters: int, top_k: int, **knobs: object
) -> HostedGate:
    """A hosted gate for one layer.

    Raises:
        InvalidArgumentError: a mode other than "prior" or "replace", or a knob that the mode's gate does not take.
    """
    kinds: dict[str, type[HostedPriorGate] | type[HostedPosteriorGate]] = {
        "prior": HostedPriorGate,
        "replace": HostedPosteriorGate,
    }
    if mode not in kinds:
        raise InvalidArgumentError(f"mode must be one of {list(kinds)}; got {mode!r}")
    if mode == "prior":
        knobs = {**knobs, "learned": False}
    try:
        return kinds[mode](hidden_size, num_experts, num_clusters, top_k, **knobs)  # type: ignore[arg-type]
    except TypeError as error:
        raise InvalidArgumentError(
            f"knobs must be options of {kinds[mode].__mro__[2].__name__}; got {error}"
        ) from error


def without_idle(gate: Gate, routing: Routing, outcome: Tensor, dense: bool | None) -> Tensor:  # -> as outcome
    """NaN where a slot carried no weight."""
    routing, outcome = gate.read(routing, outcome)
    if gate.slots_of(routing, outcome, dense) is None:
        return outcome
    return outcome.masked_fill(routing.routing_weights.detach().to(outcome.device) == 0, torch.nan)


def _far(distance: Tensor, real: Tensor | None) -> Tensor:  # (T,), (T,) -> (T,)
    return distance if real is None else distance.masked_fill(~real.to(distance.device), torch.inf)
