"""A log as one self-contained web page, for operators, reviewers and regulators.

It is made in one pass over the log, with every hash checked, and stays small however long the log is.
"""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from moe_posterior import escape
from moe_posterior.audit.belief import knobs
from moe_posterior.audit.read import Reader
from moe_posterior.audit.storage.clock import now, when
from moe_posterior.audit.views import charts
from moe_posterior.audit.views.competence import Estimate, standings
from moe_posterior.audit.views.falls import FALSE_ALARMS
from moe_posterior.audit.views.flags import Flag
from moe_posterior.audit.views.survey import SourceSurvey, Survey, require_sources, survey
from moe_posterior.files.atomic import write_text
from moe_posterior.results.page import Section, page, paragraph, table
from moe_posterior.results.tables import Cell, Table, estimate, show

TITLE = "Audit log of routing decisions"
FLAGS, ROWS, DRAWN = 300, 200, 3  # rows of flags and of other tables, and sources with figures, at most
AGAINST = {"pool": "the pool's mean", "start": "its own start"}
DEFINITIONS = (
    "Competence is the posterior mean of an expert's probability of success on a cluster of queries; intervals are central 95 % ones. "
    "Over all clusters it is the plain mean of the clusters' means; the interval then takes the clusters for independent, and is too "
    "narrow where the router pools evidence between them.",
    "A flag goes up where outcomes show that an expert fell: failures come more often than in the record of the same cluster, which "
    "begins with what the log was told of it by a warm start. Whoever was bad all along has not fallen. Against the pool: it fell, and "
    "its mean + 2 standard deviations lie below the plain mean of the active experts; plain, because weighted by traffic it would "
    "follow the expert that gets most of it and hide just its fall. A flag ends where outcomes show that the expert rose again.",
    f"An expert that stays as it is, is flagged with probability {FALSE_ALARMS:.0%} at most, however long the log is and however often "
    "it is read: half of that over all clusters, half on any of them. Of 100 such experts about one may carry a flag.",
    "The chain of hashes shows that nothing was changed since it was written, if the head's hash here equals one that was noted "
    "elsewhere at the time, or if the log has a key that who can write to the folder does not know. It does not show that what was "
    "written was true.",
)


def write_page(folder: str | PathLike[str], file: str | PathLike[str], key: bytes | None = None) -> None:
    """Read a log from its start and write the page, whole or not at all.

    Args:
        folder: of the log; a writer may be at work there.
        file: to write, for instance ``audit.html``.
        key: of the log, if it has one.

    Raises:
        AuditError: the log is malformed or altered, or holds no records. UnwritableFileError: the file cannot be written.
    """
    reader = Reader(Path(folder), key)
    found = survey(reader)
    require_sources(found)
    write_text(file, to_html(found, chain_state(reader)))


def chain_state(reader: Reader) -> dict[str, str]:
    """The state of the log's chain after reading to its end."""
    chain = reader.chain
    if chain is None:
        return {}
    ended = (
        "closed by its writer" if chain.head.closed else "open: being written, or its writer ended without closing it"
    )
    if chain.torn:
        ended = f"ends in an unfinished record of {chain.torn_bytes:,} bytes, as a crash leaves it"
    keyed = (
        "every hash is a MAC under the log's key"
        if reader.key
        else "no key: hashes can be recomputed by whoever can write"
    )
    return {
        "chain": f"unbroken up to record {chain.end.frames - 1} of segment {chain.end.segment}; {ended}",
        "head": chain.end.digest.hex(),
        "key": keyed,
    }


def to_html(found: Survey, chain: Mapping[str, str]) -> str:
    """Render the findings as one HTML document that needs no network. Text in it is escaped.

    Args:
        found: from :func:`~moe_posterior.audit.views.survey.survey`.
        chain: from :func:`chain_state`.

    >>> document = to_html(Survey(), {"head": "<b>"})
    >>> "<b>" in document, "&lt;b&gt;" in document
    (False, True)
    """
    sources = sorted(found.sources.values(), key=lambda source: -source.decisions)
    times = [time for source in sources for time in (source.first_time, source.last_time) if time]
    decisions = sum(source.decisions for source in sources)
    span = f", {when(min(times))} to {when(max(times))}" if times else ""
    drawn = [(f"s{number}", source) for number, source in enumerate(sources[:DRAWN])]
    return page(TITLE, f"{decisions:,} decisions{span}", [
        Section("summary", "Summary", _summary(found, sources, chain)),
        Section("flags", "Experts that fell", _flags(sources)),
        Section("competence", "Competence of the experts", _competence(sources)),
        Section("trajectories", "Trajectories over all clusters", "".join(_experts(*one) for one in drawn)),
        Section("clusters", "Trajectories by cluster", "".join(_clusters(*one) for one in drawn)),
        Section("configuration", "Configuration, pool and log", _configuration(found, sources)),
        Section("notes", "How to read this", "".join(map(paragraph, DEFINITIONS))),
    ])  # fmt: skip


def _summary(found: Survey, sources: list[SourceSurvey], chain: Mapping[str, str]) -> str:
    said: list[list[object]] = [["read", when(now())]]
    said.extend([name, text] for name, text in chain.items())
    said.extend([f"dropped {what}", count] for what, count in sorted(found.dropped.items()))
    said.extend([f"{what} removed by retention", n] for what, n in sorted(found.removed.items()) if "time" not in what)
    if found.unclaimed:
        said.append(["decisions of sources whose checkpoint was removed", found.unclaimed])
    columns = ["source", "decisions", "outcomes", "mean outcome", "pending", "refused", "abstained", "explored"]
    rows = [
        [
            source.name,
            source.decisions,
            source.outcomes,
            source.mean_outcome,
            source.waiting,
            sum(source.refused.values()),
            _share(source.abstained, source.decisions),
            _share(source.explored, source.decisions),
        ]
        for source in sources[:ROWS]
    ]
    refused = [[source.name, reason, n] for source in sources for reason, n in source.refused.most_common()][:ROWS]
    html = table(Table(columns, rows)) + table(Table(["log", "state"], said))
    if refused:
        html += "<h3>Outcomes that were refused</h3>" + table(Table(["source", "reason", "outcomes"], refused))
    return html


def _flags(sources: list[SourceSurvey]) -> str:
    flagged = [(source, flag) for source in sources for flag in source.flags()]
    if not flagged:
        return paragraph("No expert fell below the pool or its own start, on any cluster or over all.", "absent")
    flagged.sort(key=lambda one: (one[1].cluster is not None, one[1].number))
    columns = [
        "source",
        "expert",
        "cluster",
        "below",
        "decision",
        "at",
        "mean",
        "std",
        "level",
        "times",
        "until",
    ]
    rows = [_flag_row(source.name, flag) for source, flag in flagged[:FLAGS]]
    text = f"{len(flagged):,} flags; those over all clusters first, then in the order in which they went up."
    text += f" The first {FLAGS} are shown." if len(flagged) > FLAGS else ""
    return paragraph(text, "note") + table(Table(columns, rows))


def _flag_row(source: str, flag: Flag) -> list[object]:
    until = "still" if flag.ended is None else f"decision {flag.ended}, {when(flag.ended_time or 0)}"
    return [
        source,
        flag.expert,
        "all" if flag.cluster is None else str(flag.cluster),
        AGAINST[flag.against],
        flag.decision,
        when(flag.time),
        flag.mean,
        flag.std,
        flag.level,
        flag.times,
        until,
    ]


def _competence(sources: list[SourceSurvey]) -> str:
    columns = [
        "source",
        "expert",
        "in the pool",
        "chosen",
        "share",
        "mean outcome",
        "over all clusters",
        "where asked",
        "flags up",
        "low",
    ]
    rows = sorted((row for source in sources for row in _expert_rows(source)), key=lambda row: -row[0])
    text = (
        "Posterior mean and 95 % interval at the end of the log, a warm start included. Mean outcome: of what came "
        "back. Where asked: clusters weighted by how often the expert was chosen "
        "there. Flags up: how many are up now. Low: clusters on which it stands below the pool "
        "without having fallen."
    )
    text += f" The {ROWS} experts chosen most of {len(rows):,} are shown." if len(rows) > ROWS else ""
    return paragraph(text, "note") + table(Table(columns, [row for _, row in rows[:ROWS]]))


def _expert_rows(source: SourceSurvey) -> list[tuple[int, list[object]]]:
    """How often each expert was chosen, and its row."""
    found, total = standings(source), int(source.chosen.sum())
    rows = []
    for one in found:
        share = _share(one.chosen, total)
        judged: list[object] = [_cell(one.over_all), _cell(one.asked), one.flags, one.low]
        known = source.sampler is not None
        row = [source.name, one.expert, one.active if known else None, one.chosen, share, one.observed]
        rows.append((one.chosen, [*row, *(judged if known else [None] * 4)]))
    return rows


def _cell(one: Estimate | None) -> Cell:
    return estimate(None) if one is None else estimate(*one)


def _experts(name: str, source: SourceSurvey) -> str:
    samples, head = source.samples(), f"<h3>{escape.html(source.name)}</h3>"
    if samples is None:
        return head + paragraph("This gate has no belief.", "absent")
    note = ""
    if source.earlier:
        note = f"The clusters were last found after {source.earlier:,} decisions; trajectories and flags begin there."
    return (
        head + (paragraph(note, "note") if note else "") + charts.experts_figure(name, source, samples, source.flags())
    )


def _clusters(name: str, source: SourceSurvey) -> str:
    samples, head = source.samples(), f"<h3>{escape.html(source.name)}</h3>"
    if samples is None or not source.traffic.any():
        return head + paragraph("Nothing was decided here yet.", "absent")
    note = f"The {charts.CLUSTERS} busiest clusters; in each the {charts.PANELS} experts that are flagged or were asked most."
    return head + paragraph(note, "note") + charts.cluster_figures(name, source, samples, source.flags())


def _configuration(found: Survey, sources: list[SourceSurvey]) -> str:
    rows: list[list[object]] = []
    for source in sources:
        settings = source.checkpoint.settings if source.checkpoint is not None else {}
        said = {name: settings.get(name) for name in ("kind", "num_experts", "num_clusters", "top_k", "rate")}
        options = settings.get("options")
        said |= {
            **(options if isinstance(options, dict) else {}),
            **(knobs(source.checkpoint) if source.checkpoint else {}),
        }
        rows += [[source.name, str(name), str(value)] for name, value in said.items() if value is not None]
    happened = [[when(one.time), one.source, one.what, str(one.before)] for one in reversed(found.happenings)]
    note = f"What happened, the latest first: {len(happened)} of {found.happened}."
    return (
        table(Table(["source", "setting", "value"], rows[:ROWS]))
        + "<h3>What happened</h3>"
        + paragraph(note, "note")
        + table(Table(["time", "source", "what", "decisions before"], happened))
    )


def _share(count: int, total: int) -> Cell:
    share = count / total if total else 0.0
    return Cell(f"{100 * share:.1f} %", share, more=show(count)) if total else Cell(show(None))
