"""Routers with some life in them, recorded: what the audit tests share."""

from pathlib import Path
from typing import Any

import numpy as np

from moe_posterior import InvalidArgumentError, PosteriorRouter
from moe_posterior.audit import AuditLog

E, C, D = 5, 4, 6
EMBEDDINGS = np.random.default_rng(0).normal(size=(200, D)).astype(np.float32)
BELIEFS: dict[str, dict[str, Any]] = {
    "plain": {"score": "lcb"},
    "paper": {"score": "lcb", "threshold": 0.5, "risk_aversion": 0.7},
    "two experts": {"top_k": 2, "score": "mean"},
    "everything": {
        "score": "lcb",
        "half_life": 30.0,
        "shrinkage": 8.0,
        "surprise": 3.0,
        "exploration": 0.2,
        "false_positive_rate": 0.1,
        "top_k": 2,
        "novelty": "discount",
    },
    "thompson": {"score": "thompson", "novelty": "class", "half_life": 50.0},
    "quantile": {"score": "quantile", "max_pending": 60},
    "defaults": {"surprise": 2.0},
    "defaults, two experts": {"top_k": 2, "surprise": 3.0, "exploration": 0.1},
    "several clusters": {"clusterings": 2, "neighbours": 2, "max_pending": 60},
    "several clusters and everything": {
        "clusterings": 2,
        "neighbours": 2,
        "softness": 1.0,
        "half_life": 30.0,
        "shrinkage": 8.0,
        "surprise": 3.0,
        "exploration": 0.2,
        "false_positive_rate": 0.1,
        "top_k": 2,
        "novelty": "discount",
    },
    "several clusters, drawn": {"score": "thompson", "clusterings": 3, "threshold": 0.5},
}


def new_router(log: AuditLog | None, **options: Any) -> PosteriorRouter:
    router = PosteriorRouter(E, D, C, audit=log, **{"max_pending": 300, "abstain_below": 0.3, **options})
    router.fit(EMBEDDINGS)
    return router


def live(router: PosteriorRouter, calls: int, seed: int, waiting: list[int] | None = None) -> list[int]:
    """Route and resolve in batches of all sizes, late, in part and out of order; the ids that still wait."""
    rng, waiting = np.random.default_rng(seed), [] if waiting is None else waiting
    for _ in range(calls):
        size = int(rng.integers(0, 20))
        if rng.random() < 0.4:
            waiting.append(router.route(EMBEDDINGS[rng.integers(200)]).id)
        else:
            waiting.extend(router.route_batch(EMBEDDINGS[rng.integers(200, size=size)]).ids.tolist())
        rng.shuffle(waiting)
        done, waiting = waiting[: size // 2], waiting[size // 2 :]
        outcomes = rng.random((len(done), router.gate.top_k))
        outcomes[rng.random(outcomes.shape) < 0.1] = np.nan
        try:
            router.resolve_batch(np.array(done, dtype=np.int64), outcomes)
        except InvalidArgumentError:  # some were older than max_pending
            for decision_id, outcome in zip(done, outcomes, strict=True):
                try:
                    router.resolve(decision_id, outcome)
                except InvalidArgumentError:
                    continue
    return waiting


def flat_state(router: PosteriorRouter) -> dict[str, Any]:
    """Everything a router is, as comparable values."""
    state = router.state()
    flat = {f"gate.{n}": t.numpy().tobytes() for n, t in state["gate"].items()}
    flat |= {f"pending.{n}": t.numpy().tobytes() for n, t in state["pending"].items()}
    gate = router.gate
    knobs = (gate.score, gate.risk_aversion, gate.exploration, gate.threshold, router.abstain_below)
    return flat | {"tenure": state["tenure"].numpy().tobytes(), "next": state["next_id"], "knobs": knobs}


def lived(folder: Path, calls: int = 40, belief: str = "plain", **log_options: Any) -> PosteriorRouter:
    """A router that has lived on a log that is closed again."""
    with AuditLog(folder, **log_options) as log:
        router = new_router(log, **BELIEFS[belief])
        live(router, calls, seed=1)
    return router
