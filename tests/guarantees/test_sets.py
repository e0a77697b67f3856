"""Prediction sets against a plain loop and against MAPIE, and their coverage on simulated classes."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from moe_posterior.errors import InvalidArgumentError, NotFittedError
from moe_posterior.guarantees import PredictionSets


def drawn(seed: int, rows: int, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities that are too sharp, and labels from the honest ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    target = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return (2 * logits).softmax(1), target


def plain_scores(row: list[float], score: str, penalty: float, free_ranks: int) -> list[float]:
    order = sorted(range(len(row)), key=lambda label: -row[label])
    found = [0.0] * len(row)
    for rank, label in enumerate(order, 1):
        if score == "lac":
            found[label] = 1 - row[label]
        else:
            found[label] = sum(row[other] for other in order[:rank])
            found[label] += penalty * max(0, rank - free_ranks) if score == "raps" else 0
    return found


def plain_limit(scores: list[float], weights: list[float], own: float, error_rate: float) -> float:
    """The smallest score below which, itself included, at least 1 − ε of all weight lies, the row's own at infinity."""
    pairs = sorted(zip(scores, weights, strict=True))
    total = 0.0
    for score, weight in pairs:
        total += weight
        if total >= (1 - error_rate) * (sum(weights) + own) - 1e-12:
            return score
    return math.inf


@pytest.mark.parametrize("score", ["lac", "aps", "raps"])
@pytest.mark.parametrize("within", ["all", "class", "group"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_sets_are_those_of_a_plain_loop(score: str, within: str, weighted: bool) -> None:
    (probs, target), (later, _) = drawn(0, 120), drawn(1, 30)
    groups, later_groups = torch.arange(120) % 3, torch.arange(30) % 4  # group 3 was never seen
    weights, later_weights = (1 + p[:, 0] for p in (probs, later)) if weighted else (None, None)
    sets = PredictionSets(0.2, score, within, penalty=0.1, free_ranks=2)  # type: ignore[arg-type]
    grouped = within == "group"
    sets.calibrate(probs, target, groups=groups if grouped else None, weights=weights)
    found = sets.predict(later, groups=later_groups if grouped else None, weights=later_weights)
    mass = [1.0] * 120 if weights is None else weights.tolist()
    own = [plain_scores(row, score, 0.1, 2)[label] for row, label in zip(probs.tolist(), target.tolist(), strict=True)]
    for i, row in enumerate(later.tolist()):
        for label, value in enumerate(plain_scores(row, score, 0.1, 2)):
            key = {"all": 0, "class": label, "group": int(later_groups[i])}[within]
            keys = {"all": [0] * 120, "class": target.tolist(), "group": groups.tolist()}[within]
            mine = [j for j in range(120) if keys[j] == key]
            new = 1.0 if later_weights is None else float(later_weights[i])
            limit = plain_limit([own[j] for j in mine], [mass[j] for j in mine], new, 0.2)
            assert abs(value - limit) < 1e-9 or bool(found[i, label]) == (value <= limit)


def test_lac_is_mapies() -> None:
    mapie = pytest.importorskip("mapie.classification")
    sklearn = pytest.importorskip("sklearn.base")

    class Given(sklearn.ClassifierMixin, sklearn.BaseEstimator):  # type: ignore[name-defined, misc]
        classes_ = np.arange(4)

        def fit(self, inputs: np.ndarray, target: np.ndarray) -> "Given":
            return self

        def __sklearn_is_fitted__(self) -> bool:
            return True

        def predict_proba(self, inputs: np.ndarray) -> np.ndarray:
            return inputs

        def predict(self, inputs: np.ndarray) -> np.ndarray:
            return inputs.argmax(1)

    (probs, target), (later, _) = drawn(2, 500), drawn(3, 300)
    for error_rate in (0.05, 0.1, 0.3):
        ours = PredictionSets(error_rate).calibrate(probs, target).predict(later)
        other = mapie.SplitConformalClassifier(Given(), confidence_level=1 - error_rate, conformity_score="lac")
        _, theirs = other.conformalize(probs.numpy(), target.numpy()).predict_set(later.numpy())
        assert ours.tolist() == theirs[:, :, 0].tolist()


@pytest.mark.parametrize("score", ["lac", "aps", "raps"])
def test_sets_hold_the_right_class_as_often_as_stated_over_draws(score: str) -> None:
    covered = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        sets = PredictionSets(0.1, score).calibrate(*drawn(2 * seed, 200), generator=generator)  # type: ignore[arg-type]
        probs, target = drawn(2 * seed + 1, 400)
        covered.append(sets.predict(probs, generator=generator).gather(1, target[:, None]).double().mean())
    noise = 3 * float(torch.stack(covered).std()) / math.sqrt(60)
    assert 0.9 - noise <= float(torch.stack(covered).mean()) <= 0.9 + 1 / 201 + noise


def test_the_coverage_holds_for_each_class_where_that_is_asked_for() -> None:
    skew = torch.tensor([0.7, 0.25, 0.05, 0.0], dtype=torch.float64)  # a model that hardly ever names the last classes
    shares = {}
    for within in ("all", "class"):
        hits, counts = torch.zeros(4), torch.zeros(4)
        for seed in range(40):
            (probs, target), (later, label) = drawn(2 * seed, 600), drawn(2 * seed + 1, 600)
            sets = PredictionSets(0.1, within=within).calibrate((probs + skew) / 2, target)  # type: ignore[arg-type]
            held = sets.predict((later + skew) / 2).gather(1, label[:, None])[:, 0]
            hits += torch.bincount(label[held], minlength=4)
            counts += torch.bincount(label, minlength=4)
        shares[within] = hits / counts
    assert float(shares["all"].min()) < 0.85
    assert float(shares["class"].min()) > 0.88


def test_known_weights_mend_the_coverage_under_a_covariate_shift() -> None:
    plain: list[torch.Tensor] = []
    weighted: list[torch.Tensor] = []
    for seed in range(60):
        (probs, target), (later, label) = drawn(2 * seed, 400), drawn(2 * seed + 1, 2000)
        tilt, later_tilt = ((p[:, 0] < 0.5) * (p.max(1).values > 0.7) * 9.0 + 1 for p in (probs, later))
        kept = torch.multinomial(later_tilt, 400, generator=torch.Generator().manual_seed(seed))
        later, label, later_tilt = later[kept], label[kept], later_tilt[kept]
        for found, mass in ((plain, (None, None)), (weighted, (tilt, later_tilt))):
            sets = PredictionSets(0.1).calibrate(probs, target, weights=mass[0])
            found.append(sets.predict(later, weights=mass[1]).gather(1, label[:, None]).double().mean())
    assert float(torch.stack(plain).mean()) < 0.88
    assert float(torch.stack(weighted).mean()) > 0.89


def test_the_order_of_rows_and_of_classes_does_not_matter() -> None:
    (probs, target), (later, _) = drawn(4, 90), drawn(5, 20)
    rows, classes = torch.randperm(90), torch.tensor([2, 0, 3, 1])
    for score in ("lac", "aps", "raps"):
        found = PredictionSets(0.15, score).calibrate(probs, target).predict(later)  # type: ignore[arg-type]
        sets = PredictionSets(0.15, score).calibrate(probs[rows][:, classes], classes.argsort()[target[rows]])  # type: ignore[arg-type]
        assert torch.equal(sets.predict(later[:, classes]), found[:, classes])


def test_a_smaller_error_rate_never_takes_a_class_out() -> None:
    (probs, target), (later, _) = drawn(6, 200), drawn(7, 50)
    sizes = [PredictionSets(rate).calibrate(probs, target).predict(later) for rate in (0.3, 0.1, 0.03, 0.004)]
    assert all(bool((larger | ~smaller).all()) for smaller, larger in pairwise(sizes))
    assert sizes[-1].all()  # 200 rows cannot tell that little: every class


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_one_calibration_row_and_any_precision_are_taken(dtype: torch.dtype) -> None:
    sets = PredictionSets(0.1).calibrate(torch.tensor([[0.75, 0.25]], dtype=dtype), torch.tensor([0]))
    assert sets.predict(torch.tensor([[0.5, 0.5]], dtype=dtype)).tolist() == [[True, True]]
    assert json.loads(json.dumps(sets.to_dict(), allow_nan=False))["thresholds"] == {"0": None}
    assert all(assumption in str(sets) for assumption in sets.assumptions)


def test_calibration_rows_without_weight_exclude_nothing() -> None:
    probs, target = drawn(9, 50)
    sets = PredictionSets(0.1, within="class").calibrate(probs, target, weights=(target > 0).double())
    held = sets.predict(probs, weights=torch.zeros(50))
    assert held[:, 0].all()
    assert not held[:, 1:].all()


def test_what_does_not_fit_is_refused_by_name() -> None:
    probs, target = drawn(8, 20)
    with pytest.raises(NotFittedError, match="calibrated"):
        PredictionSets(0.1).predict(probs)
    for arguments, name in (
        ({"error_rate": 0.0}, "error_rate"),
        ({"error_rate": 0.1, "score": "best"}, "score"),
        ({"error_rate": 0.1, "within": "row"}, "within"),
    ):
        with pytest.raises(InvalidArgumentError, match=name):
            PredictionSets(**arguments)
    sets = PredictionSets(0.1)
    for changed, name in (
        ({"probs": probs * 2}, "probs"),
        ({"probs": probs * math.nan}, "probs"),
        ({"target": target + 4}, "target"),
        ({"target": target[:3]}, "target"),
        ({"groups": target}, "groups"),
        ({"weights": -torch.ones(20)}, "weights"),
        ({"probs": probs[:0], "target": target[:0]}, "probs"),
    ):
        with pytest.raises(InvalidArgumentError, match=name):
            sets.calibrate(**{"probs": probs, "target": target, **changed})
    sets.calibrate(probs, target)
    with pytest.raises(InvalidArgumentError, match="weights"):
        sets.predict(probs, weights=torch.ones(20))
    with pytest.raises(InvalidArgumentError, match="probs"):
        sets.predict(probs[:, :3])
