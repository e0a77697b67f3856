"""Keep an audit log of a router, lose the process, and ask the log what happened.

A child process routes queries with an audit log and is killed without warning. The parent verifies the log, rebuilds the router
from it, resumes where the child stopped, and then reads the log like any table: how often was a better expert known?

    pip install 'moe-posterior[audit]'
    python examples/audit_and_replay.py       # a few seconds
"""

import multiprocessing
import os
import signal
import tempfile
from pathlib import Path

import numpy as np

from moe_posterior import PosteriorRouter
from moe_posterior.audit import AuditLog
from moe_posterior.cli import main as command

COMPETENCE = np.array([0.55, 0.85, 0.70, 0.40])  # of four experts, the same on every query; the router does not know it


def serve_until_killed(folder: Path) -> None:
    """Route and learn; it returns nothing, because it is killed in the middle."""
    rng = np.random.default_rng(0)
    log = AuditLog(folder)
    router = PosteriorRouter(num_experts=4, hidden_size=8, num_clusters=4, audit=log)
    router.fit(rng.normal(size=(500, 8)))
    for step in range(1000):
        decision = router.route(rng.normal(size=8))
        router.resolve(decision.id, float(rng.random() < COMPETENCE[decision.expert]))
        if step == 600:
            log.flush()  # all decisions so far are on disk when this returns
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    folder = Path(tempfile.mkdtemp()) / "audit"
    child = multiprocessing.get_context("spawn").Process(target=serve_until_killed, args=(folder,))
    child.start()
    child.join()
    print(f"the serving process ended with {child.exitcode} (minus the signal that killed it)\n")

    print(f"$ moe-posterior audit verify {folder.name} --decisions")
    command(["audit", "verify", str(folder), "--decisions"])

    router = AuditLog.recover(folder)  # belief and pending decisions as of the last record, bit for bit
    rng = np.random.default_rng(1)
    print(f"\nrecovered; the next decision has id {router.route(rng.normal(size=8)).id}")

    table = AuditLog(folder, mode="r").decisions()  # a pyarrow.Table: also for pandas, DuckDB, Polars
    chosen = np.array([experts[0] for experts in table["experts"].to_pylist()])
    alpha, beta = (np.array(table[name].to_pylist()) for name in ("alpha", "beta"))
    believed = alpha / (alpha + beta)  # (decisions, E), what the router believed when it decided
    regret = believed.max(axis=1) - believed[np.arange(len(chosen)), chosen]
    print(
        f"{len(chosen)} decisions; by posterior mean a better expert was known in {np.mean(regret > 0.05):.1%} of them"
    )
    print("share of each expert among the last 200:", np.bincount(chosen[-200:], minlength=4) / 200)

    print(f"\n$ moe-posterior audit stats {folder.name}")
    command(["audit", "stats", str(folder)])


if __name__ == "__main__":
    main()
