"""A temperature per known domain, and one predicted from the input for rows of any other.

Dimensions: N rows, K classes, D domains.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from moe_posterior.calibrators.base import Calibrator, Outputs, read_outputs
from moe_posterior.calibrators.configuration import lookup
from moe_posterior.calibrators.probabilities import safe_log, temper
from moe_posterior.calibrators.scaling import best_temperature, validate_bounds
from moe_posterior.calibrators.shift import part_weights, require_signs, shift_signs
from moe_posterior.checks.declared import as_declared


def domain_features(outputs: Outputs) -> tuple[Tensor, Tensor]:  # -> (N, 4), (2,) bool
    """Columns 1, excess novelty, disagreement and entropy; and which of novelty and disagreement were given."""
    signs, given = shift_signs(outputs)
    probs = outputs.probs.double()
    entropy = -(probs * safe_log(probs)).sum(1, keepdim=True)
    return torch.cat([torch.ones_like(entropy), signs, entropy], dim=1), given


class MultiDomainTemperature(Calibrator):
    """One temperature per domain of the fit; rows of other domains get one from a regression on their features.

    The regression is least squares of log T of a row's domain on 1, excess novelty ``log(1 + relu(novelty - 1))``,
    disagreement and entropy, with equal weight for each domain; a feature that is not given is left out. Its prediction is
    clamped to the range of the domains' own temperatures: a linear fit says nothing about temperatures no domain had. A row
    uses its domain's own temperature where ``outputs.domain`` names a known one, the regression otherwise.

    Args:
        bounds: temperatures tried, as in ``TemperatureScaling``.

    Raises:
        InvalidArgumentError: bounds that are not 0 < low < high.

    Source: Yu et al. 2022, *Robust Calibration with Multi-domain Temperature Scaling*, algorithm 1; there T itself is
    regressed on an embedding, here its logarithm on four features.

    >>> outputs = Outputs(torch.tensor([[0.9, 0.1]] * 8), domain=torch.arange(8) // 4)
    >>> shown = MultiDomainTemperature().fit(outputs, torch.tensor([0, 0, 0, 1, 0, 0, 0, 0]))(outputs)
    >>> [round(v, 2) for v in shown[[0, -1], 0].tolist()]
    [0.75, 1.0]
    """

    fit_needs: ClassVar = ("domain",)

    domains: Tensor
    log_temperature: Tensor
    weights: Tensor
    given: Tensor

    @as_declared
    def __init__(self, bounds: tuple[float, float] = (0.05, 20.0)) -> None:
        super().__init__()
        validate_bounds(bounds)
        self.bounds = bounds
        self.register_buffer("domains", torch.zeros(0, dtype=torch.int64))  # (D,) ids, sorted
        self.register_buffer("log_temperature", torch.zeros(0, dtype=torch.float64))  # (D,)
        self.register_buffer("weights", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("given", torch.zeros(2, dtype=torch.bool))

    def _fit(self, outputs: Outputs, target: Tensor) -> None:
        assert outputs.domain is not None  # fit_needs
        self.domains, parts = outputs.domain.unique(return_inverse=True)
        self.log_temperature = torch.stack(
            [
                best_temperature(outputs.probs[parts == part], target[parts == part], self.bounds).log()
                for part in range(len(self.domains))
            ]
        )
        features, self.given = domain_features(outputs)
        features = features.clamp(max=1e6)  # an infinite novelty
        root_weight = part_weights(parts).sqrt()
        # The pseudo-inverse drops columns that are 0 or depend linearly on others.
        self.weights = torch.linalg.pinv(features * root_weight[:, None], rtol=1e-9) @ (
            root_weight * self.log_temperature[parts]
        )

    def temperatures(self, outputs: Outputs) -> Tensor:  # -> (N,)
        """The temperature of each row."""
        self.require_fitted()
        outputs = read_outputs(outputs, ())
        features, given = domain_features(outputs)
        require_signs(given, self.given)
        low, high = self.log_temperature.aminmax()
        predicted = (features.clamp(max=1e6) @ self.weights).clamp(low, high)
        if outputs.domain is None:
            return predicted.exp()
        own = lookup(outputs.domain, self.domains, self.log_temperature)
        return torch.where(torch.isin(outputs.domain, self.domains), own, predicted).exp()

    def _calibrate(self, outputs: Outputs) -> Tensor:
        return temper(outputs.probs, self.temperatures(outputs)[:, None])

    def extra_repr(self) -> str:
        spread = ", ".join(f"{math.exp(value):.3g}" for value in self.log_temperature.tolist())
        return f"temperatures=[{spread}]"
