"""How much of the loss from a damage is recovered.

Dimensions: n checkpoints along a stream.
"""

from collections.abc import Sequence

from moe_posterior.errors import InvalidArgumentError

CHECKPOINTS = (0, 512, 1024, 2048, 5120, 10_240, 20_480)  # tokens since the damage, or since the repair
RECOVERABLE = 0.02  # nats: if masking gains less, a share of it means nothing


def recovered_share(frozen: float, masked: float, now: float) -> float:
    """0 at the loss of the frozen gate on the damaged model, 1 at the loss with the damaged experts masked.

    Raises:
        InvalidArgumentError: masking gains nothing, so there is nothing to recover.

    >>> recovered_share(frozen=2.0, masked=1.5, now=1.625)
    0.75
    """
    if not frozen > masked:
        raise InvalidArgumentError(f"masked must be below frozen; got masked={masked}, frozen={frozen}")
    return (frozen - now) / (frozen - masked)


def at(tokens: int, curve: Sequence[float]) -> float:
    """The value of a curve over :data:`CHECKPOINTS` at one of them.

    >>> at(1024, [0.0, 0.1, 0.4, 0.5])
    0.4
    """
    return curve[CHECKPOINTS.index(tokens)]


def regained_traffic(before: Sequence[float], now: Sequence[float]) -> float:
    """The repaired experts' traffic relative to before the damage.

    >>> regained_traffic([0.2, 0.3], [0.1, 0.3])
    0.8
    """
    return sum(now) / sum(before)
