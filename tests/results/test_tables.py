"""One table, three renderings."""

import io

from rich.console import Console

from moe_posterior.results.page import table
from moe_posterior.results.tables import Cell, Table, print_tables, to_markdown

MIXED = Table(
    ["arm", "n", "ECE"], [["a|b", 1200, Cell("0.040", 0.04, strong=True, more="[0.031, 0.050]")]], "a note", "T"
)


def test_columns_of_numbers_are_right_aligned_in_markdown_and_in_html() -> None:
    assert MIXED.right_aligned() == [False, True, True]
    assert "|---|--:|--:|" in to_markdown(MIXED)
    assert table(MIXED).count('<th scope="col" class="number">') == 2


def test_text_columns_are_aligned_as_the_table_says() -> None:
    rows = [["a", "0.1 ± 0.2"]]
    assert Table(["gate", "error"], rows).right_aligned() == [False, False]
    assert Table(["gate", "error"], rows, right=True).right_aligned() == [False, True]
    assert Table(["n", "error"], [[1, 2]], right=False).right_aligned() == [False, False]


def test_markdown_holds_title_grid_and_note_and_escapes_the_cells() -> None:
    assert to_markdown(MIXED, Table(["x"], [[None]])) == (
        "**T**\n\n| arm | n | ECE |\n|---|--:|--:|\n| a\\|b | 1,200 | **0.040 \\[0.031, 0.050\\]** |\n\na note\n\n"
        "| x |\n|---|\n| – |\n"
    )
    assert to_markdown() == ""


def test_a_file_without_a_width_does_not_break_long_rows() -> None:
    stream = io.StringIO()
    print_tables([Table(["gate", "note"], [["posterior", "x" * 110]], "the note", "T")], Console(file=stream))
    title, header, row, note, *_ = stream.getvalue().splitlines()
    assert (title.strip(), header.split(), note) == ("T", ["gate", "note"], "the note")
    assert row.split() == ["posterior", "x" * 110]
