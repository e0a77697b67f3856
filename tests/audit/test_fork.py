"""Forks: a child uses what works and is refused the rest, never hangs, and what a worker wrote itself is on the disk when it ends."""

import json
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from audit.worlds import EMBEDDINGS, E, flat_state, live, new_router

from moe_posterior import PosteriorMoE, PosteriorRouter, forking
from moe_posterior.audit import AuditLockedError, AuditLog, AuditWriteError
from moe_posterior.audit.verify import verify
from moe_posterior.errors import ForkedError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LIMIT = 60  # seconds after which a child that hangs is ended

CHANGES: dict[str, Callable[[PosteriorRouter], object]] = {
    "route": lambda router: router.route(EMBEDDINGS[0]),
    "route_batch": lambda router: router.route_batch(EMBEDDINGS[:20]),
    "resolve": lambda router: router.resolve(int(router.state()["pending"]["id"][0]), 1.0),
    "resolve_batch": lambda router: router.resolve_batch(router.state()["pending"]["id"][1:3].numpy(), np.ones(2)),
    "warm_start": lambda router: router.warm_start(EMBEDDINGS, np.ones((200, E))),
    "add_expert": lambda router: router.add_expert(),
    "replace_expert": lambda router: router.replace_expert(0),
    "remove_expert": lambda router: router.remove_expert(1),
    "fit": lambda router: router.fit(EMBEDDINGS),
}
READS: dict[str, Callable[[PosteriorRouter], object]] = {
    "state": lambda router: router.state(),
    "save and load": lambda router: (router.save("saved.pt"), PosteriorRouter.load("saved.pt")),
    "a copy of its own": lambda router: PosteriorRouter.from_state(router.state()).route(EMBEDDINGS[0]),
    "locked": lambda router: router.locked().__enter__(),
    "skip_ids": lambda router: router.skip_ids(10),
}


def in_child(tried: dict[str, Callable[[], object]], folder: Path) -> dict[str, str]:
    """What came of each call in a forked child: nothing, or the name of the error."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT)  # kills
        found = {}
        try:
            os.chdir(folder)
            for name, call in tried.items():
                try:
                    call()
                    found[name] = ""
                except Exception as error:
                    found[name] = type(error).__name__
            os.write(writing, json.dumps(found).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as told:
        text = told.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"the child ended with {status}"
    return json.loads(text)


@contextmanager
def another_thread_holds(router: PosteriorRouter) -> Iterator[None]:
    taken, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        with router.locked():
            taken.set()
            let_go.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    try:
        yield
    finally:
        let_go.set()
        thread.join()


@contextmanager
def other_threads_route(router: PosteriorRouter) -> Iterator[None]:
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            router.resolve(router.route(EMBEDDINGS[1]).id, 1.0)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def calls_on(
    router: PosteriorRouter, calls: dict[str, Callable[[PosteriorRouter], object]]
) -> dict[str, Callable[[], object]]:
    return {name: (lambda call=call: call(router)) for name, call in calls.items()}


@pytest.mark.parametrize("busy", [False, True], ids=["alone", "beside busy threads"])
def test_a_router_without_a_log_goes_on_in_a_forked_child(busy: bool, tmp_path: Path) -> None:
    router = new_router(None)
    router.route_batch(EMBEDDINGS[:10])
    tried = calls_on(router, READS | CHANGES)
    for _ in range(10 if busy else 1):
        if busy:
            with other_threads_route(router):
                found = in_child(tried, tmp_path)
        else:
            found = in_child(tried, tmp_path)
        assert found == dict.fromkeys(tried, "")
    router.route(EMBEDDINGS[0])


@pytest.mark.parametrize("busy", [False, True], ids=["alone", "beside busy threads"])
def test_a_recorded_router_in_a_forked_child_is_read_and_refuses_to_change(busy: bool, tmp_path: Path) -> None:
    with AuditLog(tmp_path / "log") as log:
        router = new_router(log)
        router.route_batch(EMBEDDINGS[:10])
        log.flush()

        def unchanged() -> None:
            assert flat_state(router) == before

        ours: dict[str, Callable[[], object]] = {
            "flush": log.flush,
            "compact": log.compact,
            "retain": log.retain,
            "follow": lambda: log.follow(new_router(None), "another"),
            "attach": lambda: log.attach(
                PosteriorMoE(torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)]), hidden_size=2)
            ),
        }
        reads = calls_on(router, READS) | {
            "decisions": log.decisions,
            "outcomes": log.outcomes,
            "head": lambda: log.head,
        }
        del reads["skip_ids"]
        refused = calls_on(router, CHANGES) | ours
        before = flat_state(router)
        if busy:
            with other_threads_route(router):
                found = in_child(reads | refused, tmp_path)
        else:
            found = in_child(reads | refused | {"nothing changed": unchanged, "close": log.close}, tmp_path)
            assert found.pop("nothing changed") == found.pop("close") == ""
        assert found == dict.fromkeys(reads, "") | dict.fromkeys(refused, "AuditWriteError")
        router.route(EMBEDDINGS[0])
        with pytest.raises(AuditLockedError):
            AuditLog(tmp_path / "log")
    assert verify(tmp_path / "log").closed
    assert verify(tmp_path / "log").problem is None


@pytest.mark.parametrize("audited", [False, True])
def test_a_router_that_was_being_changed_for_long_when_its_process_forked_is_refused_in_the_child(
    audited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forking, "_PATIENCE", 0.05)
    log = AuditLog(tmp_path / "log") if audited else None
    router, other = new_router(log), new_router(None)
    router.route_batch(EMBEDDINGS[:10])
    tried = calls_on(router, READS | CHANGES)
    with another_thread_holds(router):
        found = in_child({**tried, "other": lambda: other.route(EMBEDDINGS[0])}, tmp_path)
    assert found.pop("other") == ""
    assert found == dict.fromkeys(tried, ForkedError.__name__)
    router.route(EMBEDDINGS[0])
    if log is not None:
        log.close()


def test_a_thread_that_forks_inside_the_lock_goes_on_in_both_processes(tmp_path: Path) -> None:
    router = new_router(None)
    with router.locked():
        assert in_child({"route": lambda: router.route(EMBEDDINGS[0])}, tmp_path) == {"route": ""}
        router.route(EMBEDDINGS[0])
    with other_threads_route(router):
        router.route(EMBEDDINGS[0])


def test_a_recorded_gate_in_a_forked_child_refuses_to_route(tmp_path: Path) -> None:
    moe = PosteriorMoE(torch.nn.ModuleList([torch.nn.Linear(6, 6) for _ in range(3)]), hidden_size=6, num_clusters=2)
    moe.gate.fit(torch.from_numpy(EMBEDDINGS))
    with AuditLog(tmp_path / "log") as log, log.attach(moe):
        moe.route(torch.from_numpy(EMBEDDINGS))
        tried = {"route": lambda: moe.route(torch.from_numpy(EMBEDDINGS))}
        assert in_child(tried, tmp_path) == {"route": "AuditWriteError"}
        moe.route(torch.from_numpy(EMBEDDINGS))


def _write(folder: Path, how: str) -> None:
    """A worker with a log of its own, which it neither flushes nor closes."""
    log = AuditLog(folder, fsync_every=1000.0)
    live(new_router(log), 10, seed=0)
    if how == "raises":
        raise RuntimeError("expected by the test")
    if how == "exits":
        raise SystemExit(3)


@pytest.mark.parametrize("how", ["returns", "raises", "exits"])
@pytest.mark.parametrize("inherited", [False, True], ids=["", "beside its parent's log"])
def test_what_a_forked_worker_wrote_is_on_the_disk_when_it_has_ended(how: str, inherited: bool, tmp_path: Path) -> None:
    parent = AuditLog(tmp_path / "parent") if inherited else None
    worker = multiprocessing.get_context("fork").Process(target=_write, args=(tmp_path / "log", how))
    worker.start()
    worker.join()
    assert worker.exitcode == {"returns": 0, "raises": 1, "exits": 3}[how]
    found = verify(tmp_path / "log")
    assert found.closed
    expected = new_router(None)
    live(expected, 10, seed=0)
    assert found.totals["decisions"] == expected._next_id > 0
    if parent is not None:
        parent.close()


def _write_in_pool(folder: str) -> int:
    log = AuditLog(folder, fsync_every=1000.0)
    router = new_router(log)
    live(router, 5, seed=1)
    return router._next_id


def test_what_the_workers_of_a_pool_wrote_is_on_the_disk_when_it_has_ended(tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in ("a", "b")]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        counts = pool.map(_write_in_pool, folders, chunksize=1)
        pool.close()
        pool.join()
    for folder, count in zip(folders, counts, strict=True):
        assert verify(Path(folder)).closed
        assert verify(Path(folder)).totals["decisions"] == count


def test_a_child_that_ends_by_itself_leaves_its_parents_log_alone(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, fsync_every=1000.0)
    router = new_router(log)
    live(router, 5, seed=1)
    worker = multiprocessing.get_context("fork").Process(target=log.close)
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    router.route(EMBEDDINGS[0])
    log.close()
    assert len(AuditLog(tmp_path, mode="r").decisions()) == router._next_id


def test_a_closed_log_refuses_changes_of_its_routers_before_they_are_made(tmp_path: Path) -> None:
    with AuditLog(tmp_path) as log:
        router = new_router(log)
        router.route_batch(EMBEDDINGS[:10])
    before = flat_state(router)
    for call in CHANGES.values():
        with pytest.raises(AuditWriteError, match="closed"):
            call(router)
    assert flat_state(router) == before
