"""The tables of a report as plain columns and rows, read by the web page and the model card alike.

Each function takes the report and returns a table, or None where the run did not measure what it shows.
"""

from moe_posterior.report.tables.about import identity, identity_values, metric_settings, pools, shifts
from moe_posterior.report.tables.cells import rows_of
from moe_posterior.report.tables.of_decisions import abstention, baselines, conditions
from moe_posterior.report.tables.of_results import every_row, main_rows, marked
from moe_posterior.report.tables.of_sections import (
    FEW,
    action,
    calibrators,
    configurations,
    gap,
    of_arm,
    shared_confidence,
    subgroups,
    worst,
)

__all__ = [
    "FEW",
    "abstention",
    "action",
    "baselines",
    "calibrators",
    "conditions",
    "configurations",
    "every_row",
    "gap",
    "identity",
    "identity_values",
    "main_rows",
    "marked",
    "metric_settings",
    "of_arm",
    "pools",
    "rows_of",
    "shared_confidence",
    "shifts",
    "subgroups",
    "worst",
]
