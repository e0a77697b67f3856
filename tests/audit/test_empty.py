"""Every reader meets logs in which there is next to nothing: no source, no decision, batches without rows, groups without calls."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from audit.worlds import EMBEDDINGS, D, new_router

from moe_posterior import InvalidArgumentError, PosteriorRouter
from moe_posterior.audit import AuditLog
from moe_posterior.audit.rebuild import rebuild
from moe_posterior.audit.storage.collect import Rows
from moe_posterior.audit.verify import verify, verify_decisions
from moe_posterior.audit.views.follow import Follower
from moe_posterior.audit.views.page import to_html
from moe_posterior.audit.views.stats import summarise
from moe_posterior.audit.views.survey import survey
from moe_posterior.cli import main

NOTHING = np.zeros((0, D), dtype=np.float32)


def nobody(log: AuditLog) -> None:
    """Opened and closed."""


def nothing_decided(log: AuditLog) -> None:
    new_router(log)


def never_fitted(log: AuditLog) -> None:
    PosteriorRouter(3, D, 2, audit=log)


def empty_batches(log: AuditLog) -> None:
    router = new_router(log)
    for _ in range(3):
        assert len(router.route_batch(NOTHING).ids) == 0
        router.resolve_batch(np.zeros(0, dtype=np.int64), np.zeros((0, 1)))
        log.flush()


def empty_then_full(log: AuditLog) -> None:
    router = new_router(log)
    router.route_batch(NOTHING)
    router.resolve_batch(router.route_batch(EMBEDDINGS[:20]).ids[:0], np.zeros(0))
    log.flush()
    router.route_batch(NOTHING)


def one_decision(log: AuditLog) -> None:
    new_router(log).route(EMBEDDINGS[0])


def only_outcomes(log: AuditLog) -> None:
    """The decisions were made before the log was there."""
    router = new_router(None)
    ids = router.route_batch(EMBEDDINGS[:20]).ids
    router._audit = log.follow(router)
    router.resolve_batch(ids[:10], np.full(10, np.nan))
    router.resolve_batch(ids[10:], np.ones(10))


def only_refusals(log: AuditLog) -> None:
    router = new_router(log)
    with pytest.raises(InvalidArgumentError):
        router.resolve(5, 1.0)


def rows_without_calls(log: AuditLog) -> None:
    """The group commit that fell between a posterior row and the decision that rests on it."""
    router = new_router(log)
    router.resolve(router.route(EMBEDDINGS[0]).id, 0.0)
    log.flush()
    rows = router._audit._belief.capture(router._audit.source, np.arange(router.gate.num_clusters))
    assert isinstance(rows, Rows)
    log.put(rows)
    log.flush()
    router.route(EMBEDDINGS[0])


def rows_and_nothing_else(log: AuditLog) -> None:
    router = new_router(log)
    recorder = router._audit
    router.gate.posterior.observe(torch.tensor([0]), torch.tensor([[1.0]]), torch.tensor([[2]]))
    log.put(recorder._belief.capture(recorder.source, np.arange(router.gate.num_clusters)))


WORLDS = [
    nobody,
    nothing_decided,
    never_fitted,
    empty_batches,
    empty_then_full,
    one_decision,
    only_outcomes,
    only_refusals,
    rows_without_calls,
    rows_and_nothing_else,
]


def command(*arguments: str) -> Callable[[Path, Path], object]:
    """A command that must end well, with the folder in place of ``LOG`` and a fresh one in place of ``OUT``."""

    def run(folder: Path, out: Path) -> None:
        places = {"LOG": str(folder), "OUT": str(out / "out")}
        status = main(["audit", *(places.get(argument, argument) for argument in arguments)])
        needs_somebody = "--html" in arguments or arguments[0] == "replay"
        assert status == 0 or (needs_somebody and not sources_of(folder))

    return run


def sources_of(folder: Path) -> list:
    return list(survey(AuditLog(folder, mode="r").read()).sources.values())


def surveyed(folder: Path, out: Path) -> None:
    found = survey(AuditLog(folder, mode="r").read())
    for source in found.sources.values():
        assert source.flags() == []
        assert source.samples() is not None
    to_html(found, {})


def followed(folder: Path, out: Path) -> None:
    follower = Follower(folder)
    assert len(list(follower.poll())) > 0
    assert list(follower.poll()) == []


def recovered(folder: Path, out: Path) -> None:
    if sources_of(folder):
        AuditLog.recover(folder)._audit.log.close()


READERS: dict[str, Callable[[Path, Path], object]] = {
    "stats": command("stats", "LOG"),
    "stats --json": command("stats", "LOG", "--json"),
    "show": command("show", "LOG"),
    "show --json": command("show", "LOG", "--json"),
    "show filtered": command("show", "LOG", "--id", "0", "--expert", "0", "--cluster", "0", "--last", "3"),
    "verify": command("verify", "LOG", "--decisions"),
    "replay": command("replay", "LOG", "--out", "OUT"),
    "export parquet": command("export", "LOG", "--out", "OUT"),
    "export csv": command("export", "LOG", "--out", "OUT", "--format", "csv"),
    "export html": command("export", "LOG", "--html", "OUT"),
    "watch": command("watch", "LOG", "--once"),
    "decisions": lambda folder, out: AuditLog(folder, mode="r").decisions().to_pylist(),
    "decisions, no posterior": lambda folder, out: AuditLog(folder, mode="r").decisions(posterior=False).to_pylist(),
    "outcomes": lambda folder, out: AuditLog(folder, mode="r").outcomes().to_pylist(),
    "posterior": lambda folder, out: AuditLog(folder, mode="r").read().posterior().to_pylist(),
    "events": lambda folder, out: AuditLog(folder, mode="r").read().events().to_pylist(),
    "summarise": lambda folder, out: summarise(AuditLog(folder, mode="r").read()),
    "verify()": lambda folder, out: verify(folder).problem is None or pytest.fail("not sound"),
    "verify_decisions": lambda folder, out: verify_decisions(AuditLog(folder, mode="r").read()),
    "rebuild": lambda folder, out: (
        rebuild(AuditLog(folder, mode="r").read(), check=True) if sources_of(folder) else None
    ),
    "survey": surveyed,
    "follow": followed,
    "recover": recovered,
}


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: world.__name__)
def logs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same world as it was written, and sealed, as Parquet."""
    folders = [tmp_path_factory.mktemp(name) / "log" for name in ("written", "compacted")]
    for folder in folders:
        with AuditLog(folder) as log:
            request.param(log)
    AuditLog(folders[1]).close()
    with AuditLog(folders[1]) as log:
        assert log.compact() > 0
    return folders


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_takes_a_log_with_next_to_nothing_in_it(logs: list[Path], reader: str, tmp_path: Path) -> None:
    for name, folder in zip(("written", "compacted"), logs, strict=True):
        (tmp_path / name).mkdir()
        READERS[reader](folder, tmp_path / name)
