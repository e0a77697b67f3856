"""``moe-posterior audit``."""

import argparse
from pathlib import Path

EXAMPLES = """
examples:
  moe-posterior audit show runs/x/audit --last 5
  moe-posterior audit show runs/x/audit --expert 3 --cluster 7 --json
  moe-posterior audit stats runs/x/audit
  moe-posterior audit verify runs/x/audit --decisions --head 5f0c...   exit status 1 if anything was altered
  moe-posterior audit replay runs/x/audit                    the belief, rebuilt and compared with every checkpoint
  moe-posterior audit export runs/x/audit --out tables --format csv
  moe-posterior audit export runs/x/audit --html audit.html  a page for those who were not there
  moe-posterior audit watch runs/x/audit                     the last minutes, live
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="moe-posterior audit",
        description="Read an audit log: what was decided, on what grounds, and whether the log is what was written.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(dest="command", required=True)

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary)
        added.add_argument("folder", type=Path, help="the log's folder")
        added.add_argument(
            "--key-file", type=Path, metavar="FILE", help="holds the key the log was written with, as bytes"
        )
        return added

    show = command("show", "print decisions, with the posterior they rested on and what came of them")
    show.add_argument("--id", type=int, nargs="+", metavar="N", help="only these decisions")
    show.add_argument("--expert", type=int, metavar="E", help="only those that chose this expert")
    show.add_argument("--cluster", type=int, metavar="C", help="only those in this cluster")
    show.add_argument("--last", type=int, default=20, metavar="N", help="at most so many, the latest (default 20)")
    show.add_argument("--json", action="store_true", help="one JSON object a line, with the full posterior row")
    stats = command("stats", "print counts, and each expert's competence with its credible interval")
    stats.add_argument("--json", action="store_true", help="as JSON")
    check = command("verify", "check every hash of the chain; exit status 1 if anything was altered")
    check.add_argument("--decisions", action="store_true", help="also recompute every choice from the logged posterior")
    check.add_argument("--head", metavar="HASH", help="a hash the log once ended with: it must stand in the chain")
    check.add_argument("--json", action="store_true", help="as JSON")
    replay = command("replay", "rebuild the router's belief from the records and compare it with every checkpoint")
    replay.add_argument("--name", default="router", help="which router, where several share a log (default router)")
    replay.add_argument("--out", type=Path, metavar="FILE", help="save the rebuilt router, for PosteriorRouter.load")
    exporting = command("export", "write decisions, outcomes, posterior and events as tables, or a web page")
    wanted = exporting.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--out", type=Path, metavar="FOLDER", help="where to write the tables")
    wanted.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page instead")
    exporting.add_argument("--format", choices=("parquet", "csv"), default="parquet")
    watching = command("watch", "show the last minutes, as they go by, until Ctrl-C")
    watching.add_argument("--once", action="store_true", help="print one view and stop; exit status 1 if there is none")
    watching.add_argument("--every", type=float, default=1.0, metavar="S", help="seconds between views (default 1)")
    watching.add_argument("--minutes", type=float, default=5.0, metavar="M", help="how far back to look (default 5)")
    return made
