"""A gate with a learned prior as a custom routing function: the map's weights and the belief's tables, and no gate.

Dimensions: T tokens, D hidden size, C clusters, E experts, k experts per token.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_posterior import beta as beta_functions
from moe_posterior import evidence as evidence_functions
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates import PosteriorGate
from moe_posterior.gates.learned import LearnedPrior, cosine_distance, log_odds, normalised, sharpness_of
from moe_posterior.kernels import reference
from moe_posterior.serving.routing import CustomRouting

_SERVED = ("lcb", "mean")


class LearnedRouting(CustomRouting):
    """A :class:`~moe_posterior.PosteriorGate`'s whose prior is learned: what it expects of a token, and the evidence of its cluster.

    The logits are ignored. Everything is computed token by token in torch, the belief in float64, in the steps of the gate: the choice
    and the weights are the gate's own bits where the hidden states are.

    Raises:
        InvalidArgumentError: a gate that ranks by another score than ``"lcb"`` or ``"mean"``, explores, pools by
            ``"hierarchy"``, or whose map is no plain stack of linear layers.
    """

    radius: Tensor  # (C,); inf where no distance counts as unusual
    strength: Tensor  # (C, E) float64
    trust: Tensor  # (E,) float64
    odds: Tensor  # (E,) float64
    successes: Tensor  # (C, E) float64
    failures: Tensor  # (C, E) float64
    pooled: Tensor  # (E,) float64, the mean that is believed of an expert far from all clusters
    usual: Tensor  # () float32, how far a token usually is from the clusters by angle
    active: Tensor  # (E,) bool
    serves = PosteriorGate
    SETTINGS: ClassVar[tuple[str, ...]] = (
        *CustomRouting.SETTINGS, "novelty", "pools", "risk_aversion", "temperature", "layers", "scale", "floor",
    )  # fmt: skip

    def _set(self, gate: PosteriorGate) -> None:
        self.novelty, self.pools, self.temperature = gate.novelty, gate.posterior.pools, gate.temperature
        self.risk_aversion = gate.risk_aversion if gate.score == "lcb" else 0.0
        self.layers = len(_linear_layers(gate))
        assert gate.prior is not None
        self.scale, self.floor = gate.prior.scale, gate.prior.floor

    @torch.no_grad()
    def forward(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        self._validate(hidden_states, gating_output, topk)
        if topk != self.top_k:
            raise InvalidArgumentError(f"topk must be the {self.top_k} that this gate chooses; got {topk}")
        outlying = self.radius if self.novelty == "class" else None
        ids, distance = reference.assign(
            hidden_states, reference.Centroids(self.centroids, self.directions, self.offsets, outlying)
        )
        logits = self._logits(hidden_states)
        mean = LearnedPrior.mean_at(logits, self.scale)
        scores = self._scores(logits, mean, ids, distance).masked_fill(~self.active, -torch.inf)
        chosen, best = reference.select(scores, self._ties(ids), topk)
        if self.scale == "odds":
            angle = cosine_distance(hidden_states, self.centroids)
            best = best * sharpness_of(angle, self.usual, self.floor).to(best)[:, None]
        return reference.weigh(best, self.temperature).float(), chosen.int()

    def _scores(self, logits: Tensor, mean: Tensor, ids: Tensor, distance: Tensor) -> Tensor:  # -> (T, E)
        alpha, beta = self._at_home(mean, ids)
        if self.scale == "odds":
            strength = self.strength[ids]
            before = beta_functions.lcb(strength * mean, strength * (1 - mean), self.risk_aversion)
            after = beta_functions.lcb(alpha, beta, self.risk_aversion)
            return logits.double() + (log_odds(after) - log_odds(before))
        if self.novelty == "discount":
            weight = evidence_functions.novelty_weight(distance, self.radius[ids]).to(alpha.dtype)[:, None]
            worth, far = (alpha + beta).clamp(max=2), 1 - weight
            pooled = worth * self.pooled
            alpha, beta = weight * alpha + far * pooled, weight * beta + far * (worth - pooled)
        return beta_functions.lcb(alpha, beta, self.risk_aversion)

    def _at_home(self, mean: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:  # -> 2 x (T, E)
        """Alpha and beta of a token that is not novel."""
        strength = self.strength[ids]
        alpha, beta = strength * mean * self.trust, strength * (1 - mean) * self.trust
        if self.pools:
            total = alpha + beta
            alpha = total * evidence_functions.shift_odds(alpha / total, self.odds)
            beta = total - alpha
        return alpha + self.successes[ids], beta + self.failures[ids]

    def _logits(self, hidden: Tensor) -> Tensor:  # (T, D) -> (T, E)
        found = normalised(hidden).to(self._buffers["weight_0"].dtype)  # type: ignore[union-attr]
        for place in range(self.layers):
            found = functional.linear(found, self._buffers[f"weight_{place}"], self._buffers[f"bias_{place}"])  # type: ignore[arg-type]
            if place + 1 < self.layers:
                found = functional.relu(found)
        found = found.float()
        return torch.where(torch.isnan(found), 0.0, found)

    def _require_served(self, gate: PosteriorGate) -> None:
        super()._require_served(gate)
        if gate.prior is None:
            raise InvalidArgumentError("gate must have a learned prior; its prior is None")
        if gate.score not in _SERVED or gate.exploration or gate.posterior.pooling != "odds":
            raise InvalidArgumentError(
                f"gate must rank by one of {list(_SERVED)}, explore nowhere and pool by 'odds' to be served with a learned prior; got "
                f"score={gate.score!r}, exploration={gate.exploration:g}, pooling={gate.posterior.pooling!r}"
            )

    @staticmethod
    def _tables(gate: PosteriorGate) -> dict[str, Tensor]:
        gate.clusterer.require_fitted()
        assert gate.prior is not None
        belief, points = gate.posterior, gate.clusterer.prepared
        alpha, beta = belief.parameters_of()
        least = (
            {"min": 0.0} if belief.noise is not None else {"min": -torch.inf}
        )  # as the belief reads de-biased counts
        map_: dict[str, Tensor] = {}
        for place, layer in enumerate(_linear_layers(gate)):
            map_ |= {f"weight_{place}": layer.weight, f"bias_{place}": layer.bias}
        return {
            "centroids": points.points,
            "directions": points.directions,
            "offsets": points.offsets,
            "radius": gate.clusterer.radius,
            "strength": belief.strength,
            "trust": belief.trust,
            "odds": belief.odds,
            "successes": belief.successes.clamp(**least),
            "failures": belief.failures.clamp(**least),
            "pooled": beta_functions.mean(alpha.sum(dim=0), beta.sum(dim=0)),
            "active": belief.active,
            "usual": gate.prior.usual,
            **map_,
        }

    def require_loadable(self, state_dict: Mapping[str, Any], prefix: str = "") -> None:
        super().require_loadable(state_dict, prefix)
        own = {name: state_dict.get(prefix + name) for name in ("strength", "odds")}
        for name, value in own.items():
            if isinstance(value, Tensor) and not bool(((value > 0) & torch.isfinite(value)).all()):
                raise InvalidArgumentError(
                    f"{prefix}{name} must be positive and finite; got values from {value.min()} to {value.max()}"
                )


def _linear_layers(gate: PosteriorGate) -> list[nn.Linear]:
    """The linear layers of the map, between which there are ReLUs."""
    parts = [] if gate.prior is None else list(gate.prior.map)
    layers = [part for part in parts[::2] if type(part) is nn.Linear]
    plain = len(layers) == (len(parts) + 1) // 2 and all(type(part) is nn.ReLU for part in parts[1::2])
    if not plain or any(layer.bias is None for layer in layers):
        raise InvalidArgumentError(
            f"prior's map must be linear layers with ReLUs between them to be served; got {parts}"
        )
    return layers
