"""Measure the calibration of predictions you already have: probabilities and labels, from any model.

Two classifiers from scikit-learn predict handwritten digits, clean and under growing noise. Accuracy falls for both; the question is
which of them still knows how often it is right. Then a temperature is fitted on validation rows, and we see how far it helps.

    pip install 'moe-posterior[train]'        # for scikit-learn and torchmetrics
    python examples/evaluate_predictions.py   # a few seconds
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from moe_posterior.calibrators import Outputs, TemperatureScaling
from moe_posterior.metrics import brier_score, calibration_error, excess_aurc, reliability_curve, top_label


def main() -> None:
    rng = np.random.default_rng(0)
    images, digits = load_digits(return_X_y=True)
    order = rng.permutation(len(images))
    images, digits = images[order] / 16, digits[order]
    train, validation, test = slice(0, 800), slice(800, 1100), slice(1100, None)
    target = torch.from_numpy(digits[test])

    models = {
        "logistic regression": LogisticRegression(C=10, max_iter=2000),
        "random forest": RandomForestClassifier(200, random_state=0),
    }
    for model in models.values():
        model.fit(images[train], digits[train])

    print(
        f"{'model':20} {'noise':>5} {'accuracy':>9} {'brier':>7} {'ECE':>6} {'debiased':>9} {'excess AURC':>12} {'+ temperature':>14}"
    )
    for name, model in models.items():

        def predict(inputs: np.ndarray, model=model) -> Tensor:  # (N, 64) -> (N, K)
            return torch.from_numpy(model.predict_proba(inputs)).float()

        calibrator = TemperatureScaling()
        calibrator.fit(Outputs(predict(images[validation])), torch.from_numpy(digits[validation]))
        for noise in (0.0, 0.2, 0.4):
            probs = predict(images[test] + noise * rng.normal(size=images[test].shape))
            confidence, correct = top_label(probs, target)
            row = (
                correct.float().mean(),
                brier_score(probs, target),
                calibration_error(probs, target),
                calibration_error(probs, target, debias=True),  # minus what noise alone adds on this many rows
                excess_aurc(confidence, correct),  # does the confidence rank right above wrong? 0 is perfect
                calibration_error(calibrator(Outputs(probs)), target, debias=True),
            )
            numbers = " ".join(
                f"{float(value):{width}.3f}" for value, width in zip(row, (9, 7, 6, 9, 12, 14), strict=True)
            )
            print(f"{name:20} {noise:5.1f} {numbers}")

    print("\nreliability of the last row (confidence, accuracy, 95 % interval, rows):")
    curve = reliability_curve(probs, target, n_bins=10)
    for values in zip(curve.confidence, curve.accuracy, curve.low, curve.high, curve.count, strict=True):
        if values[-1]:
            print("  {:.2f}  {:.2f}  [{:.2f}, {:.2f}]  {:.0f}".format(*(float(value) for value in values)))


if __name__ == "__main__":
    main()
