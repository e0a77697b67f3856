"""The router's doors: one answer for every type that holds the value, else our error, and nothing learned or recorded."""

import copy
import multiprocessing
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_posterior import DamagedFileError, InvalidArgumentError, MissingDataError, MoEPosteriorError, PosteriorRouter

KINDS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    **{f"numpy {kind}": lambda a, kind=kind: a.astype(kind) for kind in KINDS},
    **{f"torch {kind}": lambda a, kind=kind: torch.tensor(a.tolist(), dtype=getattr(torch, kind)) for kind in KINDS},
    "list": lambda a: a.tolist(),
    "tuple of scalars": lambda a: tuple(a),
    "list of tensors": lambda a: [torch.tensor(v) for v in a],
    "reversed twice": lambda a: a[::-1].copy()[::-1],
    "big-endian": lambda a: a.astype(">i2"),
    "objects": lambda a: a.astype(object),
}
OUTCOMES: dict[str, Callable[[list[float]], Any]] = {
    **{f"numpy {kind}": lambda v, kind=kind: np.array(v, dtype=kind) for kind in (*KINDS, "bool", "float16", "float64")},
    "torch bool": lambda v: torch.tensor(v).bool(),
    "torch bfloat16": lambda v: torch.tensor(v).bfloat16(),
    "torch float16": lambda v: torch.tensor(v).half(),
    "torch uint16": lambda v: torch.tensor(v).to(torch.uint16),
    "list": lambda v: v,
    "with gradient": lambda v: torch.tensor(v, requires_grad=True),
}  # fmt: skip


NUMBERS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint16, torch.int64]


def made(seed: int = 0, **options: Any) -> tuple[PosteriorRouter, np.ndarray]:
    embeddings = np.random.default_rng(seed).random((64, 8), dtype=np.float32)
    router = PosteriorRouter(4, 8, 4, **options)
    router.fit(embeddings)
    return router, embeddings


def belief(router: PosteriorRouter) -> list[Any]:
    return [router.posterior.successes.tolist(), router.posterior.failures.tolist(), router.gate.steps.item()]


@pytest.mark.parametrize("form", FORMS)
def test_ids_of_every_integer_type_resolve_the_same_decisions(form: str) -> None:
    (expected, embeddings), (router, _) = made(), made()
    for each in (expected, router):
        each.route_batch(embeddings[:5])
    ids = np.array([4, 0, 2])
    expected.resolve_batch(ids, [1.0, 0.0, 1.0])
    router.resolve_batch(FORMS[form](ids), [1.0, 0.0, 1.0])
    assert belief(router) == belief(expected)
    router.resolve(FORMS[form](np.array([3, 1]))[1], 1.0)  # a scalar of the same type


@pytest.mark.parametrize("form", OUTCOMES)
def test_outcomes_of_every_type_teach_the_same(form: str) -> None:
    (expected, embeddings), (router, _) = made(), made()
    for each in (expected, router):
        each.route_batch(embeddings[:4])
    expected.resolve_batch([0, 1, 2], [1.0, 0.0, 1.0])
    expected.resolve(3, 1.0)
    given = OUTCOMES[form]([1.0, 0.0, 1.0])
    router.resolve_batch([0, 1, 2], given)
    router.resolve(3, given[0])
    assert belief(router) == belief(expected)


@pytest.mark.parametrize("wrong", [2**64 - 1, 2**63, -1, 5, 10**30, 0.0, True, "0", None, np.nan, np.uint64(2**64 - 1)])
def test_an_id_that_was_never_given_is_refused_and_nothing_learned(wrong: Any) -> None:
    router, embeddings = made()
    router.route_batch(embeddings[:5])
    before = belief(router)
    calls = [lambda: router.resolve(wrong, 1.0), lambda: router.resolve_batch([wrong, wrong], [1.0, 1.0])]
    for call in calls:
        with pytest.raises(InvalidArgumentError):
            call()
    assert belief(router) == before
    router.resolve(0, 1.0)


@pytest.mark.parametrize("wrong", [np.inf, -np.inf, 1.5, -0.5, "good", "1", 1j, [[1.0]], {}, b"1"])
def test_an_outcome_that_is_no_competence_is_refused_and_nothing_learned(wrong: Any) -> None:
    router, embeddings = made()
    router.route_batch(embeddings[:2])
    before = belief(router)
    with pytest.raises(InvalidArgumentError):
        router.resolve_batch([0, 1], [wrong, 1.0])
    if wrong != [[1.0]]:
        with pytest.raises(InvalidArgumentError):
            router.resolve(0, wrong)
    assert belief(router) == before


def test_what_is_not_known_is_not_observed() -> None:
    for unknown in (np.nan, None, torch.tensor(torch.nan), np.float16("nan")):
        router, embeddings = made()
        router.resolve(router.route(embeddings[0]).id, unknown)
        assert belief(router)[:2] == [[[0.0] * 4] * 4] * 2


@pytest.mark.parametrize(
    "kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint16, torch.int64]
)
def test_embeddings_of_every_number_type_go_the_same_way(kind: torch.dtype) -> None:
    router, embeddings = made()
    rows = torch.from_numpy(embeddings[:6] * 4).round().to(kind)
    expected = router.route_batch(rows.double().numpy())
    again = made()[0]
    found = again.route_batch(rows)
    assert found.experts.tolist() == expected.experts.tolist()
    np.testing.assert_array_equal(found.distance, expected.distance)
    strided = torch.stack([rows, rows], dim=2)[0, :, 1]
    for row in (rows[0], strided, rows[0].tolist(), rows.double().requires_grad_()[0]):
        assert again.route(row).cluster == expected.clusters[0]


def test_an_embedding_beyond_float32_is_broken_and_not_a_number_of_its_own() -> None:
    router, _ = made()
    for value in (1e300, np.inf, np.nan):
        decision = router.route(np.full(8, value))
        assert decision.abstain
        assert decision.distance == np.inf
        router.resolve(decision.id, 1.0)
    assert belief(router)[:2] == [[[0.0] * 4] * 4] * 2


@pytest.mark.parametrize(
    "wrong", ["good", None, 1.0, np.ones(7), np.ones((1, 8)), np.ones(8, dtype=bool), ["a"] * 8, np.ones(8) * 1j]
)
def test_an_embedding_of_another_kind_is_refused(wrong: Any) -> None:
    router, _ = made()
    with pytest.raises(InvalidArgumentError, match="embedding must be numbers"):
        router.route(wrong)
    with pytest.raises(InvalidArgumentError, match="embeddings must be numbers"):
        router.route_batch(wrong if np.ndim(wrong) == 1 else [wrong])


@pytest.mark.parametrize("empty", [[], np.zeros(0), np.zeros((0, 1)), torch.zeros(0, dtype=torch.uint8)])
def test_empty_batches_change_nothing_first_and_last(empty: Any) -> None:
    router, embeddings = made()
    assert len(router.route_batch(embeddings[:0]).ids) == 0
    router.resolve_batch([], empty)
    router.resolve_batch(router.route_batch(embeddings[:2]).ids, [1.0, 0.0])
    router.resolve_batch([], empty)
    assert sum(map(sum, belief(router)[0])) == 1


def test_a_router_made_and_taught_under_inference_mode_learns_outside_it() -> None:
    with torch.inference_mode():
        router, embeddings = made()
        router.warm_start(embeddings, np.ones((64, 4)), strength=2.0)
        router.resolve(router.route(embeddings[0]).id, 1.0)
    router.resolve(router.route(embeddings[0]).id, 0.0)
    router.add_expert({0: 1.0})
    router.fit(embeddings)
    assert not any(tensor.is_inference() for tensor in router.gate.state_dict().values())


def routed_elsewhere(router: PosteriorRouter, embedding: np.ndarray) -> tuple[int, bytes]:
    router.resolve(0, 1.0)
    return router.route(embedding).id, pickle.dumps(router)


def test_a_router_copies_pickles_and_moves_to_a_spawned_process_with_its_pending_decisions() -> None:
    router, embeddings = made()
    first = router.route(embeddings[0])
    for other in (copy.copy(router), copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        assert belief(other) == belief(router)
        other.resolve(first.id, 1.0)
        assert other.route(embeddings[1]).id == 1
    assert belief(router)[0] == [[0.0] * 4] * 4, "a copy shares nothing"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        next_id, back = pool.apply(routed_elsewhere, (router, embeddings[0]))
    assert next_id == 1
    assert sum(map(sum, belief(pickle.loads(back))[0])) == 1


def test_a_file_that_is_no_routers_is_refused_by_our_own_errors(tmp_path: Path) -> None:
    router, embeddings = made()
    router.route(embeddings[0])
    whole, path = tmp_path / "router.pt", tmp_path / "junk.pt"
    router.save(whole)
    with pytest.raises(MissingDataError):
        PosteriorRouter.load(path)
    torch.save({"options": {}}, tmp_path / "other.pt")
    torch.save([1], tmp_path / "list.pt")
    state = router.state()
    torch.save({**state, "gate": {}}, tmp_path / "no gate.pt")
    torch.save({**state, "pending": {"id": torch.zeros(3, dtype=torch.int64)}}, tmp_path / "pending.pt")
    for content in (b"", b"abc", b"PK\x03\x04", pickle.dumps({"a": 1}), whole.read_bytes()[:700]):
        path.write_bytes(content)
        with pytest.raises(DamagedFileError, match="junk"), warnings.catch_warnings(action="ignore"):
            PosteriorRouter.load(path)
    for other in ("other", "list", "no gate"):
        with pytest.raises(MoEPosteriorError):
            PosteriorRouter.load(tmp_path / f"{other}.pt")
    with pytest.raises(DamagedFileError):
        PosteriorRouter.load(tmp_path)
    assert belief(PosteriorRouter.load(whole)) == belief(router)
