"""The calibration monitor: bets that cannot gain under the null, alarms that name what drifted, a state that goes on bit for bit."""

import io
import pickle

import numpy as np
import pytest
import torch

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.monitoring import CalibrationMonitor
from moe_posterior.monitoring.bets import SIZES, log_payoffs, log_start_weight, log_stream_weight, running_capital
from moe_posterior.monitoring.sequence import half_width

Columns = tuple[np.ndarray, np.ndarray, np.ndarray]


def answers(rows: int, seed: int, fall: float = 0.0, of: int = 2, start: int = 0) -> Columns:
    """Confidences, outcomes and one of four configurations, of which one is ``fall`` less often right from row ``start``."""
    rng = np.random.default_rng(seed)
    shown, configuration = rng.beta(6, 1.5, rows), rng.integers(0, 4, rows)
    falls = (configuration == of) & (np.arange(rows) >= start)
    return shown, rng.random(rows) < shown - fall * falls, configuration


@pytest.mark.parametrize("tolerance", [0.0, 0.02, 0.3])
def test_no_bet_gains_on_average_where_the_null_holds(tolerance: float) -> None:
    shown = np.concatenate([np.linspace(0, 1, 101), [1e-4, 1 - 1e-4]])
    slack = np.full_like(shown, tolerance)
    wrong, right = (np.exp(log_payoffs(shown, slack, np.full_like(shown, y))) for y in (0.0, 1.0))
    for accuracy in (shown - tolerance, shown, shown + tolerance):
        inside = accuracy.clip(0, 1)[:, None, None]
        assert (inside * right + (1 - inside) * wrong).max() <= 1 + 1e-12
    assert min(wrong.min(), right.min()) > 0
    assert max(wrong.max(), right.max()) < 20  # no single answer proves anything


def test_a_bet_gains_where_accuracy_is_beyond_the_tolerance() -> None:
    shown, slack = np.array([0.8]), np.array([0.02])
    wrong, right = (log_payoffs(shown, slack, np.array([y]))[0] for y in (0.0, 1.0))
    growth = {accuracy: (accuracy * right + (1 - accuracy) * wrong).max(axis=1) for accuracy in (0.6, 0.8, 0.95)}
    assert growth[0.6][0] > 0.05
    assert growth[0.95][1] > 0.05
    assert growth[0.8].max() < 0


def test_a_graded_outcome_pays_between_right_and_wrong() -> None:
    paid = np.exp(log_payoffs(np.full(3, 0.7), np.zeros(3), np.array([0.0, 0.25, 1.0])))
    assert np.allclose(paid[1], 0.75 * paid[0] + 0.25 * paid[2])


def test_shares_of_the_budget_add_up_to_one_at_most() -> None:
    for scale in (1.0, 16.0, 2000.0):
        assert np.exp(log_start_weight(np.arange(1.0, 10**6), scale)).sum() == pytest.approx(1, abs=2e-3 * scale**0.01)
        assert np.exp(log_start_weight(np.arange(1.0, 10**6), scale)).sum() <= 1
        assert np.exp(log_stream_weight(np.arange(1.0, 10**6), scale)).sum() <= 1


def test_running_capital_is_that_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    lengths = [1, 7, 3, 64, 1, 20]
    segment = np.repeat(np.arange(len(lengths)), lengths)
    pays, start = rng.normal(0, 1, (len(segment), 3)), rng.normal(-5, 1, len(segment))
    before = np.where(rng.random((len(lengths), 3)) < 0.5, -np.inf, rng.normal(0, 1, (len(lengths), 3)))
    found = running_capital(pays, start, before, segment)
    for group in range(len(lengths)):
        capital = np.exp(before[group])
        for row in np.flatnonzero(segment == group):
            capital = np.exp(pays[row]) * (capital + np.exp(start[row]))
            assert np.allclose(np.exp(found[row]), capital, rtol=1e-10)


def test_a_drift_is_found_named_dated_and_measured() -> None:
    monitor = CalibrationMonitor()
    raised = monitor.update(*answers(8000, 0, fall=0.3, start=4000))
    first = raised[0]
    assert monitor.alarm == first
    assert monitor.alarms == raised
    assert {alarm.configuration for alarm in raised} <= {2, None}
    assert (first.configuration, first.direction) == (2, "overconfident")
    assert 4000 <= first.row < 5000
    assert abs(first.since - 4000) < 300
    assert first.e_value >= first.threshold
    assert first.low <= 0.3 <= first.high
    assert abs(first.gap - 0.3) < 0.15


def test_too_little_confidence_is_told_from_too_much() -> None:
    assert {alarm.direction for alarm in CalibrationMonitor().update(*answers(6000, 1, fall=-0.15))} == {
        "underconfident"
    }


def test_a_gap_within_the_tolerance_raises_no_alarm_and_one_beyond_does() -> None:
    shown, _, configuration = answers(60_000, 3)
    right = np.random.default_rng(3).random(60_000) < shown - 0.03
    assert CalibrationMonitor(tolerance=0.04).update(shown, right, configuration) == ()
    assert CalibrationMonitor(tolerance=0.01).update(shown, right, configuration) != ()


def test_false_alarms_are_rarer_than_alpha() -> None:
    fired = 0
    for seed in range(150):
        fired += bool(CalibrationMonitor(alpha=0.5, tolerance=0.0).update(*answers(1500, seed)))
    assert fired <= 75
    assert fired > 0  # the bound is not met by never firing


def test_rows_one_by_one_and_in_batches_of_any_size_give_the_same_alarms() -> None:
    columns = answers(1200, 4, fall=0.4, start=300)
    whole, single, uneven = CalibrationMonitor(), CalibrationMonitor(), CalibrationMonitor()
    whole.update(*columns)
    for shown, right, configuration in zip(*columns, strict=True):
        single.update(float(shown), bool(right), int(configuration))
    for part in np.split(np.arange(1200), [1, 8, 500, 501]):
        uneven.update(*(column[part] for column in columns))
    assert whole.alarms
    for other in (single, uneven):
        assert [(a.configuration, a.row, a.since, a.rows) for a in other.alarms] == [
            (a.configuration, a.row, a.since, a.rows) for a in whole.alarms
        ]
        for one, two in zip(whole.summary(), other.summary(), strict=True):
            assert one.configuration == two.configuration
            assert one.log_e == pytest.approx(two.log_e, abs=1e-9)
            assert one.gap == pytest.approx(two.gap, abs=1e-12)


@pytest.mark.parametrize("how", ["state", "pickle"])
def test_a_monitor_goes_on_bit_for_bit_after_it_was_stored(how: str) -> None:
    first, rest = (answers(2000, seed, fall=0.3) for seed in (5, 6))
    reference = answers(500, 7)
    monitor = CalibrationMonitor(alpha=0.1).set_baseline(*reference)
    monitor.update(*first)
    if how == "pickle":
        other = pickle.loads(pickle.dumps(monitor))
    else:
        stored = io.BytesIO()
        torch.save(monitor.state_dict(), stored)
        stored.seek(0)
        other = CalibrationMonitor(alpha=0.1)
        other.load_state_dict(torch.load(stored, weights_only=True))
    for one in (monitor, other):
        one.update(*rest)
    assert other.alarms == monitor.alarms
    assert other.summary() == monitor.summary()
    assert pickle.dumps(other.state_dict()["streams"]["capital"].numpy()) == pickle.dumps(
        monitor.state_dict()["streams"]["capital"].numpy()
    )


def test_a_state_of_other_options_or_of_something_else_is_refused_and_changes_nothing() -> None:
    monitor = CalibrationMonitor()
    monitor.update(*answers(100, 0))
    before = monitor.summary()
    for state in (CalibrationMonitor(alpha=0.01).state_dict(), {}, {**monitor.state_dict(), "streams": {}}, None):
        with pytest.raises(InvalidArgumentError, match="state"):
            monitor.load_state_dict(state)  # type: ignore[arg-type]
    broken = CalibrationMonitor().state_dict()
    broken["streams"]["capital"] = torch.full_like(broken["streams"]["capital"], torch.nan)
    with pytest.raises(InvalidArgumentError, match="capital"):
        monitor.load_state_dict(broken)
    assert monitor.summary() == before


def test_a_reset_forgets_a_configuration_and_may_raise_its_alarm_again() -> None:
    monitor = CalibrationMonitor()
    monitor.update(*answers(3000, 8, fall=0.3))
    assert monitor.alarms[0].configuration == 2
    count = len(monitor.alarms)
    monitor.reset(2)
    by_name = {one.configuration: one for one in monitor.summary()}
    assert by_name[2].rows == by_name[None].rows == 0
    assert by_name[1].rows > 0
    assert monitor.update(*answers(2000, 9)) == ()  # recalibrated
    again = monitor.update(*answers(3000, 10, fall=0.3))
    assert again[0].configuration == 2
    assert len(monitor.alarms) > count
    monitor.reset()
    assert all(one.rows == 0 for one in monitor.summary())
    with pytest.raises(InvalidArgumentError, match="configuration must be one that was seen; got 99"):
        monitor.reset(99)


def test_an_alarm_is_raised_once_and_evidence_goes_on() -> None:
    monitor = CalibrationMonitor()
    shown, right, _ = answers(3000, 11)
    monitor.update(shown, right & (np.arange(3000) % 3 > 0))
    assert [alarm.configuration for alarm in monitor.alarms] == [None]
    assert monitor.alarms[0].threshold == pytest.approx(2 / 0.05)  # without configurations nothing is shared out
    before = monitor.summary()[0].log_e[0]
    assert monitor.update(shown, np.zeros(3000)) == ()
    assert monitor.summary()[0].log_e[0] > before
    assert monitor.summary()[0].alarmed == ("overconfident",)


def test_unknown_outcomes_are_counted_as_rows_and_nothing_else() -> None:
    shown, right, configuration = answers(2000, 12, fall=0.4)
    known, gaps = CalibrationMonitor(), CalibrationMonitor()
    known.update(shown, right, configuration)
    padded = [np.repeat(column, 2) for column in (shown, right.astype(float), configuration)]
    padded[1][::2] = np.nan
    gaps.update(*padded)
    assert [alarm.row for alarm in gaps.alarms] == [2 * alarm.row + 1 for alarm in known.alarms]
    assert [one.rows for one in gaps.summary()] == [one.rows for one in known.summary()]
    assert gaps.rows == 4000


def test_one_wrong_answer_said_to_be_certain_proves_nothing_and_many_do() -> None:
    monitor = CalibrationMonitor(tolerance=0.0)
    assert monitor.update(1.0, False) == ()
    assert monitor.update(np.ones(20), np.zeros(20)) != ()
    assert CalibrationMonitor().update(np.zeros(50), np.ones(50))[0].direction == "underconfident"
    assert CalibrationMonitor().update(np.ones(10_000), np.ones(10_000)) == ()


def test_a_baseline_takes_a_steady_gap_for_granted_and_finds_a_new_one() -> None:
    reference, stream = answers(3000, 13, fall=0.25), answers(20_000, 14, fall=0.25)
    assert CalibrationMonitor().update(*stream) != ()
    monitor = CalibrationMonitor().set_baseline(*reference)
    assert monitor.update(*stream) == ()
    assert monitor.update(*answers(4000, 15, fall=0.55))[0].configuration == 2
    with pytest.raises(InvalidArgumentError, match="before the first update"):
        monitor.set_baseline(*reference)
    with pytest.raises(InvalidArgumentError, match="at least 20 known outcomes; got 3"):
        CalibrationMonitor().set_baseline([0.5] * 4, [1, 0, 1, None])


def test_configurations_beyond_the_most_count_in_the_global_stream_alone() -> None:
    monitor = CalibrationMonitor(max_configurations=2)
    monitor.update(np.full(8, 0.5), np.arange(8) % 2, np.array([7, -3, 7, 5, 5, 9, 7, -3]))
    assert {one.configuration: one.rows for one in monitor.summary()} == {None: 8, 7: 3, -3: 2}
    assert monitor.left_out == 3


def test_libraries_dtypes_and_scalars_are_read_alike() -> None:
    shown, right, configuration = answers(64, 16)
    monitors = [CalibrationMonitor() for _ in range(3)]
    shown = torch.from_numpy(shown).bfloat16()
    monitors[0].update(shown.double().numpy(), right, configuration)
    monitors[1].update(shown, torch.from_numpy(right), torch.from_numpy(configuration).to(torch.uint8))
    monitors[2].update(shown.tolist(), right.astype(int).tolist(), configuration.tolist())
    assert monitors[0].summary() == monitors[1].summary() == monitors[2].summary()
    assert monitors[0].update([], [], []) == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5, 1.2], [1, 0], [0, 0]), "confidence must lie in"),
        (([0.5, np.nan], [1, 0], [0, 0]), "confidence must be finite"),
        (([[0.5]], [[1]], [0]), "confidence must be one number"),
        (([0.5], [1, 0], [0]), "correct must be numbers of shape"),
        (([0.5], [2], [0]), "correct must lie in"),
        (([0.5], [1], [0.5]), "configuration must be integers"),
        (([0.5], [1], [0, 1]), "configuration must be integers of shape"),
        (([0.5], [1], None), "configuration must be given with every update or with none; got None"),
        (("high", [1], [0]), "confidence must be numbers"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(arguments: tuple, message: str) -> None:
    monitor = CalibrationMonitor()
    monitor.update(*answers(10, 17))
    before = monitor.summary()
    with pytest.raises(InvalidArgumentError, match=message):
        monitor.update(*arguments)
    assert monitor.summary() == before
    assert monitor.rows == 10


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0},
        {"alpha": True},
        {"tolerance": 0.5},
        {"tolerance": -0.1},
        {"global_share": 1},
        {"max_configurations": 0},
    ],
)
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        CalibrationMonitor(**options)


def test_a_confidence_sequence_holds_at_all_times_at_once() -> None:
    rng = np.random.default_rng(0)
    rows, runs, missed = 400, 120, 0
    for _ in range(runs):
        chance = rng.beta(6, 1.5, rows)
        errors = (rng.random(rows) < chance) - chance
        sums, squares = errors.cumsum(), (errors**2).cumsum()
        missed += any(
            abs(sums[at]) / (at + 1) > half_width(float(squares[at]), at + 1, np.log(0.2)) for at in range(0, rows, 5)
        )
    assert missed <= 0.2 * runs
    assert half_width(0.1 * 10**5, 10**5, np.log(0.05)) < 0.01
    assert half_width(0.0, 0, np.log(0.05)) == 1


def test_the_largest_bet_is_about_a_fall_from_ninety_to_half() -> None:
    odds = 9 * np.exp(-SIZES)
    assert (odds / (1 + odds)).round(2).tolist() == [0.88, 0.85, 0.75, 0.45]
