"""What may become part of a belief: the one check at every door that counts, priors and tables of decisions come in by.

Loading a state, merging, a warm start, an inherited prior, an audit log and an exported routing all ask :func:`require_sound`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError


class _Rule(NamedTuple):
    wanted: str
    fits: Callable[[Any], Any]  # elementwise, of torch or numpy; False for NaN, unless NaN is allowed


_POSITIVE = _Rule("positive and finite", lambda v: (v > 0) & (v < math.inf))
_COUNT = _Rule("finite and at least 0", lambda v: (v >= 0) & (v < math.inf))
_FINITE = _Rule("finite", lambda v: abs(v) < math.inf)
_SHARE = _Rule("in [0, 1]", lambda v: (v >= 0) & (v <= 1))
_SHARE_OR_UNKNOWN = _Rule("in [0, 1], or NaN where not known", lambda v: ((v >= 0) & (v <= 1)) | (v != v))
_PENALTY = _Rule("below infinity", lambda v: v < math.inf)
RULES = {
    "prior_alpha": _POSITIVE,
    "prior_beta": _POSITIVE,
    "alpha": _POSITIVE,
    "beta": _POSITIVE,
    "successes": _COUNT,
    "failures": _COUNT,
    "foreseen": _COUNT,
    "trust": _SHARE,
    "suspicion": _COUNT,
    "relief": _COUNT,
    "alike": _POSITIVE,
    "outcomes": _SHARE,
    "mean_outcome": _SHARE_OR_UNKNOWN,
    "evidence_bias": _PENALTY,  # -inf for an expert that was removed
    "topk_weights": _COUNT,
    "topk_scores": _FINITE,
}
_SIGNED = ("successes", "failures")


def require_sound(tables: Mapping[str, Tensor | NDArray[Any]], *, signed: bool = False, of: str = "") -> None:
    """Raise InvalidArgumentError unless every table may be part of a belief; names without a rule are not looked at.

    Priors, alpha and beta are positive and finite; evidence is finite and at least 0; trust lies in [0, 1].

    Args:
        tables: by the name of the buffer.
        signed: whether evidence may be below 0, as counts de-biased by known error rates are while they are few.
        of: what the error puts before a name.

    Raises:
        InvalidArgumentError: naming the table, what it must hold, and the first value that does not fit.

    >>> import torch
    >>> require_sound({"successes": torch.tensor([[2.0, 0.0]])})
    >>> require_sound({"failures": torch.tensor([[2.0, torch.nan]])}, of="posterior.")
    Traceback (most recent call last):
    ...
    moe_posterior.errors.InvalidArgumentError: posterior.failures must be finite and at least 0; got nan at (0, 1)
    """
    for name, table in tables.items():
        rule = _FINITE if signed and name in _SIGNED else RULES.get(name)
        if rule is None or getattr(table, "is_meta", False):
            continue
        if isinstance(table, Tensor) and table.is_complex():
            raise InvalidArgumentError(f"{of}{name} must be {rule.wanted}; got {table.dtype}")
        fits = rule.fits(table.detach() if isinstance(table, Tensor) else table)
        if not bool(fits.all()):
            raise InvalidArgumentError(f"{of}{name} must be {rule.wanted}; got {_first_wrong(table, fits)}")


def _first_wrong(table: Any, fits: Any) -> str:
    values, good = (np.asarray(part.cpu().double() if isinstance(part, Tensor) else part) for part in (table, fits))
    where = tuple(int(place) for place in np.argwhere(good == 0)[0])
    return f"{float(values[where]):g} at {where}"
