"""One pass over a log: decisions, outcomes, competence and its history. Memory does not grow with the log.

Dimensions: N decisions, C clusters, E experts, k experts per decision.
"""

import re
from collections import Counter, deque
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_posterior.audit.belief import knobs
from moe_posterior.audit.read import Reader, Record, Source
from moe_posterior.audit.storage.marks import REMOVED, read_note
from moe_posterior.audit.storage.state import Checkpoint
from moe_posterior.audit.storage.tables import ABSTAIN, EXPLORED, ROUTE, Group
from moe_posterior.audit.views.asked import Asked
from moe_posterior.audit.views.flags import Flag, Flagging, outcomes_of
from moe_posterior.audit.views.trajectories import Sampler, Samples
from moe_posterior.errors import AuditError

_KINDS_OF_REFUSAL = 30  # distinguished; the rest are counted together
_EVENTS = 200  # the latest; all are counted
_NEW_CLUSTERS, _NEW_BELIEF = (
    "fit",
    ("attached", "warm start"),
)  # reasons of checkpoints that reset the starting competence
_NEW_EXPERT = re.compile(r"expert (\d+) (?:added|replaced|removed)")


class Happening(NamedTuple):
    """An event other than a decision or an outcome."""

    time: int
    source: str
    what: str
    before: int  # decisions of the source before it


class SourceSurvey:
    """The history of one router or gate."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.decisions = self.outcomes = self.unknown = self.abstained = self.explored = 0
        self.refused: Counter[str] = Counter()
        self.chosen = np.zeros(0, dtype=np.int64)  # (E,) slots given to each expert
        self.seen, self.won = (
            np.zeros(0),
            np.zeros(0),
        )  # (E,) outcomes of each expert that were not unknown, and their sum
        self.by_cluster = np.zeros(0, dtype=np.int64)  # (C,) decisions
        self.refused_ids = 0  # decisions with an outcome that was refused, counted once a group commit
        self.unmatched = 0  # outcomes of decisions that the log no longer holds
        self.asked: Asked | None = None
        self.traffic = np.zeros(
            (0, 0), dtype=np.int64
        )  # (C, E) slots given in each cluster, since the clusters were last found
        self.signal = 0.0  # sum of what came back
        self.first_time = self.last_time = 0  # of a decision
        self.checkpoint: Checkpoint | None = None
        self.sampler: Sampler | None = None
        self.flagging: Flagging | None = None
        self.earlier = 0  # decisions before the last fit

    def told(self, source: Source) -> str | None:
        """Add a checkpoint; returns what changed in it."""
        checkpoint, belief, old = source.checkpoint, source.belief, self.checkpoint
        self.checkpoint = checkpoint
        if self.asked is None:
            self.asked = Asked(checkpoint)
        else:
            self.asked.told(checkpoint)
        self.chosen, self.seen, self.won = (
            _widened(counts, int(checkpoint.settings["num_experts"])) for counts in (self.chosen, self.seen, self.won)
        )
        self.by_cluster = _widened(self.by_cluster, int(checkpoint.settings["num_clusters"]))
        reason, time = str(checkpoint.settings.get("reason")), _integer(checkpoint.settings.get("time"))
        if belief is not None:
            alpha, beta = belief.shown()
            old_shape = (0, 0) if self.sampler is None else self.sampler.alpha.shape
            fresh = reason == _NEW_CLUSTERS or len(alpha) != old_shape[0] or alpha.shape[1] < old_shape[1]
            if fresh or self.sampler is None or self.flagging is None:
                self.sampler = Sampler(alpha, beta, time)
                self.flagging = Flagging(alpha, beta, belief.active, _initial(checkpoint))
                self.earlier, self.traffic = self.decisions, np.zeros(alpha.shape, dtype=np.int64)
            else:
                self.sampler.told(alpha, beta, time)
                next_id = _integer(checkpoint.settings.get("next_id"))
                experts = _begun_anew(reason, len(belief.active))
                self.flagging.told(alpha, beta, belief.active, experts, next_id, time)
                new = alpha.shape[1] - self.traffic.shape[1]
                self.traffic = np.pad(self.traffic, ((0, 0), (0, new)))
        if reason == "rotated":
            return None
        changes = _changes(old, checkpoint)
        return f"{reason}: {changes}" if changes else reason

    def take(self, group: Group, source: Source) -> None:
        """Add a group commit."""
        decisions, outcomes = group.tables["decisions"], group.tables["outcomes"]
        flags = decisions["flags"]
        resolved = self._resolve(group)
        if source.belief is not None and self.sampler is not None and self.flagging is not None:
            rows = source.belief.advance(group)
            came = outcomes_of(group, self.decisions, *resolved, self.flagging.mean.shape)
            self.flagging.advance(rows, group, self.decisions, came, knobs(source.checkpoint).get("threshold"))
            if len(flags):
                self.sampler.advance(group, rows)
                np.add.at(self.traffic, (decisions["cluster"][:, None], decisions["experts"]), 1)
        if len(flags):
            times = group.tables["calls"]["time"][group.tables["calls"]["kind"] == ROUTE]
            self.first_time = self.first_time or int(times[0])
            self.last_time = int(times[-1])
            self.chosen += np.bincount(decisions["experts"].reshape(-1), minlength=len(self.chosen))
            self.by_cluster += np.bincount(decisions["cluster"], minlength=len(self.by_cluster))
        self.decisions += len(flags)
        self.refused_ids += len(np.unique(group.tables["refusals"]["id"]))
        self.abstained += int(np.count_nonzero(flags & ABSTAIN))
        self.explored += int(np.count_nonzero(flags & EXPLORED))
        self.outcomes += len(outcomes["id"])
        unknown = np.isnan(outcomes["signal"])
        self.unknown += int(np.count_nonzero(unknown))
        self.signal += float(np.where(unknown, 0.0, outcomes["signal"]).sum())
        for reason, count in Counter(group.tables["refusals"]["reason"].tolist()).items():
            kind = kind_of_refusal(reason)
            room = kind in self.refused or len(self.refused) < _KINDS_OF_REFUSAL
            self.refused[kind if room else "other reasons"] += count

    def _resolve(
        self, group: Group
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:  # (M,), (M,), (M, k)
        """Assign each outcome to its experts; returns whether its decision is known, its cluster and its experts."""
        assert self.asked is not None
        known, clusters, experts = self.asked.resolve(group)
        signal = group.tables["outcomes"]["signal"]
        known &= (clusters < len(self.by_cluster)) & (experts < len(self.chosen)).all(axis=1)
        self.unmatched += int(np.count_nonzero(~known))
        taken = (known & (clusters >= 0))[:, None] & ~np.isnan(signal)
        self.seen += np.bincount(experts[taken], minlength=len(self.seen))
        self.won += np.bincount(experts[taken], signal[taken], minlength=len(self.won))
        return known, clusters, experts

    @property
    def waiting(self) -> int:
        """Decisions without an outcome that can still get one: no more than the router remembers."""
        settings = self.checkpoint.settings if self.checkpoint is not None else {}
        options = settings.get("options")
        most = options.get("max_pending") if isinstance(options, dict) else None
        without = max(0, self.decisions - self.outcomes)
        return min(without, most) if isinstance(most, int) else without

    @property
    def mean_outcome(self) -> float | None:
        """The mean of all outcomes that are not NaN."""
        slots = self.outcomes * (0 if self.checkpoint is None else _integer(self.checkpoint.settings.get("top_k")))
        return self.signal / (slots - self.unknown) if slots > self.unknown else None

    def samples(self) -> Samples | None:
        """Trajectories since the clusters were last found; None without a belief."""
        return None if self.sampler is None else self.sampler.samples()

    def flags(self) -> list[Flag]:
        """Experts that fell since the last fit; see :class:`Flagging`."""
        return [] if self.flagging is None else self.flagging.flags()


class Survey:
    """All sources of a log, and what happened to the log itself."""

    def __init__(self) -> None:
        self.sources: dict[int, SourceSurvey] = {}
        self.happenings: deque[Happening] = deque(maxlen=_EVENTS)
        self.happened = 0
        self.dropped: Counter[str] = Counter()
        self.unclaimed = 0  # decisions of a source whose checkpoint was removed
        self.removed: dict[str, int] = {}  # totals of what retention removed
        self.first_time: int | None = None  # of a call of a router or gate
        self.last_time: int | None = None

    def take(self, record: Record, sources: dict[int, Source]) -> None:
        """Add the next record of a log; ``sources`` as of that record."""
        if isinstance(record, Group):
            found = sources.get(record.source)
            if found is None:
                self.unclaimed += record.rows("decisions")
            else:
                self._source(record.source, found.name).take(record, found)
            calls = record.tables["calls"]["time"]
            if len(calls):  # none if a group commit fell between a posterior row and the decision that uses it
                self.first_time = int(calls[0]) if self.first_time is None else self.first_time
                self.last_time = int(calls[-1])
        elif isinstance(record, Checkpoint):
            number = record.settings["source"]
            said = self._source(number, sources[number].name).told(sources[number])
            if said is not None:
                self._note(record.settings, sources[number].name, said, self.sources[number].decisions)
        else:
            lost = record.get("lost")
            if isinstance(lost, dict):
                self.dropped.update({str(what): _integer(count) for what, count in list(lost.items())[:10]})
            self._note(record, str(record.get("name", "")), _event(record), 0)

    def _source(self, number: int, name: str) -> SourceSurvey:
        if number not in self.sources:
            self.sources[number] = SourceSurvey(name)
        return self.sources[number]

    def _note(self, said: dict[str, Any], source: str, what: str, before: int) -> None:
        self.happened += 1
        self.happenings.append(Happening(_integer(said.get("time")), source, what[:500], before))


def survey(reader: Reader) -> Survey:
    """Read a log once, from its start.

    Raises:
        AuditError: the log is malformed or was altered.
    """
    found = Survey()
    removed = read_note(reader.folder / REMOVED, reader.key)
    found.removed = {} if removed is None else dict(removed.totals)
    for record in reader:
        found.take(record, reader.sources)
    return found


def kind_of_refusal(reason: str) -> str:
    """A refusal's reason without its numbers.

    >>> kind_of_refusal("decision 17 was never given; ids must be pending decisions of this router")
    'decision … was never given; ids must be pending decisions of this router'
    """
    return re.sub(r"-?\d+(\.\d+)?(e[-+]?\d+)?", "…", reason)[:160]


def _begun_anew(reason: str, num_experts: int) -> list[int]:
    """The experts whose starting belief a checkpoint for that reason sets."""
    if reason in _NEW_BELIEF:
        return list(range(num_experts))
    found = _NEW_EXPERT.fullmatch(reason)
    return [int(found[1])] if found and int(found[1]) < num_experts else []


def _initial(checkpoint: Checkpoint) -> float:
    """Pseudo-counts of a cell of which nothing is known."""
    options = checkpoint.settings.get("options") or {}
    given = [options.get(name, 1.0) for name in ("prior_alpha", "prior_beta")]
    return float(sum(value for value in given if isinstance(value, int | float)))


def _widened(counts: NDArray, size: int) -> NDArray:
    return np.pad(counts, (0, max(0, size - len(counts))))


def _integer(value: object) -> int:
    return value if isinstance(value, int) else 0


def _changes(old: Checkpoint | None, new: Checkpoint) -> str:
    """Which knobs differ."""
    if old is None:
        return ""
    before, after = knobs(old), knobs(new)
    names = [name for name in after if before.get(name) != after[name]]
    return ", ".join(f"{name} {before.get(name)} → {after[name]}" for name in names)


def _event(record: dict[str, Any]) -> str:
    """An event as a line."""
    left_out = ("event", "time", "name", "source")
    rest = ", ".join(f"{name}: {value}" for name, value in record.items() if name not in left_out)
    return f"{record.get('event')} ({rest})" if rest else str(record.get("event"))


def require_sources(found: Survey) -> None:
    """Return a log that has a recorded router or gate.

    Raises:
        AuditError: it has none.
    """
    if not found.sources:
        raise AuditError("the log holds no router and no gate yet")
