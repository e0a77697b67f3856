"""``moe-posterior evaluate``."""

import argparse
from pathlib import Path

HELP = """
Evaluate a run: accuracy, NLL, Brier score and expected calibration error of the routed aggregate, for every arm, on the stored
test rows and under each shift at each severity, on all rows and on the hard and easy ones, with 95 % intervals.

With the help of validation rows it also reports six calibrators, a confidence threshold to act on, the error when routing
configurations are reweighted, and how fast the confidences recover as outcomes arrive.

With --damage it also breaks the most used expert of every arm and shows how soon each gate leaves it, as outcomes of the chosen
experts come in: damage.png, damage.md and damage.json.

Writes index.html (one page with everything, no network needed), report.json, table.md, model_card.md (a fragment for a model card),
reliability.png, for each posterior gate competence-ARM.png, and calibrators-ARM.pt (the fitted calibrators' state) into RUN/report, and
prints the table.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "moe-posterior evaluate", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--run", required=True, metavar="DIR", help="folder of the run, as printed by fit")
    made.add_argument("--arms", nargs="+", metavar="ARM", help="only these arms")
    made.add_argument(
        "--shifts", nargs="*", metavar="SHIFT", help="only these shifts; without a name: only the stored test rows"
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
        "--damage", action="store_true", help="also break an expert of every arm, and show the recovery over outcomes"
    )
    made.add_argument(
        "--import-from",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="folder of your own modules that define the run's classes; otherwise only installed modules are imported",
    )
    made.add_argument("--copy-to", type=Path, metavar="DIR", help="also copy the report there")
    return made
