"""Numbers as the text of a table's cell: mean ± half of the 95 % interval over seeds."""

from collections.abc import Sequence

from moe_posterior.results.intervals import mean_interval, plus_minus
from moe_posterior.results.tables import DASH, Table


def text_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> Table:
    """A table of cells that are text already, all but the first column right-aligned."""
    return Table(columns, rows, note, title, right=True)


def percent(values: Sequence[float], signed: bool = False) -> str:
    """Shares in percent, mean ± half-width."""
    return _cell([100 * value for value in values], 1, "+" if signed else "")


def decimal(values: Sequence[float]) -> str:
    """Three decimals, mean ± half-width."""
    return _cell(values, 3)


def whole(values: Sequence[float]) -> str:
    """Counts, mean ± half-width."""
    return _cell(values, 0)


def plain(value: float | None) -> str:
    """A published decimal."""
    return DASH if value is None else f"{value:.3f}"


def points(value: float | None) -> str:
    """A published share in percent."""
    return DASH if value is None else f"{100 * value:.1f}"


def _cell(values: Sequence[float], digits: int, sign: str = "") -> str:
    return plus_minus(*mean_interval(values)[:2], digits, sign) if values else DASH
