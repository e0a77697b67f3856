"""What a log holds is what came: ids and outcomes of every type, and nothing of a call that could not be read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audit.worlds import EMBEDDINGS, new_router

from moe_posterior import InvalidArgumentError
from moe_posterior.audit import AuditLog

KINDS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


def outcomes(folder: Path) -> list[dict[str, Any]]:
    return AuditLog(folder, mode="r").outcomes().select(["id", "signal", "accepted"]).to_pylist()


def test_ids_of_every_integer_type_are_recorded_as_the_numbers_they_hold(tmp_path: Path) -> None:
    with AuditLog(tmp_path) as log:
        router = new_router(log)
        ids = router.route_batch(EMBEDDINGS[: 2 * len(KINDS)]).ids
        shape = (2, router.gate.top_k)
        for place, kind in enumerate(KINDS):
            pair = ids[2 * place : 2 * place + 2]
            given = torch.tensor(pair.tolist(), dtype=getattr(torch, kind)) if place % 2 else pair.astype(kind)
            router.resolve_batch(given, np.ones(shape, dtype=kind))
    found = outcomes(tmp_path)
    assert [row["id"] for row in found] == ids.tolist()
    assert all(row["accepted"] and row["signal"] == 1.0 for row in found)


@pytest.mark.parametrize("wrong", [2**64 - 1, 2**63, 10**30, -(2**63) - 1, np.uint64(2**64 - 1), 0.0, True, "0", None])
def test_an_id_that_no_log_can_hold_leaves_no_trace(tmp_path: Path, wrong: Any) -> None:
    with AuditLog(tmp_path) as log:
        router = new_router(log)
        router.route_batch(EMBEDDINGS[:2])
        for call in (
            lambda: router.resolve(wrong, np.ones(router.gate.top_k)),
            lambda: router.resolve_batch([wrong], np.ones((1, router.gate.top_k))),
        ):
            with pytest.raises(InvalidArgumentError):
                call()
    assert outcomes(tmp_path) == []


@pytest.mark.parametrize("wrong", [7, -1, 2**63 - 1])
def test_an_id_that_was_never_given_is_recorded_as_refused_under_its_own_number(tmp_path: Path, wrong: int) -> None:
    with AuditLog(tmp_path) as log:
        router = new_router(log)
        router.route_batch(EMBEDDINGS[:2])
        with pytest.raises(InvalidArgumentError):
            router.resolve(np.int64(wrong), np.ones(router.gate.top_k))
    assert {(row["id"], row["accepted"]) for row in outcomes(tmp_path)} == {(wrong, False)}
