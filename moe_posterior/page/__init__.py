"""Self-contained web pages: text, sortable tables and drawn figures in one file that needs no network.

Everything that comes from data is escaped here, so that a report may hold any name.
"""

from moe_posterior.page.chart import Axis, Series, legend, line_chart, nice_ticks
from moe_posterior.page.document import Cell, Section, Table, details, estimate, figure, page, paragraph, show, table

__all__ = [
    "Axis",
    "Cell",
    "Section",
    "Series",
    "Table",
    "details",
    "estimate",
    "figure",
    "legend",
    "line_chart",
    "nice_ticks",
    "page",
    "paragraph",
    "show",
    "table",
]
