"""Shift-aware temperature: on streams whose overconfidence grows with novelty and disagreement."""

import numpy as np
import pytest
import torch
from calibrators.worlds import draw, ece
from scipy import optimize, special
from torch import Tensor

from moe_posterior.calibrators import Outputs, ShiftAwareTemperature, TemperatureScaling
from moe_posterior.calibrators.shift import part_weights
from moe_posterior.errors import InvalidArgumentError


def stream(
    levels: list[float],
    rows: int,
    seed: int,
    gain: float = 1.0,
    hidden: float = 0.0,
) -> tuple[Outputs, Tensor]:
    """Parts whose rows lie up to ``level`` beyond the edge; log T = gain · log(1 + excess) + hidden · part level."""
    generator = torch.Generator().manual_seed(seed)
    domain = torch.arange(len(levels)).repeat_interleave(rows)
    level = torch.tensor(levels, dtype=torch.float64)[domain]
    excess = level * torch.rand(len(domain), generator=generator, dtype=torch.float64)
    disagreement = torch.rand(len(domain), generator=generator, dtype=torch.float64)
    temperature = (gain * torch.log1p(excess) + hidden * level).exp()
    outputs, target = draw(len(domain), seed=seed + 1, temperature=temperature)
    novelty = torch.where(level > 0, 1 + excess, torch.rand(len(domain), generator=generator, dtype=torch.float64))
    return Outputs(outputs.probs, novelty=novelty, disagreement=disagreement, domain=domain), target


def test_truth_is_recovered_where_the_temperature_follows_novelty_alone() -> None:
    outputs, target = stream([0.0, 1.0, 3.0], rows=6000, seed=0)
    calibrator = ShiftAwareTemperature(ridge=1e-6).fit(outputs, target)
    a, b, c = calibrator.row_weights.tolist()
    assert a == pytest.approx(0.0, abs=0.05)
    assert b / calibrator.scale[0].item() == pytest.approx(1.0, abs=0.1)
    assert 0 <= c < 0.05


def test_shifted_rows_are_calibrated_and_unshifted_ones_left_alone() -> None:
    calibrator = ShiftAwareTemperature().fit(*stream([0.0, 1.0, 3.0], rows=3000, seed=0))
    near, near_target = stream([0.0], rows=4000, seed=10)
    far, far_target = stream([2.0], rows=4000, seed=20)
    static = TemperatureScaling().fit(near, near_target)
    assert ece(calibrator(far), far_target) < 0.5 * ece(static(far), far_target)
    assert ece(calibrator(near), near_target) < ece(near.probs, near_target) + 0.015


def test_the_fit_is_the_minimum_that_scipy_finds() -> None:
    outputs, target = stream([0.0, 1.0, 2.0], rows=400, seed=0)
    outputs = outputs.rows(torch.arange(1200) < 1000)  # parts of unequal size
    target = target[:1000]
    calibrator = ShiftAwareTemperature().fit(outputs, target)
    assert outputs.novelty is not None
    assert outputs.disagreement is not None
    assert outputs.domain is not None
    signs = np.stack([np.log1p(np.maximum(outputs.novelty.numpy() - 1, 0)), outputs.disagreement.numpy()], 1)
    signs = signs / signs.max(0)
    logits, weights = outputs.probs.log().numpy(), part_weights(outputs.domain).numpy()

    def loss(point: np.ndarray) -> float:
        scaled = special.log_softmax(logits / np.exp(point[0] + signs @ point[1:])[:, None], axis=1)
        return float(-(weights * scaled[np.arange(1000), target.numpy()]).sum() + 1e-3 * (point[1:] ** 2).sum())

    bounds = [(None, None), (0, None), (0, None)]
    oracle = optimize.minimize(loss, [0.0, 0.1, 0.1], bounds=bounds, method="L-BFGS-B", options={"ftol": 1e-14}).x
    np.testing.assert_allclose(calibrator.row_weights.numpy(), oracle, atol=2e-3)


def test_every_part_weighs_the_same() -> None:
    ids = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    weights = part_weights(ids)
    for part in range(3):
        assert weights[ids == part].sum().item() == pytest.approx(1 / 3)


def test_the_temperature_never_falls_with_distance_and_never_leaves_what_was_seen() -> None:
    outputs, target = stream([0.0, 1.0, 3.0], rows=1000, seed=0)
    calibrator = ShiftAwareTemperature().fit(outputs, target)
    ladder = torch.cat([torch.linspace(0, 10, 99), torch.tensor([torch.inf])]).double()
    rows = Outputs(outputs.probs[:100], novelty=ladder, disagreement=torch.zeros(100))
    temperatures = calibrator.temperatures(rows)
    assert (temperatures.diff() >= 0).all()
    assert temperatures[-1] <= calibrator.temperatures(outputs).max()
    upside_down = ShiftAwareTemperature().fit(*stream([0.0, 1.0, 3.0], rows=1000, seed=0, gain=-0.5))
    assert upside_down.row_weights[1].item() == pytest.approx(0, abs=1e-3)


def test_adapt_reads_a_level_that_rows_alone_do_not_show() -> None:
    parts = [0.0, 0.3, 0.6, 0.9, 1.2]
    calibrator = ShiftAwareTemperature().fit(*stream(parts, rows=2000, seed=0, gain=0.0, hidden=1.0))
    for level in (0.0, 0.5, 1.0):
        fresh, target = stream([level], rows=4000, seed=50, gain=0.0, hidden=1.0)
        plain = ece(calibrator.adapt(fresh.rows(torch.arange(0)))(fresh), target)
        adapted = ece(calibrator.adapt(fresh)(fresh), target)
        assert adapted < max(0.5 * plain, 0.035)


def test_an_easy_target_does_not_become_under_confident() -> None:
    calibrator = ShiftAwareTemperature().fit(*stream([0.0, 1.0, 2.0, 3.0], rows=2000, seed=0))
    easy, target = stream([0.0], rows=4000, seed=30)  # a new domain that looks like what was seen
    before = easy.probs.amax(1).mean().item()
    after = calibrator.adapt(easy.rows(torch.arange(100)))(easy)
    assert after.amax(1).mean().item() > before - 0.02
    assert ece(after, target) < 0.03


def test_adapt_is_replaced_by_the_next_and_undone_by_no_rows() -> None:
    outputs, target = stream([0.0, 1.0, 3.0], rows=500, seed=0)
    calibrator = ShiftAwareTemperature().fit(outputs, target)
    plain = calibrator(outputs)
    far = outputs.rows(outputs.domain == 2)
    once = calibrator.adapt(far)(outputs)
    assert not torch.equal(once, plain)
    assert torch.equal(calibrator.adapt(outputs.rows(outputs.domain == 0)).adapt(far)(outputs), once)
    assert torch.equal(calibrator.adapt(far.rows(torch.arange(0)))(outputs), plain)


def test_one_part_without_signs_is_plain_temperature_scaling() -> None:
    outputs, target = draw(500, seed=0, temperature=2.0)
    plain = Outputs(outputs.probs)
    calibrator = ShiftAwareTemperature().fit(plain, target)
    expected = TemperatureScaling().fit(plain, target)(plain)
    torch.testing.assert_close(calibrator(plain), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(calibrator.adapt(plain.rows(torch.arange(20)))(plain), expected, atol=1e-6, rtol=0)


def test_wrong_knobs_parts_and_missing_signs_are_named() -> None:
    outputs, target = stream([0.0, 1.0], rows=50, seed=0)
    with pytest.raises(InvalidArgumentError, match="reference 7; got"):
        ShiftAwareTemperature(reference=7).fit(outputs, target)
    with pytest.raises(InvalidArgumentError, match="ridge must be positive"):
        ShiftAwareTemperature(ridge=0.0)
    calibrator = ShiftAwareTemperature().fit(outputs, target)
    with pytest.raises(InvalidArgumentError, match="disagreement must be given as in fit"):
        calibrator(outputs._replace(disagreement=None))
    with pytest.raises(InvalidArgumentError, match="novelty must be given as in fit"):
        calibrator.adapt(outputs._replace(novelty=None))
