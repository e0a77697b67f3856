"""Rankings and ids of any type, as checked tensors."""

from typing import Any

from torch import Tensor

from moe_posterior.checks.validation import described, floats, integers, tensor
from moe_posterior.errors import InvalidArgumentError


def read_ranking(confidence: Any, correct: Any) -> tuple[Tensor, Tensor]:  # (N,), (N,)
    """Confidences, which may be any real scores, beside grades in [0, 1].

    Raises:
        InvalidArgumentError: different shapes, a NaN confidence, or a grade outside [0, 1].
    """
    scores, grades = tensor("confidence", confidence), tensor("correct", correct)
    if scores.ndim != 1 or scores.shape != grades.shape:
        raise InvalidArgumentError(
            f"confidence and correct must have one shape (N,); got {tuple(scores.shape)} and {tuple(grades.shape)}"
        )
    scores, grades = floats("confidence", scores), floats("correct", grades)
    if scores.isnan().any():
        raise InvalidArgumentError(f"confidence must not be NaN; got NaN at {int(scores.isnan().nonzero()[0])}")
    if not ((grades >= 0) & (grades <= 1)).all():
        raise InvalidArgumentError("correct must lie in [0, 1]; got a value outside, or NaN")
    return scores, grades


def read_ids(name: str, ids: Any, ndim: int, bound: int) -> Tensor:
    """Ids of any width in [0, bound) as int64.

    Raises:
        InvalidArgumentError: a wrong type, number of dimensions or value.
    """
    found = integers(name, ids)
    if found.ndim != ndim:
        raise InvalidArgumentError(f"{name} must be integers with {ndim} dimension(s); got {described(ids)}")
    return integers(name, found, low=0, high=bound - 1)
