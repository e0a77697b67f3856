"""``moe-posterior evaluate``."""

import argparse
from pathlib import Path

HELP = """
Evaluate a run: accuracy, NLL, Brier score and expected calibration error of the routed aggregate, for every arm, on the stored
test rows and under each shift at each severity, over all rows and over the hard and the easy ones, with bootstrap intervals.

Also, from validation rows: what six calibrators make of it, the threshold to act on, the error under reweighted routing
configurations, and how fast the confidences recover as outcomes are delivered.

Writes index.html (one page with everything, no network needed), report.json, table.md, model_card.md (a fragment for a model card),
reliability.png, for each posterior gate competence-ARM.png, and calibrators-ARM.pt (the fitted calibrators' state) into RUN/report, and
prints the table.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "moe-posterior evaluate", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--run", required=True, metavar="DIR", help="folder of the run, as fit printed it")
    made.add_argument("--arms", nargs="+", metavar="ARM", help="only these arms")
    made.add_argument(
        "--shifts", nargs="*", metavar="SHIFT", help="only these shifts; none given: the stored test rows alone"
    )
    made.add_argument(
        "--severities",
        nargs="+",
        type=int,
        choices=range(1, 6),
        default=[1, 2, 3, 4, 5],
        metavar="S",
        help="1 (mild) to 5 (default: all)",
    )
    made.add_argument(
        "--resamples", type=int, default=1000, metavar="R", help="bootstrap resamples (default: %(default)s)"
    )
    made.add_argument("--seed", type=int, default=0, help="of the resamples (default: %(default)s)")
    made.add_argument(
        "--import-from",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="where modules of your own are that the run's classes come from; else only installed ones are imported",
    )
    made.add_argument("--copy-to", type=Path, metavar="DIR", help="also copy the report there")
    return made
