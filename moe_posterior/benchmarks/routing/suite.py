"""What a benchmark runs: cases (environment, gate, options, seed), one by one and resumable.

A case's key is in its records, so a case that the file already holds is not run again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from moe_posterior.benchmarks.records import Record, case_key
from moe_posterior.benchmarks.routing import llm
from moe_posterior.benchmarks.routing.environments import (
    Benchmark,
    Environment,
    synthetic,
    with_newcomer,
    with_noisy_warm_start,
)
from moe_posterior.benchmarks.routing.evaluate import figures_of
from moe_posterior.benchmarks.routing.paper import published
from moe_posterior.benchmarks.routing.real import real
from moe_posterior.benchmarks.routing.registry import GATES, TABLE_ONE, build, options_of, posterior_keywords
from moe_posterior.benchmarks.routing.stream import Exchange, Feedback, play, play_class_oracle, play_oracle

CLUSTER_COUNTS = (8, 16, 32, 64)  # Table 4
ABLATION: dict[str, dict[str, Any]] = {  # name -> what differs from the gate's tuned knobs
    "no half-life": {"half_life": None},
    "half-life 50": {"half_life": 50.0},
    "half-life 200": {"half_life": 200.0},
    "no pooling": {"shrinkage": None},
    "no surprise": {"surprise": None},
    "outliers as members": {"novelty": "off"},
    "outliers discounted": {"novelty": "discount"},
    "outliers as a class": {"novelty": "class"},
    "no exploration": {"exploration": 0.0},
    "exploration 5 %": {"exploration": 0.05},
    "mean (λ = 0)": {"score": "lcb", "risk_aversion": 0.0},
    "λ = 2": {"score": "lcb", "risk_aversion": 2.0},
    "quantile 5 %": {"score": "quantile"},
    "thompson": {"score": "thompson"},
    "strength 5": {"strength": 5.0},
    "strength 100": {"strength": 100.0},
    "outcomes 20 queries late": {"feedback_delay": 20},
    "half of the outcomes missing": {"feedback_missing": 0.5},
    "outcomes wrong 20 %": {"feedback_false_positive": 0.2, "feedback_false_negative": 0.2},
    "outcomes wrong 20 %, de-biased": {
        "feedback_false_positive": 0.2,
        "feedback_false_negative": 0.2,
        "false_positive_rate": 0.2,
        "false_negative_rate": 0.2,
    },
    "newcomer, not told": {"newcomer": "not told"},
    "newcomer, flat prior": {"newcomer": "flat"},
    "newcomer, inherited prior": {"newcomer": "inherited"},
    "newcomer, flat prior, exploration 5 %": {"newcomer": "flat", "exploration": 0.05},
    "newcomer, inherited prior, exploration 5 %": {"newcomer": "inherited", "exploration": 0.05},
    "newcomer, flat prior, λ = 0": {"newcomer": "flat", "risk_aversion": 0.0},
    "newcomer, flat prior, thompson": {"newcomer": "flat", "score": "thompson"},
}
FEEDBACK = {f"feedback_{name}" for name in ("delay", "missing", "false_positive", "false_negative")}
NOT_OF_THE_GATE = FEEDBACK | {"newcomer"}  # options of the stream, listed among a variant's options


@dataclass(frozen=True)
class Plan:
    """What to run."""

    benchmark: str
    environments: Sequence[str]
    gates: Sequence[str]
    seeds: Sequence[int]
    num_experts: int = 16
    num_queries: int = 1000
    ablation: bool = False
    batch_size: int = 1
    delay: int = 0
    knobs: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = (
        None  # environment -> gate -> options; None: the shipped ones
    )


@dataclass(frozen=True)
class Case:
    """One run."""

    benchmark: str
    environment: str
    gate: str
    knobs: Mapping[str, Any]  # for the gate
    setting: Mapping[str, Any]  # of the environment and the stream
    seed: int

    @property
    def options(self) -> dict[str, Any]:
        """All options of this run, as recorded."""
        return {**self.setting, **self.knobs}

    @property
    def key(self) -> str:
        """As :attr:`Record.case`."""
        return case_key(self.benchmark, self.environment, self.gate, self.options, self.seed)


def cases_of(plan: Plan) -> Iterator[Case]:
    """All runs of a plan: the gates, then the variants for tables 4, 5 and the ablation."""
    setting = {"experts": plan.num_experts, "queries": plan.num_queries}
    if plan.batch_size != 1 or plan.delay:
        setting |= {"batch_size": plan.batch_size, "delay": plan.delay}
    for environment in plan.environments:
        for seed in plan.seeds:
            for gate, knobs in _variants(plan, environment):
                yield Case(plan.benchmark, environment, gate, knobs, setting, seed)


def _variants(plan: Plan, environment: str) -> Iterator[tuple[str, dict[str, Any]]]:
    tuned = None if plan.knobs is None else plan.knobs.get(environment, plan.knobs.get("synthetic", {}))
    yield "oracle", {}
    if plan.benchmark == "b":
        yield "class oracle", {}
    for gate in plan.gates:
        yield gate, options_of(gate, None, tuned, environment)
    if "posterior" not in plan.gates:
        return
    base = options_of("posterior", None, tuned, environment)
    if plan.benchmark in ("b", "c"):
        yield "posterior, uniform prior", {**base, "warm": False}
    if plan.benchmark == "c":
        for gate in (
            "posterior",
            *(name for name in TABLE_ONE[1:] if name in plan.gates and "num_clusters" in GATES[name].space),
        ):
            for count in CLUSTER_COUNTS:
                yield f"{gate}, K = {count}", {**options_of(gate, None, tuned, environment), "num_clusters": count}
    if plan.ablation:
        yield from ablation_variants(base)


def ablation_variants(base: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The posterior gate with one option changed; changes that the gate does not have or that change nothing are skipped."""
    known = posterior_keywords() | NOT_OF_THE_GATE | {"strength", "num_clusters"}
    for name, change in ABLATION.items():
        changed = {**base, **change}
        if set(change) <= known and any(base.get(key, _DEFAULTS.get(key)) != value for key, value in change.items()):
            yield f"posterior, {name}", changed


_DEFAULTS: dict[str, Any] = {
    "half_life": None,
    "shrinkage": None,
    "surprise": None,
    "novelty": "off",
    "exploration": 0.0,
}


def run(plan: Plan, done: set[str], report: Callable[[list[Record]], None]) -> None:
    """Play every case that is not done yet and report its records.

    Args:
        plan: what to run.
        done: keys of the cases to skip.
        report: called with the records of each case; an empty list if it was skipped.
    """
    for case in cases_of(plan):
        report([] if case.key in done else play_case(case))


def play_case(case: Case) -> list[Record]:
    """Build the environment and the gate, play the stream, measure."""
    environment = environment_of(
        case.benchmark, case.environment, case.seed, case.setting["experts"], case.setting["queries"]
    )
    if case.gate == "oracle":
        trace = play_oracle(environment)
    elif case.gate == "class oracle":
        trace = play_class_oracle(environment)
    else:
        knobs = {name: value for name, value in case.knobs.items() if name not in NOT_OF_THE_GATE}
        told = {name.removeprefix("feedback_"): case.knobs[name] for name in case.knobs if name in FEEDBACK}
        feedback = Feedback(**{"delay": case.setting.get("delay", 0), **told})
        if (
            feedback.false_positive or feedback.false_negative
        ):  # the warm-start outcomes are judged with the same errors
            environment = with_noisy_warm_start(environment, feedback.false_positive, feedback.false_negative)
        exchange, newcomer = None, case.knobs.get("newcomer")
        if newcomer is not None:
            half = case.setting["queries"] // 2
            environment, expert = with_newcomer(environment, half)
            exchange = None if newcomer == "not told" else Exchange(expert, half, newcomer == "inherited")
        gate = build(base_name(case.gate), environment, knobs, case.seed)
        batch_size = case.setting.get("batch_size", 1)
        trace = play(gate, environment, batch_size=batch_size, feedback=feedback, exchange=exchange)
    return [
        Record(
            case.benchmark,
            case.environment,
            case.gate,
            case.options,
            case.seed,
            metric,
            value,
            published(case.benchmark, case.gate, metric),
        )
        for metric, value in figures_of(trace, environment).items()
    ]


def base_name(gate: str) -> str:
    """The registered gate behind a variant.

    >>> base_name("posterior, K = 8")
    'posterior'
    """
    return gate.split(",")[0]


@lru_cache(maxsize=16)  # everything that one configuration is tuned on
def environment_of(benchmark: str, name: str, seed: int, num_experts: int, num_queries: int) -> Environment:
    """An environment by name, cached for the next gate."""
    if benchmark == "llm":
        return llm.stream(name, seed, num_queries=num_queries)
    letter = cast(Benchmark, benchmark)
    if name == "synthetic":
        return synthetic(letter, seed, num_experts, num_queries=num_queries)
    return real(name, letter, seed, num_experts, num_queries=num_queries)
