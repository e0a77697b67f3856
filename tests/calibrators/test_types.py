"""The calibrators' doors: one map for every type that holds the values, our error for the rest, and nothing learned from a NaN."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calibrators.test_contract import MAKERS, every, trained
from calibrators.worlds import draw

from moe_posterior import InvalidArgumentError
from moe_posterior.calibrators import Calibrator, OnlineConfigurationCalibrator, Outputs, TemperatureScaling

INTEGERS = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
ROWS = 60


def world() -> tuple[Outputs, torch.Tensor]:
    outputs, target = draw(ROWS, seed=1, temperature=2.0)
    return outputs._replace(configuration=outputs.configuration % 100, domain=outputs.domain % 100), target


@every
def test_ids_and_labels_of_every_integer_type_give_the_same_map(make: Callable[[], Calibrator]) -> None:
    outputs, target = world()
    expected = make().fit(outputs, target)(outputs)
    for kind in INTEGERS:
        narrow = outputs._replace(configuration=outputs.configuration.to(kind), domain=outputs.domain.to(kind))
        assert torch.equal(make().fit(narrow, target.to(kind))(narrow), expected), kind
    listed = outputs._replace(probs=outputs.probs.numpy(), configuration=outputs.configuration.tolist())
    assert torch.equal(make().fit(listed, target.tolist())(listed), expected)
    strided = Outputs._make(None if f is None else torch.stack([f, f], dim=-1)[..., 0] for f in outputs)
    assert torch.equal(make().fit(strided, target)(strided), expected)
    tracked = outputs._replace(probs=outputs.probs.clone().requires_grad_())
    assert torch.equal(make().fit(tracked, target)(tracked), expected)


@every
@pytest.mark.parametrize("field", ["probs", "expert_probs", "routing_weights", "novelty", "disagreement"])
@pytest.mark.parametrize("wrong", [math.nan, -math.inf, -2.0])
def test_a_field_that_is_not_what_it_says_is_refused(make: Callable[[], Calibrator], field: str, wrong: float) -> None:
    outputs, target = world()
    calibrator = trained(make)
    broken = getattr(outputs, field).clone()
    broken[3] = wrong
    broken = outputs._replace(**{field: broken})
    for call in (lambda: make().fit(broken, target), lambda: calibrator(broken)):
        with pytest.raises(InvalidArgumentError, match=f"outputs.{field} must"):
            call()


@every
@pytest.mark.parametrize("wrong", ["labels", None, 3, [0.5] * ROWS, [1j] * ROWS, [0] * 59, [99] * ROWS, [-1] * ROWS])
def test_targets_of_another_kind_are_refused(make: Callable[[], Calibrator], wrong: Any) -> None:
    outputs, _ = world()
    with pytest.raises(InvalidArgumentError, match="target must"):
        make().fit(outputs, wrong)
    with pytest.raises(InvalidArgumentError, match="outputs"):
        make().fit(wrong, torch.zeros(ROWS, dtype=torch.int64))


@pytest.mark.parametrize("kind", [*INTEGERS, torch.bool, torch.float16, torch.bfloat16, torch.float64])
def test_outcomes_of_every_type_teach_the_online_calibrator_the_same(kind: torch.dtype) -> None:
    outputs, target = world()
    correct = torch.arange(ROWS) % 3 == 0
    maps = []
    for given in (correct, correct.to(kind)):
        online = OnlineConfigurationCalibrator(TemperatureScaling(), strength=10.0).fit(outputs, target)
        maps.append(online.observe(outputs, given)(outputs))
    assert torch.equal(*maps)


def test_empty_rows_teach_nothing_first_in_the_middle_and_last() -> None:
    outputs, target = world()
    online, plain = (
        OnlineConfigurationCalibrator(TemperatureScaling(), strength=10.0).fit(outputs, target) for _ in "ab"
    )
    nothing = outputs.rows(torch.zeros(0, dtype=torch.int64))
    for rows in (nothing, outputs, nothing, outputs, nothing):
        correct = torch.arange(len(rows.probs)) % 2 == 0
        online.observe(rows, correct)
        if len(correct):
            plain.observe(rows, correct)
        assert len(online(nothing)) == 0
    assert torch.equal(online(outputs), plain(outputs))


def test_outcomes_that_are_not_known_or_not_finite_are_no_successes() -> None:
    outputs, target = world()
    online = OnlineConfigurationCalibrator(TemperatureScaling(), strength=10.0).fit(outputs, target)
    online.observe(outputs, [None] * ROWS)
    assert online.outcomes == 0
    for wrong in (math.inf, -math.inf, 2.0):
        with pytest.raises(InvalidArgumentError, match="correct must"):
            online.observe(outputs, torch.full((ROWS,), wrong))
    assert online.outcomes == 0


def test_temperatures_check_what_they_are_given() -> None:
    outputs, target = world()
    for name in ("domains", "shift"):
        calibrator = MAKERS[name]().fit(outputs, target)
        with pytest.raises(InvalidArgumentError, match=r"outputs.novelty must"):
            calibrator.temperatures(outputs._replace(novelty=torch.full((ROWS,), torch.nan)))
