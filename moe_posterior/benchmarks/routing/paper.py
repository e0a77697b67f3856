"""Figures published in *Bayesian Posterior Routing in Multi-Agent Systems*, by benchmark, gate and metric.

The paper gives neither data nor competences, so these figures give orientation only; they cannot be reproduced.
"""

PAPER: dict[tuple[str, str, str], float] = {
    # Table 1 and "Benchmark B": routing error below softmax, as a share
    ("b", "posterior", "error_below_softmax"): 0.184,
    ("b", "expert threshold", "error_below_softmax"): 0.091,
    ("b", "bandit", "error_below_softmax"): 0.113,
    ("b", "posterior", "avoided_after"): 40,
    ("b", "expert threshold", "avoided_after"): 90,
    ("b", "posterior", "log_alarm_after"): 20,
    # Table 2
    ("b", "posterior", "ece"): 0.041,
    ("b", "softmax", "ece"): 0.143,
    ("b", "expert threshold", "ece"): 0.089,
    ("b", "bandit", "ece"): 0.072,
    # Table 3 and "Benchmark C"
    ("c", "posterior", "accuracy_before"): 0.914,
    ("c", "posterior", "accuracy_after"): 0.762,
    ("c", "softmax", "accuracy_after"): 0.583,
    ("c", "expert threshold", "accuracy_after"): 0.691,
    ("c", "bandit", "accuracy_after"): 0.724,
    ("c", "posterior", "gap"): 0.148,
    ("c", "posterior", "recovery"): 73,
    ("c", "expert threshold", "recovery"): 152,
    ("c", "bandit", "recovery"): 119,
    # Table 5: share of queries to stability that a warm start saves
    ("b", "posterior", "warm_start_saving"): 0.34,
    ("c", "posterior", "warm_start_saving"): 0.28,
}

FAMILY = {
    "ucb1": "bandit",
    "discounted ucb": "bandit",
    "thompson bandit": "bandit",
}  # the paper's bandit is not specified


def published(benchmark: str, gate: str, metric: str) -> float | None:
    """The paper's figure for a gate, or None.

    >>> published("b", "posterior", "ece"), published("a", "posterior", "ece")
    (0.041, None)
    """
    return PAPER.get((benchmark, FAMILY.get(gate, gate), metric))
