"""What Python users hold (tensors, arrays, data frames, Arrow tables, lists), as checked columns.

Dimensions: n rows, K classes, E experts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_posterior.checks.validation import described, tensor
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.evaluation.collect import Words
from moe_posterior.evaluation.columns import Columns, confidences, grades, labels, probabilities, weights_of
from moe_posterior.evaluation.priority import hashed

__all__ = ["MODEL_FIELDS", "SET_FIELDS", "columns_of", "numbers"]

MODEL_FIELDS = ("probs", "confidence", "correct", "configurations", "routing_weights", "expert_probs")
SET_FIELDS = ("target", "groups", "rows", "severity", "models")


def columns_of(
    given: Mapping[str, Any], where: str, *, logits: bool, class_names: Sequence[str] | None, words: Words
) -> Columns:
    """The predictions of one model on one set.

    Args:
        given: values by the names of :data:`MODEL_FIELDS` and :data:`SET_FIELDS`.
        where: the set's name in errors, ending in a dot; empty for the main set.
        logits: whether ``probs`` and ``expert_probs`` are logits.
        class_names: in the order of the probabilities.
        words: of all sets.

    Raises:
        InvalidArgumentError: values that do not fit.
    """
    if given.get("confidence") is not None:
        probs, target = _answers(given, where)
    else:
        probs, target = _classes(given, where, logits, class_names, words)
    n = len(probs)
    weights, experts = given.get("routing_weights"), given.get("expert_probs")
    if weights is not None:
        weights = weights_of(numbers(f"{where}routing_weights", weights), f"{where}routing_weights")
    if experts is not None:
        experts = _experts(numbers(f"{where}expert_probs", experts), f"{where}expert_probs", probs, logits)
    named = given.get("configurations")
    values, index = (None, None) if named is None else _coded(named, f"{where}configurations")
    rows = given.get("rows")
    row = None if rows is None else hashed(_texts(rows, f"{where}rows"))
    found = {
        "target": target,
        "routing_weights": weights,
        "expert_probs": experts,
        "configurations": index,
        "rows": row,
    }
    groups = _groups(given.get("groups"), where)
    for name, part in {**found, **{f"groups[{name!r}]": codes for name, (_, codes) in groups.items()}}.items():
        if part is not None and len(part) != n:
            raise InvalidArgumentError(f"{where}{name} must have {n} rows, as the predictions; got {len(part)}")
    if weights is not None and experts is not None and experts.shape[1] != weights.shape[1]:
        raise InvalidArgumentError(
            f"{where}expert_probs must be of {weights.shape[1]} experts, as routing_weights; got {experts.shape[1]}"
        )
    return Columns(
        probs,
        target,
        groups={name: words.group(name, own, codes) for name, (own, codes) in groups.items()},
        configuration=words.routed(weights, values, index),
        weights=weights,
        experts=experts,
        row=row,
    )


def numbers(name: str, value: Any) -> np.ndarray:
    """Numbers of any kind as an array, in their own precision where numpy has it."""
    if type(value).__module__.split(".")[0] == "pyarrow":
        value = _of_arrow(name, value)
    _require_unmasked(name, value)
    found = tensor(name, value).detach().cpu()
    if found.is_floating_point() and found.dtype.itemsize < 4:
        found = found.float()
    return found.numpy()


def _classes(
    given: Mapping[str, Any], where: str, logits: bool, class_names: Sequence[str] | None, words: Words
) -> tuple[np.ndarray, np.ndarray]:
    for name in ("probs", "target"):
        if given.get(name) is None:
            raise InvalidArgumentError(f"{where}{name} must be given, or confidence and correct; got None")
    if given.get("correct") is not None:
        raise InvalidArgumentError(f"{where}correct must come with confidence; got it with probs")
    probs, rounded = probabilities(numbers(f"{where}probs", given["probs"]), f"{where}probs", logits=logits)
    words.rounded += rounded
    named = [str(name) for name in getattr(given["probs"], "columns", ())] if class_names is None else list(class_names)
    if class_names is None and len(named) != probs.shape[1]:
        named = []
    if named and (len(named) != probs.shape[1] or len(set(named)) < len(named)):
        raise InvalidArgumentError(f"class_names must be {probs.shape[1]} different names; got {named}")
    texts = _texts(given["target"], f"{where}target")
    if texts.ndim != 1:
        raise InvalidArgumentError(f"{where}target must be one class per row; got shape {texts.shape}")
    if len(texts) != len(probs):
        raise InvalidArgumentError(f"{where}target must have {len(probs)} rows, as probs; got {len(texts)}")
    return probs, labels(texts, f"{where}target", named, probs.shape[1])


def _answers(given: Mapping[str, Any], where: str) -> tuple[np.ndarray, np.ndarray]:
    wrong = [name for name in ("probs", "target", "expert_probs") if given.get(name) is not None]
    if wrong or given.get("correct") is None:
        got = f"got {wrong[0]} too" if wrong else "got None"
        raise InvalidArgumentError(f"{where}confidence must come with correct, and without probabilities; {got}")
    said = confidences(numbers(f"{where}confidence", given["confidence"]), f"{where}confidence")
    right = grades(numbers(f"{where}correct", given["correct"]), f"{where}correct")
    if len(right) != len(said):
        raise InvalidArgumentError(f"{where}correct must have {len(said)} rows, as confidence; got {len(right)}")
    return said, right


def _experts(found: np.ndarray, where: str, probs: np.ndarray, logits: bool) -> np.ndarray:  # (n, E, K)
    if probs.ndim != 2 or found.ndim != 3 or (len(found), found.shape[2]) != probs.shape:
        raise InvalidArgumentError(f"{where} must have shape ({len(probs)}, E, {probs.shape[-1]}); got {found.shape}")
    flat, _ = probabilities(found.reshape(-1, found.shape[2]), where, logits=logits)
    return flat.reshape(found.shape)


def _groups(groups: Any, where: str) -> dict[str, tuple[list, np.ndarray]]:
    """Column -> its values, and which one each row has."""
    if groups is None:
        return {}
    if hasattr(groups, "columns") and hasattr(groups, "iloc"):  # a pandas data frame
        groups = {str(name): groups[name] for name in groups.columns}
    elif type(groups).__module__.split(".")[0] == "pyarrow" and hasattr(groups, "column_names"):
        groups = {name: groups[name] for name in groups.column_names}
    if not isinstance(groups, Mapping):
        groups = {"": groups}
    return {str(name): _coded(column, f"{where}groups") for name, column in groups.items()}


def _coded(column: Any, where: str) -> tuple[list, np.ndarray]:
    texts = _texts(column, where)
    if texts.ndim != 1:
        raise InvalidArgumentError(f"{where} must be one value per row; got shape {texts.shape}")
    values, index = np.unique(texts, return_inverse=True)
    return values.tolist(), index.reshape(-1)


def _texts(value: Any, where: str) -> np.ndarray:
    """Integers, texts or truth values as they are, none of them missing."""
    if type(value).__module__.split(".")[0] == "pyarrow":
        value = value.to_pylist()
    if hasattr(value, "detach"):
        return _one_per_row(numbers(where, value), where)
    _require_unmasked(where, value)
    array = np.asarray(value)
    if array.dtype.kind == "O":
        missing = np.array([one is None or one != one or type(one).__name__ == "NAType" for one in array.reshape(-1)])
        if missing.any():
            raise InvalidArgumentError(
                f"{where} must have a value in every row; got none in row {int(missing.argmax())}"
            )
        array = array.astype(str)
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise InvalidArgumentError(
            f"{where} must have a value in every row; got NaN in row {int(np.isnan(array).argmax())}"
        )
    if array.dtype.kind not in "iubfUS":
        raise InvalidArgumentError(f"{where} must be integers or texts; got {described(value)}")
    return _one_per_row(array, where)


def _one_per_row(array: np.ndarray, where: str) -> np.ndarray:  # (n,)
    if array.ndim != 1:
        raise InvalidArgumentError(f"{where} must hold one value per row, shape (n,); got shape {array.shape}")
    return array


def _require_unmasked(where: str, value: Any) -> None:
    """A masked value is a missing one; what stands below the mask means nothing."""
    if np.ma.is_masked(value):
        row = int(np.ma.getmaskarray(value).reshape(len(value), -1).any(axis=1).argmax())
        raise InvalidArgumentError(f"{where} must have a value in every row; got a masked one in row {row}")


def _of_arrow(name: str, value: Any) -> np.ndarray:
    """The numbers of an Arrow table, or of a column that may hold a list a row."""
    if hasattr(value, "column_names"):
        return np.column_stack([numbers(f"{name}[{one!r}]", value[one]) for one in value.column_names])
    if value.null_count:
        raise InvalidArgumentError(f"{name} must have a value in every row; got {value.null_count} nulls")
    try:
        return np.asarray(value.to_pylist())
    except ValueError as error:
        raise InvalidArgumentError(f"{name} must hold lists of one length: {error}") from error
