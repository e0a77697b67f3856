"""Results on the terminal, as Markdown and as figures."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from moe_posterior.benchmarks.records import Record, Results
from moe_posterior.escape import code, markdown, terminal
from moe_posterior.files.atomic import write_text
from moe_posterior.results.tables import Table, print_tables, to_markdown

Draw = Callable[[Iterable[Record], str], list[Path]]


def show(
    asked: argparse.Namespace, results: Results, tables: Sequence[Table], draw: Draw | None, *, signed: bool = False
) -> int:
    """Print the tables and the command that makes them; write Markdown and figures if asked to.

    ``draw`` writes figures into a folder; ``signed`` Markdown ends with the command and the versions.
    """
    print_tables(tables)
    about = results.about
    versions = f"torch {about.get('torch')}, Python {about.get('python')}, {about.get('processors')} processors"
    if asked.markdown:
        again = f"\n{code(about.get('command'))}\n\n{markdown(versions)}\n" if signed else ""
        write_text(asked.markdown, to_markdown(*tables) + again)
        print(f"tables: {terminal(asked.markdown)}")
    if asked.figures and draw:
        for path in draw(results.records, asked.figures):
            print(f"figure: {terminal(path)}")
    print(terminal(versions))
    print(f"again:  {terminal(about.get('command'))}")
    return 0
