"""Files from somebody who wishes us ill: always the typed error, no crash, no hang, no memory to speak of."""

import contextlib
import json
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from audit.worlds import live, new_router
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_posterior.audit import AuditError, AuditLog
from moe_posterior.audit.rebuild import rebuild
from moe_posterior.audit.storage.chain import Chain
from moe_posterior.audit.storage.files import HEAD, segment_name
from moe_posterior.audit.storage.frames import MAGIC, MAX_PAYLOAD, Frame, Kind, compress, genesis, pack
from moe_posterior.audit.storage.marks import Head, Position, head_bytes
from moe_posterior.audit.storage.state import decode_checkpoint, decode_json, encode_checkpoint, encode_json
from moe_posterior.audit.storage.tables import decode, encode
from moe_posterior.audit.verify import verify, verify_decisions
from moe_posterior.audit.views.stats import summarise


@pytest.fixture(scope="module")
def payloads(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Kind, bytes]]:
    """The frames of a small log."""
    folder = tmp_path_factory.mktemp("hostile")
    with AuditLog(folder) as log:
        router = new_router(log, top_k=2)
        waiting = live(router, 8, seed=0)
        log.flush()
        router.gate.configure(risk_aversion=0.5)
        live(router, 8, seed=1, waiting=waiting)
        with pytest.raises(ValueError, match="never given"):
            router.resolve(10**6, [1.0, 1.0])
    return [(frame.kind, frame.payload()) for frame in Chain(folder, None) if isinstance(frame, Frame)]


def seal(folder: Path, payloads: list[tuple[Kind, bytes]]) -> Path:
    """What somebody without a key can do: any content, under a chain that is right."""
    digest, data = genesis(None), b""
    for number, (kind, payload) in enumerate(payloads):
        stored = compress(payload)
        head, digest = pack(kind, number, stored, len(payload), digest, None)
        data += head + stored
    (folder / segment_name(0)).write_bytes(data)
    (folder / HEAD).write_bytes(head_bytes(Head(Position(0, len(payloads), digest), True), None))
    return folder


def read_in_every_way(folder: Path) -> None:
    """All that a reader offers; only AuditError may come of it."""
    assert verify(folder) is not None
    reader = AuditLog(folder, mode="r").read()
    uses = [
        lambda: list(reader),
        lambda: reader.decisions().to_pylist(),
        lambda: reader.outcomes().to_pylist(),
        lambda: reader.posterior().num_rows,
        lambda: reader.events().to_pylist(),
        lambda: summarise(reader),
        lambda: verify_decisions(reader),
        lambda: rebuild(reader, check=True),
    ]
    for use in uses:
        try:
            use()
        except AuditError:
            continue


def test_the_honest_log_is_read_in_every_way(payloads: list, tmp_path: Path) -> None:
    seal(tmp_path, payloads)
    assert verify(tmp_path).sound
    assert verify_decisions(AuditLog(tmp_path, mode="r").read()).disagreements == 0
    rebuild(AuditLog(tmp_path, mode="r").read(), check=True)


@settings(max_examples=80)
@given(data=st.data())
def test_altered_content_under_a_right_chain_raises_nothing_but_the_typed_error(
    payloads: list, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    changed = list(payloads)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(1, len(changed) - 1))
        kind, payload = changed[place]
        edit = data.draw(st.sampled_from(["flip", "cut", "random", "swap", "drop", "kind"]))
        altered = bytearray(payload)
        if edit == "flip" and altered:
            for _ in range(data.draw(st.integers(1, 8))):
                where = data.draw(st.integers(0, len(altered) - 1))
                altered[where] = data.draw(st.integers(0, 255))
        elif edit == "cut":
            del altered[data.draw(st.integers(0, len(altered))) :]
        elif edit == "random":
            altered = bytearray(data.draw(st.binary(max_size=300)))
        elif edit == "swap":
            other = data.draw(st.integers(1, len(changed) - 1))
            changed[place], changed[other] = changed[other], changed[place]
            continue
        elif edit == "drop" and len(changed) > 2:
            del changed[place]
            continue
        elif edit == "kind":
            kind = data.draw(st.sampled_from(list(Kind)))
        changed[place] = (kind, bytes(altered))
    read_in_every_way(seal(tmp_path_factory.mktemp("sealed"), changed))


@settings(max_examples=40)
@given(data=st.data())
def test_altered_settings_of_a_checkpoint_raise_nothing_but_the_typed_error(
    payloads: list, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    changed = list(payloads)
    place = data.draw(st.sampled_from([i for i, (kind, _) in enumerate(changed) if kind == Kind.CHECKPOINT]))
    checkpoint = decode_checkpoint(changed[place][1])
    settings_, arrays = json.loads(json.dumps(checkpoint.settings)), dict(checkpoint.arrays)
    target = data.draw(st.sampled_from([settings_, settings_["options"], settings_["knobs"], arrays]))
    name = data.draw(st.sampled_from(sorted(target)))
    if target is arrays:
        arrays[name] = data.draw(
            st.sampled_from([np.zeros((3, 2)), np.full(arrays[name].shape, -7), np.zeros(0, np.int64)])
        )
    else:
        target[name] = data.draw(
            st.sampled_from([None, -1, 0, 10**9, 2**70, 1.5, float("nan"), "x", [], {}, True, "lcb", "thompson"])
        )
    changed[place] = (Kind.CHECKPOINT, encode_checkpoint(checkpoint._replace(settings=settings_, arrays=arrays)))
    read_in_every_way(seal(tmp_path_factory.mktemp("sealed"), changed))


@settings(max_examples=80)
@given(garbage=st.binary(max_size=400), at=st.floats(0, 1), whole=st.booleans())
def test_garbage_in_a_segment_raises_nothing_but_the_typed_error(
    payloads: list, tmp_path_factory: pytest.TempPathFactory, garbage: bytes, at: float, whole: bool
) -> None:
    folder = seal(tmp_path_factory.mktemp("sealed"), payloads)
    path = folder / segment_name(0)
    data = path.read_bytes()
    cut = int(at * len(data))
    path.write_bytes(garbage if whole else data[:cut] + garbage + data[cut + len(garbage) :])
    read_in_every_way(folder)
    for name in (HEAD, "removed.json", "segment-00000001.json"):
        (folder / name).write_bytes(garbage)
        assert not verify(folder).sound or name != HEAD


@given(garbage=st.binary(max_size=300))
def test_decoders_take_any_bytes(garbage: bytes) -> None:
    for decoder in (decode_checkpoint, decode_json):
        with pytest.raises(AuditError):
            decoder(garbage)
    with contextlib.suppress(AuditError):
        assert decode(garbage) == []  # nothing at all is a payload without groups


def test_lengths_that_a_file_claims_are_not_allocated(tmp_path: Path) -> None:
    seal(tmp_path, [(Kind.SEGMENT, encode_json({"format": 1, "segment": 0, "previous": genesis(None).hex()}))])
    good = (tmp_path / segment_name(0)).read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for stored, raw in ((2**32 - 1, 10), (10, 2**32 - 1), (MAX_PAYLOAD, MAX_PAYLOAD)):
        head = struct.pack("<4sB3xIIQ", MAGIC, Kind.GROUP, stored, raw, 1)
        head += struct.pack("<I", zlib.crc32(head)) + bytes(32) + bytes(10)
        (tmp_path / segment_name(0)).write_bytes(good + head)
        assert not verify(tmp_path).sound
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 50 << 10  # kB


def test_parts_of_a_group_that_claim_more_than_there_is_are_refused(payloads: list) -> None:
    group = next(payload for kind, payload in payloads if kind == Kind.GROUP)
    assert encode(decode(group)) == group
    for size in (0, 1, 2**31, 2**32 - 1):
        altered = bytearray(group)
        struct.pack_into("<I", altered, 12, size)
        with pytest.raises(AuditError):
            decode(bytes(altered))
