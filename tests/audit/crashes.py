"""Writers that are killed while they write: run as a script, ``python crashes.py FOLDER RUNS SEED``.

Every run forks a writer that recovers the folder's router and writes at full speed, compacts and removes old segments, closes and opens
the log again, tells through a pipe what was acknowledged, and is killed at a random moment: half of the kills fall into closing,
opening, compaction or retention. Then a forked reader must find all of it, in a sound chain. Forked, because importing torch takes
longer than a run.
"""

import os
import random
import signal
import struct
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
from audit.worlds import EMBEDDINGS, new_router

from moe_posterior.audit import AuditLog
from moe_posterior.audit.rebuild import rebuild
from moe_posterior.audit.verify import verify, verify_decisions

ACKNOWLEDGED = struct.Struct(
    "<qqqc"
)  # decisions so far in this run, the last one's id, outcomes so far, what comes next
STEPS = {b"w": "writing", b"c": "compaction", b"r": "retention", b"o": "closing and opening"}


def write(folder: Path, pipe: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    options = {"fsync_every": float(rng.choice([0.0, 0.005])), "rotate_bytes": int(rng.choice([3_000, 10**6]))}
    in_background = {"compact": True, "retain_bytes": 1_000_000} if rng.random() < 0.3 else {}
    options |= in_background
    if (folder / "head.json").exists() and verify(folder).totals["decisions"]:
        router = AuditLog.recover(folder, **options)
        log = router._audit.log
    else:
        log = AuditLog(folder, **options)
        router = new_router(log, threshold=0.5, half_life=40.0)
    decisions = last = outcomes = 0
    while True:
        step = rng.choice([b"w", b"c", b"r", b"o"], p=[0.55, 0.15, 0.1, 0.2])
        os.write(pipe, ACKNOWLEDGED.pack(decisions, last, outcomes, bytes(step)))
        if step == b"c":
            log.compact()
        elif step == b"r":
            log.retain(max_bytes=int(rng.choice([100_000, 2_000_000], p=[0.1, 0.9])))
        elif step == b"o":
            log.close()
            router = AuditLog.recover(folder, **options)
            log = router._audit.log
        for _ in range(int(rng.integers(1, 6))):
            ids = router.route_batch(EMBEDDINGS[: int(rng.integers(1, 150))]).ids
            router.resolve_batch(ids[::2], rng.random(len(ids[::2])))
            decisions, last, outcomes = decisions + len(ids), int(ids[-1]), outcomes + len(ids[::2])
        log.flush()


def check(folder: Path, acknowledged: list[tuple[int, int, int]]) -> None:
    found = verify(folder)
    assert found.sound, found.problem
    log = AuditLog(folder, mode="r")
    ids = log.decisions(posterior=False)["id"].to_numpy()
    assert len(np.unique(ids)) == len(ids), "an id was given twice"
    assert len(ids) + found.removed["decisions"] >= sum(decisions for decisions, _, _ in acknowledged)
    assert len(log.outcomes()) + found.removed["outcomes"] >= sum(outcomes for _, _, outcomes in acknowledged)
    oldest = int(ids[0]) if found.removed["segments"] and len(ids) else 0
    missing = {last for decisions, last, _ in acknowledged if decisions and last >= oldest} - set(ids.tolist())
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


def killed(folder: Path, rng: random.Random, seed: int) -> tuple[str, tuple[int, int, int] | None]:
    """One writer's life and end: in which step it died, and what it had acknowledged."""
    reading, writing = os.pipe()
    pid = forked(write, folder, writing, seed)
    os.close(writing)
    target = rng.choice([None, *STEPS])  # None: while it opens, or soon after
    told, wait = b"", 0.15 if target in (None, b"w") else 0.02
    for _ in range(200 if target else 0):
        told += os.read(reading, ACKNOWLEDGED.size)
        if told.endswith(target) and (target != b"w" or rng.random() < 0.3):
            break
    time.sleep(rng.random() * wait)
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the writer died by itself"
    while piece := os.read(reading, 1 << 16):
        told += piece
    os.close(reading)
    whole = len(told) // ACKNOWLEDGED.size * ACKNOWLEDGED.size
    if not whole:
        return "opening", None
    *acknowledged, step = ACKNOWLEDGED.unpack(told[whole - ACKNOWLEDGED.size : whole])
    return STEPS[step], tuple(acknowledged)


def main(folder: Path, runs: int, seed: int) -> int:
    rng, acknowledged, steps = random.Random(seed), [], Counter()
    for run in range(runs):
        step, told = killed(folder, rng, seed * 1000 + run)
        steps[step] += 1
        if told is not None:
            acknowledged.append(told)
        if (folder / "head.json").exists():
            assert os.waitpid(forked(check, folder, acknowledged), 0)[1] == 0, (
                f"run {run} lost something, killed in {step}"
            )
    removed = verify(folder).removed["decisions"]
    print(
        f"{runs} runs, {sum(decisions for decisions, _, _ in acknowledged)} acknowledged decisions, none lost "
        f"({removed} removed by retention); killed in {dict(sorted(steps.items()))}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
