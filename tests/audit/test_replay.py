"""A folder alone brings its router back, bit for bit."""

import numpy as np
import pytest
from audit.worlds import BELIEFS, EMBEDDINGS, C, D, E, flat_state, live, lived, new_router

from moe_posterior import PosteriorRouter
from moe_posterior.audit import AuditError, AuditLog
from moe_posterior.audit.rebuild import rebuild


@pytest.mark.parametrize("belief", BELIEFS)
def test_a_closed_log_gives_its_router_back_bit_for_bit(tmp_path, belief: str) -> None:
    router = lived(tmp_path, belief=belief)
    rebuilt = rebuild(AuditLog(tmp_path, mode="r").read())
    assert flat_state(rebuilt) == flat_state(router)
    for embedding in EMBEDDINGS[:50]:
        assert rebuilt.route(embedding) == PosteriorRouter.route(_unaudited(router), embedding)


def _unaudited(router: PosteriorRouter) -> PosteriorRouter:
    router._audit = None
    return router


@pytest.mark.parametrize("belief", [name for name in BELIEFS if name != "quantile"])
def test_every_checkpoint_is_what_the_records_before_it_lead_to(tmp_path, belief: str) -> None:
    with AuditLog(tmp_path, fsync_every=0.0, rotate_bytes=20_000) as log:
        router = new_router(log, **BELIEFS[belief])
        waiting = live(router, 60, seed=2)
        for seed in range(6):
            log.flush()
            waiting = live(router, 30, seed=seed, waiting=waiting)
        router.gate.configure(risk_aversion=0.2)
        waiting = live(router, 10, seed=9, waiting=waiting)
        router.replace_expert(1)
        live(router, 10, seed=10, waiting=waiting)
    reader = AuditLog(tmp_path, mode="r").read()
    assert len(list(tmp_path.glob("*.audit"))) > 2
    assert flat_state(rebuild(reader, check=True)) == flat_state(router)


def test_a_recovered_router_goes_on_as_the_one_that_never_stopped(tmp_path) -> None:
    options = BELIEFS["everything"]
    with AuditLog(tmp_path / "one") as log:
        first = new_router(log, **options)
        waiting = live(first, 30, seed=3)
    recovered = AuditLog.recover(tmp_path / "one")
    unbroken = new_router(None, **options)
    assert live(unbroken, 30, seed=3) == waiting
    for router in (recovered, unbroken):
        live(router, 30, seed=4, waiting=list(waiting))
    assert flat_state(recovered) == flat_state(unbroken)
    recovered._audit.log.close()
    assert flat_state(rebuild(AuditLog(tmp_path / "one", mode="r").read(), check=True)) == flat_state(unbroken)


def test_outcomes_come_after_a_restart_and_count_once(tmp_path) -> None:
    with AuditLog(tmp_path) as log:
        decision = new_router(log).route(EMBEDDINGS[0])
    router = AuditLog.recover(tmp_path)
    router.resolve(decision.id, 1.0)
    with pytest.raises(ValueError, match="is resolved already"):
        router.resolve(decision.id, 1.0)
    assert float(router.posterior.successes.sum()) == 1
    router._audit.log.close()
    table = AuditLog(tmp_path, mode="r").outcomes().to_pydict()
    assert table["accepted"] == [True, False]
    assert "resolved already" in table["reason"][1]


def test_changes_that_no_outcome_explains_are_checkpointed(tmp_path) -> None:
    with AuditLog(tmp_path) as log:
        router = new_router(log)
        live(router, 10, seed=5)
        router.warm_start(EMBEDDINGS, np.tile([0.9, 0.2, 0.2, 0.2, 0.2], (200, 1)), strength=20.0)
        router.add_expert({0: 1.0})
        live(router, 10, seed=6)
        router.remove_expert(2)
        router.posterior.forget(0.5)  # behind the router's back
        live(router, 10, seed=7)
        router.gate.threshold = 0.5
        live(router, 10, seed=8)
    assert flat_state(rebuild(AuditLog(tmp_path, mode="r").read(), check=True)) == flat_state(router)
    events = AuditLog(tmp_path, mode="r").read().events()["event"].to_pylist()
    wanted = [
        "attached",
        "fit",
        "warm start",
        "expert 5 added",
        "expert 2 removed",
        "changed from outside",
        "configured",
    ]
    assert [event for event in events if event != "opened"] == [f"checkpoint: {reason}" for reason in wanted]


def test_a_fresh_router_on_an_old_log_gives_no_id_twice(tmp_path) -> None:
    lived(tmp_path)
    with AuditLog(tmp_path) as log:
        live(new_router(log), 20, seed=1)
    ids = AuditLog(tmp_path, mode="r").decisions()["id"].to_pylist()
    assert len(set(ids)) == len(ids)


def test_two_routers_share_a_log(tmp_path) -> None:
    with AuditLog(tmp_path) as log:
        routers = {}
        for name, belief in (("a", "plain"), ("b", "two experts")):
            routers[name] = PosteriorRouter(E, D, C, max_pending=300, **BELIEFS[belief])
            routers[name]._audit = log.follow(routers[name], name)
            routers[name].fit(EMBEDDINGS)
        for seed in range(4):
            for router in routers.values():
                live(router, 5, seed=seed)
    for name, router in routers.items():
        assert flat_state(rebuild(AuditLog(tmp_path, mode="r").read(), name)) == flat_state(router)
    with pytest.raises(AuditError, match="no router named 'c'"):
        rebuild(AuditLog(tmp_path, mode="r").read(), "c")
