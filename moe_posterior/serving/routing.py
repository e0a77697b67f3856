"""Gates as the custom routing function that vLLM and SGLang accept from a model.

Dimensions: T tokens, D hidden size, C clusters, E experts, k experts per token.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from moe_posterior.checks.declared import as_declared
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates import Gate, PosteriorGate, PriorGate
from moe_posterior.kernels import dispatch
from moe_posterior.kernels.reference import Centroids, nearest
from moe_posterior.precision import FixedPrecision
from moe_posterior.serving.rule import HostRule, choose


class CustomRouting(FixedPrecision):
    """A gate's decision without the gate: its own tables, no reference to a model, no data-dependent branch on the host.

    Pickles, compiles to one graph, and can be captured in a CUDA graph: :meth:`refresh` and ``load_state_dict`` write new evidence into
    the same memory. Move it to the device of the model before the first call.

    Args:
        gate: where clusters and evidence are copied from.
        rule: how the model turns its logits into a choice.
        spread: whether ties are spread over experts by cluster, as our own gates do, rather than going to the lowest expert.
        hosted: whether the gate lives in the model's own router.
    """

    centroids: Tensor  # (C, D)
    directions: Tensor  # (C, D)
    offsets: Tensor  # (C,)
    correction: Tensor | None  # (E,)
    serves: ClassVar[type[Gate]]  # the kind of gate whose decision it is
    SETTINGS: ClassVar[tuple[str, ...]] = ("hidden_size", "num_experts", "top_k", "spread", "hosted")  # beside the rule

    @as_declared
    def __init__(self, gate: Gate, rule: HostRule, *, spread: bool, hosted: bool = False) -> None:
        super().__init__()
        self._require_served(gate)
        rule.validate(gate.num_experts)
        self.hidden_size, self.num_experts, self.top_k = gate.hidden_size, gate.num_experts, gate.top_k
        self.spread, self.hosted = spread, hosted
        self._rule = rule._replace(e_score_correction_bias=None)
        correction = rule.e_score_correction_bias
        self._hold({"correction": None if correction is None else correction.float(), **self._tables(gate)})
        self._set(gate)

    @property
    def rule(self) -> HostRule:
        """How the model turns its logits into a choice."""
        return self._rule._replace(e_score_correction_bias=self.correction)

    @abstractmethod
    def forward(
        self,
        hidden_states: Tensor,  # (T, D)
        gating_output: Tensor,  # (T, E)
        topk: int,
        renormalize: bool,
    ) -> tuple[Tensor, Tensor]:  # (T, k) float32, (T, k) int32
        """Weights and ids of the chosen experts.

        Args:
            hidden_states: what the router saw.
            gating_output: its logits, before any softmax.
            topk, renormalize: as the model was configured.

        Raises:
            InvalidArgumentError: other sizes than were exported, or tensors on another device.
        """

    @torch.no_grad()
    def refresh(self, gate: Gate) -> None:
        """Take the gate's present clusters and evidence, in place.

        Raises:
            InvalidArgumentError: another kind of gate or other sizes; nothing has changed.
        """
        self._require_served(gate)
        fresh = self._tables(gate)
        held = {name: tuple(getattr(self, name).shape) for name in fresh}
        given = {name: tuple(table.shape) for name, table in fresh.items()}
        if held != given:
            raise InvalidArgumentError(
                f"gate must have the sizes that were exported, {held}; got {given}: export it again"
            )
        for name, table in fresh.items():
            getattr(self, name).copy_(table)
        self._set(gate)

    def _require_served(self, gate: Any) -> None:
        if not isinstance(gate, self.serves):
            raise InvalidArgumentError(f"gate must be a {self.serves.__name__}; got {type(gate).__name__}")

    def settings(self) -> dict[str, Any]:
        """Everything that defines this routing besides the tables, as JSON values."""
        rule = self._rule._asdict()
        del rule["e_score_correction_bias"]
        return {**{name: getattr(self, name) for name in self.SETTINGS}, "rule": rule}

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tables."""
        return {name: tuple(table.shape) for name, table in self.state_dict().items()}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tables: Mapping[str, Tensor]) -> Self:
        """A routing from its :meth:`settings` and its state_dict."""
        routing = cls.__new__(cls)
        FixedPrecision.__init__(routing)
        for name in cls.SETTINGS:
            setattr(routing, name, settings[name])
        routing._rule = HostRule(**settings["rule"])
        routing._hold({"correction": None, **tables})
        routing.require_loadable(tables)
        return routing

    def extra_repr(self) -> str:
        sizes = f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}"
        return f"{sizes}, num_clusters={len(self.centroids)}, rule={self._rule}"

    @staticmethod
    @abstractmethod
    def _tables(gate: Any) -> dict[str, Tensor]:
        """What is copied from a gate."""

    def _set(self, gate: Any) -> None:
        """Read from a gate the settings beside the tables; none here."""

    def _hold(self, tables: Mapping[str, Tensor | None]) -> None:
        for name, table in tables.items():
            self.register_buffer(name, None if table is None else table.detach().clone())

    def _validate(self, hidden_states: Tensor, gating_output: Tensor, topk: int) -> None:
        expected = (len(hidden_states), self.num_experts)
        if hidden_states.ndim != 2 or hidden_states.shape[1] != self.hidden_size or gating_output.shape != expected:
            raise InvalidArgumentError(
                f"hidden_states must be (T, {self.hidden_size}) and gating_output (T, {self.num_experts}); got "
                f"{tuple(hidden_states.shape)} and {tuple(gating_output.shape)}"
            )
        if not 1 <= topk <= self.num_experts:
            raise InvalidArgumentError(f"topk must lie in [1, {self.num_experts}]; got {topk}")
        if hidden_states.device != self.centroids.device:
            raise InvalidArgumentError(
                f"hidden_states must be on {self.centroids.device}, where this routing is: move it by .to(device); "
                f"got {hidden_states.device}"
            )

    def _ties(self, cluster_ids: Tensor) -> Tensor:  # (T,) -> (T,)
        return cluster_ids if self.spread else torch.zeros_like(cluster_ids)


class PriorRouting(CustomRouting):
    """A :class:`~moe_posterior.PriorGate`'s: the model's own logits and rule, with a penalty where evidence speaks against an expert.

    Without evidence the logits are untouched, and the choice is the engine's default.

    >>> gate = PriorGate(hidden_size=2, num_experts=3, num_clusters=1, top_k=1)
    >>> gate.fit(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    >>> routing = PriorRouting(gate, HostRule(), spread=False)
    >>> weights, ids = routing(torch.ones(1, 2), gating_output=torch.tensor([[0.0, 2.0, 1.0]]), topk=2, renormalize=True)
    >>> ids.tolist()
    [[1, 2]]
    >>> gate.posterior.observe(torch.zeros(99, dtype=torch.int64), torch.zeros(99, 1), torch.ones(99, 1, dtype=torch.int64))
    >>> routing.refresh(gate)  # expert 1 has failed 99 times
    >>> routing(torch.ones(1, 2), gating_output=torch.tensor([[0.0, 2.0, 1.0]]), topk=2, renormalize=True)[1].tolist()
    [[2, 0]]
    """

    evidence_bias: Tensor  # (C, E) float32
    serves = PriorGate

    @torch.no_grad()
    def forward(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        self._validate(hidden_states, gating_output, topk)
        ids = nearest(hidden_states, Centroids(self.centroids, self.directions, self.offsets))
        evidence = self.evidence_bias[ids]  # added even while it is all 0: a captured graph cannot branch on it
        return choose(gating_output.float() + evidence, self._ties(ids), topk, renormalize, self.rule, evidence)

    @staticmethod
    def _tables(gate: PriorGate) -> dict[str, Tensor]:
        points = gate.clusterer.prepared
        return {
            "centroids": points.points,  # NaN before a fit: all tokens then belong to cluster 0, as in the gate
            "directions": points.directions,
            "offsets": points.offsets,
            "evidence_bias": gate.evidence_bias,
        }


class PosteriorRouting(CustomRouting):
    """A :class:`~moe_posterior.PosteriorGate`'s: the tables of its choices and weights; the logits are ignored.

    The weights sum to 1, or, for a gate inside the model's own router, to what the model's own weights would.
    """

    topk_indices: Tensor  # (C, k) int64; one extra row if outliers are a class of their own
    topk_weights: Tensor  # (C, k) float32
    topk_scores: Tensor  # (C, k) float32
    radius: Tensor  # (C,); (0,) where no distance counts as unusual
    serves = PosteriorGate

    @torch.no_grad()
    def forward(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        self._validate(hidden_states, gating_output, topk)
        if topk != self.top_k:
            raise InvalidArgumentError(f"topk must be the {self.top_k} that this gate chooses; got {topk}")
        radius = self.radius if len(self.radius) else None
        centroids = Centroids(self.centroids, self.directions, self.offsets, radius)
        tables = (self.topk_indices, self.topk_weights, self.topk_scores)
        _, selection, weights = dispatch.route_by_table(hidden_states, centroids, *tables)
        if self.hosted:
            first = torch.zeros_like(selection.expert_indices[:, 0])
            own, _ = choose(gating_output.float(), first, topk, renormalize, self.rule)
            weights = weights * own.sum(dim=-1, keepdim=True)
        return weights, selection.expert_indices.int()

    @staticmethod
    def _tables(gate: PosteriorGate) -> dict[str, Tensor]:
        if gate.chooses_per_token:
            raise InvalidArgumentError(
                f"gate must choose by its tables alone to be served; got score={gate.score!r}, "
                f"exploration={gate.exploration:g}, novelty={gate.novelty!r}"
            )
        gate.clusterer.require_fitted()
        gate.refresh_rows(torch.arange(gate.num_clusters, device=gate.topk_indices.device))
        points = gate.clusterer.prepared
        return {
            "centroids": points.points,
            "directions": points.directions,
            "offsets": points.offsets,
            "radius": points.offsets[:0] if points.radius is None else points.radius,
            "topk_indices": gate.topk_indices,
            "topk_weights": gate.topk_weights,
            "topk_scores": gate.topk_scores,
        }

    def require_loadable(self, state_dict: Mapping[str, Any], prefix: str = "") -> None:
        super().require_loadable(state_dict, prefix)
        chosen = state_dict.get(f"{prefix}topk_indices")
        if isinstance(chosen, Tensor) and not bool(((chosen >= 0) & (chosen < self.num_experts)).all()):
            raise InvalidArgumentError(
                f"{prefix}topk_indices must lie in [0, {self.num_experts}); got values from {chosen.min()} to {chosen.max()}"
            )
