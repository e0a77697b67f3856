"""A gate is told about its own choices alone, once, and not before they are known."""

import pytest
import torch
from torch import Tensor

from moe_posterior.benchmarks import play, play_oracle, synthetic
from moe_posterior.benchmarks.routing.environments import with_newcomer, with_noisy_warm_start
from moe_posterior.benchmarks.routing.evaluate import figures_of
from moe_posterior.benchmarks.routing.registry import GATES, build, options_of
from moe_posterior.benchmarks.routing.stream import Exchange, Feedback
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates import Gate, Routing

SMALL = {"num_queries": 120, "num_warm": 300}


class Diary(Gate):
    """Chooses experts in turn and writes down what it is told, and when."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__(hidden_size, num_experts, 1)
        self.decided, self.heard = 0, []

    def forward(self, hidden: Tensor) -> Routing:
        chosen = (self.decided + torch.arange(len(hidden))) % self.num_experts
        self.decided += len(hidden)
        zeros = torch.zeros(len(hidden))
        return Routing(chosen[:, None], zeros[:, None] + 1, chosen * 0, zeros[:, None] + 0.5, zeros)

    def observe(self, routing: Routing, outcome: Tensor, *, dense: bool | None = None) -> None:
        self.heard.append((self.decided, routing.expert_indices.flatten().tolist(), outcome.flatten().tolist()))


@pytest.fixture(scope="module")
def environment():
    return synthetic("b", 0, 5, **SMALL)


@pytest.mark.parametrize(("batch_size", "delay"), [(1, 0), (1, 7), (16, 0), (50, 1)])
def test_only_the_chosen_outcome_is_heard_and_only_after_the_delay(environment, batch_size: int, delay: int) -> None:
    diary = Diary(environment.hidden_size, 5)
    trace = play(diary, environment, batch_size=batch_size, delay=delay)
    experts = [expert for _, chosen, _ in diary.heard for expert in chosen]
    outcomes = [value for _, _, heard in diary.heard for value in heard]
    assert experts == trace.chosen[: len(experts)].tolist()
    assert outcomes == trace.outcome[: len(outcomes)].tolist()
    batches = -(-120 // batch_size)
    assert len(diary.heard) == batches - delay
    for index, (decided, _, _) in enumerate(diary.heard):
        assert decided == min(120, (index + 1 + delay) * batch_size)


def test_the_trace_is_what_the_environment_holds(environment) -> None:
    trace = play(Diary(environment.hidden_size, 5), environment)
    for t in (0, 1, 63, 119):
        assert trace.expected[t] == environment.stream.competence[t, trace.chosen[t]]
        assert trace.outcome[t] == environment.stream.outcomes[t, trace.chosen[t]]
    assert (trace.confidence == 0.5).all()


def test_the_oracle_has_no_regret(environment) -> None:
    figures = figures_of(play_oracle(environment), environment)
    assert figures["regret"] == 0
    assert figures["degraded_share_affected"] == 0


@pytest.mark.parametrize("name", sorted(GATES))
def test_every_registered_gate_plays_and_repeats_itself(environment, name: str) -> None:
    first, again = (
        figures_of(play(build(name, environment, options_of(name), 0), environment), environment) for _ in "12"
    )
    assert first == again
    assert 0 <= first["error"] <= 1
    assert 0 <= first["ece"] <= 1


def test_the_posterior_finds_the_failing_expert_and_softmax_does_not() -> None:
    environment = synthetic("b", 0)
    figures = {}
    for name in ("posterior", "softmax"):
        figures[name] = figures_of(play(build(name, environment, options_of(name), 0), environment), environment)
    assert figures["posterior"]["error"] < figures["softmax"]["error"] - 0.1
    assert figures["posterior"]["degraded_share_affected"] < 0.1
    means = [figures["posterior"][f"degraded_mean_affected_{passed}"] for passed in (0, 100)]
    assert means[1] < means[0] - 0.1


def test_mistakes_are_refused(environment) -> None:
    diary = Diary(environment.hidden_size, 5)
    with pytest.raises(InvalidArgumentError, match="batch_size"):
        play(diary, environment, batch_size=0)
    with pytest.raises(InvalidArgumentError, match="gate must be one of"):
        build("oracle of delphi", environment, {}, 0)
    for name in ("posterior", "softmax"):
        with pytest.raises(InvalidArgumentError, match="colour"):
            build(name, environment, {"colour": 3}, 0)


def test_feedback_distorts_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    outcome = (torch.rand(20_000, 1, generator=generator, dtype=torch.float64) < 0.7).double()
    told = Feedback(missing=0.25, false_positive=0.3, false_negative=0.1).of(outcome, generator)
    arrived = ~told.isnan()
    assert abs(float(arrived.double().mean()) - 0.75) < 0.02
    assert abs(float(told[arrived & (outcome == 0)].mean()) - 0.3) < 0.02
    assert abs(float(told[arrived & (outcome == 1)].mean()) - 0.9) < 0.02
    assert torch.equal(Feedback().of(outcome, generator), outcome)


@pytest.mark.parametrize("wrong", [{"delay": -1}, {"missing": 1.1}, {"false_positive": -0.1}])
def test_impossible_feedback_is_refused(wrong: dict) -> None:
    with pytest.raises(InvalidArgumentError, match="feedback needs"):
        Feedback(**wrong)


def test_a_newcomer_guesses_until_it_is_exchanged_and_is_then_as_good_as_the_best(environment) -> None:
    changed, expert = with_newcomer(environment, 60)
    assert expert != environment.degraded
    others = [index for index in range(5) if index != expert]
    assert torch.equal(changed.stream.outcomes[:, others], environment.stream.outcomes[:, others])
    assert (changed.stream.competence[:60, expert] == 0.1).all()
    assert torch.equal(changed.stream.competence[60:, expert], environment.stream.competence[60:].amax(dim=1))
    assert changed.warm_outcomes[:, expert].mean() < 0.2 < environment.warm_outcomes[:, expert].mean()


@pytest.mark.parametrize("inherits", [False, True])
def test_a_gate_that_is_told_of_an_exchange_drops_what_it_knew_of_the_predecessor(environment, inherits: bool) -> None:
    changed, expert = with_newcomer(environment, 60)
    told, untold = (build("posterior", changed, options_of("posterior"), 0) for _ in "12")
    at_chance = float(told.posterior.mean()[:, expert].mean())
    play(untold, changed)
    play(told, changed, exchange=Exchange(expert, 60, inherits))
    assert at_chance < 0.2
    assert told.posterior.mean()[:, expert].mean() > untold.posterior.mean()[:, expert].mean() + 0.2


def test_a_noisy_warm_start_errs_at_the_stated_rates(environment) -> None:
    noisy = with_noisy_warm_start(environment, 0.3, 0.1)
    right = environment.warm_outcomes == 1
    assert abs(float(noisy.warm_outcomes[right].mean()) - 0.9) < 0.05
    assert abs(float(noisy.warm_outcomes[~right].mean()) - 0.3) < 0.05
    assert torch.equal(noisy.stream.outcomes, environment.stream.outcomes)
