"""What a posterior gate believes of the experts for each token: its cluster's row, shared rows, a learned prior, novelty.

Dimensions: N tokens, D hidden size, E experts, k experts per token.
"""

import torch
from torch import Tensor

from moe_posterior import beta as beta_functions
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates.base import Routing
from moe_posterior.gates.learner import PriorLearner
from moe_posterior.gates.novelty import discounted
from moe_posterior.gates.tables import counts_at
from moe_posterior.kernels import reference
from moe_posterior.memberships import Memberships, SeveralClusters, mixed, mixed_at


class TokenBelief(PriorLearner):
    """The belief of a :class:`~moe_posterior.PosteriorGate` about each token; the subclass turns it into a choice."""

    members: SeveralClusters | None  # None where a token belongs to one cluster

    def assign(self, hidden: Tensor) -> tuple[reference.Assignment, Memberships | None]:  # (N, D)
        """Cluster and distance of each token, and its memberships where it has several.

        Cluster 0 at distance 0 where a learned prior decides alone: clusters mean nothing yet.
        """
        if self.from_map_alone:
            ids = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
            return reference.Assignment(ids, torch.zeros(hidden.shape[0], device=hidden.device)), None
        if self.members is None:
            return self.clusterer(hidden), None
        return self.members(self.clusterer, hidden)

    def _members_of(self, routing: Routing) -> Memberships | None:
        if self.members is None:
            return None
        if routing.members is None:
            raise InvalidArgumentError(
                "routing must be this gate's, in which a token has several clusters; it holds no members"
            )
        return routing.members

    def believed_of(
        self,
        assignment: reference.Assignment,
        members: Memberships | None,
        expected: Tensor | None = None,  # (N, E)
    ) -> tuple[Tensor, Tensor]:  # 2 x (N, E)
        """Alpha and beta of every expert, for each token: what :meth:`decide` routes by. ``expected`` is a learned prior's mean."""
        near = None if members is None else mixed(self.posterior, members)
        if self.prior is not None:
            near = self.posterior.parameters_of(assignment.cluster_ids, expected)
        if self.novelty == "discount" and not self.from_map_alone:
            if self.prior is None or near is None:
                return discounted(self.posterior, assignment, self.clusterer.radius, near)
            worth = (near[0] + near[1]).detach().clamp(max=2)  # a novel token is never surer than one at home
            return discounted(self.posterior, assignment, self.clusterer.radius, near, worth)
        return self.posterior.parameters_of(assignment.cluster_ids) if near is None else near

    def expected_outcome(self, routing: Routing) -> Tensor:  # -> (N, k)
        """Posterior mean competence of the chosen experts as of now."""
        members = self._members_of(routing)
        if self.prior is not None:
            counts = self.counts_of(routing)
            return beta_functions.mean(counts[:, 0], counts[:, 1]).float()
        if members is not None:
            return beta_functions.mean(*mixed_at(self.posterior, members, routing.expert_indices)).float()
        return super().expected_outcome(routing)

    @torch.no_grad()
    def counts_of(self, routing: Routing) -> Tensor:  # -> (N, 2, k) float64
        """Alpha and beta of the chosen experts as of now: what mean and interval of their competence come from.

        With ``novelty="discount"`` those that the token was given, far from its cluster fewer than the cluster has.
        """
        members = self._members_of(routing)
        if self.novelty == "discount" or self.prior is not None:
            assignment = reference.Assignment(routing.cluster_ids, routing.distance)
            believed = self.believed_of(assignment, members, self.expected_of(routing))
            return counts_at(*believed, routing.expert_indices)
        if members is not None:
            return torch.stack(mixed_at(self.posterior, members, routing.expert_indices), dim=1)
        return super().counts_of(routing)

    @torch.no_grad()
    def estimates(self, hidden: Tensor) -> Tensor:  # (N, D) -> (N, E) float64
        """Posterior mean competence of every expert on every token, as of now, chosen or not."""
        self.validate_hidden(hidden)
        expected = None if self.prior is None else self.prior(hidden)
        return beta_functions.mean(*self.believed_of(*self.assign(hidden), expected))
