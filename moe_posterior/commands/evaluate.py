"""``moe-posterior evaluate``."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

HELP = """
Report accuracy, NLL, Brier score and expected calibration error with 95 % intervals: of predictions in files (--predictions), or
of a run that fit trained (--run).

Predictions are Parquet, CSV, JSON lines (both also .gz), npz, or a folder saved by the datasets package; one row an example. Columns
are the probability of every class and the label, or only a confidence and whether the answer was correct. Obvious names (label,
prob_0 …, confidence, correct) are recognised, and what was recognised is printed. What is not given is left out of the report by
name. Several files, or a folder of files, are several shifts by their names; NAME=FILE sets several models side by side.

Of the unshifted rows 30 % are held out to fit calibrators and to choose an action threshold, unless --calibration gives other rows.

Writes index.html (one page with everything, no network needed), report.json, table.md, model_card.md (for the Hugging Face hub)
and reliability.png, and prints the table. With --run, into RUN/report: also competence-ARM.png for each posterior gate,
calibrators-ARM.pt (the fitted calibrators' state) and, with --damage, damage.png, damage.md and damage.json, which show how soon each
gate leaves a broken expert.
"""
EXAMPLES = """
examples:
  moe-posterior evaluate --predictions answers.csv                                two columns: confidence, correct
  moe-posterior evaluate --predictions test.parquet --probs p_ --labels y --groups country age
  moe-posterior evaluate --predictions clean.parquet fog.parquet rain.parquet     the first is the unshifted test rows
  moe-posterior evaluate --predictions old=a.parquet new=b.parquet                two models on the same rows
  moe-posterior evaluate --predictions all.jsonl --shift domain --base photo --weights gate --experts expert_probs
  moe-posterior evaluate --run runs/demo --shifts rotate                          a run of moe-posterior fit
"""

# What belongs to one of the two roads alone.
OF_RUNS = ("arms", "shifts", "severities", "damage", "import_from", "copy_to")
OF_PREDICTIONS = (
    "labels", "probs", "confidence", "correct", "predicted", "logits", "groups", "shift", "severity", "base", "model", "weights",
    "experts", "configuration", "rows", "calibration", "hold_out", "class_names", "max_risk", "sample", "out",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "moe-posterior evaluate",
        description=HELP,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="DIR", help="folder of the run, as printed by fit")
    source.add_argument("--predictions", nargs="+", metavar="[NAME=]FILE", help="files or folders of predictions")
    made.add_argument(
        "--resamples", type=int, default=1000, metavar="R", help="bootstrap resamples (default: %(default)s)"
    )
    made.add_argument("--seed", type=int, default=0, help="of all that is random (default: %(default)s)")
    made.add_argument(
        "--tolerance",
        type=float,
        default=0.05,
        metavar="T",
        help="calibration error up to which an operating condition passes (default: %(default)s)",
    )
    made.add_argument(
        "--about",
        type=Path,
        metavar="FILE",
        help="YAML with what no program can know: model, version, training_data, evaluation_data, routing, intended_use, contact, task",
    )
    made.add_argument("--audit-log", type=Path, metavar="FOLDER", help="of the routing decisions, for incident review")
    _add_of_predictions(made.add_argument_group("with --predictions").add_argument)
    _add_of_runs(made.add_argument_group("with --run").add_argument)
    return made


def misplaced(options: argparse.Namespace) -> str | None:
    """What is wrong with options that belong to the other road; None if nothing is."""
    names, road = (OF_RUNS, "--run") if options.run is None else (OF_PREDICTIONS, "--predictions")
    defaults = parser()
    for name in names:
        if getattr(options, name) != defaults.get_default(name):
            return f"--{name.replace('_', '-')} must be given with {road}; got it without"
    return None


def _add_of_predictions(add: Callable[..., Any]) -> None:
    column: dict[str, Any] = {"metavar": "COLUMN"}
    family: dict[str, Any] = {"metavar": "PREFIX|COLUMN"}
    add("--labels", **column, help="the true classes: indices or names")
    add("--probs", **family, help="class probabilities: a column of lists, or the prefix of one column per class")
    add("--logits", action="store_true", help="the values are logits; they are never taken for such unsaid")
    add("--confidence", **column, help="instead of class probabilities: how sure the model was")
    add("--correct", **column, help="whether the answer was right: true or false, 0 to 1")
    add("--predicted", **column, help="instead of --correct: the answer, compared with --labels")
    add("--groups", nargs="+", default=[], **column, help="groups of rows to report apart")
    add("--shift", **column, help="the shift that a row is under")
    add("--severity", **column, help="its severity: 0 (unshifted) to 5")
    add("--base", metavar="NAME", help="which shift, or file's name, is the unshifted test rows")
    add("--model", **column, help="whose prediction a row is, where one file holds several models'")
    add("--weights", **family, help="routing weights; experts with a weight above 0 make the configuration")
    add("--experts", **family, help="each expert's class probabilities: lists of lists, or PREFIX<expert>_<class>")
    add("--configuration", **column, help="the routing configuration of a row, for instance its cluster")
    add("--rows", **column, help="ids of rows, where files hold the same rows in another order")
    add("--calibration", nargs="+", metavar="[NAME=]FILE", help="rows to fit calibrators and choose the threshold on")
    add(
        "--hold-out",
        type=float,
        default=0.3,
        metavar="SHARE",
        help="share of the unshifted rows held out for that without --calibration, at most 50,000 rows (default: %(default)s)",
    )
    add("--class-names", nargs="+", metavar="NAME", help="in the order of the probabilities")
    add(
        "--max-risk",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="wrong answers among those acted on, that the threshold is to keep to (default: %(default)s)",
    )
    add(
        "--sample",
        type=int,
        default=50_000,
        metavar="ROWS",
        help="rows of a set that are kept; larger sets are added up exactly and sampled for the rest (default: %(default)s)",
    )
    add("--out", type=Path, default=Path("report"), metavar="DIR", help="where to write (default: %(default)s)")


def _add_of_runs(add: Callable[..., Any]) -> None:
    add("--arms", nargs="+", metavar="ARM", help="only these arms")
    add("--shifts", nargs="*", metavar="SHIFT", help="only these shifts; without a name: only the stored test rows")
    add(
        "--severities",
        nargs="+",
        type=int,
        choices=range(1, 6),
        default=[1, 2, 3, 4, 5],
        metavar="S",
        help="1 (mild) to 5 (default: all)",
    )
    add("--damage", action="store_true", help="also break an expert of every arm, and show the recovery over outcomes")
    add(
        "--import-from",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="folder of your own modules that define the run's classes; otherwise only installed modules are imported",
    )
    add("--copy-to", type=Path, metavar="DIR", help="also copy the report there")
