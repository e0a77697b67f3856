"""A log in summary: decisions, outcomes, and each expert's competence with intervals."""

from typing import Any

from moe_posterior.audit.read import Reader
from moe_posterior.audit.views.competence import Estimate, standings
from moe_posterior.audit.views.survey import SourceSurvey, survey


def summarise(reader: Reader) -> dict[str, Any]:
    """First and last time (microseconds since 1970), and for each source its counts and its experts' competence.

    An expert's ``competence`` is its posterior mean over all clusters, ``low`` and ``high`` its central 95 % interval; ``asked``,
    ``asked_low``, ``asked_high`` are the same with each cluster weighted by how often the expert was asked there. Both come from the
    posterior as the last decisions saw it, a warm start included, and are what
    :func:`~moe_posterior.audit.views.page.write_page` shows. ``observed`` is the plain mean of its outcomes. What is not known is None.

    Raises:
        AuditError: the log was altered or is malformed.
    """
    found = survey(reader)
    return {
        "first_time": found.first_time,
        "last_time": found.last_time,
        "sources": [_summary(source) for source in found.sources.values()],
    }


def _summary(source: SourceSurvey) -> dict[str, Any]:
    share = 1 / max(source.decisions, 1)
    return {
        "source": source.name,
        "decisions": source.decisions,
        "outcomes": source.outcomes,
        "refused": source.refused_ids,
        "abstained": source.abstained,
        "abstained_share": source.abstained * share,
        "explored": source.explored,
        "explored_share": source.explored * share,
        "decisions_by_cluster": source.by_cluster.tolist(),
        "experts": [
            {
                "expert": one.expert,
                "active": one.active,
                "chosen": one.chosen,
                "outcomes": one.outcomes,
                "observed": one.observed,
                **_named(one.over_all, "competence", "low", "high"),
                **_named(one.asked, "asked", "asked_low", "asked_high"),
                "flags": one.flags,
            }
            for one in standings(source)
        ],
        "outcomes_of_decisions_no_longer_held": source.unmatched,
    }


def _named(estimate: Estimate | None, *names: str) -> dict[str, float | None]:
    return dict(zip(names, estimate or (None, None, None), strict=True))
