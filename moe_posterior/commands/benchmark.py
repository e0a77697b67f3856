"""``moe-posterior benchmark``."""

import argparse

GATES = (  # the registry's, in its order
    "posterior",
    "posterior of the paper",
    "softmax",
    "expert threshold",
    "ucb1",
    "discounted ucb",
    "thompson bandit",
    "neighbours",
    "best single",
)
EXAMPLES = """
examples:
  moe-posterior benchmark b                                 tables on the terminal, about a minute
  moe-posterior benchmark b --out b.json                    also write the records; run it again to resume
  moe-posterior benchmark b --from b.json --markdown b.md --figures figures/
                                                            render again without running anything
  moe-posterior benchmark c --environments synthetic pacs --gates posterior softmax --seeds 3
  moe-posterior benchmark c --ablation --out ablation.json  also change one option of the belief at a time
  moe-posterior benchmark a --tune 20 --knobs knobs.json    tune all gates on validation seeds, then stop
  moe-posterior benchmark audit --horizon                   how soon the audit log shows the failure of benchmark B
  moe-posterior benchmark llm                               nine real language models, static and as streams

a    a stable pool of equally competent experts: robustness should cost nothing
b    one of 16 experts fails on 60 % of the query classes, which the gates' inputs do not show
c    after half of the stream the queries come from classes new to every gate
llm  choose among nine language models: static, with the best one failing midway, with a change of tasks
lm   gates swapped into a small language model, experts damaged and repaired; see: moe-posterior benchmark lm --help
guarantees  promised thresholds and prediction sets on stored predictions; see: moe-posterior benchmark guarantees --help
intervals  how often each interval of a report holds the truth; see: moe-posterior benchmark intervals --help
monitor  how soon the calibration monitor finds a drift; see: moe-posterior benchmark monitor --help
router   the router's defaults against bandits: cold, warm, with failures, recoveries, newcomers and shared losses
latency  time per decision: one at a time, and at 1,000 to 100,000 queries per second; needs an idle machine
audit    cost of the audit log, and how fast it is written, verified and replayed; needs an idle machine

synthetic         Gaussian queries and a known competence matrix
digits            classifiers trained on scikit-learn's digits under transforms
pacs, cifar10h    the same on PACS and CIFAR-10, from $MOE_POSTERIOR_DATA or ../shared/data
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="moe-posterior benchmark",
        description="Measure gates on streams of queries with bandit feedback: one decision at a time, one outcome back.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "benchmark",
        choices=("a", "b", "c", "llm", "lm", "guarantees", "intervals", "monitor", "router", "latency", "audit"),
        help="which benchmark; see below",
    )
    made.add_argument("--seeds", type=int, metavar="S", help="how many seeds (default 5; audit --horizon 20)")
    made.add_argument("--first-seed", type=int, default=0, metavar="S", help="first seed (default 0)")
    made.add_argument(
        "--out", metavar="FILE.json", help="write the records; runs that the file already holds are skipped"
    )
    made.add_argument(
        "--from", dest="source", metavar="FILE.json", help="render these records without running anything"
    )
    made.add_argument("--markdown", metavar="FILE.md", help="also write the tables as Markdown")
    made.add_argument("--figures", metavar="FOLDER", help="draw figures into this folder")
    made.add_argument(
        "--environments", nargs="+", metavar="NAME", help="default: synthetic digits; for llm and router: all"
    )
    made.add_argument(
        "--gates", nargs="+", metavar="NAME", choices=sorted(GATES), help=f"default: all of {', '.join(GATES)}"
    )
    made.add_argument(
        "--experts", type=int, default=16, metavar="E", help="number of experts (default 16; 8 to 32 in the paper)"
    )
    made.add_argument("--queries", type=int, default=1000, metavar="T", help="queries per stream (default 1000)")
    made.add_argument("--batch", type=int, default=1, metavar="B", help="queries per decision batch (default 1)")
    made.add_argument("--delay", type=int, default=0, metavar="N", help="batches until an outcome arrives (default 0)")
    made.add_argument(
        "--ablation", action="store_true", help="also run the posterior gate with one option changed at a time"
    )
    made.add_argument(
        "--tune", type=int, metavar="N", help="try N configurations of every gate, store the best and stop"
    )
    made.add_argument(
        "--knobs", metavar="FILE.json", help="tuned options to use, or to write with --tune (default: those shipped)"
    )
    made.add_argument(
        "--horizon",
        action="store_true",
        help="with audit: measure how soon the log shows a failing expert, not its speed",
    )
    made.add_argument("--quiet", action="store_true", help="no progress bar")
    return made
