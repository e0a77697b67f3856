"""The static half of benchmark llm: fit on the training queries, choose a model for each test query.

Dimensions: N test queries, E = 9 models.
"""

from typing import Any

from torch import Tensor

from moe_posterior.benchmarks import llm
from moe_posterior.benchmarks.records import Record, case_key
from moe_posterior.gates import SoftmaxGate

PLAIN = {"num_clusters": 32, "neighbours": 1, "bandwidth": 0.1, "pooling": 0.0, "clusterings": 1}


def play_static(seed: int, done: set[str]) -> list[Record]:
    """Records of all static routers for one seed of clustering, folds and search; none where all are done already."""
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
        estimate, extra = _estimate(name, train, test, seed)
        figures = {**llm.measure_static(estimate, test.score), **extra}
        found += [Record("llm", "static", name, options, seed, metric, value) for metric, value in figures.items()]
    return found


def _estimate(name: str, train: llm.Scores, test: llm.Scores, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """(N, E) estimated scores, and further figures."""
    if name == "oracle":
        return test.score, {}
    if name == "softmax":
        gate = SoftmaxGate(train.hidden.shape[1], train.score.shape[1], top_k=1)
        gate.warm_start(train.hidden, train.score.float())
        return gate.router(test.hidden).softmax(dim=-1).detach().double(), {}
    if name == "posterior":
        options, validated = llm.search(train, seed)
        extra: dict[str, Any] = {f"knob_{knob}": value for knob, value in options.items()}
        return llm.estimate_with(train.hidden, train.score, test.hidden, options, seed), {
            **extra,
            "validation_score": validated,
        }
    if name == "posterior of the paper":
        return llm.estimate_with(train.hidden, train.score, test.hidden, PLAIN, seed), {}
    return llm.baselines(train, test.hidden)[name], {}
