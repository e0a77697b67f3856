"""Recompute the choices in a log from the posterior it holds.

Dimensions: N decisions, C clusters, E experts, k experts per decision, R rows of the posterior.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_posterior import beta as beta_functions
from moe_posterior.audit.belief import BeliefState, RowsOfGroup, knobs
from moe_posterior.audit.read import Reader, Source
from moe_posterior.audit.storage.tables import ROUTE, Group
from moe_posterior.errors import AuditError
from moe_posterior.gates import PosteriorGate
from moe_posterior.kernels import reference
from moe_posterior.memberships import Memberships

_SLACK = 1e-6  # for scores that are not plain arithmetic: a quantile's last bits depend on the batch size


@dataclass
class Recomputed:
    """What :func:`verify_decisions` found."""

    agree: int = 0
    disagree: list[dict[str, Any]] = field(default_factory=list)  # the first hundred
    disagreements: int = 0
    skipped: int = 0  # decisions of gates without a belief, or with draws that were not recorded


def verify_decisions(reader: Reader) -> Recomputed:
    """Recompute every choice from the posterior rows and the configuration that the log holds.

    Choices that depend on the cluster alone are recomputed from the rows; of those by a learned prior of scale "competence", the scores
    and their order, from what was believed of the chosen. Those that were drawn (exploration, ``thompson``,
    ``race``) or blended (``novelty="discount"``) are made again by a gate with these rows and the recorded state of its draws.

    Raises:
        AuditError: the log was altered or is malformed.
    """
    found = Recomputed()
    for group, source, rows in reader.groups():
        count = group.rows("decisions")
        if not count:
            continue
        drawn = source is not None and not _undrawn(source, group)
        # A gate that overrules a learned router records no score: the logits it chose by are not in the log.
        learned = source is not None and ("score" not in knobs(source.checkpoint) or _by_odds(source))
        if source is None or rows is None or learned or (drawn and source.checkpoint.settings["kind"] != "router"):
            found.skipped += count
            continue
        try:
            undrawn = table_choices if group.members() is None else _mixed_choices
            if group.rows("beliefs"):
                undrawn = _chosen_again
            choices = (_drawn_choices if drawn else undrawn)(group, source, rows)
        except (ValueError, ArithmeticError, KeyError, TypeError, IndexError, RuntimeError) as error:
            raise AuditError(f"choices of {source.name!r} do not fit the checkpoint before them: {error}") from error
        _compare(group, source, found, *choices)
    return found


def _by_odds(source: Source) -> bool:
    """Whether experts were ranked by a learned prior's log odds, which are not in the log."""
    return (source.checkpoint.settings.get("options") or {}).get("scale") == "odds"


def _undrawn(source: Source, group: Group) -> bool:
    said = knobs(source.checkpoint)
    options = source.checkpoint.settings.get("options") or {}
    return (
        said.get("score") not in ("thompson", "race")
        and not said.get("exploration")
        and (options.get("novelty") != "discount" or group.rows("beliefs") > 0)
    )


def table_choices(
    group: Group, source: Source, rows: RowsOfGroup
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:  # (N, k), (N, k)
    """Experts and scores of a group's decisions, from each distinct posterior row once."""
    assert source.belief is not None
    decisions = group.tables["decisions"]
    used, place = np.unique(rows.places(decisions), return_inverse=True)
    alpha, beta = torch.from_numpy(rows.alpha[used]), torch.from_numpy(rows.beta[used])
    scores = _scores(alpha, beta, knobs(source.checkpoint))
    scores = scores.masked_fill(~torch.from_numpy(source.belief.active), -torch.inf)
    clusters = torch.from_numpy((rows.keys[used] >> 32).astype(np.int64))
    selection = reference.select(scores, clusters, group.top_k)
    return selection.expert_indices.numpy()[place], selection.scores.float().numpy()[place]


def _mixed_choices(group: Group, source: Source, rows: RowsOfGroup) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """As :func:`table_choices`, of queries that belong to several clusters."""
    assert source.belief is not None
    decisions = group.tables["decisions"]
    alpha, beta = (torch.from_numpy(part) for part in rows.believed(group, np.arange(group.rows("decisions"))))
    scores = _scores(alpha, beta, knobs(source.checkpoint))
    scores = scores.masked_fill(~torch.from_numpy(source.belief.active), -torch.inf)
    selection = reference.select(scores, torch.from_numpy(decisions["cluster"].astype(np.int64)), group.top_k)
    return selection.expert_indices.numpy(), selection.scores.float().numpy()


def _chosen_again(group: Group, source: Source, rows: RowsOfGroup) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The chosen experts ranked by their recorded belief, if the log does not hold the belief about the others."""
    beliefs, experts = group.tables["beliefs"], group.tables["decisions"]["experts"].astype(np.int64)
    alpha, beta = (torch.from_numpy(beliefs[name].copy()) for name in ("alpha", "beta"))
    scores = _scores(alpha, beta, knobs(source.checkpoint)).float().numpy()
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(experts, order, axis=1), np.take_along_axis(scores, order, axis=1)


def _scores(alpha: Tensor, beta: Tensor, said: dict[str, Any]) -> Tensor:  # (R, E)
    if said.get("score") == "lcb":
        return beta_functions.lcb(alpha, beta, said["risk_aversion"])
    if said.get("score") == "quantile":
        return beta_functions.quantile(alpha, beta, said["credible_level"])
    return beta_functions.mean(alpha, beta)


class _Replayed(torch.nn.Module):
    """Stands in for a clusterer: returns the assignments in the log."""

    def __init__(self, assignment: reference.Assignment, radius: Tensor) -> None:
        super().__init__()
        self.assignment, self.radius = assignment, radius

    def require_fitted(self) -> None:
        """Always fitted."""

    def forward(self, hidden: Tensor) -> reference.Assignment:
        return self.assignment


class _ReplayedMembers(torch.nn.Module):
    """Stands in for a gate's memberships: returns those in the log."""

    def __init__(self, assignment: reference.Assignment, members: Memberships) -> None:
        super().__init__()
        self.assignment, self.members = assignment, members

    def forward(self, clusterer: object, hidden: Tensor) -> tuple[reference.Assignment, Memberships]:
        return self.assignment, self.members


class _StandIn(PosteriorGate):
    """A gate whose belief, and the experts it has lost trust in, are set from the log."""

    lost: Tensor  # (E,) bool

    @property
    def fallen(self) -> Tensor:
        return self.lost


def _stand_in(source: Source) -> _StandIn:
    settings, said, arrays = source.checkpoint.settings, knobs(source.checkpoint), source.checkpoint.arrays
    options = {**settings["options"], "num_experts": settings["num_experts"], "lazy": True}
    made_the_rows = ("half_life", "shrinkage", "surprise", "pooling", "false_positive_rate", "false_negative_rate")
    of_the_router = ("abstain_below", "max_pending")
    gate = _StandIn(**{name: value for name, value in options.items() if name not in made_the_rows + of_the_router})
    gate.configure(**{name: said[name] for name in ("score", "risk_aversion", "temperature", "exploration")})
    gate.lost = torch.from_numpy(arrays["gate.posterior.trust"] < 1) & torch.from_numpy(arrays["active"])
    return gate


def _drawn_choices(group: Group, source: Source, rows: RowsOfGroup) -> tuple[NDArray, NDArray]:  # (N, k), (N, k)
    """Recompute call by call, with a gate that has the recorded rows and the recorded state of its draws."""
    assert source.belief is not None
    said = knobs(source.checkpoint)
    gate = _stand_in(source)
    belief, decisions, calls = gate.posterior, group.tables["decisions"], group.tables["calls"]
    belief.active.copy_(torch.from_numpy(source.belief.active))
    members = group.members()
    resting = decisions if members is None else members  # what each decision rests on: one row, or J
    places, routed = rows.places(resting), calls["kind"] == ROUTE
    bumps = said["score"] == "thompson" or said["exploration"] > 0
    radius = torch.from_numpy(source.checkpoint.arrays["radius"])
    ends = np.cumsum(calls["rows"][routed].astype(np.int64))
    numbers = torch.from_numpy(group.decision_ids())
    experts, scores = [], []
    tables = _table_walk(source.belief, rows)
    for end, size, steps in zip(
        ends.tolist(), calls["rows"][routed].tolist(), calls["steps"][routed].tolist(), strict=True
    ):
        here = slice(end - size, end)
        alpha, beta = tables(places[here].reshape(-1), resting["cluster"][here].reshape(-1))
        belief.prior_alpha.copy_(torch.from_numpy(alpha))
        belief.prior_beta.copy_(torch.from_numpy(beta))
        clusters = torch.from_numpy(decisions["cluster"][here].astype(np.int64))
        assignment = reference.Assignment(clusters, torch.from_numpy(decisions["distance"][here].copy()))
        gate.clusterer = _Replayed(assignment, radius)  # type: ignore[assignment]
        if members is not None:
            parts = members["cluster"][here].astype(np.int64), members["share"][here].copy()
            several = Memberships(*(torch.from_numpy(part) for part in parts))
            gate.members = _ReplayedMembers(assignment, several)  # type: ignore[assignment]
        gate.steps.fill_(steps - bumps)
        routing = gate.route(torch.zeros(1).expand(size, gate.hidden_size), numbers[here])
        experts.append(routing.expert_indices.numpy())
        scores.append(routing.scores.numpy())
    return np.concatenate(experts), np.concatenate(scores)


def _table_walk(belief: BeliefState, rows: RowsOfGroup) -> Any:
    """A function from the rows a call used to the full tables at that call."""
    bases = np.flatnonzero(np.diff(rows.keys >> 32, prepend=-1))
    clusters = rows.keys[bases] >> 32
    alpha, beta = belief.alpha.copy(), belief.beta.copy()
    alpha[clusters], beta[clusters] = rows.alpha[bases], rows.beta[bases]

    def at(places: NDArray, of: NDArray) -> tuple[NDArray, NDArray]:
        alpha[of], beta[of] = rows.alpha[places], rows.beta[places]
        return alpha, beta

    return at


def _compare(group: Group, source: Source, found: Recomputed, experts: NDArray, scores: NDArray) -> None:
    decisions = group.tables["decisions"]
    near = np.isclose(decisions["scores"], scores, rtol=0, atol=_SLACK, equal_nan=True).all(axis=1)
    exact = knobs(source.checkpoint).get("score") in ("lcb", "mean", "race")
    same = (decisions["experts"] == experts).all(axis=1)
    good = (same & near) if exact else near  # two quantiles may tie up to rounding
    if exact:
        good &= (decisions["scores"] == scores).all(axis=1) | np.isnan(scores).any(axis=1)
    found.agree += int(good.sum())
    wrong = np.flatnonzero(~good)
    found.disagreements += len(wrong)
    ids = group.decision_ids()
    for row in wrong[: 100 - len(found.disagree)].tolist():
        found.disagree.append(
            {
                "source": source.name,
                "id": int(ids[row]),
                "logged": {"experts": decisions["experts"][row].tolist(), "scores": decisions["scores"][row].tolist()},
                "recomputed": {"experts": experts[row].tolist(), "scores": scores[row].tolist()},
            }
        )
