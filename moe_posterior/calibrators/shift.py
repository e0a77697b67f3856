"""A temperature that rises with signs of distribution shift in the input, learned on simulated shifts.

Dimensions: N rows, K classes, P parts (simulated shifts), 2 signs (novelty, disagreement), 3 levels.
"""

import math
from typing import Self

import torch
from torch import Tensor

from moe_posterior.calibrators.base import Calibrator, Outputs, read_outputs
from moe_posterior.calibrators.probabilities import minimise, safe_log, temper, top_confidence
from moe_posterior.calibrators.scaling import best_temperature, validate_bounds
from moe_posterior.checks.declared import as_declared
from moe_posterior.errors import InvalidArgumentError


def excess_novelty(novelty: Tensor) -> Tensor:  # (N,) -> (N,)
    """``log(1 + relu(novelty - 1))``: 0 inside a cluster, and growing slowly outside, so that a single outlier does not dominate.

    >>> excess_novelty(torch.tensor([0.5, 1.0, 2.0])).tolist()
    [0.0, 0.0, 0.6931471824645996]
    """
    return torch.log1p(torch.relu(novelty - 1))


def shift_signs(outputs: Outputs) -> tuple[Tensor, Tensor]:  # -> (N, 2), (2,) bool
    """Excess novelty and disagreement in columns, 0 where not given, and which were given."""
    nothing = outputs.probs.new_zeros(len(outputs.probs), dtype=torch.float64)
    novelty = nothing if outputs.novelty is None else excess_novelty(outputs.novelty.double())
    disagreement = nothing if outputs.disagreement is None else outputs.disagreement.double()
    given = [outputs.novelty is not None, outputs.disagreement is not None]
    return torch.stack([novelty, disagreement], dim=1), torch.tensor(given, device=nothing.device)


def require_signs(given: Tensor, fitted: Tensor) -> None:  # (2,) bool, (2,) bool
    """Refuse outputs that lack a sign of shift that the fit used."""
    for name, now, then in zip(("novelty", "disagreement"), given.tolist(), fitted.tolist(), strict=True):
        if then and not now:
            raise InvalidArgumentError(f"outputs.{name} must be given as in fit; got None")


def part_weights(parts: Tensor) -> Tensor:  # (N,) int64 in [0, P) -> (N,)
    """Weights that sum to 1 and give every part the same total, however many rows it has.

    >>> part_weights(torch.tensor([0, 0, 1])).tolist()
    [0.25, 0.25, 0.5]
    """
    counts = parts.bincount().double()
    return 1 / (counts[parts] * (counts > 0).sum())


class ShiftAwareTemperature(Calibrator):
    """``T(x) = exp(a + b · novelty + c · disagreement)``: the farther a row is from what was seen, the less confident.

    Here ``novelty`` is ``log(1 + relu(distance / radius - 1))``, and both signs are divided by, and capped at, the largest
    value among the rows of the fit: b and c are the growth of log T over the range seen, and T cannot grow beyond what
    the simulated shifts have shown. b, c ≥ 0. ``fit`` needs rows of several simulated shifts (a domain left out, a
    corruption) and unshifted ones; ``outputs.domain`` numbers these parts and every part weighs the same. Where the
    signs do not rise, as on an easy new domain, the temperature does not either.

    ``adapt(outputs)`` reads the level of the shift from unlabelled rows of the stream: mean novelty, mean disagreement and
    the fall of the mean confidence, each minus its value on the ``reference`` part, divided by the largest deviation among
    the parts, and clipped to the range they span. From then on
    ``log T(x) = a' + b' · novelty + c' · disagreement + g · level`` with g ≥ 0, fitted across the same parts, each with its own level.
    A level can be negative: rows more familiar than the reference get a lower temperature, as far as a part has shown it.

    The loss is the mean negative log-likelihood plus ``ridge (b² + c²)`` and, for the second map, ``+ level_ridge |g|²``; by
    L-BFGS with b, c and g written as squares.

    Args:
        reference: the id of the unshifted part.
        ridge: keeps b and c near 0 where the parts carry little information; 1e-3 is small next to a real shift's gain in loss.
        level_ridge: the same for g, larger because there are only as many levels as parts.
        bounds: the temperatures that may be shown.

    Raises:
        InvalidArgumentError: an option out of range, a reference that is not among the parts, or a sign that was there in
            ``fit`` and is missing later.

    Source: ours; the temperature as a function of the input follows Yu et al. 2022, *Robust Calibration with Multi-domain
    Temperature Scaling*.

    >>> near, far = torch.zeros(200), torch.full((200,), 3.0)
    >>> outputs = Outputs(
    ...     torch.tensor([[0.9, 0.1]] * 400), novelty=torch.cat([near, far]), domain=torch.arange(400) // 200
    ... )
    >>> target = (torch.arange(400) % 200 >= torch.where(torch.arange(400) < 200, 180, 120)).long()  # 90 % and 60 % right
    >>> shown = ShiftAwareTemperature().fit(outputs, target)(outputs)
    >>> [round(v, 2) for v in shown[[0, -1], 0].tolist()]
    [0.9, 0.61]
    """

    given: Tensor
    scale: Tensor
    row_weights: Tensor
    level_weights: Tensor
    usual: Tensor
    level_scale: Tensor
    level_range: Tensor
    level: Tensor
    adapted: Tensor

    @as_declared
    def __init__(
        self,
        reference: int = 0,
        ridge: float = 1e-3,
        level_ridge: float = 1e-2,
        bounds: tuple[float, float] = (0.05, 20.0),
    ) -> None:
        super().__init__()
        validate_bounds(bounds)
        for name, value in (("ridge", ridge), ("level_ridge", level_ridge)):
            if not value > 0:
                raise InvalidArgumentError(f"{name} must be positive; got {value}")
        self.reference, self.ridge, self.level_ridge, self.bounds = reference, ridge, level_ridge, bounds
        self.register_buffer("given", torch.zeros(2, dtype=torch.bool))  # which signs fit used
        for name, shape in (
            ("scale", (2,)),  # largest signs in the fit
            ("row_weights", (3,)),  # a, b, c
            ("level_weights", (6,)),  # a', b', c', g
            ("usual", (3,)),  # level statistics of the reference part
            ("level_scale", (3,)),
            ("level_range", (2, 3)),
            ("level", (3,)),  # of the stream, 0 before adapt
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("adapted", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def adapt(self, outputs: Outputs) -> Self:
        """Estimate the level of the shift from unlabelled rows, replacing any earlier estimate; an empty batch resets it.

        The level is a mean over the rows: give at least a few dozen.
        """
        self.require_fitted()
        outputs = read_outputs(outputs, ())
        signs, given = shift_signs(outputs)
        require_signs(given, self.given)
        self.adapted.fill_(len(signs) > 0)
        if len(signs):
            self.level = self._levels(self._statistics(self._scaled(signs), top_confidence(outputs.probs.double())))
        else:
            self.level = torch.zeros_like(self.level)
        return self

    def _fit(self, outputs: Outputs, target: Tensor) -> None:
        ids = torch.zeros_like(target) if outputs.domain is None else outputs.domain
        names, parts = ids.unique(return_inverse=True)
        if outputs.domain is not None and not (names == self.reference).any():
            raise InvalidArgumentError(
                f"outputs.domain must contain the reference {self.reference}; got {names.tolist()}"
            )
        signs, self.given = shift_signs(outputs)
        finite = torch.where(signs.isfinite(), signs, 0)
        self.scale = finite.amax(0)
        signs, confidence = self._scaled(signs), top_confidence(outputs.probs)
        statistics = [self._statistics(signs[parts == part], confidence[parts == part]) for part in range(len(names))]
        self._fit_levels(
            torch.stack(statistics), 0 if outputs.domain is None else int((names == self.reference).nonzero())
        )
        levels = torch.stack([self._levels(row) for row in statistics])[parts]  # (N, 3)
        self.level, self.adapted = torch.zeros_like(self.level), torch.zeros_like(self.adapted)
        logits, weights = safe_log(outputs.probs), part_weights(parts)
        start = best_temperature(outputs.probs, target, self.bounds).log()
        ridges = logits.new_tensor([self.ridge] * 2 + [self.level_ridge] * 3)
        self.row_weights = _fit_log_temperature(logits, target, weights, signs, ridges[:2], start)
        both = torch.cat([signs, levels], dim=1)
        self.level_weights = _fit_log_temperature(logits, target, weights, both, ridges, start)

    def _fit_levels(self, statistics: Tensor, reference: int) -> None:  # (P, 3)
        self.usual = statistics[reference]
        deviation = statistics - self.usual
        self.level_scale = deviation.abs().amax(0)
        scaled = _ratio(deviation, self.level_scale)
        self.level_range = torch.stack([scaled.amin(0), scaled.amax(0)])

    def _scaled(self, signs: Tensor) -> Tensor:  # (N, 2) -> (N, 2) in [0, 1]
        return _ratio(torch.minimum(signs, self.scale), self.scale)

    def _statistics(self, signs: Tensor, confidence: Tensor) -> Tensor:  # (N, 2), (N,) -> (3,)
        return torch.cat([signs.mean(0), -confidence.mean()[None]])

    def _levels(self, statistics: Tensor) -> Tensor:  # (3,) -> (3,)
        scaled = _ratio(statistics - self.usual, self.level_scale)
        return torch.maximum(torch.minimum(scaled, self.level_range[1]), self.level_range[0])

    def temperatures(self, outputs: Outputs) -> Tensor:  # -> (N,)
        """The temperature of each row."""
        self.require_fitted()
        signs, given = shift_signs(read_outputs(outputs, ()))
        require_signs(given, self.given)
        signs = self._scaled(signs)
        if self.adapted:
            signs = torch.cat([signs, self.level.expand(len(signs), 3)], dim=1)
        weights = self.level_weights if self.adapted else self.row_weights
        log_temperature = weights[0] + signs @ weights[1:]
        return log_temperature.clamp(*(math.log(bound) for bound in self.bounds)).exp()

    def _calibrate(self, outputs: Outputs) -> Tensor:
        return temper(outputs.probs, self.temperatures(outputs)[:, None])

    def extra_repr(self) -> str:
        a, b, c = self.row_weights.tolist()
        return f"a={a:.3g}, b={b:.3g}, c={c:.3g}, adapted={bool(self.adapted)}"


def _ratio(value: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale > 0, value / scale.clamp(min=torch.finfo(torch.float64).tiny), 0)


def _fit_log_temperature(
    logits: Tensor,  # (N, K)
    target: Tensor,  # (N,)
    weights: Tensor,  # (N,) sum to 1
    features: Tensor,  # (N, D)
    ridges: Tensor,  # (D,)
    start: Tensor,  # () log temperature
) -> Tensor:  # (1 + D,)
    def loss(point: Tensor) -> Tensor:
        slopes = point[1:].square()
        log_temperature = (point[0] + features @ slopes).clamp(-5, 5)
        losses = torch.nn.functional.cross_entropy(logits / log_temperature.exp()[:, None], target, reduction="none")
        return weights @ losses + ridges @ slopes.square()

    # A slope is the square of a parameter: started at 0 it would stay there, because the gradient is 0.
    first = torch.cat([start[None], start.new_full((features.shape[1],), 0.3)])
    found = minimise(loss, first)
    return torch.cat([found[:1], found[1:].square()])
