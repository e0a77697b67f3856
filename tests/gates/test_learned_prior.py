"""A prior that depends on the token: against plain loops, against the gate without one, and through damage."""

import copy
import math

import pytest
import torch
from oracles import best_experts, nearest_centroid, softmax
from scipy.stats import betabinom
from torch import Tensor, nn

from moe_posterior import InvalidArgumentError, LearnedPrior, NotFittedError, PosteriorGate, PosteriorRouter
from moe_posterior.gates import Routing
from moe_posterior.gates.base import ForeseenRouting
from moe_posterior.gates.strength import safe_strength
from moe_posterior.huggingface.gates import make_gate

D, E, C = 6, 5, 7


def data(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed))


def outcomes(rows: int, columns: int = E, seed: int = 1) -> Tensor:
    return torch.randint(2, (rows, columns), generator=torch.Generator().manual_seed(seed)).double()


def gate_of(*, fit: bool = True, **options) -> PosteriorGate:
    torch.manual_seed(3)
    options = {"prior": LearnedPrior(width=9, strength=4.0), **options}
    gate = PosteriorGate(D, E, C, 2, **options)
    if fit:
        gate.fit(data(300), generator=torch.Generator().manual_seed(5))
    return gate


def constant(gate: PosteriorGate, mean: float = 0.5) -> PosteriorGate:
    last = gate.prior.map[-1]
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, math.log(mean / (1 - mean)))
    return gate


def assert_alike(first: Routing, second: Routing) -> None:
    for name in Routing._fields:
        assert torch.equal(getattr(first, name), getattr(second, name)), name


SAME = [
    {},
    {"score": "mean"},
    {"score": "quantile"},
    {"novelty": "discount"},
    {"novelty": "class"},
    {"shrinkage": 5.0},  # with a half-life too, sums round differently
    {"half_life": 20.0},
    {"surprise": 2.0, "shrinkage": 5.0, "novelty": "discount"},
    {"pooling": "hierarchy", "surprise": 2.0},
    {"score": "thompson"},
    {"score": "race"},
    {"exploration": 0.3},
    {"false_positive_rate": 0.1, "threshold": 0.5},
]


@pytest.mark.parametrize("options", SAME, ids=str)
def test_a_constant_prior_is_the_gate_without_one_bit_for_bit(options: dict) -> None:
    plain = gate_of(prior=None, **options)
    prior = LearnedPrior(None, strength=2.0, shrinkage=None, scale="competence")
    learned = constant(gate_of(prior=prior, **{"novelty": "off", **options}))
    for round_ in range(6):
        hidden = data(50, seed=10 + round_) * (3 if round_ == 3 else 1)  # some of them novel
        ours, theirs = learned(hidden), plain(hidden)
        assert_alike(ours, theirs)
        seen = outcomes(50, 2, seed=round_)
        learned.observe(ours, seen)
        plain.observe(theirs, seen)
        if options.get("novelty") != "discount":  # there a gate without a prior reads the cluster alone
            assert torch.equal(learned.expected_outcome(ours), plain.expected_outcome(theirs))
            assert torch.equal(learned.greedy(ours), plain.greedy(theirs))
        assert torch.equal(learned.counts_of(ours), plain.counts_of(theirs))
        assert torch.equal(learned.estimates(hidden), plain.estimates(hidden))
    assert torch.equal(learned.posterior.alpha, plain.posterior.alpha)


def test_the_forward_is_that_of_a_plain_loop_over_tokens() -> None:
    gate = gate_of(prior=LearnedPrior(9, strength=4.0, scale="competence"), novelty="discount", risk_aversion=0.7)
    seen = data(80, 2)
    routing = gate(seen)
    gate.observe(routing, outcomes(80, 2))
    won, lost, foreseen = ([[0.0] * E for _ in range(C)] for _ in range(3))
    means = gate.prior(seen).tolist()
    rows = zip(
        routing.cluster_ids.tolist(), routing.expert_indices.tolist(), outcomes(80, 2).tolist(), means, strict=True
    )
    for cluster, experts, values, mean in rows:
        for expert, value in zip(experts, values, strict=True):
            won[cluster][expert] += value
            lost[cluster][expert] += 1 - value
            foreseen[cluster][expert] += mean[expert]
    odds = []
    for expert in range(E):
        w, f, m = (sum(table[c][expert] for c in range(C)) for table in (won, lost, foreseen))
        centre, strength = 0.5, 10.0
        happened = (strength * centre + w) / (strength * (1 - centre) + f)
        odds.append(happened / ((strength * centre + m) / (strength * (1 - centre) + w + f - m)))

    def believed(mean: float, cluster: int, expert: int) -> tuple[float, float]:
        shifted = mean * odds[expert] / (mean * odds[expert] + 1 - mean)
        return 4 * shifted + won[cluster][expert], 4 * (1 - shifted) + lost[cluster][expert]

    table = [[believed(0.5, c, e) for c in range(C)] for e in range(E)]
    pooled = [sum(a for a, _ in cells) / sum(a + b for a, b in cells) for cells in table]
    new = data(40, 3) * 1.5
    nearest = nearest_centroid(new, gate.clusterer.centroids)
    routing = gate(new)
    for row, (token, (cluster, distance)) in enumerate(zip(new, nearest, strict=True)):
        weight = min(1.0, math.exp(1 - (distance / float(gate.clusterer.radius[cluster])) ** 2))
        bounds = []
        for expert, mean in enumerate(gate.prior(token[None])[0].tolist()):
            alpha, beta = believed(mean, cluster, expert)
            alpha = weight * alpha + (1 - weight) * 2 * pooled[expert]
            beta = weight * beta + (1 - weight) * 2 * (1 - pooled[expert])
            total = alpha + beta
            bounds.append(alpha / total - 0.7 * math.sqrt(alpha * beta / (total + 1)) / total)
        chosen = best_experts(bounds, cluster, 2)
        assert routing.expert_indices[row].tolist() == chosen
        assert routing.scores[row].tolist() == pytest.approx([bounds[e] for e in chosen], rel=1e-4)
        assert routing.routing_weights[row].tolist() == pytest.approx(
            softmax([bounds[e] for e in chosen], 0.1), rel=1e-3
        )


def test_by_odds_the_evidence_moves_the_logits_by_what_it_moves_the_belief() -> None:
    gate = gate_of(prior=LearnedPrior(9, shrinkage=None, floor=0.2), risk_aversion=0.5)
    held_out = data(200, 7)
    gate.learn_prior(held_out, outcomes(200))
    seen = data(60, 2)
    routing = gate(seen)
    gate.observe(routing, outcomes(60, 2))
    won, lost = ([[0.0] * E for _ in range(C)] for _ in range(2))
    rows = zip(routing.cluster_ids.tolist(), routing.expert_indices.tolist(), outcomes(60, 2).tolist(), strict=True)
    for cluster, experts, values in rows:
        for expert, value in zip(experts, values, strict=True):
            won[cluster][expert] += value
            lost[cluster][expert] += 1 - value

    def clip(value: float) -> float:
        return min(max(value, 0.02), 0.98)

    def bound(alpha: float, beta: float) -> float:
        total = alpha + beta
        score = clip(alpha / total - 0.5 * math.sqrt(alpha * beta / (total + 1)) / total)
        return math.log(score / (1 - score))

    def angle(token: Tensor) -> float:
        cosines = [
            torch.nn.functional.cosine_similarity(token, centroid, dim=0) for centroid in gate.clusterer.centroids
        ]
        return 1 - float(max(cosines))

    usual = sorted(angle(token) for token in held_out)[99]
    new = data(40, 3)
    routing = gate(new)
    assert 0.2 < min(float(g) for g in gate.sharpness(new)) < 1.0
    for row, (cluster, _) in enumerate(nearest_centroid(new, gate.clusterer.centroids)):
        token = new[row] / math.sqrt(float(new[row].square().mean()) + 1e-6)
        logits = gate.prior.map(token[None])[0].tolist()
        scores = []
        for expert, logit in enumerate(logits):
            mean = clip(1 / (1 + math.exp(-logit)))
            alpha, beta = 2 * mean + won[cluster][expert], 2 * (1 - mean) + lost[cluster][expert]
            scores.append(logit + bound(alpha, beta) - bound(2 * mean, 2 * (1 - mean)))
        chosen = best_experts(scores, cluster, 2)
        sharpness = min(1.0, max(0.2, (usual / angle(new[row])) ** 2))
        assert routing.expert_indices[row].tolist() == chosen
        assert routing.routing_weights[row].tolist() == pytest.approx(
            softmax([sharpness * scores[e] for e in chosen], 1.0), rel=1e-3
        )


def test_by_odds_without_evidence_it_is_a_softmax_gate() -> None:
    for gate in (gate_of(fit=False, prior="learned"), gate_of(prior=LearnedPrior(9, floor=1.0), novelty="off")):
        hidden = data(50, 4)
        logits = gate.prior.logits(hidden)
        routing, best = gate(hidden), logits.topk(2, dim=1)
        assert torch.equal(routing.expert_indices, best.indices)
        torch.testing.assert_close(routing.routing_weights, torch.softmax(best.values, dim=1))
        torch.testing.assert_close(routing.scores, torch.sigmoid(best.values))
        assert torch.equal(gate.prior.logits(5 * hidden).argmax(dim=1), logits.argmax(dim=1)), "scale says nothing"


def test_by_odds_novelty_flattens_the_weights_and_never_changes_the_choice() -> None:
    gate = gate_of(prior=LearnedPrior(9))
    hidden = data(200, 4)
    before = gate(hidden)
    gate.learn_prior(data(200, 7), outcomes(200))
    after = gate(hidden)
    assert torch.equal(after.expert_indices, before.expert_indices)
    assert bool((after.routing_weights[:, 0] <= before.routing_weights[:, 0] + 1e-6).all())
    assert 0.2 < float((after.routing_weights[:, 0] < before.routing_weights[:, 0] - 1e-6).double().mean()) < 0.8


@pytest.mark.parametrize("fit", [False, True])
def test_the_gradient_of_the_weights_reaches_the_map_and_the_hidden_states(fit: bool) -> None:
    gate, hidden = gate_of(fit=fit), data(30, 4).requires_grad_()
    gate(hidden).routing_weights[:, 0].sum().backward()
    for parameter in gate.prior.parameters():
        assert parameter.grad is not None
        assert bool((parameter.grad != 0).any())
    assert bool((hidden.grad != 0).any())


def test_the_weights_are_differentiated_as_by_finite_differences() -> None:
    gate = gate_of(prior=LearnedPrior(9, scale="competence")).double()
    gate.observe(gate(data(60, 2)), outcomes(60, 2))
    hidden, bias = data(20, 4).double(), gate.prior.map[-1].bias

    def total() -> Tensor:  # in float64: the weights of a routing are rounded to float32
        routing = gate(hidden)
        alpha, beta = gate.believed_of(gate.assign(hidden)[0], None, gate.prior(hidden))
        scores = gate.scores(alpha, beta).gather(1, routing.expert_indices)
        return torch.softmax(scores / gate.temperature, dim=-1)[:, 0].sum()

    (gradient,) = torch.autograd.grad(total(), bias)
    (routed,) = torch.autograd.grad(gate(hidden).routing_weights[:, 0].sum(), bias)
    torch.testing.assert_close(gradient, routed, rtol=1e-4, atol=1e-5)
    for expert in range(E):
        with torch.no_grad():
            bias[expert] += 1e-5
            above = total()
            bias[expert] -= 2e-5
            below = total()
            bias[expert] += 1e-5
        assert float(gradient[expert]) == pytest.approx(float(above - below) / 2e-5, rel=1e-3, abs=1e-4)


def test_the_loss_is_the_log_score_of_what_was_observed_and_reaches_the_map_alone() -> None:
    gate, hidden = gate_of(prior=LearnedPrior(9, weight=3.0)), data(30, 4).requires_grad_()
    seen = outcomes(30)
    seen[torch.rand(30, E, generator=torch.Generator().manual_seed(2)) < 0.3] = math.nan
    loss = gate.loss(hidden, seen)
    loss.backward()
    scores = []
    for row, values in zip(gate.prior(hidden).tolist(), seen.tolist(), strict=True):
        scores += [-math.log(m if v == 1 else 1 - m) for m, v in zip(row, values, strict=True) if not math.isnan(v)]
    assert loss.item() == pytest.approx(3.0 * sum(scores) / len(scores), rel=1e-5)
    assert hidden.grad is None
    assert all(bool((p.grad != 0).any()) for p in gate.prior.parameters())
    assert gate_of(prior=None).loss(hidden, seen) is None


def test_without_clusters_it_routes_from_the_map_alone_by_the_mean() -> None:
    gate, hidden = gate_of(fit=False, prior="learned", risk_aversion=3.0), data(20, 4)
    routing = gate(hidden)
    assert gate.fitted
    best = gate.prior(hidden).topk(2, dim=1)
    assert torch.equal(routing.expert_indices, best.indices)
    torch.testing.assert_close(routing.scores, best.values.float())
    with pytest.raises(NotFittedError, match="no centroids yet"):
        gate.observe(routing, outcomes(20, 2))


def test_learning_the_prior_counts_no_outcome_as_evidence_and_drops_what_was_counted() -> None:
    gate, held_out = gate_of(prior=LearnedPrior(9)), data(200, 7)
    gate.observe(gate(data(50, 2)), outcomes(50, 2))
    strength = gate.learn_prior(held_out, outcomes(200))
    for counts in gate.posterior.evidence:
        assert not bool(counts.any())
    torch.testing.assert_close(gate.posterior.strength, torch.full((C, E), strength, dtype=torch.float64))
    routing = gate(data(30, 8))
    gate.observe(routing, outcomes(30, 2))
    assert float(gate.posterior.successes.sum() + gate.posterior.failures.sum()) == 60.0
    gate.measure(held_out, outcomes(200))  # as a training callback does
    assert not bool(gate.posterior.successes.any())
    assert not gate.counts_training_rows
    assert gate_of(prior=None).counts_training_rows


def test_the_strength_is_the_lower_end_of_the_likelihood_interval_and_at_most_a_cells_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    n = torch.randint(5, 60, (40, 3), generator=generator).double()
    mean = 0.2 + 0.6 * torch.rand(40, 3, generator=generator).double()
    theta = torch._sample_dirichlet(torch.stack([6 * mean, 6 * (1 - mean)], -1), generator=generator)[..., 0]
    won = torch.binomial(n, theta, generator=generator)
    found = safe_strength(won, n - won, n * mean)

    def likelihood(strength: float) -> float:
        cells = zip(won.flatten().tolist(), n.flatten().tolist(), mean.flatten().tolist(), strict=True)
        return sum(betabinom.logpmf(w, count, strength * m, strength * (1 - m)) for w, count, m in cells)

    grid = [10 ** (step / 40) for step in range(161)]
    values = [likelihood(strength) for strength in grid]
    lowest = next(k for k, value in zip(grid, values, strict=True) if value >= max(values) - 1.92)
    assert found == pytest.approx(lowest)
    assert 2 < found < 6
    rows = torch.full((40, 3), 20.0)
    steady = (rows * 0.5).round()  # no more spread than chance has: the most likely strength is without bound
    assert safe_strength(steady, rows - steady, rows * 0.5) == 20.0


def test_a_strength_of_ones_own_stays_and_a_limit_holds() -> None:
    fixed, free = gate_of(prior=LearnedPrior(9, strength=3.0)), gate_of(prior=LearnedPrior(9))
    assert fixed.learn_prior(data(200, 7), outcomes(200)) == 3.0
    assert free.learn_prior(data(200, 7), outcomes(200), strength=1.5) == 1.5


def test_far_from_all_clusters_it_is_unsure_falls_to_the_pooled_mean_and_abstains() -> None:
    gate = gate_of(prior=LearnedPrior(9, strength=50.0))
    held_out = data(400, 7)
    gate.learn_prior(held_out, (torch.rand(400, E, generator=torch.Generator().manual_seed(0)) < 0.9).double())
    near = held_out[20 * torch.arange(20)]
    alphas, betas = zip(
        *(gate.believed_of(gate.assign(scale * near)[0], None, gate.prior(scale * near)) for scale in (1, 3, 30)),
        strict=True,
    )
    totals = [alpha + beta for alpha, beta in zip(alphas, betas, strict=True)]
    assert bool((totals[2] <= 2.001).all())
    assert all(bool((total <= 50.001).all()) for total in totals)
    mean = alphas[2] / totals[2]
    torch.testing.assert_close(mean, mean[:1].expand_as(mean), rtol=0, atol=1e-6)
    assert bool(((mean[0] - 0.9).abs() < 0.06).all()), "the level is what held-out outcomes say"
    home, far = gate(near), gate(30 * near)  # the angle is the same, and so are the weights
    assert torch.equal(home.expert_indices, far.expert_indices)
    assert bool((far.scores <= home.scores + 1e-5).all())
    sure = gate_of(prior=LearnedPrior(9, strength=50.0))
    sure.prior.map[-1].bias.data += 4.0  # m near .98, of which the held-out outcomes know nothing
    sure.learn_prior(held_out, (torch.rand(400, E, generator=torch.Generator().manual_seed(0)) < 0.9).double())
    assert float(sure(30 * near).scores.max()) < 0.8 < float(sure(near).scores[:, 0].min())


def test_a_weak_belief_is_not_stronger_far_away() -> None:
    gate = gate_of(prior=LearnedPrior(9, strength=0.5))
    alpha, beta = gate.believed_of(gate.assign(100 * data(5))[0], None, gate.prior(100 * data(5)))
    torch.testing.assert_close(alpha + beta, torch.full((5, E), 0.5, dtype=torch.float64))


def test_what_fails_in_one_cluster_is_expected_less_of_in_all() -> None:
    gate, hidden = gate_of(), data(300, 9)
    routing = gate(hidden)
    before = gate.estimates(hidden)
    here = routing.cluster_ids == 0
    failed = torch.where(here[:, None], 0.0, math.nan).expand(-1, E).clone()
    failed[:, 1:] = math.nan
    gate.observe(routing, failed, dense=True)
    after = gate.estimates(hidden)
    assert bool((after[~here, 0] < before[~here, 0]).all())
    assert torch.equal(after[:, 1:], before[:, 1:])


def test_what_goes_as_expected_moves_nothing_elsewhere() -> None:
    gate, hidden = gate_of(novelty="off"), data(300, 9)
    routing = gate(hidden)
    before, here = gate.estimates(hidden), routing.cluster_ids == 0
    gate.observe(routing, torch.where(here[:, None], gate.prior(hidden).detach(), math.nan), dense=True)
    torch.testing.assert_close(gate.estimates(hidden)[~here], before[~here])


def test_what_was_foreseen_fades_is_forgotten_and_merges_with_the_evidence() -> None:
    def observed(seed: int, **options) -> PosteriorGate:
        gate = gate_of(**options)
        gate.observe(gate(data(40, seed)), outcomes(40, 2, seed))
        return gate

    one, other, both = observed(1), observed(2), observed(1)
    both.observe(both(data(40, 2)), outcomes(40, 2, 2))
    merged = copy.deepcopy(one.posterior)
    merged.merge(other.posterior)
    again = gate_of()
    for seed in (1, 2):
        again.posterior.merge(observed(seed).posterior)
    assert torch.equal(merged.foreseen, again.posterior.foreseen)
    fading = observed(1, half_life=3.0)
    assert bool((fading.posterior.foreseen <= one.posterior.foreseen).all())
    assert not torch.equal(fading.posterior.foreseen, one.posterior.foreseen)
    total = one.posterior.foreseen.clone()
    one.posterior.forget(0.25)
    assert torch.equal(one.posterior.foreseen, 0.25 * total)
    one.posterior.observe(torch.zeros(0, dtype=torch.int64), torch.zeros(0, E), keep=torch.tensor(0.5))
    assert torch.equal(one.posterior.foreseen, 0.125 * total)
    one.posterior.reset()
    assert not bool(one.posterior.foreseen.any())


def test_a_routing_that_lost_its_prior_is_held_against_the_cluster() -> None:
    gate, hidden = gate_of(), data(40, 2)
    gate.learn_prior(data(200, 7), outcomes(200))
    routing = gate(hidden)
    assert isinstance(routing, ForeseenRouting)
    plain = Routing(*routing)
    gate.observe(plain, outcomes(40, 2))
    mean = gate.posterior.prior_alpha / gate.posterior.strength
    seen = gate.posterior.successes + gate.posterior.failures
    torch.testing.assert_close(gate.posterior.foreseen, seen * mean)
    assert torch.isfinite(gate.expected_outcome(plain)).all()


def test_saved_and_resumed_it_goes_on_bit_for_bit() -> None:
    def step(gate: PosteriorGate, optimizer: torch.optim.Optimizer, number: int) -> None:
        gate.begin_step(number, 0)
        hidden = data(32, 100 + number)
        routing = gate(hidden)
        loss = gate.loss(hidden, outcomes(32, seed=number)) + routing.routing_weights[:, 0].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def made() -> tuple[PosteriorGate, torch.optim.Optimizer]:
        gate = gate_of(fit=False, prior=LearnedPrior(9, draws=3.0))
        return gate, torch.optim.AdamW(gate.parameters(), lr=1e-2)

    def finish(gate: PosteriorGate) -> Routing:
        gate.fit(data(300))
        gate.learn_prior(data(200, 7), outcomes(200))
        gate.observe(gate(data(40, 2)), outcomes(40, 2))
        return gate(data(50, 3))

    whole, optimizer = made()
    for number in range(3):
        step(whole, optimizer, number)
    kept = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    resumed, second = made()
    resumed.load_state_dict(kept[0])
    second.load_state_dict(kept[1])
    for number in range(3, 6):
        step(whole, optimizer, number)
        step(resumed, second, number)
    assert_alike(finish(whole), finish(resumed))
    restored = gate_of(fit=False, prior=LearnedPrior(9, draws=3.0))
    restored.load_state_dict(whole.state_dict())
    assert_alike(restored(data(50, 3)), whole(data(50, 3)))


def test_draws_try_other_experts_in_training_alone_and_are_the_steps() -> None:
    gate, hidden = gate_of(fit=False, prior=LearnedPrior(9, draws=3.0)), data(200, 4)
    best = gate.eval()(hidden).expert_indices
    gate.train()
    gate.begin_step(1, 0)
    first, again = gate(hidden), gate(hidden)
    assert_alike(first, again)
    assert not torch.equal(first.expert_indices, best)
    assert bool((first.scores.diff(dim=-1) <= 0).all()), "slots are best first"
    torch.testing.assert_close(
        first.scores.double(), gate.prior(hidden).gather(1, first.expert_indices), rtol=1e-6, atol=1e-6
    )
    gate.begin_step(2, 0)
    assert not torch.equal(gate(hidden).expert_indices, first.expert_indices)
    gate.fit(data(300))
    assert torch.equal(gate(hidden).expert_indices, gate.eval()(hidden).expert_indices)


def test_in_the_warm_up_it_is_not_ready_to_decide() -> None:
    gate = gate_of(fit=False, prior=LearnedPrior(9, warmup_epochs=2))
    gate.begin_step(5, 1)
    assert not gate.fitted
    gate.begin_step(9, 2)
    assert gate.fitted
    gate.begin_step(0, 0)
    assert gate.eval().fitted


def test_training_can_go_on_from_a_finished_prior() -> None:
    gate = gate_of(prior=LearnedPrior(9))
    gate.learn_prior(data(200, 7), outcomes(200))
    gate.observe(gate(data(40, 2)), outcomes(40, 2))
    gate.relearn()
    fresh = gate_of(fit=False, prior=LearnedPrior(9))
    for name, value in fresh.state_dict().items():
        if not name.startswith("prior.") and name != "steps":
            assert torch.equal(value.nan_to_num(9.0), gate.state_dict()[name].nan_to_num(9.0)), name
    assert not gate.clusterer.fitted
    assert gate.fitted


def test_a_newcomer_expects_what_its_donors_do_and_the_others_stay() -> None:
    gate, hidden = gate_of(), data(20, 4)
    before = gate.prior.logits(hidden)
    assert gate.add_expert({0: 1.0, 2: 3.0}) == E
    after = gate.prior.logits(hidden)
    torch.testing.assert_close(after[:, :E], before)
    torch.testing.assert_close(after[:, E], (before[:, 0] + 3 * before[:, 2]) / 4)
    gate.replace_expert(1)
    torch.testing.assert_close(gate.prior(hidden)[:, 1], torch.full((20,), 0.5, dtype=torch.float64))
    gate.observe(gate(hidden), torch.ones(20, 2))
    assert gate(hidden).expert_indices.max() <= E


def test_an_old_routing_can_be_observed_after_an_expert_joined() -> None:
    gate = gate_of()
    routing = gate(data(20, 4))
    gate.add_expert()
    gate.observe(routing, outcomes(20, 2))
    assert float(gate.posterior.foreseen.sum()) > 0


def test_reweighing_a_given_choice_is_differentiable() -> None:
    gate, hidden = gate_of(), data(20, 4)
    routing = gate(hidden)
    assert gate.reweighs
    same = gate.reweigh(hidden, routing, routing.expert_indices)
    torch.testing.assert_close(same.routing_weights, routing.routing_weights)
    same.routing_weights[:, 0].sum().backward()
    assert all(bool((p.grad != 0).any()) for p in gate.prior.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PosteriorGate(D, E, prior="other"), "prior must be None, 'learned' or a LearnedPrior; got 'other'"),
        (
            lambda: PosteriorGate(D, E, prior="learned", clusterings=2),
            "clusterings and neighbours must be 1 with a learned",
        ),
        (lambda: LearnedPrior(width=0), r"width must be an integer in \[1, 1048576\]; got 0"),
        (lambda: LearnedPrior(strength=0.0), "strength must be positive and finite, or None; got 0"),
        (lambda: LearnedPrior(draws=-1.0), "draws must be positive and finite, or None; got -1"),
        (lambda: LearnedPrior(weight=-1.0), "weight must be at least 0 and finite; got -1"),
        (lambda: LearnedPrior(warmup_epochs=-1), "warmup_epochs must be at least 0; got -1"),
        (lambda: PosteriorGate(D, E).learn_prior(data(5), outcomes(5)), "prior must be 'learned' or a LearnedPrior"),
        (lambda: PosteriorGate(D, E).relearn(), "prior must be 'learned' or a LearnedPrior"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make()


def test_a_router_and_a_gate_inside_one_refuse_a_learned_prior() -> None:
    with pytest.raises(InvalidArgumentError, match="prior must be None for a router"):
        PosteriorRouter(num_experts=E, hidden_size=D, prior="learned")
    with pytest.raises(InvalidArgumentError, match="prior must be None for a gate inside a router"):
        make_gate("replace", D, E, C, 2, prior="learned")


def test_one_prior_belongs_to_one_gate() -> None:
    prior = LearnedPrior(9)
    PosteriorGate(D, E, prior=prior)
    with pytest.raises(InvalidArgumentError, match="already belongs to a gate"):
        PosteriorGate(D, E, prior=prior)


REFUSED = [
    {"num_clusters": 0},
    {"top_k": E + 1},
    {"score": "best"},
    {"half_life": -1.0},
    {"prior_alpha": -1.0},
    {"false_positive_rate": 2.0},
    {"threshold": 2.0},
    {"temperature": 0.0},
    {"exploration": 1.0},
    {"backend": "other"},
]


@pytest.mark.parametrize("wrong", REFUSED, ids=str)
def test_a_gate_that_is_refused_leaves_its_prior_to_another(wrong: dict) -> None:
    prior = LearnedPrior(9)
    with pytest.raises(InvalidArgumentError):
        PosteriorGate(D, E, prior=prior, **wrong)
    assert PosteriorGate(D, E, prior=prior)(data(3)).expert_indices.shape == (3, 2)


def test_a_prior_without_a_gate_says_that_it_needs_one() -> None:
    for used in (lambda prior: prior(data(3)), lambda prior: prior.loss(data(3), outcomes(3))):
        with pytest.raises(
            InvalidArgumentError, match=r"prior must belong to a gate.* PosteriorGate\(\.\.\., prior=prior\)"
        ):
            used(LearnedPrior())


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_the_loss_refuses_what_is_no_outcome_and_takes_lists(threshold: float | None) -> None:
    gate = gate_of(threshold=threshold)
    seen = outcomes(4)
    assert torch.equal(gate.loss(data(4), seen.tolist()), gate.loss(data(4), seen))
    with pytest.raises(InvalidArgumentError, match=r"outcome must lie in \[0, 1\] or be NaN"):
        gate.loss(data(4), torch.full((4, E), 7.0))
    with pytest.raises(InvalidArgumentError, match="outcome must be numbers of shape"):
        gate.loss(data(4), seen[:, :-1])


class World:
    """Four experts, each right on its own side of the plane and seldom elsewhere; one can be broken."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.broken: int | None = None

    def sample(self, rows: int) -> tuple[Tensor, Tensor]:  # (N, 2), (N, 4)
        hidden = torch.randn(rows, 2, generator=self.generator)
        sides = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        chance = torch.sigmoid(3 * hidden @ sides.T + 1)
        if self.broken is not None:
            chance[:, self.broken] = 0.1
        return hidden, (torch.rand(rows, 4, generator=self.generator) < chance).double()


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_expert_is_left_within_80_outcomes(seed: int) -> None:
    torch.manual_seed(seed)
    world = World(seed)
    gate = PosteriorGate(2, 4, 8, 1, prior=LearnedPrior(16))
    optimizer = torch.optim.AdamW(gate.parameters(), lr=1e-2)
    for _ in range(200):
        loss = gate.loss(*world.sample(64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gate.fit(world.sample(500)[0])
    gate.learn_prior(*world.sample(400))
    probe, _ = world.sample(1000)
    chosen = gate(probe).expert_indices
    world.broken = int(chosen.flatten().bincount(minlength=4).argmax())
    before = float((chosen == world.broken).double().mean())
    for _ in range(5):
        hidden, correct = world.sample(16)
        routing = gate(hidden)
        gate.observe(routing, correct.gather(1, routing.expert_indices))
    after = float((gate(probe).expert_indices == world.broken).double().mean())
    assert before > 0.25
    assert after < before / 2
