"""Calibrators that rescale log-probabilities: one temperature, one per expert, or one scale and shift per class.

Dimensions: N rows, K classes, E experts.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from moe_posterior.calibrators.base import Calibrator, Outputs
from moe_posterior.calibrators.probabilities import minimise, root, safe_log, temper
from moe_posterior.checks.declared import as_declared
from moe_posterior.errors import InvalidArgumentError


def validate_bounds(bounds: tuple[float, float]) -> None:
    """Refuse temperature bounds that are not 0 < low < high."""
    if not (len(bounds) == 2 and 0 < bounds[0] < bounds[1] < math.inf):
        raise InvalidArgumentError(f"bounds must be two temperatures with 0 < low < high; got {bounds}")


def best_temperature(
    probs: Tensor,  # (N, K) float64
    target: Tensor,  # (N,) int64
    bounds: tuple[float, float],
) -> Tensor:  # ()
    """The temperature in ``bounds`` with the smallest negative log-likelihood; 1 if all temperatures are equally good.

    The loss is convex in 1/T, so its slope, mean(E_p[z] - z_y), has one zero: bisection finds it. Rows without a
    mistake have no best temperature and get the lower bound.

    Source: Guo et al. 2017, *On Calibration of Modern Neural Networks*, equation 9.

    >>> probs = torch.tensor([[0.9, 0.1]] * 4, dtype=torch.float64)
    >>> hot = best_temperature(probs, torch.tensor([0, 0, 0, 1]), (0.05, 20.0))
    >>> temper(probs[:1], hot)
    tensor([[0.7500, 0.2500]], dtype=torch.float64)
    """
    logits = safe_log(probs)
    chosen = logits.gather(1, target[:, None])[:, 0]

    def slope(log_inverse: Tensor) -> Tensor:
        expected = (torch.softmax(logits * log_inverse.exp(), dim=1) * logits).sum(1)
        return (expected - chosen).mean()

    start = logits.new_zeros(())
    low, high = (logits.new_tensor(-math.log(bound)) for bound in (bounds[1], bounds[0]))
    if (logits - logits[:, :1]).abs().max() < 1e-12:
        return start.exp().clamp(*bounds)
    return root(slope, low, high).neg().exp()


def stopped_temperature(
    probs: Tensor,  # (N, K) float64
    target: Tensor,  # (N,) int64
    steps: int,
) -> Tensor:  # ()
    """Where L-BFGS at learning rate 0.01 stands after ``steps`` steps from T = 1.5.

    Source: Guo et al. 2017, the code published with it, which much later work uses as it is.
    """
    logits = safe_log(probs)
    temperature = logits.new_full((), 1.5).requires_grad_()
    optimiser = torch.optim.LBFGS([temperature], lr=0.01, max_iter=steps)

    def closure() -> Tensor:
        optimiser.zero_grad()
        with torch.enable_grad():
            loss = torch.nn.functional.cross_entropy(logits / temperature, target)
            loss.backward()
        return loss

    optimiser.step(closure)
    return temperature.detach()


class TemperatureScaling(Calibrator):
    """One temperature for the aggregate: ``softmax(log p / T)``, T with the smallest validation loss.

    Args:
        bounds: the temperatures tried. [0.05, 20] holds any that is not a sign of a broken model.

    Raises:
        InvalidArgumentError: bounds that are not 0 < low < high.

    Source: Guo et al. 2017, *On Calibration of Modern Neural Networks*, section 4.2.

    >>> outputs = Outputs(torch.tensor([[0.9, 0.1]] * 4))
    >>> TemperatureScaling().fit(outputs, torch.tensor([0, 0, 0, 1]))(outputs)[0]
    tensor([0.7500, 0.2500])
    """

    temperature: Tensor

    @as_declared
    def __init__(self, bounds: tuple[float, float] = (0.05, 20.0)) -> None:
        super().__init__()
        validate_bounds(bounds)
        self.bounds = bounds
        self.register_buffer("temperature", torch.ones((), dtype=torch.float64))

    def _fit(self, outputs: Outputs, target: Tensor) -> None:
        self.temperature = best_temperature(outputs.probs, target, self.bounds)

    def _calibrate(self, outputs: Outputs) -> Tensor:
        return temper(outputs.probs, self.temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature.item():.4g}"


class ExpertTemperature(Calibrator):
    """One temperature per expert, each fitted to that expert's own validation loss; then mixed by the routing weights.

    May change the top label, because the experts' contributions change.

    Args:
        bounds: temperatures are clamped to these; [0.1, 10] as published.
        steps: None (default) finds the temperature with the smallest loss. A number stops L-BFGS with learning rate 0.01 after so many
            steps from a temperature of 1.5, as the common temperature scaling code does with 50: it may end far from the minimum.

    Raises:
        InvalidArgumentError: bounds that are not 0 < low < high, or fewer than 1 step.

    Source: *mocae* in *Toward Calibrated Mixture-of-Experts Under Distribution Shift* (arXiv 2606.20544).

    >>> experts = torch.tensor([[[0.9, 0.1], [0.75, 0.25]]] * 4)
    >>> weights = torch.tensor([[0.5, 0.5]] * 4)
    >>> outputs = Outputs(experts.mean(1), expert_probs=experts, routing_weights=weights)
    >>> ExpertTemperature().fit(outputs, torch.tensor([0, 0, 0, 1]))(outputs)[0]
    tensor([0.7500, 0.2500])
    """

    fit_needs: ClassVar = ("expert_probs", "routing_weights")
    call_needs: ClassVar = ("expert_probs", "routing_weights")
    keeps_top_label: ClassVar = False

    temperature: Tensor

    @as_declared
    def __init__(self, bounds: tuple[float, float] = (0.1, 10.0), steps: int | None = None) -> None:
        super().__init__()
        validate_bounds(bounds)
        if steps is not None and steps < 1:
            raise InvalidArgumentError(f"steps must be at least 1 or None; got {steps}")
        self.bounds, self.steps = bounds, steps
        self.register_buffer("temperature", torch.ones(0, dtype=torch.float64))  # (E,)

    def _fit(self, outputs: Outputs, target: Tensor) -> None:
        assert outputs.expert_probs is not None  # fit_needs
        experts = outputs.expert_probs.double().unbind(1)
        if self.steps is None:
            self.temperature = torch.stack([best_temperature(probs, target, self.bounds) for probs in experts])
        else:
            self.temperature = torch.stack([stopped_temperature(probs, target, self.steps) for probs in experts])
            self.temperature.clamp_(*self.bounds)

    def _calibrate(self, outputs: Outputs) -> Tensor:
        assert outputs.expert_probs is not None  # call_needs
        assert outputs.routing_weights is not None
        if outputs.expert_probs.shape[1] != len(self.temperature):
            raise InvalidArgumentError(
                f"outputs.expert_probs must have {len(self.temperature)} experts as in fit; "
                f"got {outputs.expert_probs.shape[1]}"
            )
        weights = outputs.routing_weights.double()
        tempered = temper(outputs.expert_probs.double(), self.temperature[:, None])  # (N, E, K)
        return torch.einsum("ne,nek->nk", weights / weights.sum(1, keepdim=True), tempered)

    def extra_repr(self) -> str:
        return f"experts={len(self.temperature)}"


class VectorScaling(Calibrator):
    """A scale and a shift per class: ``softmax(w ⊙ log p + b)``; may change the top label.

    Args:
        ridge: weight of ``mean((w - 1)²) + mean(b²)`` added to the mean loss. 1e-3 leaves a fit on thousands of rows as it
            is and keeps classes with few rows near the identity.

    Raises:
        InvalidArgumentError: a ridge below 0.

    Source: Guo et al. 2017, *On Calibration of Modern Neural Networks*, section 4.2.

    >>> outputs = Outputs(torch.tensor([[0.9, 0.1]] * 4))
    >>> VectorScaling(ridge=1e-6).fit(outputs, torch.tensor([0, 0, 0, 1]))(outputs)[0]
    tensor([0.7500, 0.2500])
    """

    keeps_top_label: ClassVar = False

    scale: Tensor
    shift: Tensor

    @as_declared
    def __init__(self, ridge: float = 1e-3) -> None:
        super().__init__()
        if not ridge >= 0:
            raise InvalidArgumentError(f"ridge must be at least 0; got {ridge}")
        self.ridge = ridge
        self.register_buffer("scale", torch.ones(0, dtype=torch.float64))  # (K,)
        self.register_buffer("shift", torch.zeros(0, dtype=torch.float64))  # (K,)

    def _fit(self, outputs: Outputs, target: Tensor) -> None:
        logits = safe_log(outputs.probs)
        identity = torch.stack([torch.ones_like(logits[0]), torch.zeros_like(logits[0])])  # (2, K)

        def loss(flat: Tensor) -> Tensor:
            scale, shift = flat.view(2, -1)
            penalty = (flat.view(2, -1) - identity).square().mean(1).sum()
            return torch.nn.functional.cross_entropy(scale * logits + shift, target) + self.ridge * penalty

        scale, shift = minimise(loss, identity.flatten()).view(2, -1)
        self.scale, self.shift = scale.clone(), shift.clone()

    def _calibrate(self, outputs: Outputs) -> Tensor:
        if outputs.probs.shape[1] != len(self.scale):
            raise InvalidArgumentError(
                f"outputs.probs must have {len(self.scale)} classes as in fit; got {outputs.probs.shape[1]}"
            )
        return torch.softmax(self.scale * safe_log(outputs.probs) + self.shift, dim=1)

    def extra_repr(self) -> str:
        return f"classes={len(self.scale)}, ridge={self.ridge:g}"
