"""One valid call of every public function and class: what tests replace one argument at a time of.

Dimensions: N rows, K classes, E experts, C clusters, D hidden size, k experts chosen, G groups.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import moe_posterior as mp
from moe_posterior import audit, calibrators, gates, guarantees, losses, metrics, monitoring, serving
from moe_posterior.replay import find_gates, load_recording, recording_from_experts, save_recording

N, K, E, C, D, G = 24, 3, 4, 2, 6, 3
_GENERATOR = torch.Generator().manual_seed(0)


def _random(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=_GENERATOR)


def _ids(size: int, *shape: int) -> torch.Tensor:
    return torch.randint(size, shape, generator=_GENERATOR)


PROBS, EXPERT_PROBS = _random(N, K).softmax(-1), _random(N, E, K).softmax(-1)
TARGET, CONFIDENCE, CORRECT = _ids(K, N), _random(N), _ids(2, N).double()
CLUSTERS, CHOSEN, GROUPS, HIDDEN = _ids(C, N), _ids(E, N, 1), _ids(G, N), torch.randn(N, D, generator=_GENERATOR)
WEIGHTS, CELLS = _random(N, E).softmax(-1), _random(C, E) + 1
LABELLED = {"probs": PROBS, "target": TARGET}
PREDICTED = {"preds": PROBS, "target": TARGET}
RANKED = {"confidence": CONFIDENCE, "correct": CORRECT}
MIXED = {"probs": PROBS, "expert_probs": EXPERT_PROBS, "routing_weights": WEIGHTS, "target": TARGET}
SUMMED = {"groups": torch.stack([GROUPS, 1 - (GROUPS > 0).long()]).max(0).values, "num_groups": G, "n_bins": 5}
SUMS = metrics.bin_sums(CONFIDENCE, CORRECT, GROUPS, G, 5)
CONFIGURATIONS = metrics.configuration_ids(CLUSTERS, CHOSEN, E, num_clusters=C)
OUTPUTS = calibrators.Outputs(PROBS, EXPERT_PROBS, WEIGHTS, GROUPS, CONFIDENCE, CONFIDENCE, GROUPS)
SIZES = {"hidden_size": D, "num_experts": E, "top_k": 2}
NOISE = {"false_positive": 0.1, "false_negative": 0.2}


class Call(NamedTuple):
    """A function, its arguments, and the name it goes by."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]


def _call(function: Callable[..., Any], **arguments: Any) -> Call:
    return Call(function.__qualname__, function, arguments)


def fitted_gate(**options: Any) -> mp.PosteriorGate:
    """A small gate with clusters."""
    gate = mp.PosteriorGate(D, E, C, **options)
    gate.fit(HIDDEN, generator=torch.Generator().manual_seed(0))
    return gate


def fitted_router() -> mp.PosteriorRouter:
    """A small router with clusters and one open decision."""
    router = mp.PosteriorRouter(E, D, C)
    router.fit(HIDDEN)
    router.route(HIDDEN[0])
    return router


def _prior_gate() -> mp.PriorGate:
    gate = mp.PriorGate(D, E, C)
    gate.fit(HIDDEN, generator=torch.Generator().manual_seed(0))
    return gate


def _experts() -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(D, D) for _ in range(E))


def _fitted(calibrator: calibrators.Calibrator) -> calibrators.Calibrator:
    return calibrator.fit(OUTPUTS, TARGET)


def metric_calls() -> Iterator[Call]:
    """The functions and classes of the metrics."""
    for function in (metrics.action_threshold, metrics.aurc, metrics.excess_aurc, metrics.risk_coverage):
        extra = {"max_risk": 0.5} if function is metrics.action_threshold else {}
        yield _call(function, **RANKED, **extra)
    yield _call(metrics.selective_risk, **RANKED, threshold=0.5)
    for binned in (metrics.bin_indices, metrics.equal_mass_bins):
        yield _call(binned, confidence=CONFIDENCE, n_bins=5)
    yield _call(metrics.bin_sums, **RANKED, **SUMMED)
    yield _call(metrics.brier_decomposition, **PREDICTED, n_bins=5, top_label_only=False)
    yield _call(metrics.brier_score, **PREDICTED, reduction="mean")
    yield _call(
        metrics.calibration_difference, first=(PROBS, TARGET), second=(PROBS.flip(1), TARGET), n_bins=5, level=0.9,
        rows=GROUPS, draws=100, seed=0,
    )  # fmt: skip
    yield _call(
        metrics.calibration_error, **PREDICTED, n_bins=5, norm="l1", binning="equal_width", debias=False
    )  # fmt: skip
    yield _call(metrics.calibration_from_sums, sums=SUMS, norm="l1", min_count=1)
    yield _call(metrics.calibration_interval, **PREDICTED, n_bins=5, level=0.9, rows=GROUPS, draws=100, seed=0)
    yield _call(metrics.centred_interval, value=torch.tensor(0.5), statistics=CONFIDENCE, level=0.9)
    yield _call(metrics.classwise_calibration_error, **PREDICTED, n_bins=5, norm="l1")
    yield _call(metrics.configuration_calibration, **PREDICTED, configurations=CONFIGURATIONS, min_count=1)
    yield _call(metrics.configuration_ids, cluster_ids=CLUSTERS, expert_indices=CHOSEN, num_experts=E, num_clusters=C)
    curve = {**PREDICTED, "configurations": CONFIGURATIONS, "rhos": [0.0, 0.1], "min_count": 2}
    yield _call(metrics.cross_fitted_rce_curve, **curve, splits=2, seed=0)
    yield _call(metrics.rce_curve, **curve, debias=True)
    yield _call(metrics.curve_from_sums, sums=SUMS, group=1)
    yield _call(metrics.debiased_gap, gap=CONFIDENCE - 0.5, accuracy=CONFIDENCE, count=GROUPS.double() + 1)
    yield _call(metrics.grouped_calibration_error, **PREDICTED, **SUMMED, norm="l1", min_count=1)
    yield _call(metrics.holm, p_values=[0.1, 0.2])
    yield _call(metrics.human_divergence, preds=PROBS, human=PROBS.flip(1), reduction="mean", eps=1e-12)
    yield _call(metrics.negative_log_likelihood, **PREDICTED, reduction="mean", eps=1e-12)
    yield _call(metrics.noise_floor, preds=PROBS, n_bins=5)
    yield _call(
        metrics.paired_bootstrap, metric_fn=torch.mean, arms={"a": (CONFIDENCE,), "b": (CORRECT,)}, reference="a",
        samples=3, seed=0, level=0.9,
    )  # fmt: skip
    yield _call(metrics.reliability_curve, **PREDICTED, n_bins=5)
    yield _call(metrics.reweighted_calibration_error, gap=CONFIDENCE[:4], share=torch.ones(4) / 4, rho=0.1)
    yield _call(metrics.shared_confidence, preds=PROBS, configurations=CONFIGURATIONS, decimals=2)
    yield _call(metrics.smooth_calibration_error, **PREDICTED, bandwidth=0.1)
    yield _call(metrics.top_label, **PREDICTED)
    yield _call(metrics.wilson_interval, successes=GROUPS, trials=GROUPS + 1, level=0.9)
    yield _call(metrics.worst_group, values=CONFIDENCE, count=GROUPS, min_count=1, largest=True)
    knobs = {"n_bins": 5, "norm": "l1", "validate_args": True}
    yield _call(metrics.CalibrationError, **knobs)
    yield _call(metrics.ClasswiseCalibrationError, num_classes=K, **knobs)
    yield _call(metrics.GroupedCalibrationError, num_groups=G, **knobs, min_count=1)
    yield Call("CalibrationError.update", lambda **found: metrics.CalibrationError().update(**found), PREDICTED)
    yield Call(
        "GroupedCalibrationError.update",
        lambda **found: metrics.GroupedCalibrationError(G).update(**found),
        {**PREDICTED, "groups": GROUPS},
    )


def loss_calls() -> Iterator[Call]:
    """The functions of the losses."""
    unlabelled = {name: value for name, value in MIXED.items() if name != "target"}
    thresholds = {"regret_threshold": 1e-6, "disagreement_threshold": 0.01, "quantile": 0.5}
    yield _call(losses.expert_disagreement, **unlabelled)
    yield _call(losses.filter_mask, **MIXED, **thresholds)
    yield _call(
        losses.group_dro, loss_per_row=CONFIDENCE, groups=GROUPS, weights=torch.ones(G) / G, step=0.1, adjustment=0.1,
        group_sizes=torch.ones(G),
    )  # fmt: skip
    yield _call(losses.mixture_regret, **LABELLED, expert_probs=EXPERT_PROBS)
    yield _call(losses.mmce, **LABELLED, width=0.4, weighted=True)
    yield _call(losses.nll, **LABELLED)
    yield _call(losses.nll_per_row, **LABELLED)
    yield _call(losses.robust, **LABELLED, eta=2.0, detach_weights=False)
    yield _call(
        losses.robust_config, **LABELLED, configuration=GROUPS, state=losses.ConfigurationState.start(G),
        gap="confidence", weight=1.0, step=0.1, min_count=1.0, half_life=10.0,
    )  # fmt: skip
    yield _call(losses.robust_filtered, **MIXED, eta=2.0, **thresholds, detach_weights=False)
    yield _call(losses.soft_ece, **LABELLED, n_bins=5, temperature=0.01, norm=2)
    yield _call(losses.ConfigurationState.start, num_configurations=G, device="cpu")


def calibrator_calls() -> Iterator[Call]:
    """The calibrators: making, fitting and applying one."""
    fresh: list[Callable[[], calibrators.Calibrator]] = [calibrators.IsotonicCalibration]
    for bounded in (
        calibrators.ConfigurationCalibrator,
        calibrators.ExpertTemperature,
        calibrators.MultiDomainTemperature,
        calibrators.TemperatureScaling,
    ):
        yield _call(bounded, bounds=(0.1, 10.0))
        fresh.append(bounded)
    yield _call(calibrators.HistogramBinning, n_bins=5)
    yield _call(calibrators.ShiftAwareTemperature, reference=0, ridge=0.1, level_ridge=0.1, bounds=(0.1, 10.0))
    yield _call(calibrators.VectorScaling, ridge=0.1)
    yield _call(calibrators.StructuredMatrixScaling)
    yield _call(calibrators.VennAbers)
    yield _call(calibrators.Multicalibration, seed=1)
    online = {"static": _fitted(calibrators.TemperatureScaling()), "strength": 10.0, "half_life": 10.0}
    yield _call(calibrators.OnlineConfigurationCalibrator, **online)
    fresh += [calibrators.HistogramBinning, calibrators.ShiftAwareTemperature, calibrators.VectorScaling]
    for make in fresh:
        yield Call(f"{make.__name__}.fit", make().fit, {"outputs": OUTPUTS, "target": TARGET})
        yield Call(f"{make.__name__}.__call__", _fitted(make()), {"outputs": OUTPUTS})
    running = calibrators.OnlineConfigurationCalibrator(_fitted(calibrators.TemperatureScaling()))
    _fitted(running)
    yield Call("OnlineConfigurationCalibrator.__call__", running, {"outputs": OUTPUTS})
    yield Call("OnlineConfigurationCalibrator.observe", running.observe, {"outputs": OUTPUTS, "correct": CORRECT})


def monitor_calls() -> Iterator[Call]:
    """The calibration monitor: making one, its baseline, an update, a reset and its state."""
    options = {
        "alpha": 0.1,
        "tolerance": 0.01,
        "expected_configurations": 4,
        "global_share": 0.5,
        "max_configurations": 8,
    }
    yield _call(monitoring.CalibrationMonitor, **options)
    rows = {"confidence": CONFIDENCE, "correct": CORRECT, "configuration": GROUPS}
    yield Call("CalibrationMonitor.set_baseline", monitoring.CalibrationMonitor().set_baseline, rows)
    running = monitoring.CalibrationMonitor()
    running.update(**rows)
    yield Call("CalibrationMonitor.update", running.update, rows)
    yield Call("CalibrationMonitor.reset", running.reset, {"configuration": int(GROUPS[0])})
    yield Call("CalibrationMonitor.load_state_dict", running.load_state_dict, {"state": running.state_dict()})


def guarantee_calls() -> Iterator[Call]:
    """Thresholds and prediction sets, with a promise."""
    level = {"max_risk": 0.5, "error_probability": 0.2}
    yield _call(guarantees.select_threshold, **RANKED, **level, starts={0.1: 1.0})
    pooling = {"parents": {0: 1, 1: 1}, "min_rows": 5, "max_groups": 2, "starts": {0.1: 1.0}}
    yield _call(guarantees.select_group_thresholds, **RANKED, groups=GROUPS, **level, **pooling)
    yield _call(guarantees.OnlineActionThreshold, **level, step=0.1, alarm=9.0)
    online = guarantees.OnlineActionThreshold(**level)
    for method in (online.calibrate, online.update):
        yield Call(f"OnlineActionThreshold.{method.__name__}", method, RANKED)
    yield Call("OnlineActionThreshold.acts", online.acts, {"confidence": CONFIDENCE})
    yield Call("OnlineActionThreshold.load_state_dict", online.load_state_dict, {"state": online.state_dict()})
    yield _call(guarantees.PredictionSets, error_rate=0.2, score="raps", within="group", penalty=0.1, free_ranks=2)
    sets = guarantees.PredictionSets(0.2, within="group")
    rows = {"probs": PROBS, "groups": GROUPS, "weights": CONFIDENCE + 1, "generator": torch.Generator()}
    yield Call("PredictionSets.calibrate", sets.calibrate, {**rows, "target": TARGET})
    given = guarantees.PredictionSets(0.2, "aps", "group").calibrate(**{**rows, "target": TARGET})
    yield Call("PredictionSets.predict", given.predict, rows)


def evaluation_calls() -> Iterator[Call]:
    """The report on predictions."""
    settings = {"hold_out": 0.0, "resamples": 100, "seed": 0, "max_risk": 0.5, "tolerance": 0.1, "sample": 1000}
    found = {"configurations": GROUPS, "routing_weights": WEIGHTS, "expert_probs": EXPERT_PROBS, "groups": GROUPS}
    yield _call(mp.evaluate, **LABELLED, **found, logits=False, rows=torch.arange(N), name="mine", **settings)
    others = {"shifts": {"fog": (PROBS, TARGET)}, "calibration": (PROBS.flip(0), TARGET.flip(0))}
    yield Call("evaluate", mp.evaluate, {**LABELLED, **others, **settings})
    yield Call("evaluate", mp.evaluate, {**LABELLED, "models": {"other": PROBS.flip(1)}, **settings})
    yield Call("evaluate", mp.evaluate, {**RANKED, **settings})


def gate_calls() -> Iterator[Call]:
    """The gates: making each with every knob, fitting, routing and observing."""
    posterior = {"prior_alpha": 1.0, "prior_beta": 1.0, "half_life": 10.0, "shrinkage": 2.0, "surprise": 4.0}
    knobs = {
        **{"score": "lcb", "risk_aversion": 1.0, "credible_level": 0.1, "temperature": 0.1, "threshold": 0.5},
        **{"exploration": 0.1, "novelty": "off", "false_positive_rate": 0.1, "false_negative_rate": 0.1},
        **{"clusterings": 1, "neighbours": 1, "softness": 0.1, "lazy": False, "levels": 1, "seed": 0},
        "backend": "eager",
    }
    yield _call(mp.PosteriorGate, **SIZES, num_clusters=C, **posterior, **knobs, pooling="odds")
    prior = {"penalty": 2.0, "confidence": 2.0, "strength": 3.0, "half_life": 3.0, "amnesty": 5.0, "pooling": 3.0}
    yield _call(mp.PriorGate, **SIZES, num_clusters=C, **prior, innocent=True, learned=True, backend="eager")
    yield _call(mp.SoftmaxGate, **SIZES, router_width=E)
    yield _call(
        gates.BanditGate, **SIZES, num_clusters=C, policy="ucb1", contextual=True, exploration=1.0, discount=0.9,
        temperature=0.1, threshold=0.5, seed=0,
    )  # fmt: skip
    yield _call(gates.ExpertThresholdGate, **SIZES, router_width=E, decay=0.9, window=8)
    yield _call(gates.FixedGate, **SIZES, temperature=0.1)
    yield _call(gates.NearestNeighbourGate, **SIZES, num_neighbours=3, metric="cosine", temperature=0.1, capacity=9)
    yield _call(gates.OracleGate, **SIZES, competence=lambda hidden: hidden[:, :E].sigmoid(), temperature=0.1)
    for gate in (fitted_gate(), _prior_gate()):
        kind, routing = type(gate).__name__, gate(HIDDEN)
        yield Call(f"{kind}.forward", gate.forward, {"hidden": HIDDEN})
        yield Call(f"{kind}.fit", gate.fit, {"hidden": HIDDEN, "generator": None})
        yield Call(f"{kind}.warm_start", gate.warm_start, {"hidden": HIDDEN, "outcome": _random(N, E)})
        yield Call(f"{kind}.observe", gate.observe, {"routing": routing, "outcome": _random(N, 2), "dense": False})
    gate = fitted_gate()
    yield Call(
        "PosteriorGate.replace_expert", gate.replace_expert, {"expert": 1, "prior_from": {0: 1.0}, "strength": 4.0}
    )
    yield Call(
        "PosteriorGate.add_expert", lambda **f: fitted_gate().add_expert(**f), {"prior_from": {0: 1.0}, "strength": 4.0}
    )
    strength = {"strength": 3.0, "shrinkage": 9.0, "weight": 1.0, "draws": 3.0}
    yield _call(mp.LearnedPrior, width=4, **strength, warmup_epochs=1)
    learned = fitted_gate(prior=mp.LearnedPrior(4))
    rows = {"hidden": HIDDEN, "outcome": _random(N, E)}
    yield Call("PosteriorGate.learn_prior", learned.learn_prior, {**rows, "strength": 3.0, "sync": False})
    yield Call("PosteriorGate.loss", learned.loss, rows)
    yield Call("PosteriorGate.remove_expert", lambda **f: fitted_gate().remove_expert(**f), {"expert": 1})


def belief_calls() -> Iterator[Call]:
    """The posterior, its clusters, and the arithmetic of beta and evidence."""
    knobs = {"prior_alpha": 1.0, "prior_beta": 1.0, "half_life": 10.0, "shrinkage": 2.0, "surprise": 4.0}
    yield _call(
        mp.BetaPosterior, num_clusters=C, num_experts=E, **knobs, noise=mp.ProxyNoise(0.1, 0.1), clusterings=1,
        pooling="odds", foresees=False,
    )  # fmt: skip
    belief = mp.BetaPosterior(C, E)
    foreseeing = mp.BetaPosterior(C, E, foresees=True)
    both = {"cluster_ids": CLUSTERS, "outcome": _random(N, E), "expected": _random(N, E)}
    yield Call("BetaPosterior.observe", foreseeing.observe, both)
    seen = {"cluster_ids": CLUSTERS, "expert_indices": CHOSEN, "outcome": CONFIDENCE[:, None]}
    yield Call("BetaPosterior.observe", belief.observe, seen)
    yield Call("BetaPosterior.warm_start", belief.warm_start, {"cluster_ids": CLUSTERS, "outcome": _random(N, E)})
    yield Call("BetaPosterior.merge", belief.merge, {"other": mp.Evidence(CELLS.double(), CELLS.double())})
    yield Call("BetaPosterior.lcb", belief.lcb, {"risk_aversion": 1.0})
    yield Call("BetaPosterior.quantile", belief.quantile, {"probability": 0.1})
    yield Call("BetaPosterior.forget", belief.forget, {"keep": 0.5, "experts": torch.tensor([0])})
    yield _call(mp.Clusterer, num_clusters=C, hidden_size=D, outliers=False, levels=1)
    clusterer = mp.Clusterer(C, D)
    yield Call("Clusterer.fit", clusterer.fit, {"hidden": HIDDEN, "generator": None})
    yield Call("Clusterer.set_centroids", clusterer.set_centroids, {"centroids": HIDDEN[:C], "radius": torch.ones(C)})
    yield Call("Clusterer.forward", mp.Clusterer(C, D).set_centroids(HIDDEN[:C]).forward, {"hidden": HIDDEN})
    yield _call(mp.ProxyNoise, **NOISE)


def router_calls() -> Iterator[Call]:
    """The router."""
    yield _call(
        mp.PosteriorRouter, num_experts=E, hidden_size=D, num_clusters=C, top_k=1, abstain_below=0.1, max_pending=10,
        audit=None,
    )  # fmt: skip
    router = fitted_router()
    yield Call("PosteriorRouter.fit", fitted_router().fit, {"embeddings": HIDDEN, "seed": 0})
    yield Call(
        "PosteriorRouter.warm_start", fitted_router().warm_start, {"embeddings": HIDDEN, "outcomes": _random(N, E)}
    )
    yield Call("PosteriorRouter.route", router.route, {"embedding": HIDDEN[0]})
    yield Call("PosteriorRouter.route_batch", router.route_batch, {"embeddings": HIDDEN})
    yield Call("PosteriorRouter.resolve", lambda **f: fitted_router().resolve(**f), {"decision_id": 0, "outcome": 1.0})
    yield Call(
        "PosteriorRouter.resolve_batch", lambda **f: fitted_router().resolve_batch(**f), {"ids": [0], "outcomes": [1.0]}
    )
    knobs = {"prior_from": {0: 1.0}, "strength": 4.0}
    yield Call("PosteriorRouter.add_expert", lambda **f: fitted_router().add_expert(**f), knobs)
    yield Call("PosteriorRouter.remove_expert", lambda **f: fitted_router().remove_expert(**f), {"expert": 1})
    yield Call("PosteriorRouter.replace_expert", router.replace_expert, {"expert": 1, **knobs})
    path = Path(tempfile.mkdtemp()) / "router.pt"
    yield Call("PosteriorRouter.save", router.save, {"path": path})
    router.save(path)
    yield Call("PosteriorRouter.load", mp.PosteriorRouter.load, {"path": path, "audit": None})
    yield Call("PosteriorRouter.from_state", mp.PosteriorRouter.from_state, {"state": router.state(), "audit": None})


def model_calls() -> Iterator[Call]:
    """Layers, recording and replay, serving, the audit log."""
    folder = Path(tempfile.mkdtemp())
    yield _call(
        mp.ExpertsFFN, num_experts=E, hidden_size=D, intermediate_size=5, activation="gelu", implementation="loop",
        generator=None,
    )  # fmt: skip
    yield _call(mp.MixtureOfExperts, experts=_experts(), gate=mp.SoftmaxGate(D, E))
    yield _call(mp.PosteriorMoE, experts=_experts(), hidden_size=D, num_clusters=C, top_k=2)
    layer = mp.MixtureOfExperts(_experts(), fitted_gate())
    yield Call("MixtureOfExperts.forward", layer.forward, {"hidden": HIDDEN})
    yield Call(
        "token_outcomes",
        mp.token_outcomes,
        {"logits": _random(2, 5, K), "labels": _ids(K, 2, 5), "kind": "top1", "shift": True},
    )
    yield _call(mp.Trace, gates={}, model=layer)
    with mp.record(layer) as trace:
        layer(HIDDEN)

    def observed(outcome: Any) -> None:
        with mp.record(layer) as own:
            layer(HIDDEN)
        own.observe(outcome)

    yield Call("Trace.observe", observed, {"outcome": CONFIDENCE})
    yield Call("Trace.save", trace.save, {"path": folder / "trace"})
    yield Call(
        "record", lambda **f: mp.record(**f).__enter__(), {"model": mp.MixtureOfExperts(_experts(), fitted_gate())}
    )
    trace.save(folder / "kept")
    found = load_recording(folder / "kept")
    yield Call("load_recording", load_recording, {"path": folder / "kept"})
    yield Call("save_recording", save_recording, {"recording": found, "path": folder / "other"})
    yield Call("find_gates", find_gates, {"model": layer})

    def replayed(**given: Any) -> None:
        with mp.replay(**given):
            given["model"](HIDDEN)

    yield Call("replay", replayed, {"model": layer, "recorded": found, "weights": "recorded", "same_state": False})
    yield Call(
        "recording_from_experts",
        recording_from_experts,
        {"model": layer, "experts": {"gate": _ids(E, N, 1).repeat(1, 2)}},
    )
    functions = mp.export_routing(mp.MixtureOfExperts(_experts(), _prior_gate()), rule=serving.HostRule())
    yield Call(
        "export_routing",
        mp.export_routing,
        {"model": mp.MixtureOfExperts(_experts(), _prior_gate()), "rule": serving.HostRule(), "scaled": False},
    )
    yield Call("save_routing", serving.save_routing, {"functions": functions, "path": folder / "routing"})
    serving.save_routing(functions, folder / "there")
    yield Call("load_routing", serving.load_routing, {"path": folder / "there"})
    yield Call("update_routing", serving.update_routing, {"functions": functions, "path": folder / "there"})
    for kind, gate in (
        (serving.PriorRouting, _prior_gate()),
        (serving.PosteriorRouting, fitted_gate()),
        (serving.LearnedRouting, fitted_gate(prior=mp.LearnedPrior(4))),
    ):
        yield _call(kind, gate=gate, rule=serving.HostRule(), spread=False, hosted=False)

    def opened(**given: Any) -> None:
        audit.AuditLog(**given).close()

    knobs = {
        "mode": "w",
        "fsync_every": 0.1,
        "key": b"0" * 32,
        "max_queue": 1 << 20,
        "on_full": "block",
        "max_wait": 1.0,
    }
    limits = {"rotate_bytes": 1 << 20, "rotate_seconds": 10.0, "compact": False, "retain_bytes": 1 << 30}
    yield Call("AuditLog", opened, {"folder": folder / "log", **knobs, **limits, "retain_seconds": 1e6})


def wrong_values(valid: Any) -> dict[str, Any]:
    """Values of wrong type, shape, dtype and range to put in place of a valid one."""
    wrong = {
        "None": None, "str": "x", "list": [1, "a"], "object": object(), "dict": {"a": 1}, "nan": float("nan"),
        "huge": 10**30, "negative": -1, "fraction": 0.3, "boolean": True, "complex": torch.zeros(N, dtype=torch.complex64),
        "ndim": torch.zeros(2, 2, 2, 2), "meta": torch.zeros(N, device="meta"), "empty": torch.zeros(0),
        "integers": torch.zeros(N, dtype=torch.int64), "class": int, "function": len,
    }  # fmt: skip
    if isinstance(valid, torch.Tensor):
        wrong |= {
            "of meta": valid.to("meta"),
            "of complex": valid.to(torch.complex64),
            "of more dimensions": valid[None],
            "of one row less": valid[1:] if valid.ndim else valid[None],
            "of other numbers": valid.long() if valid.is_floating_point() else valid.float(),
            "of range": torch.full_like(valid, 1e6 if valid.is_floating_point() else 10**6),
            "of negatives": torch.full_like(valid, -1),
            "of NaN": torch.full(valid.shape, torch.nan),
            "of booleans": valid.bool(),
            "sparse": valid.to_sparse(),
        }
    return wrong
