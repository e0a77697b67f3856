import json

import numpy as np
import pytest

from moe_posterior.benchmarks.cli import benchmark
from moe_posterior.benchmarks.routing import router


def short(seed: int) -> router.Play:
    return router.failing(router.made(seed, (0.9, 0.3, 0.6), queries=120), seed, 60)


def test_figures_are_those_of_the_choices_by_hand() -> None:
    competence = np.tile([0.9, 0.2], (600, 1))
    competence[300:, 0] = router.FLOOR
    play = router.Play(np.zeros((600, 2), np.float32), competence, competence, change=300, fails=0)
    chosen = np.array([0] * 310 + [1] * 290)
    found = dict(router.figures(play, chosen))
    assert found["outcome"] == pytest.approx((300 * 0.9 + 10 * 0.1 + 290 * 0.2) / 600)
    assert found["found"] == pytest.approx(210 / 500)  # the first is better over the last 500
    assert found["avoided"] == 5  # of the next 20 five are still the failed expert
    assert dict(router.figures(play, np.zeros(600, dtype=int)))["avoided"] > 280  # never, but for the end


@pytest.mark.parametrize("name", [name for name in router.STREAMS if "models" not in name])
def test_a_stream_is_the_same_for_the_same_seed_and_says_what_changes(name: str) -> None:
    one, two, other = router.STREAMS[name](0), router.STREAMS[name](0), router.STREAMS[name](1)
    assert np.array_equal(one.outcomes, two.outcomes)
    assert not np.array_equal(one.hidden, other.hidden)
    assert ((one.competence >= 0) & (one.competence <= 1)).all()
    if one.fails is not None and one.change is not None:
        before, after = one.competence[: one.change].mean(axis=0), one.competence[one.change : one.change + 500]
        assert before.argmax() == one.fails
        assert (after[:, one.fails] == router.FLOOR).all()


def test_every_policy_plays_and_a_newcomer_can_be_chosen_only_once_it_is_there() -> None:
    play = router.made(0, (0.3, 0.4, 0.95), queries=240)
    order = np.argsort(play.competence.mean(axis=0))
    play = router.Play(play.hidden, play.competence[:, order], play.outcomes[:, order], change=120, joins=True)
    for policy in router.POLICIES.values():
        chosen = router.run(play, policy(play, 0))
        assert chosen[:120].max() == 1
        assert chosen.max() == 2 or policy is router.POLICIES["router, the paper's score and belief"]


def test_the_command_writes_tables_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(router, "STREAMS", {"short": short})
    few = {name: router.POLICIES[name] for name in ("router, defaults", "Thompson")}
    monkeypatch.setattr(router, "POLICIES", few)
    out, markdown = tmp_path / "r.json", tmp_path / "r.md"
    command = ["router", "--seeds", "2", "--quiet", "--out", str(out), "--markdown", str(markdown)]
    assert benchmark(command) == 0
    text = markdown.read_text()
    assert "short, 2 seeds" in text
    assert router.BEST in text
    assert "again:" in capsys.readouterr().out
    monkeypatch.setattr(router, "run", lambda *_: pytest.fail("what is done is not run again"))
    assert benchmark(command) == 0
    assert len(json.loads(out.read_text())["records"]) == 2 * 3 * 4
