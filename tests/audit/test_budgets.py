"""A folder of a few kilobytes costs no reader gigabytes: what we do not write is refused before it is unpacked."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audit.test_hostile import seal
from audit.worlds import new_router

from moe_posterior.audit import AuditError, AuditLog
from moe_posterior.audit.storage import compact, tables
from moe_posterior.audit.storage.chain import Chain
from moe_posterior.audit.storage.files import DISK
from moe_posterior.audit.storage.frames import Frame, Kind
from moe_posterior.audit.storage.state import decode_checkpoint, encode_checkpoint
from moe_posterior.audit.storage.tables import Group, decode, empty_tables, encode

ROOM = 1 << 30  # bytes that reading may take beside what the process has
READ = """
import resource, sys, tempfile
from pathlib import Path
from moe_posterior.audit import AuditError, AuditLog
from moe_posterior.audit.views.page import write_page
from moe_posterior.audit.rebuild import rebuild
from moe_posterior.audit.views.stats import summarise
from moe_posterior.audit.verify import verify, verify_decisions
from moe_posterior.audit.views.watch import View
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + int(sys.argv[1]), resource.RLIM_INFINITY))
for folder in map(Path, sys.argv[2:]):
    reader = AuditLog(folder, mode="r").read()
    uses = {
        "verify": lambda: verify(folder), "list": lambda: [None for _ in reader], "last": lambda: reader.decisions(last=3),
        "outcomes": reader.outcomes, "events": reader.events, "stats": lambda: summarise(reader),
        "page": lambda: write_page(folder, folder / "page"),
        "choices": lambda: verify_decisions(reader), "rebuild": lambda: rebuild(reader), "watch": lambda: View(folder).read(),
        "recover": lambda: AuditLog.recover(folder)._audit.log.close(),
    }
    for name, use in uses.items():
        try:
            use()
        except AuditError as error:
            assert "memory" not in str(error), (folder.name, name, error)
"""


def compressed(rows: int, compression: str) -> bytes:
    """A group of decisions that unpacks to so many rows."""
    group = Group(
        0,
        1,
        empty_tables(1)
        | {
            "decisions": {
                c.name: np.zeros((rows, 1) if c.per_slot else rows, c.dtype) for c in tables.TABLES["decisions"]
            }
        },
    )
    batch = tables._batch("decisions", 1, group.tables["decisions"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as stream:
        stream.write_batch(batch)
    messages = pa.ipc.MessageReader.open_stream(sink.getvalue())
    messages.read_next_message()
    message = messages.read_next_message().serialize().to_pybytes()
    message += bytes(-len(message) % 8)
    return tables._PART.pack(list(tables.TABLES).index("decisions"), 1, 0, rows, len(message)) + message


@pytest.fixture(scope="module")
def payloads(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Kind, bytes]]:
    folder = tmp_path_factory.mktemp("honest")
    with AuditLog(folder) as log:
        new_router(log)
    return [(frame.kind, frame.payload()) for frame in Chain(folder, None) if isinstance(frame, Frame)]


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_a_table_that_is_compressed_in_itself_is_refused(compression: str) -> None:
    with pytest.raises(AuditError, match="is compressed"):
        decode(compressed(1000, compression))


def test_small_hostile_folders_are_read_within_a_budget_by_every_reader(payloads: list, tmp_path: Path) -> None:
    place = next(i for i, (kind, _) in enumerate(payloads) if kind == Kind.CHECKPOINT)
    checkpoint = decode_checkpoint(payloads[place][1])

    def told(**settings: object) -> tuple[Kind, bytes]:
        return Kind.CHECKPOINT, encode_checkpoint(checkpoint._replace(settings={**checkpoint.settings, **settings}))

    gate = {"kind": "gate", "num_clusters": 1, "options": {"max_pending": 1 << 28}, "top_k": 1}
    huge = {"compressed": [*payloads[: place + 1], (Kind.GROUP, compressed(20_000_000, "zstd"))]}
    bare = Kind.CHECKPOINT, encode_checkpoint(checkpoint._replace(settings={**checkpoint.settings, **gate}, arrays={}))
    wide = (
        Kind.CHECKPOINT,
        encode_checkpoint(
            checkpoint._replace(
                settings={**checkpoint.settings, **gate, "top_k": 65_536, "num_experts": 65_536}, arrays={}
            )
        ),
    )
    huge |= {
        "pending": [*payloads[:place], bare],
        "slots": [*payloads[:place], wide],
        "max_pending": [*payloads[:place], told(options={**checkpoint.settings["options"], "max_pending": 3 * 10**8})],
    }
    for name, content in huge.items():
        (tmp_path / name).mkdir()
        seal(tmp_path / name, content)
        assert sum(path.stat().st_size for path in (tmp_path / name).iterdir()) < 200_000
    command = [sys.executable, "-c", READ, str(ROOM), *(str(tmp_path / name) for name in huge)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]


def test_what_the_writer_writes_is_not_taken_for_compressed() -> None:
    group = Group(
        0,
        2,
        empty_tables(2)
        | {
            "outcomes": {"id": np.arange(5), "signal": np.ones((5, 2))},
            "calls": {
                n: np.array([v], c.dtype)
                for n, v, c in zip(
                    ("kind", "rows", "time", "first", "steps"), (1, 5, 7, 0, 1), tables.TABLES["calls"], strict=True
                )
            },
        },
    )
    assert [one.rows("outcomes") for one in decode(encode([group]))] == [5]


@pytest.mark.parametrize("cut", range(0, 200, 7))
def test_a_message_that_lies_about_its_own_layout_is_the_typed_error(cut: int) -> None:
    data = bytearray(compressed(100, "zstd"))
    struct.pack_into("<I", data, tables._PART.size + 8 + cut % 120, 0xFFFFFF00)
    with pytest.raises(AuditError):
        decode(bytes(data))


@pytest.mark.parametrize("bomb", ["rows", "codec"])
def test_a_parquet_file_that_unpacks_to_more_than_it_can_or_as_we_never_pack_is_refused(
    bomb: str, tmp_path: Path
) -> None:
    rows = 50_000_000 if bomb == "rows" else 10
    table = pa.table({"id": pa.array(np.zeros(rows, dtype=np.int64))})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd" if bomb == "rows" else "gzip")
    assert (tmp_path / "a.parquet").stat().st_size < 300_000
    with pytest.raises(AuditError, match="unpacks to" if bomb == "rows" else "not compressed the way"):
        compact._table_of(tmp_path / "a.parquet", DISK)
