"""Decision rules: numbers computed by hand, float and double, and the gate that takes them."""

import pytest
import torch
from scipy import stats

from moe_posterior import InvalidArgumentError, PosteriorGate
from moe_posterior.gates import LCB, Mean, Quantile, Race, Rule, Thompson

ALPHA, BETA = torch.tensor([1.0, 6.0, 3.0]), torch.tensor([1.0, 6.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (LCB(1.0), [0.5 - 12**-0.5, 0.5 - 52**-0.5, 0.75 - (3 / 80) ** 0.5]),
        (LCB(0.0), [0.5, 0.5, 0.75]),
        (Race(1.0), [0.5 - 12**-0.5, 0.5 - 52**-0.5, 0.75 - (3 / 80) ** 0.5]),
        (Mean(), [0.5, 0.5, 0.75]),
        (Thompson(), [0.5, 0.5, 0.75]),  # without a generator the mean
        (Quantile(0.1), list(stats.beta(ALPHA.numpy(), BETA.numpy()).ppf(0.1))),
    ],
)
def test_scores_are_the_formulas(rule: Rule, expected: list[float], dtype: torch.dtype) -> None:
    scores = rule(ALPHA.to(dtype), BETA.to(dtype))
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=dtype), rtol=1e-5, atol=1e-6)


def test_thompson_draws_from_the_generator() -> None:
    first, second = (Thompson()(ALPHA, BETA, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, Thompson()(ALPHA, BETA))


@pytest.mark.parametrize(
    "make", [lambda: LCB(-1.0), lambda: LCB(float("inf")), lambda: Quantile(0.0), lambda: Quantile(1.0)]
)
def test_a_rule_refuses_what_it_cannot_be(make) -> None:
    with pytest.raises(InvalidArgumentError):
        make()


@pytest.mark.parametrize("rule", [LCB(2.5), Mean(), Quantile(0.2), Thompson(7), Race(0.5)])
def test_a_gate_with_a_rule_is_the_gate_with_its_options(rule: Rule) -> None:
    hidden = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    outcome = torch.rand(60, 5, generator=torch.Generator().manual_seed(1))
    gates = [PosteriorGate(4, 5, 3, 2, rule=rule), PosteriorGate(4, 5, 3, 2, **rule.options)]
    for gate in gates:
        gate.fit(hidden)
        gate.observe(gate(hidden), outcome)
    assert gates[0].rule == gates[1].rule == rule
    for one, other in zip(gates[0](hidden), gates[1](hidden), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "knob", [{"score": "best"}, {"risk_aversion": -1.0}, {"credible_level": 2.0}, {"temperature": 0.0}]
)
def test_a_knob_out_of_range_changes_nothing(knob: dict) -> None:
    gate = PosteriorGate(4, 5, 3)
    before = gate.knobs
    with pytest.raises(InvalidArgumentError, match=next(iter(knob))):
        gate.configure(**knob)
    assert gate.knobs == before
