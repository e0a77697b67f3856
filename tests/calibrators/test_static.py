"""The static calibrators against scikit-learn, scipy and truths that are known."""

import numpy as np
import pytest
import torch
from calibrators.worlds import draw, ece, nll
from scipy import optimize, special
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from moe_posterior.calibrators import (
    ConfigurationCalibrator,
    ExpertTemperature,
    HistogramBinning,
    IsotonicCalibration,
    MultiDomainTemperature,
    Outputs,
    TemperatureScaling,
    VectorScaling,
)
from moe_posterior.calibrators.configuration import between_variance, penalised_shifts
from moe_posterior.errors import InvalidArgumentError


def scipy_temperature(probs: Tensor, target: Tensor, bounds: tuple[float, float]) -> float:
    logits, labels = probs.double().log().numpy(), target.numpy()

    def loss(log_temperature: float) -> float:
        scaled = special.log_softmax(logits / np.exp(log_temperature), axis=1)
        return -float(scaled[np.arange(len(labels)), labels].mean())

    found = optimize.minimize_scalar(loss, bounds=np.log(bounds), method="bounded", options={"xatol": 1e-10})
    return float(np.exp(found.x))


@pytest.mark.parametrize("true", [0.5, 1.0, 2.5])
def test_temperature_is_recovered_and_agrees_with_scipy(true: float) -> None:
    outputs, target = draw(20_000, seed=0, temperature=true)
    found = TemperatureScaling().fit(outputs, target).temperature.item()
    assert found == pytest.approx(true, rel=0.05)
    assert found == pytest.approx(scipy_temperature(outputs.probs, target, (0.05, 20)), rel=1e-5)


def test_temperature_without_mistakes_or_without_hits_ends_at_its_bounds_and_flat_rows_leave_it_at_one() -> None:
    outputs, _ = draw(50, seed=0)
    best, worst = outputs.probs.argmax(1), outputs.probs.argmin(1)
    assert TemperatureScaling((0.2, 5.0)).fit(outputs, best).temperature.item() == pytest.approx(0.2)
    assert TemperatureScaling((0.2, 5.0)).fit(outputs, worst).temperature.item() == pytest.approx(5.0)
    flat = Outputs(torch.full((6, 3), 1 / 3))
    assert TemperatureScaling().fit(flat, torch.tensor([0, 0, 0, 0, 1, 2])).temperature.item() == 1.0


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (2.0, 1.0), (1.0, float("inf"))])
def test_bounds_without_meaning_are_refused(bounds: tuple[float, float]) -> None:
    for make in (TemperatureScaling, ExpertTemperature, MultiDomainTemperature, ConfigurationCalibrator):
        with pytest.raises(InvalidArgumentError, match="bounds must"):
            make(bounds)


def test_each_expert_gets_its_own_temperature_and_the_mixture_is_that_of_a_plain_loop() -> None:
    outputs, target = draw(3000, seed=0, temperature=2.0)
    assert outputs.expert_probs is not None
    assert outputs.routing_weights is not None
    calibrator = ExpertTemperature((0.1, 1.9)).fit(outputs, target)
    for expert in range(3):
        oracle = scipy_temperature(outputs.expert_probs[:, expert], target, (0.1, 1.9))
        assert calibrator.temperature[expert].item() == pytest.approx(oracle, rel=1e-5)
    shown = calibrator(outputs)
    for row in range(5):
        weights = outputs.routing_weights[row].numpy()
        mixture = sum(
            weight * special.softmax(probs.log().numpy() / temperature.item())
            for weight, probs, temperature in zip(
                weights, outputs.expert_probs[row], calibrator.temperature, strict=True
            )
        )
        np.testing.assert_allclose(shown[row].numpy(), mixture / weights.sum(), rtol=1e-9)
    with pytest.raises(InvalidArgumentError, match="3 experts as in fit; got 2"):
        calibrator(outputs._replace(expert_probs=outputs.expert_probs[:, :2], routing_weights=torch.ones(3000, 2)))


def test_vector_scaling_reaches_the_minimum_that_scipy_finds() -> None:
    outputs, target = draw(2000, seed=0, temperature=2.0, classes=3)
    calibrator = VectorScaling(ridge=1e-3).fit(outputs, target)
    logits, labels = outputs.probs.log().numpy(), target.numpy()

    def loss(flat: np.ndarray) -> float:
        scaled = special.log_softmax(logits * flat[:3] + flat[3:], axis=1)
        penalty = np.mean((flat[:3] - 1) ** 2) + np.mean(flat[3:] ** 2)
        return -float(scaled[np.arange(len(labels)), labels].mean()) + 1e-3 * penalty

    oracle = optimize.minimize(loss, np.r_[np.ones(3), np.zeros(3)], method="BFGS", options={"gtol": 1e-7}).x
    np.testing.assert_allclose(torch.cat([calibrator.scale, calibrator.shift]).numpy(), oracle, atol=1e-4)
    with pytest.raises(InvalidArgumentError, match="3 classes as in fit; got 5"):
        calibrator(draw(4, seed=0)[0])
    with pytest.raises(InvalidArgumentError, match="ridge"):
        VectorScaling(-1.0)


def test_isotonic_shows_what_scikit_learn_predicts_also_beyond_what_it_saw() -> None:
    outputs, target = draw(800, seed=0, temperature=3.0)
    confidence, label = outputs.probs.max(1)
    oracle = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(confidence, label == target)
    fresh, _ = draw(800, seed=1, temperature=6.0)
    shown = IsotonicCalibration().fit(outputs, target)(fresh)
    expected = oracle.predict(fresh.probs.amax(1).numpy()).clip(min=1 / 5)
    np.testing.assert_allclose(shown.amax(1).numpy(), expected, atol=1e-9)


def test_histogram_shows_the_accuracy_of_bins_of_equal_mass() -> None:
    outputs, target = draw(1000, seed=0, temperature=2.0)
    shown = HistogramBinning(n_bins=10).fit(outputs, target)(outputs).amax(1)
    confidence, label = outputs.probs.max(1)
    order = np.argsort(confidence.numpy())
    correct = label.eq(target).double().numpy()
    for rows in np.split(order, 10):
        np.testing.assert_allclose(shown.numpy()[rows], max(correct[rows].mean(), 0.2))


def test_histogram_of_equal_confidences_is_one_bin_and_bins_must_be_a_number() -> None:
    outputs = Outputs(torch.tensor([[0.9, 0.1]] * 10))
    calibrator = HistogramBinning().fit(outputs, torch.tensor([0] * 7 + [1] * 3))
    assert calibrator.values.tolist() == [0.7]
    for wrong in (0, 2.5, True):
        with pytest.raises(InvalidArgumentError, match="n_bins"):
            HistogramBinning(wrong)  # type: ignore[arg-type]


def test_known_domains_get_their_temperature_and_new_ones_that_of_their_features() -> None:
    domain = torch.arange(9000) // 3000
    novelty = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)[domain]
    true = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)[domain]  # log T = log(1 + relu(novelty - 1)): linear
    outputs, target = draw(9000, seed=0, temperature=true)
    outputs = Outputs(outputs.probs, novelty=novelty, domain=domain)
    calibrator = MultiDomainTemperature().fit(outputs, target)
    for part in range(3):
        oracle = scipy_temperature(outputs.probs[domain == part], target[domain == part], (0.05, 20))
        assert calibrator.temperatures(outputs)[domain == part][0].item() == pytest.approx(oracle, rel=1e-5)
    unseen = outputs._replace(domain=torch.full((9000,), 7), novelty=torch.full((9000,), 2.5))
    assert calibrator.temperatures(unseen).median().item() == pytest.approx(2.5, rel=0.1)
    assert torch.equal(calibrator.temperatures(unseen), calibrator.temperatures(unseen._replace(domain=None)))
    far = calibrator.temperatures(unseen._replace(novelty=torch.full((9000,), torch.inf)))
    assert far.max().item() <= calibrator.log_temperature.exp().max().item() + 1e-12
    with pytest.raises(InvalidArgumentError, match="novelty must be given as in fit"):
        calibrator(unseen._replace(novelty=None))


def test_domain_regression_is_weighted_least_squares() -> None:
    outputs, target = draw(900, seed=0, temperature=2.0)
    outputs = outputs._replace(domain=(torch.arange(900) >= 100).long() + (torch.arange(900) >= 400).long())
    calibrator = MultiDomainTemperature().fit(outputs, target)
    assert outputs.novelty is not None
    assert outputs.disagreement is not None
    assert outputs.domain is not None
    probs = outputs.probs.numpy()
    features = np.stack(
        [
            np.ones(900),
            np.log1p(np.maximum(outputs.novelty.numpy() - 1, 0)),
            outputs.disagreement.numpy(),
            special.entr(probs).sum(1),
        ],
        axis=1,
    )
    weight = np.sqrt(1 / np.bincount(outputs.domain.numpy())[outputs.domain.numpy()])
    response = calibrator.log_temperature.numpy()[outputs.domain.numpy()]
    oracle = np.linalg.lstsq(features * weight[:, None], response * weight, rcond=None)[0]
    np.testing.assert_allclose(calibrator.weights.numpy(), oracle, atol=1e-9)


@pytest.mark.parametrize("variance", [0.1, 1.0, 10.0])
def test_penalised_shifts_are_those_of_scikit_learn(variance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(0, 3, (60,), generator=generator)
    correct = torch.randint(0, 2, (60,), generator=generator).double()
    flat = torch.full((60,), 0.0, dtype=torch.float64)
    found = penalised_shifts(flat, correct, groups, 3, variance)
    design = torch.nn.functional.one_hot(groups, 3).numpy()
    oracle = LogisticRegression(C=variance, fit_intercept=False, tol=1e-10).fit(design, correct.numpy()).coef_[0]
    np.testing.assert_allclose(found.numpy(), oracle, atol=1e-5)


def test_penalised_shifts_respect_the_confidence_they_start_from() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, generator=generator, dtype=torch.float64)
    correct = torch.randint(0, 2, (200,), generator=generator).double()
    found = penalised_shifts(logits, correct, torch.zeros(200, dtype=torch.int64), 1, 0.5)[0].item()

    def loss(shift: float) -> float:
        score = logits.numpy() + shift
        return float(-(correct.numpy() * score - np.logaddexp(0, score)).sum() + shift**2)

    assert found == pytest.approx(optimize.minimize_scalar(loss).x, abs=1e-6)


@pytest.mark.parametrize("true", [0.0, 0.25, 1.0])
def test_between_variance_finds_how_far_configurations_differ(true: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shifts = true**0.5 * torch.randn(400, generator=generator, dtype=torch.float64)
    right = torch.binomial(torch.full((400,), 50.0, dtype=torch.float64), shifts.sigmoid(), generator=generator)
    found = between_variance(right - 25, torch.full((400,), 12.5, dtype=torch.float64)).item()
    assert 0.6 * true <= found <= 1.1 * true + 0.05  # the score saturates: large shifts are underrated


def per_configuration(rows_each: list[int], shifts: list[float], seed: int = 0) -> tuple[Outputs, Tensor]:
    """Two classes; configuration c shows sigmoid(z) and is right with probability sigmoid(z + shift_c)."""
    generator = torch.Generator().manual_seed(seed)
    configuration = torch.repeat_interleave(torch.arange(len(rows_each)), torch.tensor(rows_each))
    logits = 1.2 + 2 * torch.rand(len(configuration), generator=generator, dtype=torch.float64)
    truth = torch.sigmoid(logits + torch.tensor(shifts, dtype=torch.float64)[configuration])
    right = torch.rand(len(truth), generator=generator, dtype=torch.float64) < truth
    confidence = logits.sigmoid()
    return Outputs(torch.stack([confidence, 1 - confidence], 1), configuration=configuration), 1 - right.long()


def test_many_rows_give_a_configuration_its_own_map_and_few_leave_it_the_global_one() -> None:
    outputs, target = per_configuration([8000, 8000, 8000, 8000, 2], [0.0, -1.0, 1.0, 0.5, -1.0])
    calibrator = ConfigurationCalibrator().fit(outputs, target)
    between = calibrator.shifts[:4] - calibrator.shifts[0]
    assert between.tolist() == pytest.approx([0.0, -1.0, 1.0, 0.5], abs=0.2)
    assert abs(calibrator.shifts[4].item()) < 0.5
    static = TemperatureScaling().fit(outputs, target)
    fresh, labels = per_configuration([4000] * 4, [0.0, -1.0, 1.0, 0.5], seed=1)
    for configuration in range(4):
        rows = fresh.configuration == configuration
        own = ece(calibrator(fresh)[rows], labels[rows])
        assert own < 0.03
        assert own < ece(static(fresh)[rows], labels[rows]) + 0.005


def test_configurations_that_differ_by_noise_alone_share_the_global_map() -> None:
    outputs, target = per_configuration([20] * 300, [0.0] * 300)
    calibrator = ConfigurationCalibrator().fit(outputs, target)
    assert calibrator.shifts.abs().max() < 0.3
    unshrunk = penalised_shifts(outputs.probs.amax(1).logit(), 1.0 - target, outputs.configuration, 300, 1e9)
    assert unshrunk.abs().max() > 1.0


def test_an_unseen_configuration_gets_the_global_map() -> None:
    outputs, target = per_configuration([500, 500], [-1.0, 1.0])
    calibrator = ConfigurationCalibrator().fit(outputs, target)
    shown = calibrator(outputs._replace(configuration=torch.full((1000,), -5)))
    assert torch.equal(shown, calibrator(outputs._replace(configuration=torch.full((1000,), 10**12))))
    logits = (outputs.probs.amax(1).logit() / calibrator.temperature) + calibrator.common_shift
    torch.testing.assert_close(shown.amax(1), logits.sigmoid().clamp(min=0.5))


@pytest.mark.parametrize("make", [TemperatureScaling, IsotonicCalibration, HistogramBinning, ConfigurationCalibrator])
def test_overconfidence_is_cured_on_fresh_rows(make: type) -> None:
    calibrator = make().fit(*draw(5000, seed=0, temperature=3.0))
    fresh, target = draw(5000, seed=1, temperature=3.0)
    assert ece(calibrator(fresh), target) < 0.04 < 0.1 < ece(fresh.probs, target)


def test_temperature_and_vector_scaling_lower_the_loss_on_fresh_rows() -> None:
    outputs, target = draw(5000, seed=0, temperature=3.0)
    fresh, labels = draw(5000, seed=1, temperature=3.0)
    for make in (TemperatureScaling, VectorScaling):
        assert nll(make().fit(outputs, target)(fresh), labels) < 0.8 * nll(fresh.probs, labels)
