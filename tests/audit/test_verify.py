"""Whatever is done to a log's files is found, and every choice can be recomputed."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from audit.worlds import BELIEFS, EMBEDDINGS, live, lived, new_router

from moe_posterior.audit import AuditError, AuditLog
from moe_posterior.audit.storage.files import segment_name
from moe_posterior.audit.storage.frames import OVERHEAD
from moe_posterior.audit.verify import verify, verify_decisions

KEY = b"sixteen bytes or more"


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed log of several segments."""
    folder = tmp_path_factory.mktemp("sealed") / "log"
    with AuditLog(folder, fsync_every=0.02, rotate_bytes=2_000) as log:
        router = new_router(log)
        waiting: list[int] = []
        for seed in range(4):
            waiting = live(router, 8, seed=seed, waiting=waiting)
            log.flush()
    assert verify(folder).sound
    return folder


def frames_of(path: Path) -> list[tuple[int, int]]:
    """Where each frame begins and ends, from the lengths alone."""
    data, places, position = path.read_bytes(), [], 0
    while position < len(data):
        size = OVERHEAD + int.from_bytes(data[position + 8 : position + 12], "little")
        places.append((position, position + size))
        position += size
    assert position == len(data)
    return places


def test_a_sound_log_is_found_sound_and_counted(sealed: Path) -> None:
    found = verify(sealed)
    table = AuditLog(sealed, mode="r").decisions()
    assert found.problem is None
    assert found.closed
    assert found.totals["decisions"] == len(table) > 100
    assert found.segments == len(list(sealed.glob("*.audit"))) > 2


@pytest.mark.parametrize("part", range(4))
def test_any_single_flipped_bit_is_found(sealed: Path, tmp_path: Path, part: int) -> None:
    folder = tmp_path / "log"
    shutil.copytree(sealed, folder)
    rng = random.Random(part)
    files = [path for path in folder.iterdir() if path.suffix in (".audit", ".json")]
    for path in files:
        data = path.read_bytes()
        for _ in range(40):
            place = rng.randrange(8 * len(data))
            altered = bytearray(data)
            altered[place // 8] ^= 1 << place % 8
            path.write_bytes(altered)
            found = verify(folder)
            assert not found.sound, (path.name, place)
        path.write_bytes(data)
    assert verify(folder).sound


def test_the_first_altered_record_is_named(sealed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    shutil.copytree(sealed, folder)
    path = folder / segment_name(1)
    _, end = frames_of(path)[2]
    data = bytearray(path.read_bytes())
    data[end - 1] ^= 1
    path.write_bytes(data)
    assert verify(folder).problem.startswith("segment 1, record 2: its hash does not match")


@pytest.mark.parametrize("what", ["removed", "repeated", "swapped", "cut", "moved"])
def test_records_that_are_removed_repeated_or_moved_are_found(sealed: Path, tmp_path: Path, what: str) -> None:
    for path in sorted(sealed.glob("*.audit")):
        pieces = [path.read_bytes()[begin:end] for begin, end in frames_of(path)]
        for index in range(len(pieces)):
            changed = list(pieces)
            if what == "removed":
                del changed[index]
            elif what == "repeated":
                changed.insert(index, pieces[index])
            elif what == "cut":
                changed = changed[:index]
            elif what == "moved":
                changed.append(changed.pop(index))
            elif index:
                changed[index - 1], changed[index] = changed[index], changed[index - 1]
            if changed == pieces:
                continue
            folder = tmp_path / f"{path.stem}-{index}"
            shutil.copytree(sealed, folder)
            (folder / path.name).write_bytes(b"".join(changed))
            assert not verify(folder).sound, (path.name, index)


def test_segments_that_are_removed_or_swapped_are_found(sealed: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in sealed.glob("*.audit"))
    for index, name in enumerate(names):
        folder = tmp_path / name
        shutil.copytree(sealed, folder)
        (folder / name).unlink()
        assert not verify(folder).sound, name
        other = names[index - 1]
        shutil.copy(sealed / other, folder / name)
        shutil.copy(sealed / name, folder / other)
        assert not verify(folder).sound, (name, other)
    folder = tmp_path / "no head"
    shutil.copytree(sealed, folder)
    (folder / "head.json").unlink()
    assert "has no head.json" in verify(folder).problem


def test_a_digest_noted_elsewhere_must_stand_in_the_chain(tmp_path: Path) -> None:
    with AuditLog(tmp_path / "log") as log:
        router = new_router(log)
        log.flush()
        shutil.copytree(tmp_path / "log", tmp_path / "early")
        live(router, 10, seed=1)
        log.flush()
        pin = log.head.digest.hex()
        live(router, 10, seed=2)
    assert verify(tmp_path / "log", head=pin).sound
    assert "no record has the hash" in verify(tmp_path / "early", head=pin).problem
    assert verify(tmp_path / "early").sound  # without the pin nobody can tell


def test_a_keyed_log_needs_its_key(tmp_path: Path) -> None:
    lived(tmp_path, key=KEY)
    assert verify(tmp_path, KEY).sound
    assert "sealed with a key" in verify(tmp_path).problem
    assert not verify(tmp_path, b"another key of sixteen").sound
    with pytest.raises(AuditError, match="sealed with a key"):
        AuditLog(tmp_path, mode="r")
    assert len(AuditLog(tmp_path, mode="r", key=KEY).decisions()) > 0


@pytest.mark.parametrize("belief", [name for name in BELIEFS])
def test_every_logged_choice_is_recomputed(tmp_path: Path, belief: str) -> None:
    with AuditLog(tmp_path, fsync_every=0.02, rotate_bytes=20_000) as log:
        router = new_router(log, **BELIEFS[belief])
        waiting = live(router, 15, seed=1)
        router.gate.configure(risk_aversion=2.0)
        waiting = live(router, 10, seed=2, waiting=waiting)
        router.remove_expert(0)
        log.flush()
        live(router, 15, seed=3, waiting=waiting)
    reader = AuditLog(tmp_path, mode="r").read()
    found = verify_decisions(reader)
    assert found.disagree == []
    assert found.agree == len(reader.decisions())
    assert found.skipped == 0


@pytest.mark.parametrize("belief", ["plain", "everything", "defaults", "defaults, two experts", "thompson"])
def test_a_choice_that_the_belief_does_not_explain_is_reported(tmp_path: Path, belief: str) -> None:
    with AuditLog(tmp_path) as log:
        router = new_router(log, **BELIEFS[belief])
        live(router, 20, seed=1)
        before = router._next_id
        router.gate.topk_indices += 1  # a router that chooses otherwise than its belief says
        router.gate.topk_indices %= 5
        if router.gate.chooses_per_token:
            router.gate.seed += 1  # or draws otherwise than it was configured to
        router.route_batch(EMBEDDINGS[:30])
    found = verify_decisions(AuditLog(tmp_path, mode="r").read())
    assert found.disagreements > (0 if router.gate.chooses_per_token else 29)
    assert all(wrong["id"] >= before for wrong in found.disagree)


def test_the_full_entry_holds_the_posterior_as_the_decision_saw_it(tmp_path: Path) -> None:
    seen = []
    with AuditLog(tmp_path, fsync_every=0.01) as log:
        router = new_router(log, threshold=0.5)
        rng = np.random.default_rng(3)
        for step in range(120):
            if step == 60:
                log.flush()
            decision = router.route(EMBEDDINGS[step])
            row = router.posterior.alpha[decision.cluster].tolist(), router.posterior.beta[decision.cluster].tolist()
            outcome = float(rng.random()) if step % 3 else None
            seen.append((decision, row, outcome))
            if outcome is not None:
                router.resolve(decision.id, outcome)
    rows = AuditLog(tmp_path, mode="r").decisions().to_pylist()
    assert len(rows) == len(seen)
    for row, (decision, (alpha, beta), outcome) in zip(rows, seen, strict=True):
        assert (row["id"], row["cluster"], tuple(row["experts"])) == (decision.id, decision.cluster, decision.experts)
        assert row["scores"] == pytest.approx([decision.score])
        assert row["distance"] == pytest.approx(decision.distance)
        assert (row["abstain"], row["explored"]) == (decision.abstain, decision.explored)
        assert (row["alpha"], row["beta"]) == (alpha, beta)
        assert row["signal"] == (None if outcome is None else [outcome])
        assert row["mode"] == router.gate.score
    filtered = AuditLog(tmp_path, mode="r").decisions(cluster=rows[0]["cluster"], last=5, posterior=False).to_pylist()
    wanted = [row for row in rows if row["cluster"] == rows[0]["cluster"]][-5:]
    assert [row["id"] for row in filtered] == [row["id"] for row in wanted]
    outcomes = AuditLog(tmp_path, mode="r").outcomes().to_pylist()
    assert [row["outcome"] for row in outcomes] == [row["signal"] >= 0.5 for row in outcomes]
    assert json.dumps(AuditLog(tmp_path, mode="r").read().events()["detail"].to_pylist()[1])
