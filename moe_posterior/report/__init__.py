"""Calibration reports: compute a dict, then render it as a table, JSON, Markdown or figures."""

from moe_posterior.report.card import to_card
from moe_posterior.report.compute import evaluate_predictions
from moe_posterior.report.figures import posterior_heatmap, reliability_diagram
from moe_posterior.report.html import to_html
from moe_posterior.report.model_card import to_model_card
from moe_posterior.report.render import render_table, to_markdown, write_json
from moe_posterior.report.tracking import log_report
from moe_posterior.report.verdict import verdict_of
from moe_posterior.results.intervals import bootstrap_sums

__all__ = [
    "bootstrap_sums",
    "evaluate_predictions",
    "log_report",
    "posterior_heatmap",
    "reliability_diagram",
    "render_table",
    "to_card",
    "to_html",
    "to_markdown",
    "to_model_card",
    "verdict_of",
    "write_json",
]
