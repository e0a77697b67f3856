"""What no record could hold is refused before anything is recorded, by a message that names the limit; what just fits is read back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audit.worlds import EMBEDDINGS, D, new_router
from torch import nn

from moe_posterior import InvalidArgumentError, PosteriorGate, PosteriorRouter
from moe_posterior.audit import AuditLog, attach, limits
from moe_posterior.audit.rebuild import rebuild
from moe_posterior.audit.verify import verify, verify_decisions

TOO_LARGE: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"num_experts": 65_537, "num_clusters": 1}, "num_experts .* at most 65536; got 65537"),
    "belief": ({"num_experts": 30_000, "num_clusters": 200}, "num_clusters=200 x num_experts=30000"),
    "slots": ({"num_experts": 65_536, "num_clusters": 1, "top_k": 65_536, "max_pending": 1}, "top_k .* at most 65535"),
    "pending": ({"num_experts": 4, "num_clusters": 2, "max_pending": 10_000_000}, "max_pending=10000000, top_k=1"),
    "belief and pending": (
        {"num_experts": 20_000, "num_clusters": 190, "max_pending": 6_000_000},
        "with all its pending decisions",
    ),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_a_router_that_fits_no_record_is_refused_when_it_is_made_and_the_log_goes_on(case: str, tmp_path: Path) -> None:
    options, message = TOO_LARGE[case]
    with AuditLog(tmp_path) as log:
        with pytest.raises(InvalidArgumentError, match=message):
            PosteriorRouter(hidden_size=D, audit=log, **options)
        new_router(log).route(EMBEDDINGS[0])  # under the same name
    assert verify(tmp_path).totals["decisions"] == 1


@pytest.mark.parametrize(
    "option", [10**5000, "x" * 70_000, {1: 2, "a": 3}, object()], ids=["digits", "text", "keys", "object"]
)
def test_options_that_no_reader_takes_are_refused(option: object, tmp_path: Path) -> None:
    router = new_router(None)
    router.options["seed"] = option
    with AuditLog(tmp_path) as log:
        with pytest.raises(InvalidArgumentError):
            log.follow(router)
        new_router(log).route(EMBEDDINGS[0])
    assert verify(tmp_path).totals["decisions"] == 1


@pytest.mark.parametrize("size", ["experts", "bytes"])
def test_one_expert_too_many_is_refused_before_it_is_added(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with AuditLog(tmp_path) as log:
        router = PosteriorRouter(6, D, 3, audit=log, max_pending=50)
        router.fit(EMBEDDINGS)
        if size == "experts":
            monkeypatch.setattr(limits, "MAX_EXPERTS", 7)
        else:
            fits = limits._BESIDE + limits.belief_bytes(router.gate, 7) + 4 * 7 + 50 * 20
            monkeypatch.setattr(limits, "MAX_PAYLOAD", fits)
        assert router.add_expert() == 6
        before = router.state()
        with pytest.raises(InvalidArgumentError, match="num_experts"):
            router.add_expert()
        assert router.gate.num_experts == 7
        assert torch.equal(router.state()["tenure"], before["tenure"])
        router.route(EMBEDDINGS[0])
        monkeypatch.undo()
    rebuild(AuditLog(tmp_path, mode="r").read(), check=True)


@pytest.mark.parametrize("name", ["x" * 1001, "", "é" * 2000])
def test_a_name_that_no_segment_can_begin_with_is_refused(name: str, tmp_path: Path) -> None:
    with AuditLog(tmp_path) as log, pytest.raises(InvalidArgumentError, match="name must be 1 to 1000 characters"):
        log.follow(new_router(None), name)


def test_names_that_are_too_long_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_NAMES", 2000)
    with AuditLog(tmp_path) as log:
        routers = [new_router(None) for _ in range(7)]
        for number, router in enumerate(routers[:6]):
            log.follow(router, f"{number} " + "é" * 50)
        with pytest.raises(InvalidArgumentError, match="names in a log must be at most 2000 bytes"):
            log.follow(routers[6], "é" * 50)
    AuditLog(tmp_path).close()
    assert verify(tmp_path).sound


@pytest.mark.parametrize("field", ["num_experts", "top_k"])
def test_a_gate_that_fits_no_record_leaves_the_whole_model_unrecorded(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.ModuleList([PosteriorGate(D, 4, 2, top_k=1), PosteriorGate(D, 9, 2, top_k=3)])
    limit = {"num_experts": "MAX_EXPERTS", "top_k": "MAX_TOP_K"}[field]
    monkeypatch.setattr(limits, limit, getattr(model[1], field) - 1)
    with AuditLog(tmp_path) as log:
        with pytest.raises(InvalidArgumentError, match=field):
            log.attach(model)
        assert not any("observe" in gate.__dict__ or gate._forward_hooks for gate in model)


def test_the_largest_pool_is_recorded_and_read_back(tmp_path: Path) -> None:
    with AuditLog(tmp_path) as log:
        router = PosteriorRouter(65_536, 2, 2, top_k=1, audit=log, max_pending=10)
        router.fit(np.random.default_rng(0).normal(size=(20, 2)))
        router.resolve(router.route(np.zeros(2)).id, 0.0)
        router.gate.posterior.observe(torch.tensor([0, 1]), torch.zeros(2, 1), torch.full((2, 1), 65_535))
        router.route(np.zeros(2))
    assert verify_decisions(AuditLog(tmp_path, mode="r").read()).agree == 2
    rebuild(AuditLog(tmp_path, mode="r").read(), check=True)


def test_the_most_experts_a_decision_are_recorded_and_read_back(tmp_path: Path) -> None:
    with AuditLog(tmp_path) as log:
        router = PosteriorRouter(65_535, 2, 1, top_k=65_535, audit=log, max_pending=2)
        router.fit(np.random.default_rng(0).normal(size=(20, 2)))
        router.resolve(router.route(np.zeros(2)).id, np.ones(65_535))
    assert len(AuditLog(tmp_path, mode="r").decisions(posterior=False)["experts"][0]) == 65_535
    assert len(AuditLog(tmp_path, mode="r").outcomes()) == 65_535


def test_a_forward_of_any_number_of_tokens_is_recorded_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attach, "_PIECE", 100)
    gate = PosteriorGate(D, 4, 2, top_k=2)
    gate.fit(torch.from_numpy(EMBEDDINGS))
    with AuditLog(tmp_path) as log, log.attach(gate):
        routing = gate(torch.from_numpy(EMBEDDINGS[:50]))
        gate.observe(routing, torch.arange(100.0).reshape(50, 2) / 100)
    rows = AuditLog(tmp_path, mode="r").decisions(posterior=False).to_pylist()
    assert [row["experts"] for row in rows] == routing.expert_indices.tolist()
    assert [row["signal"] for row in rows] == (torch.arange(100.0).reshape(50, 2) / 100).double().tolist()
