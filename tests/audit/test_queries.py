"""The queries of the README run, and answer what a plain loop over the router's life answers."""

import re
from pathlib import Path

import numpy as np
import pytest
from audit.worlds import EMBEDDINGS, new_router

from moe_posterior import InvalidArgumentError
from moe_posterior.audit import AuditLog
from moe_posterior.audit.views.export import export

duckdb = pytest.importorskip("duckdb")
README = Path(__file__).resolve().parents[2] / "moe_posterior" / "audit" / "README.md"
QUERIES = re.findall(r"```sql\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory):
    folder, seen, refused = tmp_path_factory.mktemp("queries"), [], []
    with AuditLog(folder) as log:
        router = new_router(log, exploration=0.3, seed=3)
        rng = np.random.default_rng(0)
        for step in range(150):
            decision = router.route(EMBEDDINGS[step])
            alpha, beta = (
                table[decision.cluster].numpy().copy() for table in (router.posterior.alpha, router.posterior.beta)
            )
            outcome = float(rng.random() < 0.2 * (1 + decision.expert)) if step % 4 else None
            seen.append((decision, alpha / (alpha + beta), outcome))
            if outcome is not None:
                router.resolve(decision.id, outcome)
            if step % 40 == 39:
                with pytest.raises(InvalidArgumentError):
                    router.resolve(decision.id, 1.0)
                refused.append(decision.id)
        with pytest.raises(InvalidArgumentError):
            router.resolve(10**9, 1.0)
        refused.append(10**9)
    return folder, seen, refused


@pytest.fixture(params=["tables", "files"])
def ask(request: pytest.FixtureRequest, life, tmp_path: Path):
    log = AuditLog(life[0], mode="r")
    connection = duckdb.connect()
    if request.param == "tables":
        for name, table in (("decisions", log.decisions()), ("outcomes", log.outcomes())):
            connection.register(name, table)
    else:
        export(log.read(), tmp_path)
        for name in ("decisions", "outcomes"):
            connection.execute(f"CREATE VIEW {name} AS SELECT * FROM '{tmp_path}/{name}.parquet'")
    return lambda query: connection.sql(query).fetchall()


def test_decisions_that_ignored_a_better_expert(life, ask) -> None:
    wanted = []
    for decision, means, _ in life[1]:
        believed, best = round(means[decision.expert], 3), round(means.max(), 3)
        if best - believed > 0.2:
            wanted.append((decision.id, decision.cluster, decision.expert, believed, best))
    found = ask(QUERIES[0])
    assert len(wanted) > 3
    assert sorted(found) == [pytest.approx(row) for row in sorted(wanted)]


def test_how_each_expert_did(life, ask) -> None:
    wanted = []
    for expert in sorted({decision.expert for decision, _, _ in life[1]}):
        mine = [(decision, outcome) for decision, _, outcome in life[1] if decision.expert == expert]
        known = [outcome for _, outcome in mine if outcome is not None]
        wanted.append((expert, len(mine), len(known), round(np.mean(known), 3), sum(d.abstain for d, _ in mine)))
    assert ask(QUERIES[1]) == [pytest.approx(row) for row in wanted]


def test_refused_outcomes_and_their_decisions(life, ask) -> None:
    found = ask(QUERIES[2])
    assert [row[0] for row in found] == life[2]
    decisions = {decision.id: decision for decision, _, _ in life[1]}
    for decision_id, _, reason, cluster, experts, _ in found:
        known = decisions.get(decision_id)
        assert (cluster, experts) == ((known.cluster, list(known.experts)) if known else (None, None))
        assert ("resolved already" if known else "never given") in reason
