"""Writers that are killed while they write: run as a script, ``python crashes.py FOLDER RUNS SEED``.

Every run forks a writer that recovers the folder's router and writes at full speed, tells through a pipe what was acknowledged, and
is killed at a random moment. Then a forked reader must find all of it, in a sound chain. Forked, because importing torch takes longer
than a run.
"""

import os
import random
import signal
import struct
import sys
import time
import traceback
from pathlib import Path

import numpy as np
from audit.worlds import EMBEDDINGS, new_router

from moe_posterior.audit import AuditLog
from moe_posterior.audit.replay import rebuild
from moe_posterior.audit.verify import verify, verify_decisions

ACKNOWLEDGED = struct.Struct("<qqq")  # decisions so far in this run, the last one's id, outcomes so far


def write(folder: Path, pipe: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    options = {"fsync_every": float(rng.choice([0.0, 0.005])), "rotate_bytes": int(rng.choice([3_000, 10**6]))}
    if (folder / "head.json").exists() and verify(folder).totals["decisions"]:
        router = AuditLog.recover(folder, **options)
        log = router._audit.log
    else:
        log = AuditLog(folder, **options)
        router = new_router(log, threshold=0.5, half_life=40.0)
    decisions = outcomes = 0
    while True:
        for _ in range(int(rng.integers(1, 6))):
            ids = router.route_batch(EMBEDDINGS[: int(rng.integers(1, 150))]).ids
            router.resolve_batch(ids[::2], rng.random(len(ids[::2])))
            decisions, outcomes = decisions + len(ids), outcomes + len(ids[::2])
        log.flush()
        os.write(pipe, ACKNOWLEDGED.pack(decisions, int(ids[-1]), outcomes))


def check(folder: Path, acknowledged: list[tuple[int, int, int]]) -> None:
    found = verify(folder)
    assert found.sound, found.problem
    log = AuditLog(folder, mode="r")
    ids = log.decisions(posterior=False)["id"].to_numpy()
    assert len(np.unique(ids)) == len(ids), "an id was given twice"
    assert len(ids) >= sum(decisions for decisions, _, _ in acknowledged)
    assert len(log.outcomes()) >= sum(outcomes for _, _, outcomes in acknowledged)
    missing = {last for decisions, last, _ in acknowledged if decisions} - set(ids.tolist())
    assert not missing, f"acknowledged and lost: {missing}"
    recomputed = verify_decisions(log.read())
    assert not recomputed.disagreements, recomputed.disagree[:3]
    if len(ids):
        rebuild(log.read(), check=True)


def forked(function: object, *arguments: object) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        function(*arguments)  # type: ignore[operator]
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main(folder: Path, runs: int, seed: int) -> int:
    rng, acknowledged = random.Random(seed), []
    for run in range(runs):
        reading, writing = os.pipe()
        pid = forked(write, folder, writing, seed * 1000 + run)
        os.close(writing)
        first = os.read(reading, ACKNOWLEDGED.size) if rng.random() < 0.7 else b""  # else kill it while it opens
        time.sleep(rng.random() * 0.15)
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the writer died by itself"
        told = first
        while piece := os.read(reading, 1 << 16):
            told += piece
        os.close(reading)
        whole = len(told) // ACKNOWLEDGED.size * ACKNOWLEDGED.size
        if whole:
            acknowledged.append(ACKNOWLEDGED.unpack(told[whole - ACKNOWLEDGED.size : whole]))
        if (folder / "head.json").exists():
            assert os.waitpid(forked(check, folder, acknowledged), 0)[1] == 0, f"run {run} lost something"
    print(f"{runs} runs, {sum(decisions for decisions, _, _ in acknowledged)} acknowledged decisions, none lost")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
