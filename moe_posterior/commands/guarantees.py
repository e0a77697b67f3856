"""``moe-posterior benchmark guarantees``."""

import argparse

FILES = (
    "*----softmax--vanilla--42.npz",
    "hard----posterior--vanilla--42.npz",
    "identities--*--softmax--vanilla--42.npz",
)
EXAMPLES = """
examples:
  moe-posterior study pacs --runs runs                     train, and store predictions in runs/study-pacs/outputs
  moe-posterior benchmark guarantees --predictions runs    every promise on them, about ten minutes on one core
  moe-posterior benchmark guarantees --predictions runs --files 'hard*softmax--vanilla--42.npz' --resamples 100
                                                           a first look at one of them, a minute
  moe-posterior benchmark guarantees --predictions runs --out g.parquet --markdown g.md
  moe-posterior benchmark guarantees --from g.parquet      render again without running anything

A file holds arrays named PART/probs (n, K) and PART/target (n,), and may hold PART/configuration (n,). Part test is the population
that rows are drawn from; part val calibrates what is then served test and any other part. Files without these parts take no part.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="moe-posterior benchmark guarantees",
        description="Are promises of moe_posterior.guarantees kept on real predictions, and what do they cost?",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--predictions", metavar="FOLDER", help="searched for .npz files of predictions, with its folders"
    )
    made.add_argument("--files", nargs="+", default=list(FILES), metavar="PATTERN", help="which (default: %(default)s)")
    made.add_argument(
        "--levels", nargs="+", type=float, default=[0.05, 0.1, 0.2], metavar="α", help="(default 0.05 0.1 0.2)"
    )
    made.add_argument("--delta", type=float, default=0.1, metavar="δ", help="error probability (default 0.1)")
    made.add_argument(
        "--resamples", type=int, default=1000, metavar="R", help="(default 1000; groups, streams and sets: a tenth)"
    )
    made.add_argument("--seed", type=int, default=0, metavar="S", help="of the draws (default 0)")
    made.add_argument(
        "--out", metavar="FILE", help="write the records as .json or .parquet; files done already are skipped"
    )
    made.add_argument("--from", dest="source", metavar="FILE", help="render these records without running anything")
    made.add_argument("--markdown", metavar="FILE.md", help="also write the tables as Markdown")
    made.add_argument("--quiet", action="store_true", help="no progress bar")
    made.set_defaults(figures=None)
    return made
