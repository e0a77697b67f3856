"""The static half of benchmark llm: fit on the training queries, choose a model for each test query.

Dimensions: N test queries, E = 9 models.
"""

from typing import Any

from torch import Tensor

from moe_posterior.benchmarks.records import Record, case_key
from moe_posterior.benchmarks.routing import llm
from moe_posterior.gates import SoftmaxGate

PLAIN = {"num_clusters": 32, "neighbours": 1, "clusterings": 1}


def play_static(seed: int, done: set[str]) -> list[Record]:
    """Records of all static routers for one seed of clustering, folds and search; empty if all are done."""
    settings: dict[str, dict[str, Any]] = {
        "posterior": {"grid": len(llm.grid())},
        "posterior of the paper": PLAIN,
        "softmax": {},
        "best single": {},
        "40 nearest neighbours": {},
        "oracle": {},
    }
    missing = {
        name: options
        for name, options in settings.items()
        if case_key("llm", "static", name, options, seed) not in done
    }
    if not missing:
        return []
    train, test = llm.load("train"), llm.load("test")
    found = []
    for name, options in missing.items():
        if name == "posterior":
            figures = _posterior(train, test, seed)
        else:
            figures = llm.measure_static(_estimate(name, train, test, seed), test.score)
        found += [Record("llm", "static", name, options, seed, metric, value) for metric, value in figures.items()]
    return found


def _posterior(train: llm.Scores, test: llm.Scores, seed: int) -> dict[str, Any]:
    """Choose options and the confidence line by cross-validation on the training queries, then run the test queries once."""
    options, validated = llm.search(train, seed)
    line = llm.confidence_line(train, options, seed)
    final = {**options, "clusterings": llm.FINAL_CLUSTERINGS}
    estimate = llm.estimate_with(train.hidden, train.score, test.hidden, final, seed)
    return {
        **llm.measure_static(estimate, test.score, line),
        "ece_before_line": llm.measure_static(estimate, test.score)["ece"],
        **{f"knob_{knob}": value for knob, value in options.items()},
        "validation_score": validated,
    }


def _estimate(name: str, train: llm.Scores, test: llm.Scores, seed: int) -> Tensor:  # (N, E) estimated scores
    if name == "oracle":
        return test.score
    if name == "softmax":
        gate = SoftmaxGate(train.hidden.shape[1], train.score.shape[1], top_k=1)
        gate.warm_start(train.hidden, train.score.float())
        return gate.router(test.hidden).softmax(dim=-1).detach().double()
    if name == "posterior of the paper":
        return llm.estimate_with(train.hidden, train.score, test.hidden, PLAIN, seed)
    return llm.baselines(train, test.hidden)[name]
