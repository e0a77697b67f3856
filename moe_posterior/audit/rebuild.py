"""Rebuild the router that wrote a log, bit for bit.

Dimensions: N decisions, M outcomes, C clusters, E experts, k experts per decision.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe_posterior.audit.read import Reader
from moe_posterior.audit.storage.files import DISK, FileSystem, segment_numbers
from moe_posterior.audit.storage.state import Checkpoint
from moe_posterior.audit.storage.tables import RESOLVE, Group
from moe_posterior.errors import AuditError, InvalidArgumentError, MoEPosteriorError
from moe_posterior.gates.rules import KNOBS
from moe_posterior.pending import Members
from moe_posterior.router import PosteriorRouter

_FOLDED = ("rotated", "configured", "recovered", "trust changed")  # reasons of checkpoints that outcomes alone lead to


def restore(checkpoint: Checkpoint) -> PosteriorRouter:
    """The router of a checkpoint.

    Raises:
        AuditError: the checkpoint is not a router's, or is inconsistent.
    """
    settings, arrays = checkpoint.settings, checkpoint.arrays

    def tensors(prefix: str) -> dict[str, torch.Tensor]:
        return {n.removeprefix(prefix): torch.from_numpy(a.copy()) for n, a in arrays.items() if n.startswith(prefix)}

    try:
        state = {
            "options": settings["options"],
            "next_id": settings["next_id"],
            "gate": tensors("gate."),
            "tenure": torch.from_numpy(arrays["tenure"].copy()),
            "pending": tensors("pending."),
        }
        router = PosteriorRouter.from_state(state)
        knobs = settings["knobs"]
        router.gate.configure(**{name: knobs[name] for name in KNOBS})
        router.gate.threshold, router.abstain_below = knobs["threshold"], knobs["abstain_below"]
    except (KeyError, TypeError, ValueError, ArithmeticError, IndexError, RuntimeError, MoEPosteriorError) as error:
        raise AuditError(f"a checkpoint cannot be turned into a router: {error}") from error
    return router


class Fold:
    """A router that is advanced by the records of a log instead of by queries and outcomes."""

    def __init__(self, router: PosteriorRouter) -> None:
        self.router = router
        belief = router.gate.posterior
        self._plain = belief.half_life is None and belief.surprise is None and belief.noise is None
        self._plain = self._plain and not belief.pools and router.gate.members is None
        belief.mute()  # the tables are not read until the end

    def advance(self, group: Group) -> None:
        """Apply a group.

        Raises:
            AuditError: it refers to decisions that the log does not hold.
        """
        router = self.router
        ids, decisions = group.decision_ids(), group.tables["decisions"]
        experts = decisions["experts"].astype(np.int32)
        clusters = np.where(np.isinf(decisions["distance"]), -1, decisions["cluster"].astype(np.int32))
        beyond = len(ids) and (
            int(experts.max()) >= router.gate.num_experts or int(clusters.max()) >= router.gate.num_clusters
        )
        members = _members_of(group)
        width = 0 if members is None else members[0].shape[1]
        if group.top_k != router.gate.top_k or beyond or (len(ids) and width != router.pending.width):
            raise AuditError("a group does not fit the router of the checkpoint before it")
        if group.rows("outcomes"):
            self._learn(group, ids, clusters, experts, members)
        router.take_over(ids, clusters, experts, members)
        router.pending.remove(group.tables["outcomes"]["id"])
        steps = group.tables["calls"]["steps"][group.tables["calls"]["kind"] <= RESOLVE]
        if len(steps):
            router.gate.steps.fill_(int(steps[-1]))

    def finish(self) -> PosteriorRouter:
        """The router, its tables brought up to date."""
        self.router.gate.posterior.mute(False)
        self.router.gate.load_state_dict(self.router.gate.state_dict())
        return self.router

    def _learn(self, group: Group, ids: NDArray, clusters: NDArray, experts: NDArray, members: Members | None) -> None:
        outcomes, pending = group.tables["outcomes"], self.router.pending
        own = [clusters, experts, *(() if members is None else members)]
        held = [pending.cluster, pending.experts, *((pending.members, pending.shares) if pending.width else ())]
        their_clusters, their_experts, *theirs = self._looked_up(outcomes["id"], ids, own, held)
        signal = np.where(their_clusters[:, None] >= 0, outcomes["signal"], np.nan)
        their_clusters = their_clusters.clip(min=0).astype(np.int64)
        calls = group.tables["calls"]
        sizes = calls["rows"][calls["kind"] == RESOLVE].astype(np.int64)
        if self._plain:
            self._add_plainly(np.repeat(np.arange(len(sizes)), sizes), their_clusters, their_experts, signal)
            return
        belief, threshold = self.router.gate.posterior, self.router.gate.threshold
        rows = theirs[0].astype(np.int64) if theirs else their_clusters
        parts = [torch.from_numpy(a) for a in (rows, signal, their_experts.astype(np.int64), *theirs[1:])]
        for cluster, outcome, chosen, *share in zip(*(p.split(sizes.tolist()) for p in parts), strict=True):
            try:
                shares = share[0] if share else None
                belief.observe(cluster, outcome, chosen, shares=shares, threshold=threshold, sync=False)
            except InvalidArgumentError as error:
                raise AuditError(f"the log holds outcomes that the router refuses: {error}") from error

    def _looked_up(
        self, wanted: NDArray, ids: NDArray, own: list[NDArray], held: list[NDArray]
    ) -> list[NDArray]:  # (M,) and (N,); (N, ...) each, (P, ...) each -> (M, ...) each
        """Columns of the decisions that outcomes belong to: this group's own, or pending ones from before."""
        slots, waiting = self.router.pending.find(wanted)
        places = np.searchsorted(ids, wanted).clip(max=max(len(ids) - 1, 0))
        here = ids[places] == wanted if len(ids) else np.zeros(len(wanted), dtype=np.bool_)
        known = here | waiting
        if not known.all():
            raise AuditError(f"the log holds an outcome of decision {int(wanted[~known][0])}, but not the decision")
        found = [column[slots] for column in held]
        for column, of_group in zip(found, own if here.any() else [], strict=bool(here.any())):
            column[here] = of_group[places[here]]
        return found

    def _add_plainly(self, batch: NDArray, clusters: NDArray, experts: NDArray, signal: NDArray) -> None:
        """``observe`` for many calls at once: sums by cell within a call, calls in order; the same additions."""
        gate = self.router.gate
        seen = ~np.isnan(signal)
        cells = (clusters[:, None] * gate.num_experts + experts)[seen]
        values = signal[seen]
        if gate.threshold is not None:
            values = (values >= gate.threshold).astype(np.float64)
        keys = np.repeat(batch, seen.sum(axis=1)) * gate.posterior.successes.numel() + cells
        kept, place = np.unique(keys, return_inverse=True)
        for counts, added in ((gate.posterior.successes, values), (gate.posterior.failures, 1 - values)):
            sums = np.zeros(len(kept))
            np.add.at(sums, place, added)
            np.add.at(counts.numpy().reshape(-1), kept % counts.numel(), sums)


def _members_of(group: Group) -> Members | None:
    members = group.members()
    return None if members is None else (members["cluster"].astype(np.int32), members["share"])


def rebuild(reader: Reader, name: str = "router", *, check: bool = False) -> PosteriorRouter:
    """The router of that name as of the end of the log.

    Args:
        reader: of the log.
        name: which router.
        check: rebuild from the first checkpoint, and compare with every later one that outcomes alone lead to.

    Raises:
        AuditError: the log holds no such router, or (``check``) a checkpoint is not what the records before it lead to.
    """
    fold: Fold | None = None
    checkpoint: Checkpoint | None = None
    waiting: list[Group] = []
    for record in reader:
        if (
            isinstance(record, Checkpoint)
            and record.settings["name"] == name
            and record.settings.get("kind") == "router"
        ):
            if check and fold is not None and record.settings["reason"] in _FOLDED:
                _compare(fold, record)
            checkpoint, waiting = record, []
            fold = Fold(restore(record)) if check else None
        elif isinstance(record, Group) and checkpoint is not None and record.source == checkpoint.settings["source"]:
            if fold is not None:
                fold.advance(record)
            else:
                waiting.append(record)
    if checkpoint is None:
        raise AuditError(f"{reader.folder} holds no router named {name!r}")
    if fold is None:
        fold = Fold(restore(checkpoint))
        for group in waiting:
            fold.advance(group)
    return fold.finish()


def rebuild_from_end(
    folder: Path, key: bytes | None, name: str = "router", files: FileSystem = DISK
) -> PosteriorRouter:
    """As :func:`rebuild`, from the last segment that holds a checkpoint of the router; nothing before it is read.

    Raises:
        AuditError: as :func:`rebuild`.
    """
    for start in reversed(segment_numbers(folder, files)):
        reader = Reader(folder, key, start=start, files=files)
        if any(
            isinstance(r, Checkpoint) and r.settings["name"] == name and r.settings["kind"] == "router" for r in reader
        ):
            return rebuild(reader, name)
    raise AuditError(f"{folder} holds no router named {name!r}")


def _compare(fold: Fold, checkpoint: Checkpoint) -> None:
    expected: dict[str, Any] = {
        n: a for n, a in checkpoint.arrays.items() if n.startswith(("gate.", "tenure", "pending."))
    }
    state = fold.router.state()
    found = {f"gate.{n}": t.numpy() for n, t in state["gate"].items()}
    found |= {"tenure": state["tenure"].numpy()} | {f"pending.{n}": t.numpy() for n, t in state["pending"].items()}
    for name, array in expected.items():
        if not np.array_equal(array, found[name], equal_nan=array.dtype.kind == "f"):
            raise AuditError(
                f"the checkpoint of {checkpoint.settings['time']} ({checkpoint.settings['reason']}) is not what the records "
                f"before it lead to: {name} differs"
            )
