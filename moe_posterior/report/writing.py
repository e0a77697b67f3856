"""All files of a report, in a folder."""

from pathlib import Path

from moe_posterior.files.atomic import write_text
from moe_posterior.report.figures import MOST_ARMS, reliability_diagram
from moe_posterior.report.html import to_html
from moe_posterior.report.model_card import to_model_card
from moe_posterior.report.render import to_markdown, write_json
from moe_posterior.report.schema import Report

__all__ = ["FILES", "write_report"]

FILES = ("index.html", "report.json", "table.md", "model_card.md", "reliability.png")


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, table.md, index.html, model_card.md and, for as many arms as it can tell apart, reliability.png.

    Args:
        report: a computed report.
        folder: is there already; give the draft of :func:`~moe_posterior.files.atomic.replacing_folder`, so that all files
            appear together.

    Raises:
        UnwritableFileError: the file system refuses. MissingDependencyError: without matplotlib.
    """
    write_json(report, folder / "report.json")
    write_text(folder / "table.md", to_markdown(report).rstrip() + "\n")
    write_text(folder / "index.html", to_html(report))
    write_text(folder / "model_card.md", to_model_card(report))
    if len(report["arms"]) <= MOST_ARMS:
        reliability_diagram(report, folder / "reliability.png")
