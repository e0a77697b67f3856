"""The command: runs, resumes, renders from a file, and says what is wrong."""

import json

import pytest
import torch

from moe_posterior.benchmarks import cli
from moe_posterior.benchmarks.cli import benchmark
from moe_posterior.benchmarks.records import read
from moe_posterior.benchmarks.routing import llm, suite, tune
from moe_posterior.benchmarks.routing.llm import Scores
from moe_posterior.clustering import Clusterer
from moe_posterior.errors import InvalidArgumentError, MissingDataError
from moe_posterior.gates import PosteriorGate

pytest.importorskip("rich")
pytest.importorskip("scipy")
QUICK = ["--environments", "synthetic", "--gates", "posterior", "softmax", "--queries", "120"]
QUICK += ["--seeds", "2", "--experts", "8", "--quiet"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "b.json"
    assert benchmark(["b", *QUICK, "--out", str(path)]) == 0
    return path


def test_records_are_tidy_and_name_their_paper_figure(file) -> None:
    content = json.loads(file.read_text())
    assert content["about"]["command"].startswith("moe-posterior benchmark b")
    fields = {"benchmark", "environment", "gate", "options", "seed", "metric", "value", "paper"}
    assert all(set(record) == fields for record in content["records"])
    papers = {(r["gate"], r["metric"]): r["paper"] for r in content["records"]}
    assert papers["posterior", "ece"] == 0.041
    assert papers["posterior", "regret"] is None
    assert {record["seed"] for record in content["records"]} == {0, 1}


def test_a_second_run_runs_nothing_and_a_larger_one_only_what_is_new(file, tmp_path, monkeypatch) -> None:
    path = tmp_path / "copy.json"
    path.write_text(file.read_text())
    played = []
    original = suite.play_case
    monkeypatch.setattr(suite, "play_case", lambda case: played.append(case) or original(case))
    benchmark(["b", *QUICK, "--out", str(path)])
    assert not played
    benchmark(["b", *QUICK, "--seeds", "3", "--out", str(path)])
    assert {case.seed for case in played} == {2}
    assert len(read(path).records) > len(read(file).records)


def test_rendering_from_a_file_runs_nothing(file, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(cli, "run", lambda *_: pytest.fail("a case was run"))
    markdown = tmp_path / "b.md"
    assert benchmark(["b", "--from", str(file), "--markdown", str(markdown)]) == 0
    printed, text = capsys.readouterr().out, markdown.read_text()
    for part in ("Table 1", "Table 2", "Table 5", "Table 6", "18.4", "0.041"):
        assert part in printed
        assert part in text
    assert "moe-posterior benchmark b --environments synthetic" in printed


def test_figures_are_drawn(file, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    benchmark(["b", "--from", str(file), "--figures", str(tmp_path)])
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert drawn == ["b-synthetic-E-8-success.png", "b-synthetic-E-8-trajectories.png"]


def test_c_has_the_shift_and_cluster_tables_and_the_ablation(capsys, monkeypatch) -> None:
    monkeypatch.setattr(suite, "CLUSTER_COUNTS", (8, 64))
    monkeypatch.setattr(suite, "ABLATION", {"strength 5": {"strength": 5.0}, "thompson": {"score": "thompson"}})
    benchmark(["c", *QUICK, "--seeds", "1", "--ablation"])
    printed = capsys.readouterr().out
    for part in ("Table 3", "Table 4", "K = 64", "Table 5", "Ablation", "76.2"):
        assert part in printed


def test_tuning_writes_knobs_that_a_run_takes(tmp_path) -> None:
    path = tmp_path / "knobs.json"
    arguments = ["a", "--gates", "softmax", "posterior", "--tune", "2", "--queries", "60", "--quiet", "--knobs"]
    assert benchmark([*arguments, str(path)]) == 0
    stored = json.loads(path.read_text())["synthetic"]
    assert set(stored["knobs"]) == {"softmax", "posterior"}
    assert min(stored["seeds"]) >= tune.FIRST_SEED
    out = tmp_path / "a.json"
    benchmark(["a", *QUICK, "--seeds", "1", "--knobs", str(path), "--out", str(out)])
    options = next(record.options for record in read(out).records if record.gate == "posterior")
    assert stored["knobs"]["posterior"].items() <= options.items()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (["b", "--from", "nowhere.json"], MissingDataError, "--out nowhere.json"),
        (["b", "--environments", "moon"], InvalidArgumentError, "'synthetic'"),
        (["llm", "--environments", "digits"], InvalidArgumentError, "'static'"),
        (["b", "--seeds", "0"], InvalidArgumentError, "--seeds must be at least 1"),
        (["b", *QUICK, "--out", "no/such/folder/b.json"], InvalidArgumentError, "existing folder"),
        (["b", *QUICK, "--knobs", "nowhere.json"], MissingDataError, "--tune"),
    ],
)
def test_mistakes_say_what_to_do(arguments, error, says) -> None:
    with pytest.raises(error, match=says):
        benchmark(arguments)


def test_a_file_of_something_else_is_refused(file, tmp_path) -> None:
    broken = tmp_path / "x.json"
    broken.write_text('{"format": 99}')
    with pytest.raises(InvalidArgumentError, match="format 1; got 99"):
        benchmark(["b", "--from", str(broken)])
    with pytest.raises(InvalidArgumentError, match="benchmark 'c'"):
        benchmark(["c", "--from", str(file)])


def test_help_teaches_by_examples(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark(["--help"])
    assert stopped.value.code == 0
    assert "examples:" in capsys.readouterr().out


@pytest.fixture(scope="module")
def train() -> Scores:
    try:
        return llm.load("train")
    except MissingDataError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", llm.STREAMS)
def test_llm_streams_hold_real_scores_until_the_change(train, name: str) -> None:
    environment = llm.stream(name, seed=0, num_queries=200)
    stream, half = environment.stream, environment.change_at
    assert stream.outcomes.shape == (200, 9)
    assert not stream.affected[:half].any()
    if name == "degraded":
        assert set(stream.outcomes[stream.affected, environment.degraded].unique().tolist()) <= {0.0, 1.0}
    else:
        early, late = (set(part.tolist()) for part in stream.query_class.split(half))
        assert not early & late


@pytest.mark.parametrize("options", [{"clusterings": 1}, {"clusterings": 3, "neighbours": 2, "softness": 0.1}], ids=str)
def test_the_posterior_router_of_the_benchmark_is_a_posterior_gate_with_public_knobs(train, options: dict) -> None:
    few = Scores(train.hidden[:400], train.score[:400], train.models)
    estimate = llm.estimate_with(few.hidden, few.score, few.hidden, {"num_clusters": 8, **options}, 0)
    gate = PosteriorGate(few.hidden.shape[1], 9, 8, 1, score="mean", **options)
    runs = [Clusterer(8, 384).fit(few.hidden, generator=torch.Generator().manual_seed(run)) for run in range(3)]
    gate.clusterer.load_state_dict(runs[0].state_dict())
    if gate.members is not None:
        gate.members.adopt(gate.clusterer, runs[1:], few.hidden)
    gate.warm_start(few.hidden, few.score)
    routing = gate(few.hidden)
    best = estimate.max(dim=1, keepdim=True).values
    assert torch.equal(estimate.gather(1, routing.expert_indices), best)
    assert torch.equal(routing.scores, best.float())


def test_the_confidence_line_says_how_much_too_high_the_best_of_nine_estimates_is(train) -> None:
    order = torch.randperm(len(train.hidden), generator=torch.Generator().manual_seed(0))  # the file is sorted by task
    few, rest = (Scores(train.hidden[rows], train.score[rows], train.models) for rows in (order[:600], order[600:]))
    options = {"num_clusters": 64, "neighbours": 1, "clusterings": 1}
    estimate = llm.estimate_with(few.hidden, few.score, rest.hidden, options, 0)
    line = llm.confidence_line(few, options, seed=0)
    plain, mended = llm.measure_static(estimate, rest.score), llm.measure_static(estimate, rest.score, line)
    assert mended["score"] == plain["score"]
    assert mended["ece"] < 0.7 * plain["ece"]
