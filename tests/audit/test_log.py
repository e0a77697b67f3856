"""What the writer promises: sync before acknowledgement, refusals on record, rotation, and a light hand on the router."""

import os
import time
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from audit.worlds import BELIEFS, EMBEDDINGS, C, D, E, live, new_router

from moe_posterior import InvalidArgumentError, PosteriorRouter
from moe_posterior.audit import AuditLog
from moe_posterior.audit.storage.files import FileSystem, segment_name
from moe_posterior.audit.verify import verify


class Watched(FileSystem):
    """Remembers the order of calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def append(self, path: Path) -> BinaryIO:
        self.calls.append(f"append {path.name}")
        return super().append(path)

    def write(self, file: BinaryIO, data: bytes) -> None:
        self.calls.append("write")
        super().write(file, data)

    def sync(self, file: BinaryIO) -> None:
        self.calls.append("sync")
        super().sync(file)

    def sync_folder(self, folder: Path) -> None:
        self.calls.append("sync folder")
        super().sync_folder(folder)


def test_flush_returns_after_the_sync_and_a_new_file_is_in_its_folder_by_then(tmp_path: Path) -> None:
    disk = Watched()
    with AuditLog(tmp_path, files=disk, fsync_every=1000.0) as log:
        router = new_router(log)
        log.flush()
        first = [call for call in disk.calls if call not in ("write",)]
        assert first.index(f"append {segment_name(0)}") < first.index("sync")
        assert first[first.index("sync") + 1] == "sync folder"
        for step in range(5):
            disk.calls.clear()
            router.route(EMBEDDINGS[step])
            assert disk.calls == []
            log.flush()
            assert disk.calls == ["write", "sync"]
            assert len(AuditLog(tmp_path, mode="r").decisions()) == step + 1


def test_decisions_reach_the_disk_by_themselves(tmp_path: Path) -> None:
    with AuditLog(tmp_path, fsync_every=0.01) as log:
        router = new_router(log)
        router.route(EMBEDDINGS[0])
        deadline = time.monotonic() + 20
        while not len(AuditLog(tmp_path, mode="r").decisions()) if (tmp_path / segment_name(0)).exists() else True:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_refused_outcomes_are_on_record_with_their_reason(tmp_path: Path) -> None:
    with AuditLog(tmp_path) as log:
        router = new_router(log)
        ids = router.route_batch(EMBEDDINGS[:10]).ids.tolist()
        router.resolve(ids[0], 1.0)
        gone = router.route(EMBEDDINGS[0])
        router.replace_expert(gone.expert)
        cases = [
            (ids[0], 0.5, "is resolved already"),
            (77, 1.0, "was never given"),
            (-3, 1.0, "was never given"),
            (gone.id, 1.0, "has left or been replaced"),
            (ids[1], 1.5, "outcome must lie"),
        ]
        for decision_id, outcome, reason in cases:
            with pytest.raises(InvalidArgumentError, match=reason):
                router.resolve(decision_id, outcome)
        with pytest.raises(InvalidArgumentError, match="must not repeat"):
            router.resolve_batch([ids[2], ids[2]], [1.0, 0.0])
        with pytest.raises(InvalidArgumentError):
            router.resolve_batch(np.arange(10**6, 10**6 + 5000), np.ones(5000))
    rows = AuditLog(tmp_path, mode="r").outcomes().to_pylist()
    assert [(row["id"], row["signal"], row["accepted"]) for row in rows[:1]] == [(ids[0], 1.0, True)]
    refused = [row for row in rows if not row["accepted"]]
    for (decision_id, outcome, reason), row in zip(cases, refused, strict=False):
        assert (row["id"], row["signal"], row["outcome"]) == (decision_id, outcome, None)
        assert reason in row["reason"]
    assert [row["id"] for row in refused[5:7]] == [ids[2]] * 2
    assert len(refused) == 7 + 1000
    assert "one of 5000 refused together" in refused[-1]["reason"]


def test_segments_rotate_by_age(tmp_path: Path) -> None:
    with AuditLog(tmp_path, rotate_seconds=1.0, fsync_every=0.01) as log:
        router = new_router(log)
        log.flush()
        log._writer.segments.opened -= 5.0  # as if it were that much later
        for seed in range(3):
            live(router, 5, seed=seed)
            log.flush()
    assert len(list(tmp_path.glob("*.audit"))) == 2
    assert verify(tmp_path).sound


def test_what_the_caller_does_with_its_arrays_does_not_reach_the_log(tmp_path: Path) -> None:
    with AuditLog(tmp_path, fsync_every=1000.0) as log:
        router = new_router(log)
        batch = router.route_batch(EMBEDDINGS[:50])
        wanted = batch.experts.tolist(), batch.scores.tolist(), batch.clusters.tolist()
        outcomes = np.ones(50)
        router.resolve_batch(batch.ids, outcomes)
        for array in (batch.experts, batch.scores, batch.clusters, batch.distance, batch.abstain, outcomes):
            array[:] = 0
    table = AuditLog(tmp_path, mode="r").decisions()
    assert (table["experts"].to_pylist(), table["scores"].to_pylist(), table["cluster"].to_pylist()) == wanted
    assert table["signal"].to_pylist() == [[1.0]] * 50


@pytest.mark.parametrize("name", BELIEFS)
def test_the_log_tells_the_means_that_the_decisions_carried(tmp_path: Path, name: str) -> None:
    with AuditLog(tmp_path) as log:
        router = new_router(log, **BELIEFS[name])
        live(router, 10, seed=0)
        decided = [router.route(EMBEDDINGS[0])]
        live(router, 3, seed=1)
        batch = router.route_batch(EMBEDDINGS[:50])
    table = AuditLog(tmp_path, mode="r").decisions(ids=[decided[0].id, *batch.ids.tolist()])
    carried = [list(decided[0].means), *batch.means.tolist()]
    if BELIEFS[name].get("novelty") == "discount":
        carried = [None] * 51
    assert table["means"].to_pylist() == carried


def test_an_audited_router_decides_as_an_unaudited_one(tmp_path: Path) -> None:
    with AuditLog(tmp_path) as log:
        audited, plain = (new_router(where, exploration=0.2, top_k=2) for where in (log, None))
        for embedding in EMBEDDINGS:
            one, other = audited.route(embedding), plain.route(embedding)
            assert one == other
            for router in (audited, plain):
                router.resolve(one.id, [1.0, 0.0])


def test_no_query_and_no_embedding_is_stored(tmp_path: Path) -> None:
    queries = np.random.default_rng(7).normal(size=(64, D)).astype(np.float32)
    with AuditLog(tmp_path) as log:
        new_router(log).route_batch(queries)
    stored = b"".join(
        frame.payload()
        for frame in AuditLog(tmp_path, mode="r").read().frames()  # decompressed
    )
    assert EMBEDDINGS[:1].tobytes()[:8] not in stored
    assert not any(query.tobytes()[:8] in stored for query in queries)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "a"}, "mode must be"),
        ({"on_full": "forget"}, "on_full must be one of"),
        ({"key": b"short"}, "key must be 16 to 64 bytes"),
        ({"fsync_every": -1.0}, "fsync_every"),
        ({"rotate_bytes": 0}, "rotate_bytes must be at least 1"),
        ({"max_queue": 0}, "max_queue must be at least 1"),
    ],
)
def test_options_out_of_range_are_named(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        AuditLog(tmp_path / "log", **options)
    assert not (tmp_path / "log").exists()


def test_routers_that_cannot_be_recorded_are_refused(tmp_path: Path) -> None:
    with AuditLog(tmp_path) as log:
        with pytest.raises(InvalidArgumentError, match="pending decisions must fit one record"):
            PosteriorRouter(E, D, C, max_pending=50_000_000, audit=log)
        first = new_router(log)
        with pytest.raises(InvalidArgumentError, match="no other router in this log goes by"):
            new_router(log)
        first.gate.threshold = np.float32(0.5)  # a knob of another kind of number
        first.route(EMBEDDINGS[0])
        log.flush()
    assert os.path.getsize(tmp_path / segment_name(0))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), np.float32(0.25), None])
def test_any_threshold_of_abstaining_is_read_back(tmp_path: Path, value: float | None) -> None:
    with AuditLog(tmp_path) as log:
        router = new_router(log)
        router.abstain_below = value
        router.route(EMBEDDINGS[0])
    recovered = AuditLog.recover(tmp_path)
    assert recovered.abstain_below == value
    recovered._audit.log.close()


@pytest.mark.parametrize("value", [float("nan"), "half", 1e30])
def test_a_knob_that_no_reader_takes_is_refused_before_anything_is_decided(tmp_path: Path, value: object) -> None:
    with AuditLog(tmp_path) as log:
        router = new_router(log)
        router.abstain_below = value
        for _ in range(2):
            with pytest.raises(InvalidArgumentError, match="abstain_below"):
                router.route(EMBEDDINGS[0])
        router.abstain_below = 0.3
        assert router.route(EMBEDDINGS[0]).id == 0
    assert AuditLog(tmp_path, mode="r").decisions().num_rows == 1


def test_a_name_that_no_table_holds_is_refused(tmp_path: Path) -> None:
    with AuditLog(tmp_path) as log:
        for name in ("\ud800", 3):
            with pytest.raises(InvalidArgumentError, match="name must be a text"):
                log.follow(new_router(None), name)
        log.follow(new_router(None), "größer ✓")
