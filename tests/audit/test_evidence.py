"""An audit log as a report's evidence."""

import shutil
from pathlib import Path

import pytest
from audit.worlds import live, new_router

from moe_posterior import MissingDataError
from moe_posterior.audit import AuditLog
from moe_posterior.audit.storage.files import segment_name
from moe_posterior.audit.verify import verify
from moe_posterior.audit.views.evidence import evidence_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("evidence") / "log"
    with AuditLog(place) as log:
        live(new_router(log), 8, seed=0, waiting=[])
    return place


def test_a_sound_log_is_verified_and_named_by_its_last_hash(folder: Path) -> None:
    found, known = evidence_of(folder), verify(folder)
    assert found == {
        "path": str(folder),
        "verified": True,
        "decisions": known.totals["decisions"],
        "head": known.head.digest.hex(),
    }
    assert found["decisions"] > 0


def test_an_altered_log_says_where(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "log")
    segment = copied / segment_name(0)
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    found = evidence_of(copied)
    assert found["verified"] is False
    assert found["problem"]


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="nowhere"):
        evidence_of(tmp_path / "nowhere")
