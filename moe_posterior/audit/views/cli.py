"""``moe-posterior audit``: inspect a log, verify it, recompute it, export it."""

import argparse
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np

from moe_posterior.audit.log import AuditLog
from moe_posterior.audit.rebuild import rebuild
from moe_posterior.audit.storage.clock import when
from moe_posterior.audit.verify import Verification, verify, verify_decisions
from moe_posterior.audit.views.export import export
from moe_posterior.audit.views.page import write_page
from moe_posterior.audit.views.stats import summarise
from moe_posterior.audit.views.watch import MOST_MINUTES, watch
from moe_posterior.commands.audit import parser
from moe_posterior.errors import AuditError, InvalidArgumentError, MissingDataError
from moe_posterior.escape import terminal

_OVER_ALL, _ASKED = ("competence", "low", "high"), ("asked", "asked_low", "asked_high")


def audit(arguments: Sequence[str]) -> int:
    """Run ``moe-posterior audit``; the exit status is 0, or 1 if a log is not what was written."""
    given = parser().parse_args(arguments)
    key = given.key_file.read_bytes() if given.key_file else None
    if given.command == "verify":
        return _verify(given, key)
    if given.command == "watch":
        return _watch(given, key)
    log = AuditLog(given.folder, mode="r", key=key)
    return {"show": _show, "stats": _stats, "replay": _replay, "export": _export}[given.command](log, given)


def _when(time: Any) -> str:
    if isinstance(time, datetime):
        return time.isoformat(sep=" ", timespec="milliseconds").removesuffix("+00:00")
    return when(time).removesuffix(" UTC")


def _show(log: AuditLog, given: argparse.Namespace) -> int:
    table = log.decisions(ids=given.id, expert=given.expert, cluster=given.cluster, last=given.last)
    rows = table.to_pylist()
    if given.json:
        for row in rows:
            times = {name: row[name].isoformat() if row[name] else None for name in ("time", "resolved")}
            print(json.dumps(row | times))
        return 0
    print(
        f"{'id':>12} {'time (UTC)':23} {'cluster':>7} {'distance':>8} {'expert':>6} {'score':>7} {'mean':>6}  outcome"
    )
    for row in rows:
        best = row["experts"][0]
        mean = "" if row["alpha"] is None else f"{row['alpha'][best] / (row['alpha'][best] + row['beta'][best]):.3f}"
        signal = "waits" if row["signal"] is None else " ".join(f"{value:g}" for value in row["signal"])
        notes = [word for word in ("abstain", "explored") if row[word]] + [f"also {e}" for e in row["experts"][1:]]
        source = [] if row["source"] == "router" else [terminal(row["source"])]
        print(
            f"{row['id']:>12} {_when(row['time']):23} {row['cluster']:>7} {row['distance']:>8.3f} {best:>6} "
            f"{row['scores'][0]:>7.4f} {mean:>6}  {', '.join([signal, *notes, *source])}"
        )
    print(f"{len(rows)} decisions")
    return 0


def _stats(log: AuditLog, given: argparse.Namespace) -> int:
    found = summarise(log.read())
    if given.json:
        print(json.dumps(found))
        return 0
    if found["first_time"] is not None:
        print(f"from {_when(found['first_time'])} to {_when(found['last_time'])} UTC")
    for source in found["sources"]:
        print(f"\n{terminal(source['source'])}")
        for name in ("decisions", "outcomes", "refused"):
            print(f"  {name:<10} {source[name]:>12,}")
        for name in ("abstained", "explored"):
            print(f"  {name:<10} {source[name]:>12,}  {source[name + '_share']:.2%}")
        print(
            f"\n  {'expert':>6} {'chosen':>12} {'outcomes':>12} {'observed':>8}  competence, 95 %       where asked, 95 %"
        )
        for row in source["experts"]:
            seen = "" if row["observed"] is None else f"{row['observed']:.4f}"
            over_all, asked = (_bounds(row, *names) for names in (_OVER_ALL, _ASKED))
            print(
                f"  {row['expert']:>6} {row['chosen']:>12,} {row['outcomes']:>12,} {seen:>8}  {over_all:22} {asked}".rstrip()
            )
    return 0


def _bounds(row: dict[str, Any], mean: str, low: str, high: str) -> str:
    return "" if row[mean] is None else f"{row[mean]:.4f} [{row[low]:.3f}, {row[high]:.3f}]"


def _verify(given: argparse.Namespace, key: bytes | None) -> int:
    if not (given.folder.is_dir() and any(given.folder.iterdir())):
        raise MissingDataError(f"there is no audit log in {given.folder}")
    found = verify(given.folder, key, head=given.head)
    report = {**_report(found), "choices": None}
    good = found.sound
    if given.decisions and found.sound:
        choices = verify_decisions(AuditLog(given.folder, mode="r", key=key).read())
        report["choices"] = choices.__dict__
        good = not choices.disagreements
    if given.json:
        print(json.dumps(report))
        return 0 if good else 1
    if not found.sound:
        print(f"ALTERED: {terminal(found.problem)}")
        return 1
    for name in ("segments", "records", "decisions", "outcomes", "refusals", "head"):
        print(f"{name:<10} {report[name]}")
    if found.removed:
        print(
            f"removed    {found.removed['segments']} segments with {found.removed['decisions']} decisions, by retention"
        )
    print(
        "ends       "
        + ("as it was closed" if found.closed else f"open: {found.torn or 'not closed, or still written'}")
    )
    if report["choices"]:
        print(
            f"choices    {choices.agree} recomputed alike, {choices.disagreements} not, {choices.skipped} not recomputable"
        )
        for wrong in choices.disagree[:10]:
            print(f"  {terminal(json.dumps(wrong))}")
    print("sound" if good else "DISAGREES")
    return 0 if good else 1


def _report(found: Verification) -> dict[str, Any]:
    return {
        "sound": found.sound,
        "problem": found.problem,
        "segments": found.segments,
        "records": found.records,
        **{name: found.totals[name] for name in ("decisions", "outcomes", "refusals")},
        "removed": dict(found.removed),
        "closed": found.closed,
        "torn": found.torn,
        "torn_bytes": found.torn_bytes,
        "cut_bytes": found.cut_bytes,
        "head": None if found.head is None else found.head.digest.hex(),
    }


def _replay(log: AuditLog, given: argparse.Namespace) -> int:
    try:
        router = rebuild(log.read(), given.name, check=True)
    except AuditError as error:
        print(f"DISAGREES: {terminal(error)}")
        return 1
    belief = router.posterior
    observed = float((belief.successes + belief.failures).sum())
    waiting = int(np.count_nonzero(router.state()["pending"]["id"].numpy() >= 0))
    print(f"experts    {belief.num_experts}, of which active {int(belief.active.sum())}")
    print(f"clusters   {belief.num_clusters}")
    print(f"evidence   {observed:g} observations")
    print(f"waiting    {waiting} decisions without an outcome")
    if given.out is not None:
        router.save(given.out)
        print(f"saved      {terminal(given.out)}")
    print("the records lead to every checkpoint, bit for bit")
    return 0


def _watch(given: argparse.Namespace, key: bytes | None) -> int:
    if not given.every > 0 or not 0 < given.minutes <= MOST_MINUTES:
        raise InvalidArgumentError(
            f"--every must be above 0 and --minutes at most {MOST_MINUTES}; got {given.every} and {given.minutes}"
        )
    return watch(given.folder, key, once=given.once, every=given.every, minutes=given.minutes)


def _export(log: AuditLog, given: argparse.Namespace) -> int:
    if given.html is not None:
        write_page(log.folder, given.html, log.key)
        print(terminal(given.html))
        return 0
    for path, rows in export(log.read(), given.out, given.format).items():
        print(f"{rows:>12,} rows  {terminal(path)}")
    return 0
