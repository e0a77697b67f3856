"""The calibration report of any model's predictions, straight from Python.

Dimensions: n rows, K classes, E experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moe_posterior.checks.validation import count, described, number
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.evaluation.arrays import MODEL_FIELDS, SET_FIELDS, columns_of
from moe_posterior.evaluation.collect import Collector, Settings, Words
from moe_posterior.evaluation.columns import Columns
from moe_posterior.evaluation.result import CalibrationReport
from moe_posterior.evaluation.survey import Survey, planned
from moe_posterior.report.conditions import TOLERANCE
from moe_posterior.report.places import ALL_SHIFTS

__all__ = ["BASE", "LEAST_RESAMPLES", "evaluate", "settings_of"]

BASE = "test rows"
LEAST_RESAMPLES, MOST_RESAMPLES, LEAST_SAMPLE = 100, 10**6, 1_000


def evaluate(
    probs: Any = None,  # (n, K)
    target: Any = None,  # (n,)
    *,
    confidence: Any = None,  # (n,)
    correct: Any = None,  # (n,)
    logits: bool = False,
    groups: Any = None,
    configurations: Any = None,  # (n,)
    routing_weights: Any = None,  # (n, E)
    expert_probs: Any = None,  # (n, E, K)
    rows: Any = None,  # (n,)
    shifts: Mapping[Any, Any] | None = None,
    calibration: Any = None,
    models: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    name: str = "model",
    max_risk: float = 0.1,
    hold_out: float = 0.3,
    sample: int = 50_000,
    resamples: int = 1000,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> CalibrationReport:
    """Measure how far predictions mean what they say: accuracy, NLL, Brier score and calibration error with intervals, by group, by
    routing configuration and under shift; calibrators; and a confidence to act on.

    Arrays may be torch, numpy, pandas, pyarrow or lists. What is not given is left out of the report by name.

    Args:
        probs, target: the probability of every class, and the label: a class index, or a class's name.
        confidence, correct: instead of these two, how sure the model was of each answer, and whether it was right: a truth value, 0
            or 1, or a grade in between.
        logits: whether ``probs`` and ``expert_probs`` are logits. It is never guessed.
        groups: one value per row, or a mapping or data frame with several columns of them.
        configurations: the routing configuration of each row, an integer or a text, for instance its cluster.
        routing_weights: of the aggregate; experts with a weight above 0 are the chosen ones, and make the configuration.
        expert_probs: each expert's own probabilities.
        rows: ids of the rows, if sets or models hold the same rows in another order or only some of them. Otherwise models hold the
            same rows in the same order, and sets with the same labels in the same order hold the same rows.
        shifts: further sets by name: a pair (probs, target), or a mapping with the names of these arguments and ``severity`` (1 to
            5) and ``models``. A key may be a pair (name, severity).
        calibration: rows on which calibrators are fitted and the action threshold is chosen, as one of ``shifts``. Without them a
            random part of the main set is held out for it, and everything is judged on the rest.
        models: further models on the same rows: probabilities by name, or mappings with the names of the arguments of a model. The
            others are compared with the first model, called ``name``.
        class_names: in the order of the probabilities, for labels that are names.
        name: of the model.
        max_risk: share of wrong answers among those acted on that the action threshold is to keep to.
        hold_out: share of the main set to hold out, in [0, 1), at most 50,000 rows; 0, or fewer than 40 rows: none, and no calibrators.
        sample: rows of a set that are kept; larger sets are added up exactly and sampled for what takes rows, see the report's notes.
        resamples: of the bootstrap, at least 100; 1,000 settle the second digit of a 95 % interval.
        seed: of all that is random.
        tolerance: calibration error up to which an operating condition passes, in (0, 1].

    Raises:
        InvalidArgumentError: values or shapes that do not fit, naming the argument and the first bad row.

    >>> import numpy as np
    >>> draw = np.random.default_rng(0)
    >>> confidence = draw.uniform(0.5, 1, 400)
    >>> report = evaluate(confidence=confidence, correct=draw.random(400) < confidence, resamples=100)
    >>> [one["section"] for one in report.to_dict()["left_out"]]
    ['subgroups', 'routing configurations', 'calibrators']
    """
    settings = settings_of(
        max_risk=max_risk, hold_out=hold_out, sample=sample, resamples=resamples, seed=seed, tolerance=tolerance
    )
    if not isinstance(name, str) or not name:
        raise InvalidArgumentError(f"name must be a text that is not empty; got {name!r}")
    if not isinstance(logits, bool | np.bool_):
        raise InvalidArgumentError(f"logits must be True or False; got {described(logits)}")
    if isinstance(class_names, str):
        raise InvalidArgumentError(f"class_names must be one name per class; got the text {class_names!r}")
    main = {
        "probs": probs,
        "target": target,
        "confidence": confidence,
        "correct": correct,
        "groups": groups,
        "configurations": configurations,
        "routing_weights": routing_weights,
        "expert_probs": expert_probs,
        "rows": rows,
        "models": models,
    }
    words, pieces, calibrating = Words(), {}, {}
    sets = {(BASE, 0): ("", main), **_shifted(shifts)}
    for place, (where, given) in sets.items():
        for model, own, path in _models(given, where, name):
            pieces[model, *place] = columns_of(own, path, logits=logits, class_names=class_names, words=words)
            _require_alike(pieces[model, *place], next(iter(pieces.values())), path)
            _require_routed_alike(pieces[model, *place], pieces.get((model, BASE, 0)), path)
    if calibration is not None:
        given = _mapping(calibration, "calibration")
        for model, own, path in _models(given, "calibration.", name):
            calibrating[model] = columns_of(own, path, logits=logits, class_names=class_names, words=words)
            _require_alike(calibrating[model], next(iter(pieces.values())), path)
            _require_same_experts(calibrating[model], pieces.get((model, BASE, 0)), path)
    return CalibrationReport(_collected(pieces, calibrating, settings, words).report())


def settings_of(
    *, max_risk: float, hold_out: float, sample: int, resamples: int, seed: int, tolerance: float = TOLERANCE
) -> Settings:
    """The settings, checked.

    Raises:
        InvalidArgumentError: one is out of its range.
    """
    return Settings(
        seed=count("seed", seed, least=0, most=2**63 - 1),
        resamples=count("resamples", resamples, least=LEAST_RESAMPLES, most=MOST_RESAMPLES),
        max_risk=number("max_risk", max_risk, above=0.0, below=1.0),
        sample=count("sample", sample, least=LEAST_SAMPLE),
        hold_out=number("hold_out", hold_out, least=0.0, below=1.0),
        tolerance=number("tolerance", tolerance, above=0.0, most=1.0),
    )


def _collected(
    pieces: Mapping[tuple[str, str, int], Columns], calibrating: Mapping[str, Columns], settings: Settings, words: Words
) -> Collector:
    facts = {}
    for key, columns in pieces.items():
        survey = Survey(settings.seed)
        survey.add(len(columns), columns.target if columns.probs.ndim == 2 else None, columns.row)
        facts[key] = survey.facts()
    plan = planned(facts, 0.0 if calibrating else settings.hold_out)
    collector = Collector(plan, settings, words, calibrated=bool(calibrating))
    for key, columns in pieces.items():
        collector.add(key, columns)
    for model, columns in calibrating.items():
        collector.calibrate(model, columns)
    return collector


def _require_alike(columns: Columns, first: Columns, where: str) -> None:
    """Predictions of the kind, and of as many classes, as the first set's."""
    kinds = ["confidences" if one.probs.ndim == 1 else f"{one.probs.shape[1]} classes" for one in (first, columns)]
    if kinds[0] != kinds[1]:
        raise InvalidArgumentError(f"{where}probs must be of {kinds[0]}, as the main set; got {kinds[1]}")


def _require_routed_alike(columns: Columns, main: Columns | None, where: str) -> None:
    """A model whose configurations are known on the main set has them on every set: calibrators ask for them."""
    if main is not None and main.configuration is not None and columns.configuration is None:
        name = "configurations" if main.weights is None else "routing_weights"
        raise InvalidArgumentError(f"{where}{name} must be given, as the main set has them; got None")
    _require_same_experts(columns, main, where)


def _require_same_experts(columns: Columns, main: Columns | None, where: str) -> None:
    for name, own, other in (
        ("routing_weights", columns.weights, None if main is None else main.weights),
        ("expert_probs", columns.experts, None if main is None else main.experts),
    ):
        if own is not None and other is not None and own.shape[1] != other.shape[1]:
            raise InvalidArgumentError(
                f"{where}{name} must be of {other.shape[1]} experts, as the main set; got {own.shape[1]}"
            )


def _shifted(shifts: Mapping[Any, Any] | None) -> dict[tuple[str, int], tuple[str, Mapping[str, Any]]]:
    found: dict[tuple[str, int], tuple[str, Mapping[str, Any]]] = {}
    if shifts is not None and not isinstance(shifts, Mapping):
        raise InvalidArgumentError(f"shifts must be a mapping from names to sets; got {described(shifts)}")
    for key, value in (shifts or {}).items():
        shift, severity = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
        where = f"shifts[{key!r}]"
        given = _mapping(value, where)
        level = count(f"{where}.severity", given.get("severity", 1) if severity is None else severity, most=5)
        if not isinstance(shift, str) or shift in (BASE, "clean", ALL_SHIFTS) or (shift, level) in found:
            raise InvalidArgumentError(
                f"shifts must have different names, not {BASE!r}, 'clean' or {ALL_SHIFTS!r}; got {key!r}"
            )
        found[shift, level] = (f"{where}.", given)
    return found


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    """A set's values by name."""
    if isinstance(value, tuple) and len(value) == 2:
        return {"probs": value[0], "target": value[1]}
    known = {*MODEL_FIELDS, *SET_FIELDS}
    if not isinstance(value, Mapping) or not known.issuperset(value):
        got = sorted(set(value) - known) if isinstance(value, Mapping) else described(value)
        raise InvalidArgumentError(
            f"{where} must be a pair (probs, target) or a mapping with keys of {sorted(known)}; got {got}"
        )
    return value


def _models(given: Mapping[str, Any], where: str, name: str) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Each model of a set: its name, its values with those of the set, and what errors call it."""
    yield name, given, where
    further = {} if given.get("models") is None else given["models"]
    if not isinstance(further, Mapping):
        raise InvalidArgumentError(
            f"{where}models must be a mapping from names to predictions; got {described(further)}"
        )
    shared = {key: given.get(key) for key in SET_FIELDS if key != "models"}
    for model, value in further.items():
        own = value if isinstance(value, Mapping) else {"probs": value}
        if not isinstance(model, str) or model == name or not set(own) <= set(MODEL_FIELDS):
            raise InvalidArgumentError(
                f"{where}models must map other names than {name!r} to probabilities, or to mappings with keys of "
                f"{list(MODEL_FIELDS)}; got {model!r}: {described(value)}"
            )
        yield model, {**shared, **own}, f"{where}models[{model!r}]."
