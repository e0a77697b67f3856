"""The options of a living belief, each against its formula or a simulation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_posterior import BetaPosterior, InvalidArgumentError, ProxyNoise, evidence

C, E = 3, 4
cell_rows = st.lists(
    st.tuples(st.integers(0, C - 1), st.lists(st.sampled_from([0.0, 1.0, math.nan]), min_size=E, max_size=E)),
    max_size=10,
)


def feed(posterior: BetaPosterior, rows: list, batch: bool) -> BetaPosterior:
    clusters = torch.tensor([c for c, _ in rows], dtype=torch.int64)
    outcomes = torch.tensor([r for _, r in rows], dtype=torch.float64).reshape(len(rows), E)
    if batch:
        posterior.observe(clusters, outcomes)
    else:
        for i in range(len(rows)):
            posterior.observe(clusters[i : i + 1], outcomes[i : i + 1])
    return posterior


def repeat(posterior: BetaPosterior, cluster: int, expert: int, outcome: float, times: int) -> None:
    slots = torch.full((times, 1), expert)
    posterior.observe(torch.full((times,), cluster), torch.full((times, 1), outcome), slots)


@given(rows=cell_rows, half_life=st.floats(0.5, 50))
def test_forgetting_in_a_batch_equals_forgetting_one_by_one(rows: list, half_life: float) -> None:
    whole = feed(BetaPosterior(C, E, half_life=half_life), rows, batch=True)
    single = feed(BetaPosterior(C, E, half_life=half_life), rows, batch=False)
    torch.testing.assert_close(whole.successes, single.successes)
    torch.testing.assert_close(whole.failures, single.failures)


def test_after_a_half_life_of_observations_the_past_counts_half() -> None:
    posterior = BetaPosterior(1, 1, half_life=8)
    repeat(posterior, 0, 0, 1.0, 100)
    before = posterior.successes.item()
    repeat(posterior, 0, 0, 0.0, 8)
    assert posterior.successes.item() == pytest.approx(before / 2)


def test_forgetting_leaves_the_prior_and_cells_that_are_not_observed() -> None:
    posterior = BetaPosterior(2, 2, prior_alpha=7.0, half_life=2)
    repeat(posterior, 0, 0, 1.0, 3)
    idle = posterior.successes[0, 0].item()
    repeat(posterior, 1, 1, 0.0, 50)
    assert posterior.successes[0, 0].item() == idle
    assert (posterior.prior_alpha == 7.0).all()


@given(rows=cell_rows)
def test_without_options_the_belief_is_prior_plus_counts(rows: list) -> None:
    posterior = feed(BetaPosterior(C, E), rows, batch=True)
    assert torch.equal(posterior.alpha, 1 + posterior.successes)
    assert torch.equal(posterior.beta, 1 + posterior.failures)


def test_pooling_lets_a_failure_on_some_clusters_warn_on_the_others() -> None:
    apart, pooled = BetaPosterior(C, E), BetaPosterior(C, E, shrinkage=4.0)
    for posterior in (apart, pooled):
        posterior.warm_start(torch.arange(C).repeat(40), torch.ones(40 * C, E) * 0.9, strength=20.0)
        for cluster in (0, 1):
            repeat(posterior, cluster, 2, 0.0, 6)
    assert pooled.mean()[2, 2] < apart.mean()[2, 2] - 0.2
    torch.testing.assert_close(pooled.mean()[:, [0, 1, 3]], apart.mean()[:, [0, 1, 3]], atol=0.02, rtol=0)


def test_under_a_flat_prior_the_pooled_odds_are_those_of_the_pooled_mean() -> None:
    posterior = BetaPosterior(50, 1, shrinkage=1e-6)
    for cluster, outcomes in ((0, [1.0, 1.0, 0.0]), (1, [1.0])):
        for outcome in outcomes:
            repeat(posterior, cluster, 0, outcome, 1)
    assert posterior.mean()[40, 0].item() == pytest.approx(3 / 4, abs=1e-4)


@given(rows=cell_rows, strength=st.floats(0.5, 30))
def test_a_pooled_belief_stays_a_belief(rows: list, strength: float) -> None:
    posterior = feed(BetaPosterior(C, E, shrinkage=strength), rows, batch=True)
    assert (posterior.alpha > 0).all()
    assert (posterior.beta > 0).all()
    plain = BetaPosterior(C, E)
    plain.load_state_dict(posterior.state_dict())
    torch.testing.assert_close(posterior.alpha + posterior.beta, plain.alpha + plain.beta)


@given(rows=cell_rows)
def test_pooling_one_expert_at_a_time_leaves_the_same_bits_as_all_at_once(rows: list) -> None:
    posterior = feed(BetaPosterior(C, E, shrinkage=3.0), rows, batch=False)
    restored = BetaPosterior(C, E, shrinkage=3.0)
    restored.load_state_dict(posterior.state_dict())
    assert torch.equal(posterior.alpha, restored.alpha)


def test_warm_start_with_shrinkage_starts_unseen_clusters_at_the_experts_pooled_rate() -> None:
    posterior = BetaPosterior(10, 1, shrinkage=5.0)
    clusters = torch.arange(9).repeat(200)  # cluster 9 is never seen
    outcome = (torch.rand(1800, 1, generator=torch.Generator().manual_seed(0)) < 0.8).double()
    posterior.warm_start(clusters, outcome)
    assert posterior.mean()[9, 0].item() == pytest.approx(0.8, abs=0.03)
    assert float(posterior.alpha[9, 0] + posterior.beta[9, 0]) > 20  # alike clusters say much about an unseen one


def test_unlike_clusters_say_little_about_each_other() -> None:
    counts = torch.full((20, 1), 100.0, dtype=torch.float64)
    rates = torch.linspace(0.05, 0.95, 20, dtype=torch.float64)[:, None]
    unlike = evidence.between_cluster_strength(counts * rates, counts * (1 - rates))
    alike = evidence.between_cluster_strength(counts * 0.5, counts * 0.5)
    # Uniform rates are Beta(1, 1): strength 2.
    assert 1.0 <= unlike.item() < 3.5
    assert alike.item() == 1000.0


def test_surprise_fires_soon_after_a_collapse_and_lets_new_evidence_decide() -> None:
    calm, alert = BetaPosterior(2, 2), BetaPosterior(2, 2, surprise=4.0)
    for posterior in (calm, alert):
        repeat(posterior, 0, 0, 1.0, 400)
        repeat(posterior, 0, 0, 0.0, 12)
    assert alert.trust[0] < 1
    assert alert.trust[1] == 1
    assert alert.mean()[0, 0] < 0.85
    assert calm.mean()[0, 0] > 0.95


def test_an_expert_that_surprised_is_judged_by_its_record_in_clusters_where_it_was_not_seen_since() -> None:
    posterior = BetaPosterior(3, 2, prior_alpha=45.0, prior_beta=5.0, surprise=4.0, shrinkage=50.0)
    before = posterior.mean()[2, 0]
    for _ in range(3):
        for cluster in (0, 1):
            repeat(posterior, cluster, 0, 0.0, 1)
    assert posterior.trust[0] < 1
    assert posterior.mean()[2, 0] < before - 0.2
    assert posterior.mean()[2, 1] == before


def test_surprise_hardly_ever_fires_while_competence_is_as_believed() -> None:
    generator, alarms = torch.Generator().manual_seed(0), 0
    for _ in range(20):
        posterior = BetaPosterior(1, 1, prior_alpha=80.0, prior_beta=20.0, surprise=5.0)
        for outcome in (torch.rand(200, generator=generator) < 0.8).double():
            posterior.observe(torch.tensor([0]), outcome.reshape(1, 1))
        alarms += int(posterior.trust.item() < 1)
    assert alarms <= 2


def test_cusum_steps_match_bernoulli_likelihoods() -> None:
    step = evidence.degraded_log_likelihood_ratio(torch.tensor([1.0, 0.0]), torch.tensor([0.8, 0.8]), 0.5)
    assert step.tolist() == pytest.approx([math.log(0.4 / 0.8), math.log(0.6 / 0.2)])


def test_a_noisy_signal_raises_no_more_false_alarms_than_a_clean_one() -> None:
    generator, alarms = torch.Generator().manual_seed(0), 0
    for _ in range(20):
        noise = ProxyNoise(0.2, 0.2)
        posterior = BetaPosterior(1, 1, prior_alpha=80.0, prior_beta=20.0, surprise=5.0, noise=noise)
        signal = torch.rand(200, generator=generator) < noise.false_positive + noise.contrast * 0.8
        for outcome in signal.double():
            posterior.observe(torch.tensor([0]), outcome.reshape(1, 1))
        alarms += int(posterior.trust.item() < 1)
    assert alarms <= 2


@pytest.mark.parametrize(("false_positive", "false_negative"), [(0.3, 0.05), (0.0, 0.4), (0.3, 0.3)])
def test_a_noisy_proxy_is_debiased(false_positive: float, false_negative: float) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = ProxyNoise(false_positive, false_negative)
    truth = torch.rand(20_000, 1, generator=generator) < 0.7
    flip = torch.rand(20_000, 1, generator=generator)
    signal = torch.where(truth, flip >= false_negative, flip < false_positive).double()
    naive, corrected = BetaPosterior(1, 1), BetaPosterior(1, 1, noise=noise)
    for posterior in (naive, corrected):
        posterior.observe(torch.zeros(20_000, dtype=torch.int64), signal)
    assert abs(corrected.mean().item() - 0.7) < 0.02
    assert abs(naive.mean().item() - 0.7) > 0.05
    assert corrected.std() > naive.std()


def test_few_noisy_outcomes_leave_a_proper_belief() -> None:
    posterior = BetaPosterior(1, 1, noise=ProxyNoise(0.3, 0.3))
    repeat(posterior, 0, 0, 0.0, 3)
    assert posterior.alpha.item() >= 1.0
    assert posterior.beta.item() > 1.0


@pytest.mark.parametrize("theta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("errors", [(0.05, 0.05), (-0.05, 0.05), (0.05, -0.05), (-0.05, -0.05)])
def test_the_proxy_bound_holds_for_every_error_within_it(theta: float, errors: tuple[float, float]) -> None:
    assumed = ProxyNoise(0.2, 0.1)
    false_positive, false_negative = assumed.false_positive + errors[0], assumed.false_negative + errors[1]
    signal = theta * (1 - false_negative) + (1 - theta) * false_positive
    estimate = (signal - assumed.false_positive) / assumed.contrast
    assert abs(estimate - theta) <= evidence.proxy_ece_bound(assumed, 0.05) + 1e-12


@pytest.mark.parametrize("rates", [(0.5, 0.5), (-0.1, 0.0), (0.2, 1.0)])
def test_uninformative_noise_rates_are_refused(rates: tuple[float, float]) -> None:
    with pytest.raises(InvalidArgumentError, match="proxy noise must be a false_positive_rate"):
        BetaPosterior(1, 1, noise=ProxyNoise(*rates))


@pytest.mark.parametrize("option", ["half_life", "shrinkage", "surprise"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_options_out_of_range_are_refused_by_name(option: str, value: float) -> None:
    with pytest.raises(InvalidArgumentError, match=option):
        BetaPosterior(1, 1, **{option: value})


def test_a_new_expert_inherits_from_its_donors_and_changes_no_other() -> None:
    posterior = BetaPosterior(2, 3)
    repeat(posterior, 0, 0, 1.0, 30)
    repeat(posterior, 0, 1, 0.0, 30)
    before = posterior.alpha.clone(), posterior.beta.clone()
    index = posterior.add_expert({0: 3.0, 1: 1.0}, strength=8.0)
    assert index == 3
    assert torch.equal(posterior.alpha[:, :3], before[0])
    assert torch.equal(posterior.beta[:, :3], before[1])
    donors = before[0][0] / (before[0][0] + before[1][0])
    assert posterior.mean()[0, 3].item() == pytest.approx((3 * donors[0].item() + donors[1].item()) / 4)
    assert float(posterior.alpha[0, 3] + posterior.beta[0, 3]) == pytest.approx(8.0)


def test_a_replaced_expert_starts_anew_and_a_removed_one_is_marked() -> None:
    posterior = BetaPosterior(1, 2, surprise=3.0)
    repeat(posterior, 0, 0, 1.0, 10)
    posterior.replace_expert(0)
    assert posterior.alpha[0].tolist() == [1.0, 1.0]
    posterior.remove_expert(0)
    assert posterior.active.tolist() == [False, True]
    with pytest.raises(InvalidArgumentError, match="the last active one"):
        posterior.remove_expert(1)
    with pytest.raises(InvalidArgumentError, match="must be an active index"):
        posterior.replace_expert(0)


@pytest.mark.parametrize("donors", [{}, {5: 1.0}, {0: 0.0}, {0: -1.0}])
def test_impossible_donors_are_refused_and_change_nothing(donors: dict) -> None:
    posterior = BetaPosterior(1, 2)
    with pytest.raises(InvalidArgumentError, match="prior_from"):
        posterior.add_expert(donors)
    assert posterior.num_experts == posterior.alpha.shape[1] == 2


def test_novelty_weights_fall_smoothly_from_one_at_the_radius_to_zero() -> None:
    distance = torch.tensor([0.0, 1.0, 1.1, 2.0, 5.0, math.inf])
    weight = evidence.novelty_weight(distance, torch.ones(6))
    assert weight.tolist() == pytest.approx([1, 1, math.exp(1 - 1.21), math.exp(-3), math.exp(-24), 0], abs=1e-6)
    assert evidence.novelty_weight(torch.tensor([3.0]), torch.tensor([math.inf])).item() == 1.0


def test_forget_keeps_a_share_of_the_named_experts_evidence() -> None:
    posterior = BetaPosterior(1, 3)
    posterior.observe(torch.zeros(4, dtype=torch.int64), torch.ones(4, 3))
    posterior.forget(0.25, torch.tensor([1]))
    assert posterior.successes.tolist() == [[4.0, 1.0, 4.0]]
    with pytest.raises(InvalidArgumentError, match=r"keep must lie in \[0, 1\]"):
        posterior.forget(1.5)
