"""A threshold that watches itself: alarms, caution, renewal, and what survives a restart."""

import copy
import json
import math
import pickle
from typing import Any

import pytest
import torch

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.guarantees import OnlineActionThreshold, select_threshold
from moe_posterior.guarantees.online import EPOCHS

ALPHA = 0.1


def drawn(seed: int, rows: int, slope: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """The risk among confidences of at least t is ``slope * (1 - t) / 2``."""
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(rows, generator=generator, dtype=torch.float64)
    return confidence, torch.rand(rows, generator=generator) > slope * (1 - confidence)


def calibrated(seed: int = 0, **options: Any) -> OnlineActionThreshold:
    return OnlineActionThreshold(ALPHA, **options).calibrate(*drawn(seed, 3000))


def test_it_starts_from_the_threshold_that_calibration_rows_promise() -> None:
    assert calibrated().threshold == select_threshold(*drawn(0, 3000), ALPHA).threshold
    assert calibrated().acts(torch.tensor([0.1, 1.0, math.nan])).tolist() == [False, True, False]


def test_without_a_shift_it_is_never_laxer_than_promised_and_seldom_withdrawn() -> None:
    alarms = 0
    for seed in range(30):
        online = calibrated(seed)
        promised = online.threshold
        for confidence, correct in zip(*drawn(1000 + seed, 300), strict=True):
            online.update(confidence, correct)
            assert online.threshold >= promised
        alarms += online.alarms
    assert alarms <= 12  # at least 100 outcomes to each on average would allow 60


def test_after_a_shift_the_promise_is_withdrawn_within_a_hundred_outcomes_and_nothing_is_acted_on() -> None:
    for seed in range(20):
        online = calibrated(seed)
        online.update(*drawn(2000 + seed, 100, slope=2.0))
        assert online.alarms >= 1
        assert online.threshold == math.inf


def test_a_new_promise_is_made_from_the_outcomes_since_the_alarm_alone_at_half_the_error_probability() -> None:
    online, wrong = calibrated(), 0
    while not online.alarms:
        online.update(1.0, False)
        wrong += 1
    assert (online.threshold, online.outcomes) == (math.inf, wrong)
    confidence, correct = drawn(5, EPOCHS[0], slope=0.0)
    online.update(confidence[:-1], correct[:-1])
    assert online.threshold == math.inf
    online.update(confidence[-1], correct[-1])
    assert math.isfinite(online.threshold)
    assert online.promise == select_threshold(confidence, correct, ALPHA, 0.05)


def test_without_calibration_rows_the_first_outcomes_have_to_do_and_later_ones_lower_the_threshold() -> None:
    online = OnlineActionThreshold(0.2, alarm=1e300)
    assert online.update(*drawn(11, EPOCHS[0] - 1)).threshold == math.inf
    confidence, correct = drawn(11, EPOCHS[3])
    found = []
    for trial, rows in enumerate(EPOCHS[:4]):
        online = OnlineActionThreshold(0.2, alarm=1e300, step=0.0).update(confidence[:rows], correct[:rows])
        found.append(select_threshold(confidence[:rows], correct[:rows], 0.2, 0.05 / 2**trial).threshold)
        assert online.threshold == min(found)
    assert found[3] < min(found[:2])


def test_promises_after_an_alarm_are_broken_at_most_as_often_as_stated() -> None:
    broken, runs = 0, 150
    for seed in range(runs):
        online = OnlineActionThreshold(
            0.2, 0.2, step=0.0, alarm=1e9
        )  # starts as after an alarm, and is never withdrawn
        online.update(*drawn(3000 + seed, 800, slope=0.6))
        broken += math.isfinite(online.threshold) and 0.3 * (1 - online.threshold) > 0.2
    assert broken <= (0.2 + 3 * math.sqrt(0.16 / runs)) * runs


def test_every_error_raises_the_threshold_and_right_answers_bring_it_back_to_the_promised_one() -> None:
    online = calibrated(step=0.1)
    promised = online.threshold
    online.update(1.0, False)
    raised = online.threshold
    assert raised > promised
    assert calibrated(step=0.0).update(1.0, False).threshold == promised
    online.update(torch.ones(30), torch.ones(30))
    assert online.threshold == promised


def test_unknown_outcomes_and_answers_below_the_threshold_change_no_decision() -> None:
    online = calibrated()
    before = online.state_dict()
    online.update(torch.ones(50), torch.full((50,), math.nan))
    assert online.state_dict() == before
    online.update(torch.zeros(50), torch.zeros(50))
    assert online.state_dict() == {**before, "outcomes": 50}


def test_memory_is_bounded() -> None:
    online = OnlineActionThreshold(ALPHA, alarm=1e300, step=0.0)
    online.update(torch.rand(EPOCHS[-1] + 500), torch.zeros(EPOCHS[-1] + 500))
    assert len(online.state_dict()["since"]) == EPOCHS[-1]
    assert len(calibrated().state_dict()["knots"]) <= 256


@pytest.mark.parametrize("way", ["json", "pickle", "copy"])
def test_a_saved_state_goes_on_exactly_where_it_stopped(way: str) -> None:
    online = calibrated()
    online.update(*drawn(7, 150, slope=1.5))
    if way == "json":
        other = OnlineActionThreshold(ALPHA).load_state_dict(
            json.loads(json.dumps(online.state_dict(), allow_nan=False))
        )
    else:
        other = pickle.loads(pickle.dumps(online)) if way == "pickle" else copy.deepcopy(online)
    for one in (online, other):
        one.update(*drawn(8, 700, slope=0.2))
    assert other.state_dict() == online.state_dict()
    assert str(other) == str(online)


def test_a_state_of_other_settings_or_of_something_else_is_refused_and_changes_nothing() -> None:
    online = calibrated()
    before = online.state_dict()
    for state in (
        OnlineActionThreshold(0.2).state_dict(),
        {"format": 1},
        {**before, "wealth": [1.0]},
        {**before, "knots": []},
        {**before, "promise": {"threshold": 0.5}},
        {**before, "since": [[0.5]]},
        {**before, "depth": 7.0},
    ):
        with pytest.raises(InvalidArgumentError):
            online.load_state_dict(state)
        assert online.state_dict() == before


@pytest.mark.parametrize(
    ("confidence", "correct", "name"),
    [(math.nan, 1.0, "confidence"), ([0.1, 0.2], [1.0], "confidence and correct"), (0.5, 2.0, "correct")],
)
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(confidence: Any, correct: Any, name: str) -> None:
    online = calibrated()
    before = online.state_dict()
    with pytest.raises(InvalidArgumentError, match=name):
        online.update(confidence, correct)
    assert online.state_dict() == before


@pytest.mark.parametrize("options", [{"alarm": 1.0}, {"step": -0.1}, {"max_risk": 1.0}, {"error_probability": 0.0}])
def test_settings_out_of_range_are_refused_by_name(options: dict[str, float]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        OnlineActionThreshold(**{"max_risk": 0.1, **options})


def test_it_says_what_it_assumes_and_that_nothing_can_be_promised() -> None:
    online = OnlineActionThreshold(ALPHA)
    assert "nothing can be promised" in str(online)
    assert all(assumption in str(calibrated()) for assumption in calibrated().assumptions)
