"""Streams whose calibration drifts at a known row: river's FriedmanDrift, PACS predictions under a change of domain, and none at all.

Dimensions: T rows of a stream, R reference rows, C configurations.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_posterior.errors import MissingDataError, MissingDependencyError

Array = NDArray[np.float64]
Index = NDArray[np.int64]

TRAIN, CALIBRATE, REFERENCE = 10_000, 5_000, 5_000
STABLE, AFTER = 5_000, 5_000
LONG_AFTER = 20_000  # of "local", which a global test hardly finds
CONFIGURATIONS = 16
TRUTH_ROWS = 60_000  # to know which configurations a drift moves, and by how much
MOVED = 0.04  # change of a configuration's gap that counts as a drift: twice the monitor's tolerance
FAR = 0.1  # of the one configuration that changes its domain
FRIEDMAN = ("local", "lea", "gra", "gsg")
PACS_DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
PACS_ARMS = ("softmax--vanilla", "posterior--robust_filtered")
PACS_STABLE, PACS_AFTER = 5_000, 10_000


class Answers(NamedTuple):
    """What a monitor sees, row by row."""

    confidence: Array  # (T,)
    correct: Array  # (T,)
    configuration: Index  # (T,)

    def at(self, rows: Any) -> "Answers":
        """Some of the rows, or all in another order."""
        return Answers(self.confidence[rows], self.correct[rows], self.configuration[rows])

    def then(self, other: "Answers") -> "Answers":
        """These rows, then others."""
        return Answers(
            np.concatenate([self.confidence, other.confidence]),
            np.concatenate([self.correct, other.correct]),
            np.concatenate([self.configuration, other.configuration]),
        )


@dataclass(frozen=True)
class Stream:
    """Answers of a deployed model, whose calibration changes at row ``drift``."""

    answers: Answers
    reference: Answers  # (R,) of the time before the drift, for the monitor's baseline
    drift: int
    moved: frozenset[int]  # configurations whose gap changes by more than MOVED


class Deployed(NamedTuple):
    """A fitted mixture: the gate is a tree of 16 leaves, each expert a logistic regression, the calibrator a logistic map."""

    answer: Callable[[Array, Array], Answers]  # inputs, targets of FriedmanDrift


def friedman(scenario: str, seed: int) -> Stream:
    """One stream of a fixed deployed model; the label says whether FriedmanDrift's target exceeds its median before the drift.

    ``gra`` changes the function everywhere at once, ``gsg`` over 500 rows; ``lea`` in 1.6 % of the inputs, after a third of the
    rows in 5 %, and after two thirds in 18 %; ``local`` in those 18 % at once.
    """
    model = _deployed()
    stable = model.answer(*_drawn("gra", None, REFERENCE + STABLE, 1_000 + seed))
    rows = LONG_AFTER if scenario == "local" else AFTER
    after = model.answer(*_drawn(scenario, 0, rows, 5_000 + seed))
    stream = stable.at(slice(REFERENCE, None)).then(after)
    return Stream(stream, stable.at(slice(REFERENCE)), STABLE, _moved_by(scenario))


def pacs(folder: Path, domain: str, arm: str, seed: int, *, whole: bool) -> Stream:
    """A trained mixture's own domains, then a domain it never saw: for all rows, or for those of one configuration.

    The stable stream is drawn with replacement from the validation rows, which are the reference too: there are too few of them
    to split, and nothing but the change of domain shall differ. The one configuration has at least 5 % of the rows of both
    and its gap changes by more than 10 points; without such a configuration nothing moves.
    """
    files = sorted((folder / "outputs").glob(f"{domain}----{arm}--*.npz"))
    if not files:
        raise MissingDataError(
            f"there are no {folder}/outputs/{domain}----{arm}--*.npz; make them with: moe-posterior study"
        )
    rng = np.random.default_rng([seed, PACS_DOMAINS.index(domain), PACS_ARMS.index(arm)])
    with np.load(files[seed % len(files)]) as stored:
        home, foreign = _stored(stored, "val"), _stored(stored, "test")
    stable = home.at(rng.integers(len(home.correct), size=PACS_STABLE))
    if whole:
        after = foreign.at(rng.integers(len(foreign.correct), size=PACS_AFTER))
        return Stream(stable.then(after), home, PACS_STABLE, _moved(home, foreign, MOVED))
    after = home.at(rng.integers(len(home.correct), size=PACS_AFTER))
    far = [one for one in sorted(_moved(home, foreign, FAR)) if _share(home, one) > 0.05 < _share(foreign, one)]
    chosen = far[int(rng.integers(len(far)))] if far else -1
    pool, mine = foreign.at(foreign.configuration == chosen), after.configuration == chosen
    if far:
        after = _replaced(after, mine, pool.at(rng.integers(len(pool.correct), size=int(mine.sum()))))
    return Stream(stable.then(after), home, PACS_STABLE, frozenset({chosen} if far else ()))


def calibrated(rows: int, gap: float, rng: np.random.Generator) -> Answers:
    """Answers of a model whose every confidence is ``gap`` above its accuracy, in 16 configurations of very different sizes."""
    confidence = rng.beta(6, 1.5, rows)
    shares = 1 / np.arange(1.0, CONFIGURATIONS + 1)
    configuration = rng.choice(CONFIGURATIONS, rows, p=shares / shares.sum())
    return Answers(confidence, (rng.random(rows) < confidence - gap).astype(np.float64), configuration)


def _stored(stored: Any, part: str) -> Answers:
    probs = stored[f"{part}/probs"].astype(np.float64)
    right = probs.argmax(1) == stored[f"{part}/target"]
    return Answers(probs.max(1).clip(0, 1), right.astype(np.float64), stored[f"{part}/configuration"])


def _replaced(answers: Answers, where: NDArray[np.bool_], by: Answers) -> Answers:
    places = np.arange(len(where))
    places[where] = len(where) + np.arange(len(by.correct))
    return answers.then(by).at(places)


def _share(answers: Answers, configuration: int) -> float:
    return float((answers.configuration == configuration).mean())


def _gap(answers: Answers, configuration: int) -> float:
    mine = answers.at(answers.configuration == configuration)
    return float((mine.confidence - mine.correct).mean())


def _moved(before: Answers, after: Answers, by: float) -> frozenset[int]:
    both = set(before.configuration.tolist()) & set(after.configuration.tolist())
    return frozenset(one for one in both if abs(_gap(after, one) - _gap(before, one)) > by)


def _drawn(scenario: str, drift: int | None, rows: int, seed: int) -> tuple[Array, Array]:  # (T, 10), (T,)
    """Inputs and targets; None: no drift within the rows."""
    try:
        from river.datasets.synth import FriedmanDrift
    except ImportError as error:
        raise MissingDependencyError("river", "drift") from error
    kind, window = ("lea" if scenario == "local" else scenario), 0
    far = 10**9
    if drift is None:
        position: tuple[int, ...] = (far, far + 1, far + 2)[: 3 if kind == "lea" else 2]
    elif scenario == "local":
        position = (drift - 2, drift - 1, drift)
    elif scenario == "lea":
        position = (drift, drift + rows // 3, drift + 2 * rows // 3)
    else:
        position, window = (drift, far), 500 if scenario == "gsg" else 0
    source = FriedmanDrift(kind, position, window, seed=seed)
    found = [(list(inputs.values()), target) for inputs, target in source.take(rows)]
    return np.array([inputs for inputs, _ in found]), np.array([target for _, target in found])


@functools.cache
def _deployed() -> Deployed:
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.tree import DecisionTreeRegressor
    except ImportError as error:
        raise MissingDependencyError("scikit-learn", "train") from error
    inputs, targets = _drawn("gra", None, TRAIN + CALIBRATE, 0)
    median = float(np.median(targets[:TRAIN]))
    train, labels = inputs[:TRAIN], targets[:TRAIN] > median
    gate = DecisionTreeRegressor(max_leaf_nodes=CONFIGURATIONS, min_samples_leaf=200, random_state=0)
    leaves = gate.fit(train, targets[:TRAIN]).apply(train)
    numbers = {leaf: place for place, leaf in enumerate(np.unique(leaves).tolist())}
    experts = {leaf: LogisticRegression(C=1.0).fit(train[leaves == leaf], labels[leaves == leaf]) for leaf in numbers}

    def raw(rows: Array) -> tuple[Array, Index]:  # probability of the label, leaf
        own = gate.apply(rows)
        probability = np.zeros(len(rows))
        for leaf, expert in experts.items():
            mine = own == leaf
            if mine.any():
                probability[mine] = expert.predict_proba(rows[mine])[:, 1]
        return probability, np.array([numbers[leaf] for leaf in own.tolist()])

    def logit(probability: Array) -> Array:
        inside = probability.clip(1e-4, 1 - 1e-4)
        return (np.log(inside) - np.log1p(-inside))[:, None]

    held, _ = raw(inputs[TRAIN:])
    calibrator = LogisticRegression(C=1e6).fit(logit(held), targets[TRAIN:] > median)

    def answer(rows: Array, target: Array) -> Answers:
        probability, configuration = raw(rows)
        shown = calibrator.predict_proba(logit(probability))[:, 1]
        right = (shown > 0.5) == (target > median)
        return Answers(np.maximum(shown, 1 - shown), right.astype(np.float64), configuration)

    return Deployed(answer)


@functools.cache
def _moved_by(scenario: str) -> frozenset[int]:
    """Configurations that the scenario's last phase moves, from a long stream before and one after."""
    model = _deployed()
    last = {"lea": "local", "gsg": "gra"}.get(scenario, scenario)
    before = model.answer(*_drawn("gra", None, TRUTH_ROWS, 1))
    return _moved(before, model.answer(*_drawn(last, 0, TRUTH_ROWS, 2)), MOVED)
