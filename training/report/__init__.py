"""Calibration reports: compute a dict, then render it as a table, JSON, Markdown or figures."""

from moe_posterior.results.intervals import bootstrap_sums
from moe_posterior.training.report.card import to_card
from moe_posterior.training.report.compute import evaluate_predictions
from moe_posterior.training.report.figures import posterior_heatmap, reliability_diagram
from moe_posterior.training.report.html import to_html
from moe_posterior.training.report.render import render_table, to_markdown, write_json

__all__ = [
    "bootstrap_sums",
    "evaluate_predictions",
    "posterior_heatmap",
    "reliability_diagram",
    "render_table",
    "to_card",
    "to_html",
    "to_markdown",
    "write_json",
]
