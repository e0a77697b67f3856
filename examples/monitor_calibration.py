"""Watch a deployed mixture's confidences and recalibrate only once a drift is proven.

A simulated classifier answers batches of 250 queries; a gate sends each to one of four routing configurations. From batch 20, the third
configuration is right 30 points less often, and its confidence does not show it. The monitor may be read after every batch, for ever:
over its whole life it raises a false alarm with a probability of at most 5 %. After an alarm an online calibrator takes over. It starts
with the outcomes since the drift began, and goes on learning.

    python examples/monitor_calibration.py    # a few seconds
"""

import numpy as np
import torch
from torch import Tensor

from moe_posterior.calibrators import OnlineConfigurationCalibrator, Outputs, TemperatureScaling
from moe_posterior.calibrators.base import Calibrator
from moe_posterior.metrics import calibration_error, top_label
from moe_posterior.monitoring import CalibrationMonitor

BATCH, FALL_FROM, BATCHES = 250, 20, 60


def answered(rng: np.random.Generator, batch: int) -> tuple[Outputs, Tensor]:  # four classes: -> outputs, (N,) labels
    shown, configuration = rng.uniform(0.6, 0.98, BATCH), rng.integers(0, 4, BATCH)
    fell = (configuration == 2) & (batch >= FALL_FROM)
    wrong = rng.random(BATCH) >= shown - 0.3 * fell
    probs = np.concatenate([shown[:, None], np.repeat((1 - shown)[:, None] / 3, 3, axis=1)], axis=1)
    return Outputs(torch.from_numpy(probs), configuration=torch.from_numpy(configuration)), torch.from_numpy(
        wrong
    ).long()


def joined(parts: list[tuple[Outputs, Tensor]]) -> tuple[Outputs, Tensor]:
    probs, configuration = (torch.cat([getattr(one, name) for one, _ in parts]) for name in ("probs", "configuration"))
    return Outputs(probs, configuration=configuration), torch.cat([labels for _, labels in parts])


def main() -> None:
    rng = np.random.default_rng(0)
    validation = joined([answered(rng, 0) for _ in range(8)])
    static = TemperatureScaling().fit(*validation)
    online = OnlineConfigurationCalibrator(static).fit(*validation)

    service: Calibrator = static
    monitor = CalibrationMonitor()
    history: list[tuple[Outputs, Tensor]] = []
    shown: list[tuple[Tensor, Tensor]] = []
    for batch in range(BATCHES):
        outputs, labels = answered(rng, batch)
        history.append((outputs, labels))
        confidence, correct = top_label(service(outputs), labels)
        shown.append((confidence, correct))
        alarms = monitor.update(confidence, correct, outputs.configuration)
        for alarm in alarms:
            where = "all rows" if alarm.configuration is None else f"configuration {alarm.configuration}"
            print(f"batch {batch}: {where} {alarm.direction} since row {alarm.since} by about {alarm.gap:.2f}")
        if alarms and service is static:
            outputs, labels = joined(history[alarms[0].since // BATCH :])
            service = online
        if service is online:
            online.observe(outputs, top_label(static(outputs), labels)[1])
        if alarms:
            monitor.reset()  # the evidence was about a map that is no longer in use

    never = [top_label(static(outputs), labels) for outputs, labels in history]
    for name, judged in (("as monitored", shown), ("never recalibrated", never)):
        confidence, correct = (torch.cat(part) for part in zip(*judged[FALL_FROM + 10 :], strict=True))
        print(
            f"calibration error from batch {FALL_FROM + 10}, {name}: {calibration_error(confidence, correct, debias=True):.3f}"
        )


if __name__ == "__main__":
    main()
