"""A calibration map per routing configuration, shrunk to a global map where the configuration has few rows.

Dimensions: N rows, K classes, C configurations.
"""

from typing import ClassVar

import torch
from torch import Tensor

from moe_posterior.calibrators.base import Calibrator, Outputs
from moe_posterior.calibrators.probabilities import root, safe_logit, temper, top_confidence, top_label, with_confidence
from moe_posterior.calibrators.scaling import best_temperature, validate_bounds
from moe_posterior.checks.declared import as_declared

SHIFT_BOUND = 20.0  # in logits; beyond the bounded logits of any confidence


def between_variance(
    residual: Tensor,  # (C,) sum of correct - confidence
    information: Tensor,  # (C,) sum of confidence (1 - confidence)
) -> Tensor:  # ()
    """Variance of the configurations' true shifts in logits, by the method of moments; 0 where noise explains it all.

    Under shifts with mean 0 and variance τ² a configuration's score has the second moment ``E[U²] ≈ I + τ² I²``, so
    ``τ² = Σ (U² - I) / Σ I²``. Unlike an estimate from each configuration's own best shift, it needs none of them to be
    finite; it underestimates shifts of more than about one logit (by a third at τ² = 1), which means more shrinkage, not less.

    Source: the moments behind the score test for a variance component, Lin 1997, *Variance component testing in
    generalised linear models with random effects*.

    >>> between_variance(torch.tensor([2.0, -2.0]), torch.tensor([1.0, 1.0])).item()
    3.0
    """
    return ((residual.square() - information).sum() / information.square().sum().clamp(min=1e-12)).clamp(min=0)


def penalised_shifts(
    logits: Tensor,  # (N,) of the confidence
    correct: Tensor,  # (N,) float64
    groups: Tensor,  # (N,) int64 in [0, C)
    num_groups: int,
    variance: Tensor | float,
) -> Tensor:  # (C,)
    """For every group the shift d that maximises ``Σ log Bernoulli(correct | sigmoid(logit + d)) - d² / (2 variance)``.

    >>> logits, right = torch.zeros(4, dtype=torch.float64), torch.tensor([1.0, 1, 1, 0], dtype=torch.float64)
    >>> penalised_shifts(logits, right, torch.zeros(4, dtype=torch.int64), 1, 1e9).sigmoid()
    tensor([0.7500], dtype=torch.float64)
    """

    def slope(shift: Tensor) -> Tensor:
        surplus = torch.sigmoid(logits + shift[groups]) - correct
        return groups.bincount(weights=surplus, minlength=num_groups) + shift / variance

    bound = logits.new_full((num_groups,), SHIFT_BOUND)
    return root(slope, -bound, bound)


def lookup(
    ids: Tensor,  # (N,) int64
    known: Tensor,  # (C,) int64, sorted
    values: Tensor,  # (C,)
) -> Tensor:  # (N,)
    """The value of each id, 0 for an id that is not known.

    >>> lookup(torch.tensor([7, 8]), torch.tensor([3, 7]), torch.tensor([0.1, 0.2])).tolist()
    [0.20000000298023224, 0.0]
    """
    if not len(known):
        return values.new_zeros(len(ids))
    place = torch.searchsorted(known, ids.contiguous()).clamp(max=len(known) - 1)
    return torch.where(known[place] == ids, values[place], 0)


class ConfigurationCalibrator(Calibrator):
    """A confidence map per routing configuration, shrunk to the global one: the fewer rows, the more.

    Three steps, each fitted to what the one before leaves over:

    1. one temperature for all rows;
    2. one shift μ of the logit of the top-label confidence for all rows, with the prior N(0, 1): a temperature alone can
       leave the mean confidence wrong;
    3. per configuration a shift d_c on top, with the prior N(0, τ²): a one-dimensional ridge logistic regression. τ² is
       the between-configuration variance by the method of moments, so configurations that differ no more than by noise
       all keep the global map.

    The result is ``sigmoid(logit(confidence) + μ + d_c)``, without d_c for a configuration that ``fit`` has not seen; the other
    classes share the rest in proportion. The top label stays, so with K classes no confidence falls below 1/K.

    Args:
        bounds: temperatures tried, as in ``TemperatureScaling``.

    Raises:
        InvalidArgumentError: bounds that are not 0 < low < high.

    Source: ours; the hierarchy as in Gelman et al., *Bayesian Data Analysis*, chapter 5.

    >>> outputs = Outputs(torch.tensor([[0.7, 0.3]] * 400), configuration=torch.arange(400) // 200)
    >>> target = (torch.arange(400) % 200 >= torch.where(torch.arange(400) < 200, 180, 120)).long()  # 90 % and 60 % right
    >>> shown = ConfigurationCalibrator().fit(outputs, target)(outputs)
    >>> [round(v, 2) for v in shown[[0, -1], 0].tolist()]
    [0.89, 0.61]
    """

    fit_needs: ClassVar = ("configuration",)
    call_needs: ClassVar = ("configuration",)

    temperature: Tensor
    common_shift: Tensor
    variance: Tensor
    configurations: Tensor
    shifts: Tensor

    @as_declared
    def __init__(self, bounds: tuple[float, float] = (0.05, 20.0)) -> None:
        super().__init__()
        validate_bounds(bounds)
        self.bounds = bounds
        self.register_buffer("temperature", torch.ones((), dtype=torch.float64))
        self.register_buffer("common_shift", torch.zeros((), dtype=torch.float64))  # μ
        self.register_buffer("variance", torch.zeros((), dtype=torch.float64))  # τ²
        self.register_buffer("configurations", torch.zeros(0, dtype=torch.int64))  # (C,) ids, sorted
        self.register_buffer("shifts", torch.zeros(0, dtype=torch.float64))  # (C,) d_c

    def _fit(self, outputs: Outputs, target: Tensor) -> None:
        assert outputs.configuration is not None  # fit_needs
        self.temperature = best_temperature(outputs.probs, target, self.bounds)
        logits = safe_logit(top_confidence(temper(outputs.probs, self.temperature)))
        correct = top_label(outputs.probs).eq(target).double()
        everyone = torch.zeros_like(target)
        self.common_shift = penalised_shifts(logits, correct, everyone, 1, 1.0)[0]
        logits = logits + self.common_shift
        self.configurations, groups = outputs.configuration.unique(return_inverse=True)
        confidence, num_groups = logits.sigmoid(), len(self.configurations)
        self.variance = between_variance(
            groups.bincount(weights=correct - confidence, minlength=num_groups),
            groups.bincount(weights=confidence * (1 - confidence), minlength=num_groups),
        )
        if self.variance > 0:
            self.shifts = penalised_shifts(logits, correct, groups, num_groups, self.variance)
        else:
            self.shifts = logits.new_zeros(num_groups)

    def _calibrate(self, outputs: Outputs) -> Tensor:
        assert outputs.configuration is not None  # call_needs
        tempered = temper(outputs.probs, self.temperature)
        shift = self.common_shift + lookup(outputs.configuration, self.configurations, self.shifts)
        return with_confidence(tempered, torch.sigmoid(safe_logit(top_confidence(tempered)) + shift))

    def extra_repr(self) -> str:
        return (
            f"configurations={len(self.configurations)}, temperature={self.temperature.item():.4g}, "
            f"variance={self.variance.item():.4g}"
        )
