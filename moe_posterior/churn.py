"""Experts come and go: what a belief keeps, inherits and drops when the pool changes.

Dimensions: C clusters, E experts.
"""

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from moe_posterior.checks import validation
from moe_posterior.checks.soundness import require_sound
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.precision import FixedPrecision


class ChangingPool(FixedPrecision):
    """The part of a :class:`~moe_posterior.BetaPosterior` that adds, removes and replaces experts.

    Source: *Bayesian Posterior Routing in Multi-Agent Systems*, "Dynamic Expert Pool Management".
    """

    num_clusters: int
    num_experts: int
    initial_prior: tuple[float, float]
    prior_alpha: Tensor  # (C, E) float64
    prior_beta: Tensor  # (C, E) float64
    successes: Tensor  # (C, E) float64
    failures: Tensor  # (C, E) float64
    trust: Tensor  # (E,) float64
    suspicion: Tensor  # (E,) float64
    active: Tensor  # (E,) bool

    @abstractmethod
    def mean(self) -> Tensor:  # (C, E)
        """Posterior mean competence."""

    @abstractmethod
    def _changed(self) -> None:
        """Bring everything derived up to date."""

    @abstractmethod
    def _starts(self) -> dict[str, float]:
        """What of a newcomer beside its cells begins with which value, by buffer; experts are the last dimension."""

    @torch.no_grad()
    def add_expert(self, prior_from: Mapping[int, float] | None = None, *, strength: float = 4.0) -> int:
        """Make room for another expert and return its index; the others' belief is unchanged.

        Args:
            prior_from: donors and how much their domains overlap with the new expert's (any positive weights): in each
                cluster its prior mean is their weighted posterior mean. None starts it from the initial prior.
            strength: pseudo-observations the inherited prior is worth; few, since the newcomer has proved nothing itself.

        Raises:
            InvalidArgumentError: an unknown donor, a weight or strength that is not positive.

        Source: *Bayesian Posterior Routing in Multi-Agent Systems*, "Dynamic Expert Pool Management".
        """
        alpha, beta = self._inherited(prior_from, strength)
        nothing = torch.zeros_like(alpha)
        columns = {"prior_alpha": alpha, "prior_beta": beta, "successes": nothing, "failures": nothing}
        for name, column in columns.items():
            setattr(self, name, torch.cat([getattr(self, name), column[:, None]], dim=1))
        for name, start in self._starts().items():
            per_expert = getattr(self, name)
            room = per_expert.new_full((*per_expert.shape[:-1], 1), start)
            setattr(self, name, torch.cat([per_expert, room], dim=-1))
        self.num_experts += 1
        self._changed()
        return self.num_experts - 1

    @torch.no_grad()
    def remove_expert(self, expert: int) -> None:
        """Never choose this expert again; its index is not given to another, so delayed outcomes cannot be misattributed.

        Raises:
            InvalidArgumentError: there is no such active expert, or it is the last one.
        """
        expert = self._require_active(expert)
        if int(self.active.sum()) == 1:
            raise InvalidArgumentError(f"expert {expert} is the last active one and cannot be removed")
        self.active[expert] = False
        self._changed()

    @torch.no_grad()
    def replace_expert(
        self, expert: int, prior_from: Mapping[int, float] | None = None, *, strength: float = 4.0
    ) -> None:
        """A retrained or exchanged expert in the same place: its evidence is dropped; arguments as :meth:`add_expert`."""
        expert = self._require_active(expert)
        alpha, beta = self._inherited(prior_from, strength)
        self.prior_alpha[:, expert], self.prior_beta[:, expert] = alpha, beta
        self.successes[:, expert], self.failures[:, expert] = 0.0, 0.0
        for name, start in self._starts().items():
            getattr(self, name)[..., expert] = start
        self._changed()

    def _inherited(self, prior_from: Mapping[int, float] | None, strength: float) -> tuple[Tensor, Tensor]:  # 2 x (C,)
        if prior_from is None:
            return tuple(self.prior_alpha.new_full((self.num_clusters,), value) for value in self.initial_prior)  # type: ignore[return-value]
        worth = validation.real(strength)
        if not isinstance(prior_from, Mapping) or not prior_from or worth is None or not 0 < worth < float("inf"):
            raise InvalidArgumentError(
                f"prior_from needs donors and a positive, finite strength; got {prior_from}, {strength}"
            )
        for donor, weight in prior_from.items():
            share = validation.real(weight)
            known = validation.is_index(donor, self.num_experts)
            if not known or share is None or not 0 < share < float("inf"):
                raise InvalidArgumentError(
                    f"prior_from must map experts in [0, {self.num_experts}) to positive, finite weights; got {donor}: {weight}"
                )
        weights = self.prior_alpha.new_tensor([float(weight) for weight in prior_from.values()])
        mean = self.mean()[:, [int(donor) for donor in prior_from]] @ (weights / weights.sum())
        alpha, beta = worth * mean, worth * (1 - mean)
        require_sound({"alpha": alpha, "beta": beta}, of="inherited ")
        return alpha, beta

    def _require_active(self, expert: int) -> int:
        if not validation.is_index(expert, self.num_experts) or not bool(self.active[int(expert)]):
            raise InvalidArgumentError(f"expert must be an active index below {self.num_experts}; got {expert}")
        return int(expert)
