"""Numbers as the text of a table's cell: mean ± half of the 95 % interval over seeds."""

from collections.abc import Sequence

from moe_posterior.benchmarks.statistics import summarise

NOTHING = "–"


def percent(values: Sequence[float], signed: bool = False) -> str:
    """Shares in percent, mean ± half-width."""
    return _cell([100 * value for value in values], 1, signed)


def decimal(values: Sequence[float]) -> str:
    """Three decimals, mean ± half-width."""
    return _cell(values, 3, False)


def whole(values: Sequence[float]) -> str:
    """Counts, mean ± half-width."""
    return _cell(values, 0, False)


def plain(value: float | None) -> str:
    """A published decimal."""
    return NOTHING if value is None else f"{value:.3f}"


def points(value: float | None) -> str:
    """A published share in percent."""
    return NOTHING if value is None else f"{100 * value:.1f}"


def _cell(values: Sequence[float], digits: int, signed: bool) -> str:
    if not values:
        return NOTHING
    mean, half_width, count = summarise(values)
    sign = "+" if signed else ""
    text = f"{mean:{sign}.{digits}f}"
    return text if count == 1 else f"{text} ± {half_width:.{digits}f}"
