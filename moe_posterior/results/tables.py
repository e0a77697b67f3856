"""A table of results, and its renderings: Markdown and the terminal here, HTML in :mod:`moe_posterior.results.page`.

Every text is escaped for where it is shown, so names of arms, experts or data sets may hold anything.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_posterior.errors import MissingDependencyError
from moe_posterior.escape import markdown, terminal

if TYPE_CHECKING:
    from rich.console import Console

DASH = "–"
FILE_WIDTH = 132  # characters to a line where the output is not a terminal


@dataclass(frozen=True)
class Cell:
    """Text beside the value that it sorts by."""

    text: str
    key: float | str | None = None  # None sorts last
    strong: bool = False
    more: str = ""  # set smaller after the text, for instance an interval


@dataclass(frozen=True)
class Table:
    """Columns, rows, and what a reader must know to read them."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]  # each as long as columns: str, int, float, bool, None or Cell
    note: str = ""
    title: str = ""
    right: bool | None = None  # whether all columns but the first are right-aligned; None: those that hold numbers

    def right_aligned(self) -> list[bool]:
        """Which columns are right-aligned."""
        if self.right is None:
            return [_is_numeric(row[i] for row in self.rows) for i in range(len(self.columns))]
        return [self.right and i > 0 for i in range(len(self.columns))]


def show(value: object, digits: int = 3) -> str:
    """A value as text: ``–`` if missing, thousands separators in counts, a fixed number of decimals otherwise.

    >>> show(None), show(float("nan")), show(12345), show(0.25), show("art"), show(True)
    ('–', '–', '12,345', '0.250', 'art', 'yes')
    """
    if isinstance(value, Cell):
        return f"{value.text} {value.more}".strip()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return ("−∞" if value < 0 else "∞") if math.isinf(value) else f"{value:.{digits}f}".replace("-", "−")
    return str(value)


def estimate(
    value: float | None, low: float | None = None, high: float | None = None, *, digits: int = 3, strong: bool = False
) -> Cell:
    """A cell with a value and, if known, its interval; it sorts by the value.

    >>> show(estimate(0.04, 0.031, 0.05)), show(estimate(0.04)), show(estimate(None))
    ('0.040 [0.031, 0.050]', '0.040', '–')
    """
    missing = value is None or math.isnan(value)
    known = not missing and low is not None and high is not None
    more = f"[{show(low, digits)}, {show(high, digits)}]" if known else ""
    return Cell(show(value, digits), None if missing else value, strong, more)


def sort_key(value: object) -> float | str | None:
    """What a value sorts by: a finite number, a text, or None if there is nothing."""
    key = value.key if isinstance(value, Cell) else value
    if isinstance(key, bool):
        return show(key)
    if isinstance(key, int | float):
        return key if math.isfinite(key) else None
    return None if key is None else str(key)


def _is_numeric(values: Iterable[object]) -> bool:
    keys = [key for value in values if (key := sort_key(value)) is not None]
    return bool(keys) and all(isinstance(key, int | float) for key in keys)


def to_markdown(*tables: Table) -> str:
    """Tables in Markdown, each with its title and note, ending in a newline; empty without tables.

    >>> print(to_markdown(Table(["gate", "x"], [["posterior", 1], [Cell("a|b", "b", strong=True), None]], "n", "T")), end="")
    **T**
    <BLANKLINE>
    | gate | x |
    |---|--:|
    | posterior | 1 |
    | **a\\|b** | – |
    <BLANKLINE>
    n
    """
    blocks = []
    for table in tables:
        body = grid(
            map(markdown, table.columns), (map(_markdown_cell, row) for row in table.rows), table.right_aligned()
        )
        title, note = f"**{markdown(table.title)}**" if table.title else "", markdown(table.note)
        blocks.append("\n\n".join(part for part in (title, body, note) if part) + "\n")
    return "\n".join(blocks)


def grid(
    columns: Iterable[str], rows: Iterable[Iterable[str]], right: Sequence[bool]
) -> str:  # text that is Markdown already
    """The lines of a table in Markdown, from cells that are escaped already.

    >>> print(grid(["a", "n"], [["x", "1"]], [False, True]))
    | a | n |
    |---|--:|
    | x | 1 |
    """
    head, *body = ("| " + " | ".join(cells) + " |" for cells in (columns, *rows))
    return "\n".join([head, "|" + "|".join("--:" if one else "---" for one in right) + "|", *body])


def _markdown_cell(value: object) -> str:
    text = markdown(show(value))
    return f"**{text}**" if isinstance(value, Cell) and value.strong else text


def print_tables(tables: Iterable[Table], console: "Console | None" = None) -> None:
    """Print tables to the terminal.

    Raises:
        MissingDependencyError: rich is not installed.
    """
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text
    except ImportError as error:
        raise MissingDependencyError("rich", "train") from error
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, FILE_WIDTH)  # a file has no width: keep rich from wrapping at 80
    for table in tables:
        made = RichTable(
            title=Text(terminal(table.title)), title_justify="left", title_style="bold", box=None, padding=(0, 1)
        )
        for index, (name, right) in enumerate(zip(table.columns, table.right_aligned(), strict=True)):
            made.add_column(Text(terminal(name)), justify="right" if right else "left", no_wrap=index == 0)
        for row in table.rows:
            made.add_row(*(Text(terminal(show(cell))) for cell in row))
        console.print(made)
        if table.note:
            console.print(Text(terminal(table.note), "dim italic"))
        console.print()
