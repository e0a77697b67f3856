"""The environments are what they say, and the same for the same seed."""

import pytest
import torch

from moe_posterior.benchmarks.routing import banks
from moe_posterior.benchmarks.routing.environments import CHANCE, Environment, synthetic
from moe_posterior.benchmarks.routing.real import real
from moe_posterior.errors import InvalidArgumentError, MissingDataError

SMALL = {"num_queries": 300, "num_warm": 200}


def tensors(environment: Environment) -> list[torch.Tensor]:
    return [environment.warm_hidden, environment.warm_outcomes, *vars(environment.stream).values()]


@pytest.mark.parametrize("benchmark", ["a", "b", "c"])
def test_synthetic_is_a_function_of_its_seed(benchmark: str) -> None:
    first, again, other = (synthetic(benchmark, seed, 9, **SMALL) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(tensors(first), tensors(again), strict=True))
    assert not torch.equal(first.stream.hidden, other.stream.hidden)
    assert first.stream.outcomes.shape == first.stream.competence.shape == (300, 9)
    assert set(first.stream.outcomes.unique().tolist()) <= {0.0, 1.0}


def test_a_is_homogeneous() -> None:
    competence = synthetic("a", 0, **SMALL).stream.competence
    assert competence.min() >= 0.88
    assert competence.max() <= 0.95


def test_b_degrades_one_expert_to_chance_on_sixty_percent_of_the_classes_and_hides_it_from_the_features() -> None:
    environment = synthetic("b", 3, **SMALL)
    stream, expert = environment.stream, environment.degraded
    assert (stream.competence[stream.affected, expert] == CHANCE).all()
    assert (stream.competence[~stream.affected, expert] > CHANCE).all()
    affected = {int(c) for c in stream.query_class[stream.affected]}
    assert len(affected) == 10  # of 16
    assert environment.warm_outcomes[:, expert].mean() > 0.7  # the warm start shows it competent


def test_c_shifts_the_features_half_way() -> None:
    environment = synthetic("c", 0, **SMALL)
    stream = environment.stream
    assert environment.change_at == 150
    assert stream.query_class[:150].max() < 16 <= stream.query_class[150:].min()
    assert stream.hidden[150:].var() > 1.5 * stream.hidden[:150].var()


@pytest.mark.parametrize(("benchmark", "experts"), [("d", 16), ("b", 1)])
def test_an_impossible_environment_is_refused(benchmark: str, experts: int) -> None:
    with pytest.raises(InvalidArgumentError, match="num_experts"):
        synthetic(benchmark, 0, experts)


@pytest.mark.parametrize("benchmark", ["b", "c"])
def test_digits_experts_are_really_trained(benchmark: str) -> None:
    pytest.importorskip("sklearn")
    environment = real("digits", benchmark, 0, 4, **SMALL)
    assert environment.hidden_size == 64
    assert environment.warm_outcomes.amax(dim=1).mean() > 0.9  # somebody knows nearly every digit
    again = real("digits", benchmark, 0, 4, **SMALL)
    assert torch.equal(environment.stream.outcomes, again.stream.outcomes)
    if benchmark == "c":
        before, after = environment.stream.competence.split(150)
        assert before.mean() > after.mean() + 0.1


def test_no_image_is_in_two_parts() -> None:
    pytest.importorskip("sklearn")
    bank = banks.digits(0)
    images = torch.arange(1797).repeat(len(banks.DIGIT_DOMAINS))
    for image in (0, 100, 1796):
        assert len(bank.part[images == image].unique()) == 1


def test_absent_data_say_what_to_put_where(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MOE_POSTERIOR_DATA", str(tmp_path))
    with pytest.raises(MissingDataError, match=r"features_efficientnet_lite0\.npz.*MOE_POSTERIOR_DATA"):
        banks.pacs.__wrapped__(0)


def test_pacs_is_read_where_it_is_at_hand() -> None:
    try:
        bank = banks.pacs(0)
    except MissingDataError as error:
        pytest.skip(str(error))
    assert bank.hidden.shape == (9991, banks.PACS_DIMENSIONS)
    assert bank.num_labels == 7
    assert bank.held_out.tolist().count(True) == 1
