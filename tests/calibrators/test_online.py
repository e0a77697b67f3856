"""The online calibrator: equal to the static one at first, quick under shift, harmless without."""

import math

import numpy as np
import pytest
import torch
from calibrators.worlds import draw, ece
from scipy import integrate, optimize, special, stats
from torch import Tensor

from moe_posterior.calibrators import OnlineConfigurationCalibrator, Outputs, TemperatureScaling
from moe_posterior.calibrators.online import STRENGTHS
from moe_posterior.calibrators.pooling import (
    NUM_BINS,
    PRIOR_SCALES,
    Counts,
    affine_posterior,
    beta_shift,
    pooled_shifts,
)
from moe_posterior.errors import InvalidArgumentError


def online(seed: int = 0, **knobs: float) -> OnlineConfigurationCalibrator:
    """On rows that are calibrated as they are, so that the static temperature is about 1."""
    return OnlineConfigurationCalibrator(TemperatureScaling(), **knobs).fit(*draw(2000, seed=seed))


def right(outputs: Outputs, target: Tensor) -> Tensor:
    return outputs.probs.argmax(1) == target


def test_without_outcomes_it_is_the_static_calibrator_bit_for_bit() -> None:
    calibrator = online()
    for dtype in (torch.float16, torch.float32, torch.float64):
        outputs, _ = draw(500, seed=1)
        outputs = outputs._replace(probs=outputs.probs.to(dtype))
        calibrator.observe(outputs.rows(torch.arange(3)), torch.full((3,), torch.nan))
        assert torch.equal(calibrator(outputs), calibrator.static(outputs))


def test_a_hundred_outcomes_halve_the_error_under_shift() -> None:
    before, after = [], []
    for seed in range(20):
        calibrator = online(seed=1000 + seed)
        stream, target = draw(100, seed=2000 + seed, temperature=3.0)
        held_out, labels = draw(4000, seed=3000 + seed, temperature=3.0)
        before.append(ece(calibrator(held_out), labels))
        calibrator.observe(stream, right(stream, target))
        after.append(ece(calibrator(held_out), labels))
    assert np.mean(before) > 0.15
    assert np.mean(after) < 0.5 * np.mean(before)


def test_a_few_dozen_outcomes_already_act_in_a_configuration_that_had_none() -> None:
    calibrator = online()
    stream, target = draw(40, seed=1, temperature=3.0)
    elsewhere, labels = draw(4000, seed=2, temperature=3.0)
    elsewhere = elsewhere._replace(configuration=torch.full((4000,), 99))
    before = ece(calibrator(elsewhere), labels)
    calibrator.observe(stream, right(stream, target))
    assert ece(calibrator(elsewhere), labels) < 0.75 * before


@pytest.mark.parametrize("outcomes", [10, 50, 100, 500])
def test_a_calibrated_stream_is_not_made_worse_beyond_noise(outcomes: int) -> None:
    changes = []
    for seed in range(20):
        calibrator = online(seed=1000 + seed)
        stream, target = draw(outcomes, seed=2000 + seed)
        held_out, labels = draw(4000, seed=3000 + seed)
        before = ece(calibrator(held_out), labels)
        changes.append(ece(calibrator.observe(stream, right(stream, target))(held_out), labels) - before)
    assert np.mean(changes) < 0.015


def test_one_by_one_in_batches_and_merged_give_the_same_map() -> None:
    stream, target = draw(60, seed=1, temperature=3.0)
    correct = right(stream, target)
    whole = online().observe(stream, correct)
    singly, first, second = online(), online(), online()
    for row in range(60):
        index = torch.tensor([row])
        singly(stream.rows(index))  # prequential: show, then learn
        singly.observe(stream.rows(index), correct[index])
    first.observe(stream.rows(torch.arange(20)), correct[:20])
    second.observe(stream.rows(torch.arange(20, 60)), correct[20:])
    expected = whole(stream)
    torch.testing.assert_close(singly(stream), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(first.merge(second)(stream), expected, atol=1e-9, rtol=0)
    assert whole.outcomes == singly.outcomes == first.outcomes == 60


def test_half_life_discounts_by_age_however_outcomes_are_batched() -> None:
    stream, target = draw(30, seed=1, temperature=3.0)
    correct = right(stream, target)
    whole, singly = (online(strength=30.0, half_life=10.0) for _ in range(2))
    whole.observe(stream, correct)
    for row in range(30):
        index = torch.tensor([row])
        singly.observe(stream.rows(index), correct[index])
    assert whole.outcomes == pytest.approx(sum(2 ** (-age / 10) for age in range(30)))
    torch.testing.assert_close(singly(stream), whole(stream), atol=1e-9, rtol=0)
    with pytest.raises(InvalidArgumentError, match="half_life"):
        whole.merge(singly)


def test_with_a_half_life_a_stream_that_recovers_is_believed_again() -> None:
    forgetful, faithful = online(strength=30.0, half_life=50.0), online(strength=30.0)
    bad, bad_target = draw(400, seed=1, temperature=4.0)
    good, good_target = draw(300, seed=2)
    held_out, labels = draw(4000, seed=3)
    for calibrator in (forgetful, faithful):
        calibrator.observe(bad, right(bad, bad_target)).observe(good, right(good, good_target))
    assert ece(forgetful(held_out), labels) < 0.6 * ece(faithful(held_out), labels)


def test_a_configuration_that_fails_loses_confidence_and_the_others_less() -> None:
    calibrator = online(strength=30.0)
    outputs, _ = draw(400, seed=1)
    outputs = outputs._replace(configuration=torch.arange(400) % 4)
    fails = outputs.configuration == 2
    generator = torch.Generator().manual_seed(0)
    truth = torch.where(fails, 0.3, calibrator(outputs).amax(1))
    before = calibrator(outputs).amax(1)
    calibrator.observe(outputs, torch.rand(400, generator=generator, dtype=torch.float64) < truth)
    fall = before - calibrator(outputs).amax(1)
    assert fall[fails].mean() > 0.15
    assert fall[~fails].mean() < 0.5 * fall[fails].mean()


def test_a_confidence_bin_of_its_own_moves_on_its_own() -> None:
    calibrator = online(strength=10.0)
    sure, unsure = torch.tensor([[0.95, 0.05]]).expand(300, 2), torch.tensor([[0.6, 0.4]]).expand(300, 2)
    calibrator.static = TemperatureScaling().fit(Outputs(torch.full((4, 2), 0.5)), torch.zeros(4, dtype=torch.int64))
    calibrator.observe(Outputs(sure), torch.arange(300) % 10 < 6)  # right in 60 %
    calibrator.observe(Outputs(unsure), torch.arange(300) % 10 < 6)
    shown = calibrator(Outputs(torch.cat([sure[:1], unsure[:1]])))[:, 0]
    assert shown.tolist() == pytest.approx([0.6, 0.6], abs=0.02)


def test_offset_and_slope_are_the_average_of_scipys_maxima_weighted_by_their_evidence() -> None:
    logits = np.array([-1.0, 0.0, 1.0, 2.0, 4.0])
    won, lost = np.array([1.0, 3, 5, 6, 7]), np.array([4.0, 6, 4, 5, 3])
    maxima, evidence = [], []
    for sigma in PRIOR_SCALES:
        spread = np.array([sigma, sigma / 2])

        def loss(moved: np.ndarray, spread: np.ndarray = spread) -> float:
            scores = moved[0] + (1 + moved[1]) * logits
            fit = won * special.log_expit(scores) + lost * special.log_expit(-scores)
            return float(-fit.sum() + ((moved / spread) ** 2).sum() / 2)

        best = optimize.minimize(loss, [0.0, 0.0], options={"gtol": 1e-9}).x
        p = special.expit(best[0] + (1 + best[1]) * logits)
        design = np.stack([np.ones(5), logits], 1)
        hessian = design.T @ (design * ((won + lost) * p * (1 - p))[:, None]) + np.diag(spread**-2)
        maxima.append(best)
        evidence.append(-loss(best) - np.log(sigma) - np.log(spread).sum() - np.linalg.slogdet(hessian)[1] / 2)
    expected = special.softmax(evidence) @ np.array(maxima)
    offset, slope = affine_posterior(*(torch.as_tensor(column) for column in (logits, won, lost)))
    assert [offset.item(), slope.item() - 1] == pytest.approx(expected.tolist(), abs=1e-5)


def test_laplace_evidence_is_close_to_the_integral() -> None:
    # The average over scales rests on the approximation; here is what it approximates, for one outcome count.
    sigma, won, lost = 1.0, 3, 9
    exact = integrate.dblquad(
        lambda k, a: (
            special.expit(a + k) ** won
            * special.expit(-a - k) ** lost
            * stats.norm.pdf(a, 0, sigma)
            * stats.norm.pdf(k, 1, sigma / 2)
        ),
        -6,
        6,
        -3,
        5,
    )[0]

    def negative(point: np.ndarray) -> float:
        score = point[0] + 1 + point[1]
        prior = stats.norm.logpdf(point[0], 0, sigma) + stats.norm.logpdf(point[1], 0, sigma / 2)
        return float(-(won * special.log_expit(score) + lost * special.log_expit(-score) + prior))

    best = optimize.minimize(negative, [0.0, 0.0]).x
    p = special.expit(best[0] + 1 + best[1])
    hessian = 12 * p * (1 - p) * np.ones((2, 2)) + np.diag([sigma**-2, 4 * sigma**-2])
    laplace = -negative(best) + math.log(2 * math.pi) - np.linalg.slogdet(hessian)[1] / 2
    assert laplace == pytest.approx(math.log(exact), abs=0.05)


def test_beta_shift_leads_to_the_mean_of_scipys_beta() -> None:
    shift = beta_shift(*(torch.tensor([v], dtype=torch.float64) for v in (7.0, 20.0, 16.0)), strength=12.0)
    posterior = stats.beta(12 * 0.8 + 7, 12 * 0.2 + 13).mean()
    assert torch.sigmoid(shift + math.log(4)).item() == pytest.approx(posterior)


def test_each_step_shifts_only_what_the_steps_before_left_over() -> None:
    counts = Counts(*(torch.zeros(2, NUM_BINS, dtype=torch.float64) for _ in range(3)))
    cells = {(0, 12): (30, 5, 0.2), (0, 14): (10, 25, 2.5), (1, 12): (20, 20, 0.4), (1, 16): (8, 1, 4.9)}
    for cell, (won, lost, logit) in cells.items():
        counts.successes[cell], counts.failures[cell], counts.logits[cell] = won, lost, logit * (won + lost)
    shifts = pooled_shifts(counts, strength=20.0)

    def left_over(members: list[tuple[int, int]], with_bins: bool) -> float:
        total = sum(cells[cell][0] + cells[cell][1] for cell in members)
        expected = 0.0
        for cell in members:
            score = shifts.offset.item() + shifts.slope.item() * cells[cell][2]
            score += shifts.bins[cell[1]].item() if with_bins else 0.0
            expected += (cells[cell][0] + cells[cell][1]) * special.expit(score)
        prior = expected / total
        posterior = (20 * prior + sum(cells[cell][0] for cell in members)) / (20 + total)
        return float(special.logit(posterior) - special.logit(prior))

    for column in range(NUM_BINS):
        members = [cell for cell in cells if cell[1] == column]
        assert shifts.bins[column].item() == pytest.approx(left_over(members, with_bins=False) if members else 0.0)
    for row in range(2):
        members = [cell for cell in cells if cell[0] == row]
        assert shifts.configurations[row].item() == pytest.approx(left_over(members, with_bins=True))


@pytest.mark.parametrize("outcome", [True, False])
def test_outcomes_that_are_all_alike_stay_finite(outcome: bool) -> None:
    calibrator = online()
    outputs, _ = draw(5000, seed=1, temperature=10.0)
    shown = calibrator.observe(outputs, torch.full((5000,), outcome))(outputs)
    assert shown.isfinite().all()
    assert (shown.amax(1).mean() > 0.95) if outcome else (shown.amax(1).max() < 0.25)


def test_strength_is_chosen_on_validation_unless_given() -> None:
    assert online(strength=7.0).chosen_strength.item() == 7.0
    assert online().chosen_strength.item() in STRENGTHS
    outputs, _ = draw(4000, seed=0)
    generator = torch.Generator().manual_seed(0)
    accuracy = torch.tensor([0.3, 0.9, 0.5, 0.99])[outputs.configuration]  # configurations matter: listen quickly
    wins = torch.rand(4000, generator=generator) < accuracy
    target = torch.where(wins, outputs.probs.argmax(1), outputs.probs.argmin(1))
    assert OnlineConfigurationCalibrator(TemperatureScaling()).fit(outputs, target).chosen_strength.item() <= 30


def test_a_fitted_static_calibrator_and_a_strength_need_no_fit() -> None:
    outputs, target = draw(100, seed=0)
    static = TemperatureScaling().fit(outputs, target)
    assert torch.equal(OnlineConfigurationCalibrator(static, strength=30.0)(outputs), static(outputs))


def test_wrong_outcomes_and_knobs_are_refused_and_change_nothing() -> None:
    calibrator = online()
    outputs, _ = draw(3, seed=0)
    for wrong in (torch.tensor([0.0, 1.0, 2.0]), torch.tensor([True])):
        with pytest.raises(InvalidArgumentError, match="correct must"):
            calibrator.observe(outputs, wrong)
    assert calibrator.outcomes == 0
    for knobs in ({"strength": 0.0}, {"half_life": -1.0}):
        with pytest.raises(InvalidArgumentError, match="must be positive"):
            OnlineConfigurationCalibrator(TemperatureScaling(), **knobs)
