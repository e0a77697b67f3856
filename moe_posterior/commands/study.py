"""``moe-posterior study``."""

import argparse

STUDIES = ("cifar10h", "comments", "pacs")
HELP = """
Compare all training methods, with the softmax and with the posterior gate, over seeds, on one data set.

Every cell is trained once (methods of one seed share their ERM warm-up). Its predictions on validation and test rows are kept under
runs/study-NAME, and all figures are computed from them. Run the same command again to resume.
"""
EXAMPLES = """
examples:
  moe-posterior study pacs --out results/calibration/pacs.json --markdown results/calibration/pacs.md
  moe-posterior study comments --seeds 1                  a first look
  moe-posterior study pacs --from results/calibration/pacs.json   the tables of an earlier run, nothing is trained
  moe-posterior study summary --from results/calibration/*.parquet

pacs        each of the four domains held out in turn; a layer of 128 on the features of an ImageNet network
comments    Contextual Abuse Dataset in CivilComments' schema; a layer of 128 on sentence embeddings; hard: any identity mentioned
summary     hard rows of every data set in one table, and the paired differences; reads --from alone
cifar10h    CIFAR-10H end to end: a small ResNet on 18,000 images, 20 epochs, the first 8 shared ERM; hard: people disagree
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "moe-posterior study",
        description=HELP,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("study", choices=(*STUDIES, "summary"), help="which data, or summary; see below")
    made.add_argument("--seeds", type=int, metavar="S", help="how many, from --first-seed on (default: 5; cifar10h 3)")
    made.add_argument("--first-seed", type=int, default=42, metavar="S", help="default %(default)s")
    made.add_argument("--run-dir", default="runs", metavar="DIR", help="where runs live (default: %(default)s)")
    made.add_argument("--out", metavar="FILE.json", help="write the figures as tidy records")
    made.add_argument("--figure", metavar="FILE.png", help="draw the calibration error while outcomes are delivered")
    made.add_argument("--markdown", metavar="FILE.md", help="write the tables")
    made.add_argument(
        "--from",
        dest="source",
        nargs="+",
        metavar="FILE.json",
        help="show the tables of these records, run nothing; summary takes several files",
    )
    made.add_argument(
        "--skip",
        nargs="+",
        default=[],
        metavar="NAME",
        help="gates and methods to leave out, such as: learned fgr",
    )
    made.add_argument("--train-only", action="store_true", help="train what is missing and stop")
    return made
