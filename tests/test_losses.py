"""Training objectives: plain loops in double precision, gradients by finite differences, algebra, degenerate batches."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_posterior import losses
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.losses import ConfigurationState

N, E, K, G = 7, 3, 4, 3
CONFIGURATION = torch.tensor([0, 1, 1, 0, 1, 0, 0])  # configuration 2 never occurs
STATE = ConfigurationState(
    weights=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    gaps=torch.tensor([0.2, -0.1, 0.3], dtype=torch.float64),
    counts=torch.tensor([200.0, 50.0, 10.0], dtype=torch.float64),
)


class Batch:
    """A mixture of E softmax experts in double precision; ``logits`` is the leaf of the graph."""

    def __init__(self, rows: int = N, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        options = {"generator": generator, "dtype": torch.float64}
        self.logits = torch.randn(rows, E, K, **options).mul(2).requires_grad_()
        self.weights = torch.randn(rows, E, **options).softmax(1)
        self.target = torch.randint(K, (rows,), generator=generator)

    def experts(self, logits: Tensor | None = None) -> Tensor:
        return (self.logits if logits is None else logits).softmax(2)

    def probs(self, logits: Tensor | None = None) -> Tensor:
        return (self.weights[..., None] * self.experts(logits)).sum(1)

    def rows(self) -> list[float]:
        return [-math.log(p[y]) for p, y in zip(self.probs().tolist(), self.target.tolist(), strict=True)]


@pytest.fixture
def batch() -> Batch:
    return Batch()


def configured(probs: Tensor, target: Tensor, gap: str) -> Tensor:
    configuration = torch.arange(len(target)) % 2
    return losses.robust_config(probs, target, configuration, STATE, gap=gap)[0]


def spread(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Two experts that disagree and mix to ``probs``, equally weighted."""
    experts = torch.stack([probs.square(), 2 * probs - probs.square()], 1).clamp(0, 1)
    return experts, probs.new_full((len(probs), 2), 0.5)


# Everything that maps (probs, target) to a scalar, with the attributes at which its values are compared.
SCALARS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nll": losses.nll,
    "robust": losses.robust,
    "robust_detached": lambda p, y: losses.robust(p, y, detach_weights=True),
    "robust_filtered": lambda p, y: losses.robust_filtered(p, *spread(p), y),
    "robust_filtered_none_pass": lambda p, y: losses.robust_filtered(
        p, *spread(p), y, regret_threshold=1e9, disagreement_threshold=1e9
    ),
    "robust_filtered_quantile": lambda p, y: losses.robust_filtered(p, *spread(p), y, quantile=0.5),
    "robust_filtered_detached": lambda p, y: losses.robust_filtered(p, *spread(p), y, detach_weights=True),
    "group_dro": lambda p, y: losses.group_dro(
        losses.nll_per_row(p, y), torch.arange(len(y)) % 2, torch.full((2,), 0.5, dtype=torch.float64), step=1.0
    )[0],
    "mmce": losses.mmce,
    "mmce_unweighted": lambda p, y: losses.mmce(p, y, weighted=False),
    "soft_ece": losses.soft_ece,
    "soft_ece_l1": lambda p, y: losses.soft_ece(p, y, norm=1),
    "robust_config": lambda p, y: configured(p, y, "confidence"),
    "robust_config_soft_ece": lambda p, y: configured(p, y, "soft_ece"),
    "robust_config_mmce": lambda p, y: configured(p, y, "mmce"),
}
each_loss = pytest.mark.parametrize("loss", SCALARS.values(), ids=SCALARS)
DETACHED = {"robust_detached", "robust_filtered_detached"}  # not the gradient of their own value
# The adversary of group DRO is held constant as well: its step must not move under a finite difference.
DIFFERENTIABLE = {name: loss for name, loss in SCALARS.items() if name not in DETACHED | {"group_dro"}}


def tilted(rows: list[float], eta: float) -> tuple[float, list[float]]:
    exponentials = [math.exp(eta * row) for row in rows]
    shares = [value / sum(exponentials) for value in exponentials]
    return sum(q * row for q, row in zip(shares, rows, strict=True)), shares


def top(probs: Tensor, target: Tensor) -> list[tuple[float, float]]:
    """Confidence and correctness of each row."""
    return [(max(p), float(p.index(max(p)) == y)) for p, y in zip(probs.tolist(), target.tolist(), strict=True)]


def plain_soft_ece(rows: list[tuple[float, float]], n_bins: int = 15, temperature: float = 0.01, norm: float = 2):
    bins = [[0.0, 0.0, 0.0] for _ in range(n_bins)]
    for confidence, correct in rows:
        scores = [math.exp(-((confidence - (b + 0.5) / n_bins) ** 2) / temperature) for b in range(n_bins)]
        for own, score in zip(bins, scores, strict=True):
            share = score / sum(scores)
            for place, value in enumerate((share, share * confidence, share * correct)):
                own[place] += value
    return sum(m / len(rows) * abs(a / m - c / m) ** norm for m, c, a in bins if m > 0) ** (1 / norm)


def plain_mmce_weighted(rows: list[tuple[float, float]], width: float = 0.4) -> float:
    right = [confidence for confidence, correct in rows if correct]
    wrong = [confidence for confidence, correct in rows if not correct]

    def kernel(a: float, b: float) -> float:
        return math.exp(-abs(a - b) / width)

    total = 0.0
    if wrong:
        total += sum(a * b * kernel(a, b) for a in wrong for b in wrong) / len(wrong) ** 2
    if right:
        total += sum((1 - a) * (1 - b) * kernel(a, b) for a in right for b in right) / len(right) ** 2
    if wrong and right:
        total -= 2 * sum((1 - a) * b * kernel(a, b) for a in right for b in wrong) / (len(right) * len(wrong))
    return math.sqrt(total)


def test_nll_is_the_mean_of_the_negative_logs(batch: Batch) -> None:
    rows = batch.rows()
    assert losses.nll_per_row(batch.probs(), batch.target).tolist() == pytest.approx(rows, rel=1e-12)
    assert losses.nll(batch.probs(), batch.target).item() == pytest.approx(sum(rows) / N, rel=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 2.0, 10.0])
@pytest.mark.parametrize("detach", [False, True])
def test_robust_agrees_with_a_plain_loop(batch: Batch, eta: float, detach: bool) -> None:
    value = losses.robust(batch.probs(), batch.target, eta=eta, detach_weights=detach)
    assert value.item() == pytest.approx(tilted(batch.rows(), eta)[0], rel=1e-12)


def plain_filter(batch: Batch, regret_threshold: float, disagreement_threshold: float) -> tuple[list[float], ...]:
    regrets, disagreements, passed = [], [], []
    for i in range(len(batch.target)):
        p, experts = batch.probs()[i].tolist(), batch.experts()[i].tolist()
        y, weights = int(batch.target[i]), batch.weights[i].tolist()
        regrets.append(max(0.0, -math.log(p[y]) - min(-math.log(e[y]) for e in experts)))
        distances = [sum((e[k] - p[k]) ** 2 for k in range(K)) for e in experts]
        disagreements.append(sum(r * d for r, d in zip(weights, distances, strict=True)))
        passed.append(regrets[-1] > regret_threshold or disagreements[-1] > disagreement_threshold)
    return regrets, disagreements, passed


@pytest.mark.parametrize(("regret", "disagreement"), [(1e-6, 0.01), (0.8, 0.3), (0.2, 9.0), (99.0, 0.2), (99.0, 9.0)])
@pytest.mark.parametrize("detach", [False, True])
def test_robust_filtered_agrees_with_a_plain_loop(
    batch: Batch, regret: float, disagreement: float, detach: bool
) -> None:
    arguments = (batch.probs(), batch.experts(), batch.weights, batch.target)
    thresholds = {"regret_threshold": regret, "disagreement_threshold": disagreement}
    regrets, disagreements, passed = plain_filter(batch, regret, disagreement)
    assert losses.mixture_regret(batch.probs(), batch.experts(), batch.target).tolist() == pytest.approx(regrets)
    assert losses.expert_disagreement(*arguments[:3]).tolist() == pytest.approx(disagreements)
    mask = losses.filter_mask(*arguments, **thresholds)
    assert mask.tolist() == passed
    assert not mask.requires_grad
    rows = batch.rows()
    kept = [row for row, keep in zip(rows, passed, strict=True) if keep]
    mean = sum(rows) / N
    expected = mean + (tilted(kept, 2.0)[0] if kept else mean)
    value = losses.robust_filtered(*arguments, **thresholds, detach_weights=detach)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_the_thresholds_of_the_plain_loop_filter_none_some_and_all(batch: Batch) -> None:
    shares = [sum(plain_filter(batch, *pair)[2]) for pair in ((1e-6, 0.01), (0.8, 0.3), (99.0, 9.0))]
    assert shares[0] == N
    assert 0 < shares[1] < N
    assert shares[2] == 0


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.8, 1.0])
def test_a_quantile_keeps_the_upper_share_of_regret_and_of_disagreement(quantile: float) -> None:
    batch = Batch(rows=101)
    regrets, disagreements, _ = plain_filter(batch, 0, 0)
    # 101 rows: the quantiles fall on a row, so nothing is interpolated
    bounds = [sorted(values)[round(100 * quantile)] for values in (regrets, disagreements)]
    expected = [r > bounds[0] or d > bounds[1] for r, d in zip(regrets, disagreements, strict=True)]
    mask = losses.filter_mask(batch.probs(), batch.experts(), batch.weights, batch.target, quantile=quantile)
    assert mask.tolist() == expected
    assert 1 - quantile - 0.01 <= mask.double().mean() <= 2 * (1 - quantile) + 0.01


def test_an_expert_that_was_not_run_may_be_a_row_of_zeros(batch: Batch) -> None:
    weights = torch.tensor([0.25, 0.75, 0.0], dtype=torch.float64).expand(N, E)
    experts = batch.experts().detach()
    probs = (weights[..., None] * experts).sum(1)
    silent = experts * torch.tensor([1.0, 1.0, 0.0])[:, None]
    two = losses.filter_mask(probs, experts[:, :2], weights[:, :2], batch.target, quantile=0.5)
    assert losses.filter_mask(probs, silent, weights, batch.target, quantile=0.5).equal(two)


def test_mmce_weighted_agrees_with_a_plain_loop_over_pairs() -> None:
    for seed in range(5):
        batch = Batch(rows=20, seed=seed)
        rows = top(batch.probs(), batch.target)
        for width in (0.4, 0.1):
            value = losses.mmce(batch.probs(), batch.target, width=width)
            assert value.item() == pytest.approx(plain_mmce_weighted(rows, width), rel=1e-9)


def test_mmce_unweighted_agrees_with_a_plain_loop_and_with_netcal() -> None:
    batch = Batch(rows=30)
    rows = top(batch.probs(), batch.target)
    pairs = [(a - x) * (b - y) * math.exp(-abs(a - b) / 0.4) for a, x in rows for b, y in rows]
    value = losses.mmce(batch.probs(), batch.target, weighted=False).item()
    assert value == pytest.approx(math.sqrt(sum(pairs)) / 30, rel=1e-12)
    netcal = pytest.importorskip("netcal.metrics")
    assert value == pytest.approx(netcal.MMCE().measure(batch.probs().detach().numpy(), batch.target.numpy()), rel=1e-6)


def test_mmce_vanishes_at_calibration_unweighted_but_weighted_only_at_an_accuracy_of_one_half() -> None:
    def calibrated(accuracy: float) -> tuple[Tensor, Tensor]:
        probs = torch.tensor([[accuracy, 1 - accuracy]], dtype=torch.float64).expand(10, 2)
        return probs, (torch.arange(10) >= round(10 * accuracy)).long()

    assert losses.mmce(*calibrated(0.8), weighted=False).item() == pytest.approx(0, abs=1e-9)
    assert losses.mmce(*calibrated(0.8)).item() == pytest.approx(0.6)  # |0.8 - (1 - 0.8)|


@pytest.mark.parametrize(("n_bins", "temperature", "norm"), [(15, 0.01, 2), (15, 0.01, 1), (5, 0.1, 2), (10, 1e-4, 3)])
def test_soft_ece_agrees_with_a_plain_loop(n_bins: int, temperature: float, norm: float) -> None:
    batch = Batch(rows=25)
    value = losses.soft_ece(batch.probs(), batch.target, n_bins=n_bins, temperature=temperature, norm=norm)
    expected = plain_soft_ece(top(batch.probs(), batch.target), n_bins, temperature, norm)
    assert value.item() == pytest.approx(expected, rel=1e-8)


def test_soft_ece_turns_into_the_binned_error_as_the_bins_harden() -> None:
    batch = Batch(rows=200)
    bins: dict[int, list[float]] = {}
    for confidence, correct in top(batch.probs(), batch.target):
        bins.setdefault(int(confidence * 15), []).append(confidence - correct)
    hard = sum(abs(sum(gaps)) for gaps in bins.values()) / 200
    value = losses.soft_ece(batch.probs(), batch.target, temperature=1e-7, norm=1)
    assert value.item() == pytest.approx(hard, abs=1e-3)


@pytest.mark.parametrize("loss", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_gradients_agree_with_finite_differences(loss: Callable, batch: Batch) -> None:
    assert torch.autograd.gradcheck(lambda logits: loss(batch.probs(logits), batch.target), batch.logits)


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


def factors_on_rows(value: Tensor, rows: Tensor, leaf: Tensor) -> Tensor:
    """By what factor each row's own gradient enters that of the loss."""
    own = torch.stack([gradient(row, leaf)[i].flatten() for i, row in enumerate(rows)])
    whole = gradient(value, leaf).flatten(1)
    factors = (whole * own).sum(1) / own.square().sum(1)
    torch.testing.assert_close(whole, factors[:, None] * own)
    return factors


def test_the_weights_carry_a_gradient_that_pushes_easy_rows_the_other_way(batch: Batch) -> None:
    rows, eta = losses.nll_per_row(batch.probs(), batch.target), 2.0
    value = losses.robust(batch.probs(), batch.target, eta=eta)
    mean, shares = tilted(rows.tolist(), eta)
    expected = [q * (1 + eta * (row - mean)) for q, row in zip(shares, rows.tolist(), strict=True)]
    factors = factors_on_rows(value, rows, batch.logits)
    torch.testing.assert_close(factors, torch.tensor(expected, dtype=torch.float64))
    assert (factors < 0).tolist() == [row < mean - 1 / eta for row in rows.tolist()]
    assert 0 < (factors < 0).sum() < N, "both signs occur in this batch"


def test_detached_the_gradient_is_that_of_the_kl_ball(batch: Batch) -> None:
    rows, eta = losses.nll_per_row(batch.probs(), batch.target), 2.0
    value = losses.robust(batch.probs(), batch.target, eta=eta, detach_weights=True)
    factors = factors_on_rows(value, rows, batch.logits)
    torch.testing.assert_close(factors, torch.tensor(tilted(rows.tolist(), eta)[1], dtype=torch.float64))
    dual = (eta * rows).exp().mean().log() / eta
    torch.testing.assert_close(gradient(value, batch.logits), gradient(dual, batch.logits))


def test_detaching_the_filtered_loss_leaves_shares_within_the_filter(batch: Batch) -> None:
    arguments = (batch.probs(), batch.experts(), batch.weights, batch.target)
    thresholds = {"regret_threshold": 0.8, "disagreement_threshold": 0.3}
    mask = losses.filter_mask(*arguments, **thresholds)
    rows = losses.nll_per_row(batch.probs(), batch.target)
    value = losses.robust_filtered(*arguments, **thresholds, detach_weights=True)
    expected = torch.full((N,), 1 / N, dtype=torch.float64)
    expected[mask] += torch.tensor(tilted(rows[mask].tolist(), 2.0)[1], dtype=torch.float64)
    torch.testing.assert_close(factors_on_rows(value, rows, batch.logits), expected)


def test_the_published_filtered_loss_differs_from_the_detached_in_its_gradient_alone(batch: Batch) -> None:
    arguments = (batch.probs(), batch.experts(), batch.weights, batch.target)
    published, detached = (losses.robust_filtered(*arguments, detach_weights=flag) for flag in (False, True))
    assert published.item() == detached.item()
    assert not torch.allclose(gradient(published, batch.logits), gradient(detached, batch.logits))


@given(st.permutations(range(N)), st.integers(0, 5), st.sampled_from(sorted(SCALARS)))
def test_the_order_of_the_rows_does_not_matter(order: list[int], seed: int, name: str) -> None:
    batch = Batch(seed=seed)
    with torch.no_grad():
        probs, target = batch.probs(), batch.target
        if name == "group_dro":
            rows = losses.nll_per_row(probs, target)
            uniform = torch.full((G,), 1 / G, dtype=torch.float64)
            values = [losses.group_dro(rows[o], CONFIGURATION[o], uniform, step=1.0) for o in (range(N), order)]
        elif name.startswith("robust_config"):
            gap = name.removeprefix("robust_config").removeprefix("_") or "confidence"
            values = [
                losses.robust_config(probs[o], target[o], CONFIGURATION[o], STATE, gap=gap) for o in (range(N), order)
            ]
        else:
            values = [SCALARS[name](probs[o], target[o]) for o in (range(N), order)]
    torch.testing.assert_close(values[0], values[1])


@pytest.mark.parametrize("detach", [False, True])
def test_without_a_tilt_robust_is_the_mean_in_value_and_gradient(batch: Batch, detach: bool) -> None:
    mean = losses.nll(batch.probs(), batch.target)
    flat = losses.robust(batch.probs(), batch.target, eta=0.0, detach_weights=detach)
    torch.testing.assert_close(flat, mean)
    torch.testing.assert_close(gradient(flat, batch.logits), gradient(mean, batch.logits))


@given(st.integers(0, 20), st.floats(0, 5), st.floats(0, 5))
def test_robust_lies_between_mean_and_maximum_and_grows_with_the_tilt(seed: int, first: float, second: float) -> None:
    batch = Batch(seed=seed)
    low, high = sorted((first, second))
    values = [losses.robust(batch.probs(), batch.target, eta=eta).item() for eta in (0.0, low, high)]
    assert values[0] - 1e-9 <= values[1] <= values[2] + 1e-9
    assert values[2] <= max(batch.rows()) + 1e-9


def test_group_dro_agrees_with_a_plain_loop_over_batches() -> None:
    weights, expected = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64), [0.2, 0.3, 0.5]
    sizes = torch.tensor([4, 100, 9])
    for seed in range(4):
        batch = Batch(seed=seed)
        means = [
            sum(row for row, c in zip(batch.rows(), CONFIGURATION.tolist(), strict=True) if c == g) / n
            for g, n in ((0, 4), (1, 3))
        ]
        gains = [mean + 0.6 / math.sqrt(n) for mean, n in zip(means, (4, 100), strict=True)] + [
            0.0
        ]  # the last is absent
        raised = [q * math.exp(0.1 * gain) for q, gain in zip(expected, gains, strict=True)]
        expected = [value / sum(raised) for value in raised]
        rows = losses.nll_per_row(batch.probs(), batch.target)
        loss, weights = losses.group_dro(rows, CONFIGURATION, weights, step=0.1, adjustment=0.6, group_sizes=sizes)
        assert weights.tolist() == pytest.approx(expected, rel=1e-12)
        assert loss.item() == pytest.approx(expected[0] * means[0] + expected[1] * means[1], rel=1e-12)
        # held constant, the weights are the factors on the group means
        shares = weights[CONFIGURATION] / torch.tensor([4.0, 3.0], dtype=torch.float64)[CONFIGURATION]
        torch.testing.assert_close(gradient(loss, batch.logits), gradient((shares * rows).sum(), batch.logits))
        assert not weights.requires_grad


@given(st.lists(st.floats(0, 30), min_size=G, max_size=G), st.floats(0, 100))
def test_group_weights_sum_to_one_and_the_worst_gains_most(group_losses: list[float], step: float) -> None:
    before = torch.full((G,), 1 / G, dtype=torch.float64)
    loss_per_row = torch.tensor(group_losses, dtype=torch.float64)
    _, after = losses.group_dro(loss_per_row, torch.arange(G), before, step=step)
    assert after.sum().item() == pytest.approx(1)
    assert after[loss_per_row.argmax()] == after.max()
    assert after.max() >= 1 / G - 1e-12


def test_the_weight_of_the_worst_group_rises_batch_by_batch_and_can_fall_again() -> None:
    weights = torch.full((2,), 0.5)
    for _ in range(10):
        before = weights
        _, weights = losses.group_dro(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]), weights, step=100.0)
        assert weights[1] > before[1] or weights[1] == 1.0
    _, weights = losses.group_dro(torch.tensor([9.0, 2.0]), torch.tensor([0, 1]), weights, step=100.0)
    assert weights.tolist() == [1.0, 0.0], "even from a weight that has underflowed"


def plain_robust_config(batch: Batch, state: dict[str, list[float]], options: dict[str, float]) -> float:
    """One step on ``state`` (in place) by plain loops; returns the loss."""
    rows = top(batch.probs(), batch.target)
    trust = []
    for gap, count in zip(state["gaps"], state["counts"], strict=True):
        enough = count > 0 and count >= options["min_count"]
        trust.append(gap / (abs(gap) + 0.5 / math.sqrt(count)) if enough else 0.0)
    raised = [
        q * math.exp(options["step"] * abs(t * m))
        for q, t, m in zip(state["weights"], trust, state["gaps"], strict=True)
    ]
    floored = [max(value / sum(raised), 0.01 / G) for value in raised]
    state["weights"] = [value / sum(floored) for value in floored]
    loss = sum(batch.rows()) / N
    for c in range(G):
        own = [a - b for (a, b), other in zip(rows, CONFIGURATION.tolist(), strict=True) if other == c]
        if not own:
            continue
        gap = sum(own) / len(own)
        loss += options["weight"] * state["weights"][c] * trust[c] * gap
        kept = state["counts"][c] * 0.5 ** (len(own) / options["half_life"])
        state["gaps"][c] = (kept * state["gaps"][c] + len(own) * gap) / (kept + len(own))
        state["counts"][c] = kept + len(own)
    return loss


def test_robust_config_agrees_with_a_plain_loop_over_batches() -> None:
    state = ConfigurationState.start(G)
    plain = {name: values.tolist() for name, values in state._asdict().items()}
    options = {"weight": 0.7, "step": 3.0, "min_count": 7.0, "half_life": 10.0}
    for seed in range(12):
        batch = Batch(seed=seed)
        loss, state = losses.robust_config(batch.probs(), batch.target, CONFIGURATION, state, **options)
        assert loss.item() == pytest.approx(plain_robust_config(batch, plain, options), rel=1e-10)
        for name, values in state._asdict().items():
            assert values.tolist() == pytest.approx(plain[name], rel=1e-10), name
            assert not values.requires_grad
    assert state.weights.max() > 0.4, "the adversary has moved"


def test_before_there_is_evidence_robust_config_is_the_mean(batch: Batch) -> None:
    loss, state = losses.robust_config(
        batch.probs(), batch.target, CONFIGURATION, ConfigurationState.start(G), weight=9.0
    )
    assert loss.item() == losses.nll(batch.probs(), batch.target).item()
    assert state.counts.tolist() == [4, 3, 0]


def test_a_long_memory_is_the_mean_over_all_rows() -> None:
    state, every = ConfigurationState.start(G), {0: [], 1: []}
    for seed in range(5):
        batch = Batch(seed=seed)
        _, state = losses.robust_config(batch.probs(), batch.target, CONFIGURATION, state, half_life=1e12)
        for (confidence, correct), c in zip(top(batch.probs(), batch.target), CONFIGURATION.tolist(), strict=True):
            every[c].append(confidence - correct)
    assert state.gaps[:2].tolist() == pytest.approx([sum(gaps) / len(gaps) for gaps in every.values()], abs=1e-9)
    assert state.counts.tolist() == pytest.approx([20, 15, 0])


def stream(rows: list[int], confidence: list[float], accuracy: list[float], generator: torch.Generator):
    """Batches in which configuration c has ``rows[c]`` rows of this confidence and, on average, this accuracy."""
    configuration = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    top_label = torch.tensor(confidence, dtype=torch.float64)[configuration]
    chance = torch.tensor(accuracy, dtype=torch.float64)[configuration]
    while True:
        right = torch.rand(len(chance), generator=generator, dtype=torch.float64) < chance
        yield torch.stack([top_label, 1 - top_label], 1), (~right).long(), configuration


def test_the_adversary_finds_the_miscalibrated_configuration_and_lowers_its_confidence(
    generator: torch.Generator,
) -> None:
    batches = stream([8, 8, 8], [0.9, 0.9, 0.6], [0.9, 0.6, 0.6], generator)
    state = ConfigurationState.start(3)
    for _ in range(200):
        loss, state = losses.robust_config(*next(batches), state, step=1.0)
    assert state.weights[1] > 0.95
    assert state.gaps[1].item() == pytest.approx(0.3, abs=0.06)
    probs, target, configuration = next(batches)
    probs.requires_grad_()
    loss, _ = losses.robust_config(probs, target, configuration, state)
    slope = gradient(loss - losses.nll(probs, target), probs)[:, 0]  # of the penalty, by the top label's probability
    assert (slope[configuration == 1] > 0.8 / 8).all(), "descent lowers the confidence there"
    assert (slope[configuration != 1].abs() < 0.01 / 8).all(), "and hardly elsewhere"


def test_an_underconfident_configuration_is_pushed_up(batch: Batch) -> None:
    probs = torch.tensor([[0.6, 0.4]] * 4, dtype=torch.float64).requires_grad_()
    state = ConfigurationState.start(1)._replace(
        gaps=torch.tensor([-0.3], dtype=torch.float64), counts=torch.tensor([500.0], dtype=torch.float64)
    )
    target = torch.zeros(4, dtype=torch.int64)
    loss, _ = losses.robust_config(probs, target, torch.zeros(4, dtype=torch.int64), state)
    assert (gradient(loss - losses.nll(probs, target), probs)[:, 0] < 0).all()


def test_a_rare_calibrated_configuration_does_not_attract_the_adversary_as_the_size_of_batch_gaps_would(
    generator: torch.Generator,
) -> None:
    batches = stream([16, 16, 1], [0.8, 0.8, 0.6], [0.8, 0.65, 0.6], generator)
    state, naive = ConfigurationState.start(3), torch.zeros(3, dtype=torch.float64)
    for _ in range(400):
        probs, target, configuration = next(batches)
        _, state = losses.robust_config(probs, target, configuration, state)
        residual = probs[:, 0] - target.eq(0).double()
        naive += torch.stack([residual[configuration == c].mean().abs() for c in range(3)])
    assert naive.argmax() == 2, "the rare one has the largest |gap| in a batch"
    assert state.weights.argmax() == 1
    assert state.weights[2] < 1 / 3


def test_penalty_and_adversary_come_from_different_rows_so_a_calibrated_configuration_is_not_penalised(
    generator: torch.Generator,
) -> None:
    batches = stream([2], [0.7], [0.7], generator)
    state, penalties = ConfigurationState.start(1), []
    for _ in range(3000):
        probs, target, configuration = next(batches)
        loss, state = losses.robust_config(probs, target, configuration, state)
        penalties.append((loss - losses.nll(probs, target)).item())
    mean, error = (f(torch.tensor(penalties)).item() for f in (torch.mean, lambda x: x.std() / len(x) ** 0.5))
    assert abs(mean) < 3 * error
    assert abs(mean) < 0.005, "|gap| of two rows would be 0.28 on average"


def test_training_with_the_penalty_calibrates_a_configuration_that_the_loss_leaves_alone(
    generator: torch.Generator,
) -> None:
    """The mean loss is taken out, so that what moves the confidence is the penalty."""
    logit = torch.tensor([3.0, 0.0], dtype=torch.float64, requires_grad=True)  # confidences 0.95 and 0.5
    accuracy = torch.tensor([0.7, 0.8], dtype=torch.float64)
    optimizer = torch.optim.SGD([logit], lr=0.2)
    state, configuration = ConfigurationState.start(2), torch.arange(2).repeat_interleave(16)
    for _ in range(1500):
        right = torch.rand(32, generator=generator, dtype=torch.float64) < accuracy[configuration]
        # a third class, so that an unsure row still has the first as its top label
        top_label = 1 / 3 + logit.sigmoid()[configuration] * 2 / 3
        probs = torch.stack([top_label, (1 - top_label) / 2, (1 - top_label) / 2], 1)
        target = (~right).long()
        loss, state = losses.robust_config(probs, target, configuration, state, half_life=128)
        optimizer.zero_grad()
        (loss - losses.nll(probs, target)).backward()
        optimizer.step()
    confidence = 1 / 3 + logit.detach().sigmoid() * 2 / 3
    torch.testing.assert_close(confidence, accuracy, atol=0.05, rtol=0)


@pytest.mark.parametrize("gap", ["soft_ece", "mmce"])
def test_unsigned_gaps_are_those_of_each_configuration_alone(batch: Batch, gap: str) -> None:
    loss, state = losses.robust_config(batch.probs(), batch.target, CONFIGURATION, STATE, gap=gap, weight=2.0, step=0.0)
    expected = losses.nll(batch.probs(), batch.target)
    for c in (0, 1):
        own = (batch.probs()[CONFIGURATION.eq(c)], batch.target[CONFIGURATION.eq(c)])
        value = losses.soft_ece(*own) if gap == "soft_ece" else losses.mmce(*own, weighted=False)
        trust = STATE.gaps[c] / (STATE.gaps[c].abs() + 0.5 / STATE.counts[c].sqrt())
        expected = expected + 2.0 * STATE.weights[c] * trust * value
        kept = STATE.counts[c] * 0.5 ** (len(own[1]) / 512)
        mean = (kept * STATE.gaps[c] + len(own[1]) * value) / (kept + len(own[1]))
        assert state.gaps[c].item() == pytest.approx(mean.item(), rel=1e-10)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, batch.logits), gradient(expected, batch.logits))


def test_a_batch_that_overflowed_shows_in_the_loss_and_leaves_the_memory_usable(batch: Batch) -> None:
    probs = batch.probs().detach()
    probs[0] = torch.nan  # configuration 0
    loss, state = losses.robust_config(probs, batch.target, CONFIGURATION, STATE)
    assert loss.isnan()
    assert all(part.isfinite().all() for part in state)
    assert state.counts[0] == STATE.counts[0]
    loss, weights = losses.group_dro(losses.nll_per_row(probs, batch.target), CONFIGURATION, STATE.weights)
    assert loss.isnan()
    assert weights.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("gap", ["confidence", "soft_ece"])
def test_ids_of_any_integer_type_will_do(batch: Batch, gap: str, dtype: torch.dtype) -> None:
    ids, target, probs = CONFIGURATION.to(dtype), batch.target.to(dtype), batch.probs()
    narrow, wide = (
        losses.robust_config(probs, *pair, STATE, gap=gap) for pair in ((target, ids), (batch.target, CONFIGURATION))
    )
    torch.testing.assert_close(narrow, wide)
    rows = losses.nll_per_row(probs, target)
    narrow, wide = (losses.group_dro(rows, each, STATE.weights) for each in (ids, CONFIGURATION))
    torch.testing.assert_close(narrow, wide)


def test_states_are_not_written_to(batch: Batch) -> None:
    before = [part.clone() for part in STATE]
    losses.robust_config(batch.probs(), batch.target, CONFIGURATION, STATE)
    learned = STATE.weights.clone().requires_grad_()  # constant to the loss even so
    _, weights = losses.group_dro(losses.nll_per_row(batch.probs(), batch.target), CONFIGURATION, learned)
    assert not weights.requires_grad
    assert learned.equal(STATE.weights)
    assert all(now.equal(then) for now, then in zip(STATE, before, strict=True))


DEGENERATE = {
    "no rows": (torch.empty(0, K), torch.empty(0, dtype=torch.int64)),
    "one row": (torch.tensor([[0.4, 0.3, 0.2, 0.1]]), torch.tensor([2])),
    "one certain row": (torch.tensor([[0.0, 1.0, 0.0, 0.0]]), torch.tensor([1])),
    "one certain error": (torch.tensor([[0.0, 1.0, 0.0, 0.0]]), torch.tensor([0])),
    "all certain and right": (torch.eye(K), torch.arange(K)),
    "all certain and wrong": (torch.eye(K), torch.arange(K).flip(0)),
    "certain, right and wrong": (torch.eye(K), torch.tensor([0, 1, 3, 2])),
    "all ties": (torch.full((5, K), 1 / K), torch.arange(5) % K),
    "equal rows": (torch.tensor([[0.75, 0.25]] * 4), torch.tensor([0, 0, 0, 1])),  # perfectly calibrated
    "one class": (torch.ones(3, 1), torch.zeros(3, dtype=torch.int64)),
}


@each_loss
@pytest.mark.parametrize("case", DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_degenerate_batches_give_finite_values_and_gradients(loss: Callable, case: tuple, dtype: torch.dtype) -> None:
    probs, target = case[0].to(dtype).requires_grad_(), case[1]
    value = loss(probs, target)
    assert value.ndim == 0
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.isfinite()
    assert gradient(value, probs).isfinite().all()
    if not len(target):
        assert value.item() == 0


TILTED = {
    "robust": lambda probs, target: losses.robust(probs, target),
    "robust, detached": lambda probs, target: losses.robust(probs, target, detach_weights=True),
    "robust filtered": lambda probs, target: losses.robust_filtered(
        probs, torch.stack([probs.flip(1), probs], dim=1), torch.full((len(probs), 2), 0.5), target
    ),
    "robust config": lambda probs, target: losses.robust_config(probs, target, target * 0, ConfigurationState.start(1))[
        0
    ],
    "group dro": lambda probs, target: losses.group_dro(
        losses.nll_per_row(probs, target), target % 2, torch.full((2,), 0.5, dtype=torch.float64)
    )[0],
    "nll": losses.nll,
}


@pytest.mark.parametrize("loss", TILTED.values(), ids=TILTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("depth", [30.0, 60.0, 80.0])
def test_a_row_far_below_1e_12_keeps_its_gradient(loss: Callable, dtype: torch.dtype, depth: float) -> None:
    logits = torch.tensor([[0.0, depth], [0.5, 0.0], [0.0, 1.0], [0.2, 0.0]], dtype=dtype, requires_grad=True)
    target = torch.tensor([0, 0, 1, 1])
    found = gradient(loss(logits.softmax(1), target), logits)
    assert found.isfinite().all()
    assert found[0].norm() > 0.05, "the row with the probability below 1e-12"


@pytest.mark.parametrize("detach", [False, True])
def test_robust_agrees_with_a_computation_in_logs_where_probabilities_are_tiny(detach: bool) -> None:
    logits = torch.tensor([[0.0, 60.0], [0.5, 0.0], [0.0, 1.0], [55.0, 0.0]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 0, 1, 1])
    rows = -logits.log_softmax(1).gather(1, target[:, None])[:, 0]
    share = (2 * rows).softmax(0)
    expected = ((share.detach() if detach else share) * rows).sum()
    found = losses.robust(logits.softmax(1), target, detach_weights=detach)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, logits), gradient(expected, logits))
    assert gradient(expected, logits).norm() > 1


@pytest.mark.parametrize("loss", TILTED.values(), ids=TILTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_row_that_underflowed_to_0_does_not_stop_the_others_from_learning(loss: Callable, dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 2000.0], [0.5, 0.0], [0.0, 1.0], [0.2, 0.0]], dtype=dtype, requires_grad=True)
    probs, target = logits.softmax(1), torch.tensor([0, 0, 1, 1])
    assert probs[0, 0] == 0
    value = loss(probs, target)
    found = gradient(value, logits)
    assert value.isfinite()
    assert found.isfinite().all()
    assert found[1:].norm() > 0.05


def test_an_empty_batch_leaves_both_adversaries_as_they_were() -> None:
    probs, nothing = torch.empty(0, K, requires_grad=True), torch.empty(0, dtype=torch.int64)
    _, state = losses.robust_config(probs, nothing, nothing, STATE)
    assert all(now.equal(then) for now, then in zip(state, STATE, strict=True))
    _, weights = losses.group_dro(losses.nll_per_row(probs, nothing), nothing, STATE.weights)
    torch.testing.assert_close(weights, STATE.weights)


@each_loss
def test_half_precision_is_computed_in_single(loss: Callable) -> None:
    batch = Batch(rows=20)
    probs = batch.probs().detach().bfloat16()
    torch.testing.assert_close(loss(probs, batch.target), loss(probs.float(), batch.target), rtol=0, atol=0)


PROBS, TARGET = torch.full((4, 2), 0.5), torch.tensor([0, 1, 0, 1])
EXPERTS, WEIGHTS = torch.full((4, 3, 2), 0.5), torch.full((4, 3), 1 / 3)
IDS, ROWS, EVEN = torch.tensor([0, 0, 1, 1]), torch.ones(4), torch.full((2,), 0.5)
START = ConfigurationState.start(2)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"probs must be floating point of shape \(N, K\)", lambda: losses.nll(PROBS[0], TARGET)),
        (r"probs must be floating point of shape \(N, K\)", lambda: losses.nll(TARGET[:, None], TARGET)),
        (r"probs must be probabilities in \[0, 1\]; got 3 at \(0, 0\)", lambda: losses.nll(6 * PROBS, TARGET)),
        (r"target must be integer of shape \(4,\)", lambda: losses.robust(PROBS, TARGET[:3])),
        (r"target must be integer", lambda: losses.soft_ece(PROBS, TARGET.float())),
        (r"target must be integer", lambda: losses.mmce(PROBS, TARGET.bool())),
        (r"target must lie in \[0, 1\]; got values from 1 to 2", lambda: losses.nll(PROBS, TARGET + 1)),
        (r"target must lie in \[0, 1\]; got values from -1 to 0", lambda: losses.robust(PROBS, TARGET - 1)),
        (r"eta must be finite and at least 0; got -1", lambda: losses.robust(PROBS, TARGET, eta=-1.0)),
        (r"eta must be finite", lambda: losses.robust(PROBS, TARGET, eta=math.inf)),
        (r"eta must be finite", lambda: losses.robust_filtered(PROBS, EXPERTS, WEIGHTS, TARGET, eta=math.nan)),
        (
            r"expert_probs must be floating point of shape \(4, 3, 2\)",
            lambda: losses.mixture_regret(PROBS, EXPERTS[:2], TARGET),
        ),
        (r"expert_probs must be .* \(4, E ≥ 1, 2\)", lambda: losses.mixture_regret(PROBS, PROBS, TARGET)),
        (r"expert_probs must be probabilities", lambda: losses.mixture_regret(PROBS, EXPERTS - 1, TARGET)),
        (
            r"routing_weights must be floating point of shape \(4, 3\)",
            lambda: losses.filter_mask(PROBS, EXPERTS, PROBS, TARGET),
        ),
        (
            r"quantile must lie in \[0, 1\] or be None; got 80",
            lambda: losses.filter_mask(PROBS, EXPERTS, WEIGHTS, TARGET, quantile=80),
        ),
        (r"width must be finite and above 0", lambda: losses.mmce(PROBS, TARGET, width=0.0)),
        (r"n_bins must be an integer of at least 1; got 0", lambda: losses.soft_ece(PROBS, TARGET, n_bins=0)),
        (r"temperature must be finite and above 0", lambda: losses.soft_ece(PROBS, TARGET, temperature=0.0)),
        (r"norm must be finite and at least 1", lambda: losses.soft_ece(PROBS, TARGET, norm=0.5)),
        (r"loss_per_row must be floating point of shape \(8,\)", lambda: losses.group_dro(PROBS, IDS, EVEN)),
        (r"groups must be integer of shape \(4,\)", lambda: losses.group_dro(ROWS, IDS[:2], EVEN)),
        (r"groups must lie in \[0, 1\]; got values from 1 to 2", lambda: losses.group_dro(ROWS, IDS + 1, EVEN)),
        (r"weights must be at least 0 and not all 0", lambda: losses.group_dro(ROWS, IDS, 0 * EVEN)),
        (r"weights must be at least 0 and not all 0", lambda: losses.group_dro(ROWS, IDS, torch.tensor([2.0, -1.0]))),
        (r"weights must be floating point", lambda: losses.group_dro(ROWS, IDS, IDS)),
        (r"step must be finite and at least 0", lambda: losses.group_dro(ROWS, IDS, EVEN, step=-0.1)),
        (r"adjustment must be finite and at least 0", lambda: losses.group_dro(ROWS, IDS, EVEN, adjustment=-1.0)),
        (
            r"group_sizes must be 2 positive counts; got None",
            lambda: losses.group_dro(ROWS, IDS, EVEN, adjustment=1.0),
        ),
        (
            r"group_sizes must be 2 positive counts; got \[0, 3\]",
            lambda: losses.group_dro(ROWS, IDS, EVEN, adjustment=1.0, group_sizes=torch.tensor([0, 3])),
        ),
        (r"num_configurations must be an integer in", lambda: ConfigurationState.start(0)),
        (r"configuration must lie in \[0, 1\]", lambda: losses.robust_config(PROBS, TARGET, IDS + 1, START)),
        (r"configuration must be integer", lambda: losses.robust_config(PROBS, TARGET, ROWS, START)),
        (
            r"state must hold three",
            lambda: losses.robust_config(PROBS, TARGET, IDS, START._replace(gaps=torch.zeros(3))),
        ),
        (r"gap must be one of", lambda: losses.robust_config(PROBS, TARGET, IDS, START, gap="ece")),
        (r"weight must be finite", lambda: losses.robust_config(PROBS, TARGET, IDS, START, weight=-1.0)),
        (r"step must be finite", lambda: losses.robust_config(PROBS, TARGET, IDS, START, step=-1.0)),
        (r"min_count must be finite", lambda: losses.robust_config(PROBS, TARGET, IDS, START, min_count=-1)),
        (r"half_life must be finite and above 0", lambda: losses.robust_config(PROBS, TARGET, IDS, START, half_life=0)),
    ],
)
def test_bad_arguments_are_refused_by_name(message: str, call: Callable) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        call()
