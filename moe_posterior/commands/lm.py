"""``moe-posterior benchmark lm``."""

import argparse

PARTS = ("damage", "knobs", "scratch")
LAYERS, STEPS, HEALTHY = 2, 900, 102_400  # the recipe's and the plan's own
EXAMPLES = """
examples:
  moe-posterior benchmark lm --text book.txt wiki.txt --runs runs/lm --out lm.json
                                        everything, hours on one core; run it again to resume
  moe-posterior benchmark lm --text book.txt --parts damage --seeds 1 --steps 300
                                        a first look, a few minutes
  moe-posterior benchmark lm --from lm.json --markdown lm.md --figures figures/
                                        render again without running anything

damage   train a small Mixtral on bytes, swap its gates, serve text, damage experts, serve on, repair them
knobs    the same with one option of the gate changed at a time, only with damages in all layers
scratch  the same transformer trained from scratch with softmax, prior and posterior gates, and with a learned prior
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="moe-posterior benchmark lm",
        description="Does a gate that learns from evidence help a language model? A small Mixtral on bytes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--text", nargs="+", metavar="FILE", help="plain text to train, serve and measure on")
    made.add_argument("--runs", default="runs/lm", metavar="FOLDER", help="checkpoints (default runs/lm)")
    made.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    made.add_argument("--seeds", type=int, default=3, metavar="S", help="how many seeds (default 3)")
    made.add_argument("--first-seed", type=int, default=0, metavar="S", help="first seed (default 0)")
    made.add_argument("--layers", type=int, default=LAYERS, help=f"default {LAYERS}")
    made.add_argument("--steps", type=int, default=STEPS, help=f"of 32 windows of 128 bytes (default {STEPS})")
    made.add_argument(
        "--scratch-steps", type=int, default=500, metavar="N", help="the same for training from scratch (default 500)"
    )
    made.add_argument(
        "--arms",
        nargs="+",
        default=[],
        metavar="GATE",
        help="gates to train from scratch with (default: all), such as: softmax 'learned, balanced'",
    )
    made.add_argument(
        "--healthy",
        type=int,
        default=HEALTHY,
        metavar="N",
        help=f"tokens served before a damage (default {HEALTHY})",
    )
    made.add_argument(
        "--tuning", action="store_true", help="use the parts of the text reserved for tuning, which no report reads"
    )
    made.add_argument(
        "--out", metavar="FILE.json", help="write the records; runs that the file already holds are skipped"
    )
    made.add_argument(
        "--from", dest="source", metavar="FILE.json", help="render these records without running anything"
    )
    made.add_argument("--markdown", metavar="FILE.md", help="also write the tables as Markdown")
    made.add_argument("--figures", metavar="FOLDER", help="draw figures into this folder")
    made.add_argument("--quiet", action="store_true", help="print no progress")
    return made
