"""Trivial baselines and paired comparisons, against plain computations."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from moe_posterior.calibrators import TemperatureScaling
from moe_posterior.metrics import calibration_error
from moe_posterior.prediction import Prediction
from moe_posterior.report.baselines import CONSTANT, MODEL, SINGLE, STATIC, TEMPERATURE, UNIFORM, beside, trivial
from moe_posterior.report.sections import fit_calibrators
from moe_posterior.report.versus import beats


def routed(n: int, seed: int, sharpness: float = 1.0) -> Prediction:
    """Three experts of falling quality on three classes, and their even mix, made over-confident."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(3, (n,), generator=generator)
    logits = torch.randn(n, 3, 3, generator=generator, dtype=torch.float64)
    logits[torch.arange(n), :, target] += torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    experts = torch.softmax(logits, dim=-1)
    probs = torch.softmax(experts.mean(dim=1).log() * sharpness, dim=-1)
    weights = torch.full((n, 3), 1 / 3, dtype=torch.float64)
    rows = {"row": torch.arange(n), "configuration": torch.zeros_like(target)}
    return Prediction(probs, expert_probs=experts, routing_weights=weights, target=target, **rows)


def test_baselines_are_chosen_on_validation_rows() -> None:
    judged, validation = routed(400, 1), routed(500, 0)
    found = trivial(judged, validation, {})
    accuracy = float((validation.probs.argmax(1) == validation.target).double().mean())
    confidence = found[CONSTANT][1].amax(dim=1)
    torch.testing.assert_close(confidence, torch.full_like(confidence, accuracy))
    assert torch.equal(found[CONSTANT][1].argmax(1), judged.probs.argmax(1))
    assert found[SINGLE][0] == "expert 0"
    assert torch.equal(found[SINGLE][1].argmax(1), judged.expert_probs[:, 0].argmax(1))
    torch.testing.assert_close(found[UNIFORM][1], judged.expert_probs.mean(dim=1))


def test_the_fixed_mix_is_the_likeliest_one() -> None:
    judged, validation = routed(400, 1), routed(500, 0)
    weights = np.array([float(part) for part in trivial(judged, validation, {})[STATIC][0].split(", ")])
    likelihood = validation.expert_probs[torch.arange(500), :, validation.target].numpy()
    best = minimize(
        lambda w: -np.log(likelihood @ w).mean(),
        np.full(3, 1 / 3),
        bounds=[(0, 1)] * 3,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
    ).x
    np.testing.assert_allclose(weights, best, atol=0.01)


def test_without_expert_probabilities_constant_and_temperature_remain() -> None:
    bare = Prediction(routed(50, 0).probs, target=routed(50, 0).target)
    fitted = {TEMPERATURE: TemperatureScaling().fit(bare.outputs, bare.target)}
    assert list(trivial(bare, bare, fitted)) == [CONSTANT, TEMPERATURE]


def test_rows_hold_the_metrics_and_comparisons_their_differences() -> None:
    judged, validation = routed(600, 1, sharpness=3.0), routed(600, 0, sharpness=3.0)
    fitted = {"a": fit_calibrators(validation)}
    rows, versus = beside([("clean", "a", judged)], {"a": validation}, fitted, 15, 0)
    found = {row["name"]: row for row in rows}
    assert list(found) == [MODEL, CONSTANT, TEMPERATURE, SINGLE, UNIFORM, STATIC]
    one_hot = torch.eye(3, dtype=torch.float64)[judged.target]
    assert found[MODEL]["brier"] == pytest.approx(float(((judged.probs - one_hot) ** 2).sum(1).mean()))
    assert found[MODEL]["ece"] == pytest.approx(float(calibration_error(judged.probs, judged.target, debias=True)))
    for row in versus:
        if row["against"] == MODEL:
            wanted = found[row["name"]][row["metric"]] - found[MODEL][row["metric"]]
            assert row["value"] == pytest.approx(wanted, abs=1e-9)
            assert row["low"] <= row["value"] <= row["high"]
    against = {row["name"] for row in versus if row["against"] == TEMPERATURE}
    assert against == {"temperature per expert", "vector", "isotonic", "histogram", "configuration"}
    assert {row["comparisons"] for row in versus} == {15}


def verdicts(sharpness: float) -> dict[tuple[str, str], bool | None]:
    judged, validation = routed(2000, 1, sharpness), routed(2000, 0, sharpness)
    _, versus = beside([("clean", "a", judged)], {"a": validation}, {"a": fit_calibrators(validation)}, 15, 0)
    return {(row["name"], row["metric"]): beats(row) for row in versus if row["against"] == MODEL}


def test_an_over_confident_model_is_beaten_by_its_temperature() -> None:
    found = verdicts(sharpness=12.0)
    assert found[TEMPERATURE, "ece"] is True
    assert found[TEMPERATURE, "brier"] is True


def test_a_model_that_ranks_its_answers_beats_a_constant() -> None:
    found = verdicts(sharpness=3.0)
    assert found[CONSTANT, "brier"] is False
    assert found[CONSTANT, "nll"] is False


def test_copies_of_rows_do_not_narrow_a_comparison() -> None:
    judged, validation = routed(300, 1), routed(300, 0)
    twice = judged.rows(torch.arange(300).repeat(4))
    fitted = {"a": fit_calibrators(validation)}
    once, copied = (beside([("clean", "a", one)], {"a": validation}, fitted, 15, 0)[1] for one in (judged, twice))
    for first, second in zip(once, copied, strict=True):
        if first["metric"] != "ece":
            assert second["high"] - second["low"] == pytest.approx(first["high"] - first["low"], rel=1e-6)


def test_bare_confidences_are_set_beside_a_constant() -> None:
    confidence = torch.linspace(0.5, 1, 800, dtype=torch.float64)
    correct = torch.rand(800, generator=torch.Generator().manual_seed(0), dtype=torch.float64) < confidence
    bare = Prediction(confidence, target=correct)
    rows, versus = beside([("clean", "a", bare)], {"a": bare}, {}, 15, 0)
    assert [row["name"] for row in rows] == [MODEL, CONSTANT]
    assert rows[1]["brier"] > rows[0]["brier"]
    assert {(row["name"], row["against"]) for row in versus} == {(CONSTANT, MODEL)}


def test_without_calibration_rows_there_are_no_baselines() -> None:
    assert beside([("clean", "a", routed(50, 0))], {}, {}, 15, 0) == ([], [])
