"""The cases of the experiment; runs those that are not done yet."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from moe_posterior.benchmarks.lm.damage import Damage, every_damage, usage_of, victims
from moe_posterior.benchmarks.lm.data import Corpus
from moe_posterior.benchmarks.lm.models import Evaluation, Recipe, build, train
from moe_posterior.benchmarks.lm.scratch import ARMS, train_arm
from moe_posterior.benchmarks.lm.stream import Method, Plan, Service, after_damage, bounds, measured_windows
from moe_posterior.benchmarks.records import Record, case_key
from moe_posterior.commands.lm import PARTS
from moe_posterior.errors import InvalidArgumentError

HEALTHY, SCRATCH, BASE = "healthy", "from scratch", "unswapped"
AMNESTY = 5000.0  # tuned on the tuning parts with seed 100; other options are PriorGate's defaults
GRADIENT = Method("gradient", knobs={"amnesty": AMNESTY}, repairs=True)
METHODS = (
    GRADIENT,
    Method("gradient, without innocence", knobs={"amnesty": AMNESTY, "innocent": False}),
    Method("shared top-1", "top1", {"amnesty": AMNESTY}),
    Method("shared probability", "probability", {"amnesty": AMNESTY}),
)
VARIATIONS: tuple[tuple[str, Mapping[str, Any]], ...] = (  # one knob at a time
    ("η = 10", {"penalty": 10.0}),
    ("η = 40", {"penalty": 40.0}),
    ("z = 1", {"confidence": 1.0}),
    ("z = 3", {"confidence": 3.0}),
    ("k0 = 10", {"strength": 10.0}),
    ("k0 = 100", {"strength": 100.0}),
    ("half-life 30", {"half_life": 30.0}),
    ("half-life 1000", {"half_life": 1000.0}),
    ("C = 16", {"num_clusters": 16}),
    ("C = 256", {"num_clusters": 256}),
    ("no pooling", {"pooling": None}),
    ("amnesty 20,000", {"amnesty": 20_000.0}),
    ("no amnesty", {"amnesty": None}),
)
KNOB_METHODS = tuple(
    Method(f"gradient, {name}", knobs={"amnesty": AMNESTY, **knobs}, repairs="amnesty" in knobs)
    for name, knobs in VARIATIONS
)


@dataclass(frozen=True)
class Experiment:
    """What to run.

    Args:
        text: plain text files.
        runs: folder of the checkpoints.
        seeds: of model, order of the stream and noise.
        parts: any of ``damage``, ``knobs``, ``scratch``.
        recipe, scratch_steps: of the model to swap, and training steps of the models from scratch.
        plan: lengths of the phases.
        tuning: read the tuning parts of the text, for choosing knobs.
        arms: gates to train from scratch with, of :data:`~moe_posterior.benchmarks.lm.scratch.ARMS`.
        report: called with the records of every finished case.
        say: called with a progress line.
    """

    text: Sequence[str]
    runs: Path
    seeds: Sequence[int]
    parts: Sequence[str] = PARTS
    recipe: Recipe = field(default_factory=Recipe)
    scratch_steps: int = 500
    plan: Plan = field(default_factory=Plan)
    tuning: bool = False
    arms: Sequence[str] = ARMS
    report: Callable[[list[Record]], None] = lambda records: None
    say: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise InvalidArgumentError(f"parts must be among {list(PARTS)}; got {unknown}")
        if unknown := [arm for arm in self.arms if arm not in ARMS]:
            raise InvalidArgumentError(f"--arms must be among {list(ARMS)}; got {unknown}")


def run(experiment: Experiment, done: set[str]) -> None:
    """Run every case that is not done; report each when it is complete."""
    corpus = Corpus(experiment.text)
    damages = every_damage(experiment.recipe.layers)
    for seed in experiment.seeds:
        jobs = _jobs(experiment, damages)
        if any(_missing(experiment, method, wanted, seed, done) for method, wanted in jobs):
            weights = _base_weights(experiment, corpus, seed)
            _measure_bounds(experiment, corpus, weights, damages, seed, done)
            for method, wanted in jobs:
                _serve(experiment, corpus, weights, method, wanted, seed, done)
    if "scratch" in experiment.parts:
        for seed in experiment.seeds:
            for arm in experiment.arms:
                _from_scratch(experiment, corpus, arm, seed, done)


def _jobs(experiment: Experiment, damages: list[Damage]) -> list[tuple[Method, list[Damage]]]:
    """Options are varied only for damages in all layers: nine damages times thirteen variants would take hours."""
    everywhere = [damage for damage in damages if len(damage.layers) == experiment.recipe.layers]
    jobs = [(method, damages) for method in METHODS] if "damage" in experiment.parts else []
    if "knobs" in experiment.parts:
        jobs += [(GRADIENT, everywhere)] + [(method, everywhere) for method in KNOB_METHODS]
    return jobs


def _missing(experiment: Experiment, method: Method, wanted: list[Damage], seed: int, done: set[str]) -> list[str]:
    names = [HEALTHY, *(damage.name for damage in wanted)]
    options = _options(experiment, method)
    return [name for name in names if case_key("lm", name, method.name, options, seed) not in done]


def _options(experiment: Experiment, method: Method | None) -> dict[str, Any]:
    common = {"layers": experiment.recipe.layers, "steps": experiment.recipe.steps, "tuning": experiment.tuning}
    return common if method is None else {**common, "signal": method.signal, **method.knobs}


def _base_weights(experiment: Experiment, corpus: Corpus, seed: int) -> dict[str, Any]:
    model = build(experiment.recipe, seed)
    experiment.say(f"seed {seed}: training the model")
    train(model, corpus, experiment.recipe, seed, experiment.runs / f"base-{seed}.pt")
    return model.state_dict()


def _fresh(experiment: Experiment, weights: Mapping[str, Any], seed: int) -> nn.Module:
    model = build(experiment.recipe, seed)
    model.load_state_dict(weights)
    return model


def _measure_bounds(
    experiment: Experiment,
    corpus: Corpus,
    weights: Mapping[str, Any],
    damages: list[Damage],
    seed: int,
    done: set[str],
) -> None:
    options = _options(experiment, None)
    wanted = [damage for damage in damages if case_key("lm", damage.name, BASE, options, seed) not in done]
    if not wanted:
        return
    experiment.say(f"seed {seed}: what the damages cost")
    model = _fresh(experiment, weights, seed)
    windows = measured_windows(corpus, experiment.plan, tuning=experiment.tuning)
    usage = usage_of(model, windows)
    for damage in wanted:
        found = bounds(model, damage, usage, windows, seed)
        metrics: dict[str, Any] = {f"{name}_loss": entry.loss for name, entry in found.items()}
        metrics |= {f"{name}_ece": entry.ece for name, entry in found.items()}
        touched = victims(damage, usage)
        metrics["traffic"] = sum(float(usage[layer][expert]) for layer in touched for expert in touched[layer])
        experiment.report(_records(damage.name, BASE, options, seed, metrics))


def _serve(
    experiment: Experiment,
    corpus: Corpus,
    weights: Mapping[str, Any],
    method: Method,
    wanted: list[Damage],
    seed: int,
    done: set[str],
) -> None:
    missing = _missing(experiment, method, wanted, seed, done)
    if not missing:
        return
    experiment.say(f"seed {seed}, {method.name}: healthy")
    options = _options(experiment, method)
    model = _fresh(experiment, weights, seed)
    service = Service(model, method, experiment.plan, corpus, seed, tuning=experiment.tuning)
    service.serve(experiment.plan.healthy)
    if HEALTHY in missing:
        phases = {"before": service.before, "swapped": service.swapped, "after": service.evaluate()}
        found = _records(HEALTHY, method.name, options, seed, _flat(phases))
        experiment.report(found)
        done.update(record.case for record in found)
    moment = service.moment()
    for damage in wanted:
        if damage.name in missing:
            experiment.say(f"seed {seed}, {method.name}: {damage.name}")
            service.go_back(moment)
            found = _records(damage.name, method.name, options, seed, after_damage(service, damage))
            experiment.report(found)
            done.update(record.case for record in found)


def _from_scratch(experiment: Experiment, corpus: Corpus, arm: str, seed: int, done: set[str]) -> None:
    recipe = Recipe(**{**asdict(experiment.recipe), "steps": experiment.scratch_steps})
    options = {"layers": recipe.layers, "steps": recipe.steps, "tuning": experiment.tuning}
    if case_key("lm", SCRATCH, arm, options, seed) in done:
        return
    experiment.say(f"seed {seed}, from scratch: {arm}")
    path = experiment.runs / f"scratch-{arm.replace(', ', '-')}-{seed}.pt"
    measured = "tune evaluate" if experiment.tuning else "evaluate"
    found = train_arm(arm, corpus, recipe, seed, path, measured=measured)
    experiment.report(_records(SCRATCH, arm, options, seed, found))


def _flat(phases: Mapping[str, Evaluation]) -> dict[str, float]:
    return {f"{phase}_{name}": value for phase, entry in phases.items() for name, value in asdict(entry).items()}


def _records(
    environment: str, gate: str, options: Mapping[str, Any], seed: int, metrics: Mapping[str, Any]
) -> list[Record]:
    return [Record("lm", environment, gate, options, seed, name, value) for name, value in metrics.items()]
