"""Self-contained web pages: text, sortable tables and drawn figures in one file that needs no network.

All text from data is escaped here, so a report may hold any name.
"""

from moe_posterior.results.page.chart import Axis, Series, legend, line_chart, nice_ticks
from moe_posterior.results.page.document import Section, details, figure, page, paragraph, table

__all__ = [
    "Axis",
    "Section",
    "Series",
    "details",
    "figure",
    "legend",
    "line_chart",
    "nice_ticks",
    "page",
    "paragraph",
    "table",
]
