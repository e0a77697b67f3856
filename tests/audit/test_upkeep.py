"""Old segments become Parquet or go; what is left is as readable and as verifiable as before."""

import random
import shutil
from pathlib import Path

import pytest
from audit.worlds import BELIEFS, flat_state, live, new_router

from moe_posterior.audit import AuditLog
from moe_posterior.audit.rebuild import rebuild
from moe_posterior.audit.storage import chain
from moe_posterior.audit.storage.files import FileSystem
from moe_posterior.audit.storage.marks import note_bytes, read_note
from moe_posterior.audit.verify import verify, verify_decisions


def fill(log: AuditLog, belief: str = "two experts"):
    router = new_router(log, **BELIEFS[belief])
    waiting: list[int] = []
    for seed in range(5):
        waiting = live(router, 10, seed=seed, waiting=waiting)
        log.flush()
    return router, waiting


def views(folder: Path) -> str:  # NaN equals itself in text
    log = AuditLog(folder, mode="r")
    return repr([log.decisions().to_pylist(), log.outcomes().to_pylist(), log.read().posterior().to_pylist()])


@pytest.mark.parametrize(
    "belief", ["plain", "two experts", "everything", "defaults", "several clusters and everything"]
)
def test_compaction_changes_nothing_that_can_be_read(tmp_path: Path, belief: str) -> None:
    with AuditLog(tmp_path, rotate_bytes=2_000) as log:
        router, waiting = fill(log, belief)
        before = views(tmp_path)
        assert log.compact() > 2
        assert len(list(tmp_path.glob("*.audit"))) == 1
        assert len(list(tmp_path.glob("decisions-*.parquet"))) > 2
        assert views(tmp_path) == before
        assert log.compact() == 0
        live(router, 10, seed=9, waiting=waiting)
    assert verify(tmp_path).problem is None
    reader = AuditLog(tmp_path, mode="r").read()
    assert verify(tmp_path).totals["decisions"] == len(reader.decisions())
    assert flat_state(rebuild(reader, check=True)) == flat_state(router)
    assert verify_decisions(reader).disagreements == 0
    recovered = AuditLog.recover(tmp_path)
    assert flat_state(recovered) == flat_state(router)
    recovered._audit.log.close()


def test_removed_segments_leave_their_totals_and_a_sound_chain(tmp_path: Path) -> None:
    with AuditLog(tmp_path, rotate_bytes=2_000) as log:
        router, waiting = fill(log)
        whole = verify(tmp_path).totals
        log.compact()
        removed = log.retain(max_bytes=sum(path.stat().st_size for path in tmp_path.iterdir()) // 2)
        assert removed > 0
        waiting = live(router, 10, seed=7, waiting=waiting)
        log.flush()
        assert verify(tmp_path).problem is None
        again = log.retain(max_bytes=1)
        assert again > 0
        assert len(list(tmp_path.glob("segment-*"))) == 1
    found = verify(tmp_path)
    assert found.problem is None
    assert found.removed["segments"] == removed + again
    assert found.removed["decisions"] + found.totals["decisions"] == router._next_id > whole["decisions"]
    assert flat_state(rebuild(AuditLog(tmp_path, mode="r").read())) == flat_state(router)
    assert verify_decisions(AuditLog(tmp_path, mode="r").read()).disagreements == 0


@pytest.mark.parametrize("key", [None, b"sixteen bytes or more"])
def test_any_flipped_bit_is_found_also_in_parquet_and_tombstones(tmp_path: Path, key: bytes | None) -> None:
    folder = tmp_path / "log"
    with AuditLog(folder, rotate_bytes=2_000, key=key) as log:
        fill(log)
        log.compact()
        log.retain(max_bytes=sum(path.stat().st_size for path in folder.iterdir()) * 3 // 4)
    assert verify(folder, key).sound
    files = [path for path in sorted(folder.iterdir()) if path.name != "writer.lock"]
    assert {path.suffix for path in files} == {".audit", ".json", ".parquet"}
    assert folder / "removed.json" in files
    rng = random.Random(0)
    for path in files:
        data = path.read_bytes()
        for _ in range(12):
            place = rng.randrange(8 * len(data))
            altered = bytearray(data)
            altered[place // 8] ^= 1 << place % 8
            path.write_bytes(altered)
            assert not verify(folder, key).sound, (path.name, place)
        path.unlink()
        assert not verify(folder, key).sound, f"{path.name} is missing"
        path.write_bytes(data)
    assert verify(folder, key).sound


def test_a_note_that_was_written_anew_with_its_files_is_found(tmp_path: Path) -> None:
    """Whoever can compute hashes still cannot replace a compacted segment: a later record vouches for the old note."""
    for name, seed in (("log", 0), ("other", 1)):
        with AuditLog(tmp_path / name, rotate_bytes=2_000) as log:
            router = new_router(log)
            for step in range(4):
                live(router, 10, seed=seed + step)
                log.flush()
            log.compact()
    note = tmp_path / "log" / "segment-00000000.json"
    first, second = (read_note(tmp_path / n / note.name, None) for n in ("log", "other"))
    for name in second.files:
        shutil.copy(tmp_path / "other" / name, tmp_path / "log" / name)
    note.write_bytes(note_bytes(second._replace(start=first.start, end=first.end), None))
    assert "no record vouches for the note of segment 0" in verify(tmp_path / "log").problem


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", range(0, 60, 4))
def test_a_crash_during_upkeep_loses_nothing(tmp_path: Path, at: int) -> None:
    class DyingDisk(FileSystem):
        armed, left = False, at

        def step(self) -> None:
            if self.armed:
                self.left -= 1
                if self.left < 0:
                    raise Killed

        def replace(self, path: Path, data: bytes) -> None:
            self.step()
            super().replace(path, data)

        def remove(self, path: Path) -> None:
            self.step()
            super().remove(path)

        def sync_folder(self, folder: Path) -> None:
            self.step()
            super().sync_folder(folder)

    disk = DyingDisk()
    log = AuditLog(tmp_path, rotate_bytes=2_000)
    router, _ = fill(log)
    before = router._next_id
    log._upkeep.files = disk
    disk.armed = True
    try:
        log.compact()
        log.retain(max_bytes=6_000)
    except Killed:
        pass
    log.flush()
    log._lock_file.close()  # as if it had died
    log._writer = None
    found = verify(tmp_path)
    assert found.problem is None
    assert found.totals["decisions"] + found.removed["decisions"] == before
    recovered = AuditLog.recover(tmp_path)
    assert {n: v for n, v in flat_state(recovered).items() if n != "next"} == {
        n: v for n, v in flat_state(router).items() if n != "next"
    }
    recovered._audit.log.compact()
    recovered._audit.log.retain(max_bytes=1)
    recovered._audit.log.close()
    assert verify(tmp_path).problem is None
    assert len(list(tmp_path.glob("segment-*"))) == 1


def test_upkeep_runs_by_itself_after_rotations(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, rotate_bytes=2_000, compact=True, retain_bytes=150_000, fsync_every=0.01)
    router = new_router(log)
    waiting: list[int] = []
    compacted: set[Path] = set()  # also those that retention takes away again
    for seed in range(30):
        waiting = live(router, 10, seed=seed, waiting=waiting)
        log.flush()
        compacted.update(tmp_path.glob("*.parquet"))
    log.close()
    found = verify(tmp_path)
    assert found.problem is None
    assert found.removed["segments"] > 0
    assert compacted
    assert flat_state(rebuild(AuditLog(tmp_path, mode="r").read())) == flat_state(router)


@pytest.mark.parametrize("read", ["verify", "decisions", "outcomes"])
def test_a_reader_whose_segments_are_compacted_meanwhile_reads_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str
) -> None:
    ways = {
        "verify": lambda: verify(tmp_path).problem,
        "decisions": lambda: AuditLog(tmp_path, mode="r").decisions().num_rows,
        "outcomes": lambda: AuditLog(tmp_path, mode="r").outcomes().num_rows,
    }
    with AuditLog(tmp_path, rotate_bytes=4000, fsync_every=0) as log:
        router = new_router(log)
        for seed in range(6):
            live(router, 10, seed)
            log.flush()
        expected = ways[read]()
        done = []

        def note_after_compaction(path: Path, key: bytes | None, files: FileSystem) -> object:
            if not done:  # the reader has listed the folder
                done.append(-1)
                done[0] = log.compact()
            return read_note(path, key, files)

        monkeypatch.setattr(chain, "read_note", note_after_compaction)
        assert ways[read]() == expected
    assert done[0] > 0


def test_retention_takes_tables_that_a_crash_left_and_no_file_that_a_note_names(tmp_path: Path) -> None:
    """Notes of a log without a key can be written by anybody: what they name is not removed for that."""
    with AuditLog(tmp_path, rotate_bytes=2_000) as log:
        fill(log)
        log.compact()
        path = tmp_path / "segment-00000000.json"
        note = read_note(path, None)
        kept = tmp_path / "precious"
        kept.write_bytes(b"precious")
        (tmp_path / "refusals-00000000.parquet").write_bytes(b"of a compaction that did not come to its end")
        files = {**note.files, kept.name: "0" * 64}
        log.retain(max_bytes=1)
        path.write_bytes(note_bytes(note._replace(files=files), None))
        (tmp_path / "others-00000000.parquet").write_bytes(b"again")
        log._upkeep.sweep()
    assert kept.exists()
    assert not list(tmp_path.glob("*-00000000.*"))
    assert verify(tmp_path).problem is None
