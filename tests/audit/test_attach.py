"""Gates inside models are recorded token by token, at a stated rate, with the outcomes they observe."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from moe_posterior import (
    InvalidArgumentError,
    LearnedPrior,
    MixtureOfExperts,
    PosteriorMoE,
    PriorGate,
    SoftmaxGate,
    record,
)
from moe_posterior.audit import AuditError, AuditLog
from moe_posterior.audit.verify import verify, verify_decisions

HIDDEN = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))


def experts(count: int = 4) -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(8, 8) for _ in range(count)])


def model(**options) -> nn.Sequential:
    first = PosteriorMoE(experts(5), hidden_size=8, num_clusters=6, top_k=2, **options)
    first.gate.fit(HIDDEN)
    return nn.Sequential(first, nn.ReLU(), MixtureOfExperts(experts(4), SoftmaxGate(8, 4, 1)))


@pytest.mark.parametrize("options", [{}, {"clusterings": 2, "neighbours": 2}], ids=["one cluster", "several"])
def test_all_gates_of_a_model_are_recorded_with_gradient_outcomes(tmp_path: Path, options: dict) -> None:
    layers = model(**options)
    seen = []
    with AuditLog(tmp_path) as log, log.attach(layers):
        for _ in range(3):
            with record(layers) as trace:
                loss = layers(HIDDEN).square().mean()
            loss.backward()
            seen.append([routing for _, routing in trace.routings])
            trace.observe_gradients()
    entries = AuditLog(tmp_path, mode="r").decisions().to_pylist()
    for place, name in ((0, "model.0.gate"), (1, "model.2.gate")):
        wanted = [row for routings in seen for row in routings[place].expert_indices.tolist()]
        mine = [entry for entry in entries if entry["source"] == name]
        assert [entry["experts"] for entry in mine] == wanted
        signals = [value for entry in mine for value in entry["signal"]]
        assert {"0.0"} <= {repr(value) for value in signals} <= {"0.0", "1.0", "nan"}
    found = verify_decisions(AuditLog(tmp_path, mode="r").read())
    assert (found.agree, found.disagreements, found.skipped) == (900, 0, 900)
    assert verify(tmp_path).sound


def test_the_rate_is_kept_and_stated(tmp_path: Path) -> None:
    layers = model()
    with AuditLog(tmp_path) as log, log.attach(layers, rate=0.1):
        routings = [layers[0].route(HIDDEN) for _ in range(10)]
        for step, routing in enumerate(routings):
            layers[0].observe(routing, torch.full((300, 5), step / 16), dense=True)
    log = AuditLog(tmp_path, mode="r")
    entries = log.decisions().to_pylist()
    assert 200 < len(entries) < 400
    assert {tuple(entry["signal"]) for entry in entries} == {(step / 16,) * 2 for step in range(10)}
    assert '"rate":0.1' in log.read().events()["detail"].to_pylist()[1]


def test_a_detached_model_is_as_before_and_its_forwards_are_unchanged_meanwhile(tmp_path: Path) -> None:
    layers = model()
    plain = layers(HIDDEN)
    keys = {name: set(module.__dict__) for name, module in layers.named_modules()}
    with AuditLog(tmp_path) as log:
        attachment = log.attach(layers)
        assert torch.equal(layers(HIDDEN), plain)
        with pytest.raises(AuditError, match="already being recorded"):
            log.attach(layers)
        twin = copy.deepcopy(layers.state_dict())
        attachment.detach()
        layers(HIDDEN)
    assert set(twin) == set(layers.state_dict())
    assert {name: set(module.__dict__) for name, module in layers.named_modules()} == keys
    assert len(AuditLog(tmp_path, mode="r").decisions()) == 2 * len(HIDDEN)


def test_an_outcome_counts_once_in_the_log(tmp_path: Path) -> None:
    layers = model()
    with AuditLog(tmp_path) as log, log.attach(layers):
        routing = layers[0].route(HIDDEN)
        layers[0].observe(routing, torch.ones(300, 2))
        layers[0].observe(routing, torch.zeros(300, 2))  # the layer does not mind; the log holds the first
        layers[0].observe(layers[0].gate(HIDDEN), torch.zeros(300, 2))
    assert AuditLog(tmp_path, mode="r").outcomes().num_rows == 2 * 2 * 300


def test_what_cannot_be_attached_is_refused(tmp_path: Path) -> None:
    with AuditLog(tmp_path) as log:
        with pytest.raises(InvalidArgumentError, match="holds none"):
            log.attach(nn.Linear(2, 2))
        with pytest.raises(InvalidArgumentError, match="rate must lie"):
            log.attach(model(), rate=0.0)


OUTSIDE = {
    "warm start": lambda gate: gate.warm_start(HIDDEN, HIDDEN[:, :5].sigmoid().double()),
    "expert added": lambda gate: gate.add_expert(),
    "expert removed": lambda gate: gate.remove_expert(1),
    "loaded": lambda gate: gate.load_state_dict(
        {n: 3 * t if "prior" in n else t for n, t in gate.state_dict().items()}
    ),
    "moved": lambda gate: gate._apply(torch.clone),
}


@pytest.mark.parametrize("change", OUTSIDE)
def test_what_no_outcome_changed_is_checkpointed_before_the_next_decision(tmp_path: Path, change: str) -> None:
    moe = PosteriorMoE(experts(5), hidden_size=8, num_clusters=6, top_k=2)
    moe.gate.fit(HIDDEN)
    draws = torch.Generator().manual_seed(1)

    def live() -> None:
        for _ in range(3):
            moe.observe(routing := moe.gate(HIDDEN[:40]), torch.rand(*routing.expert_indices.shape, generator=draws))

    with AuditLog(tmp_path) as log, log.attach(moe):
        live()
        OUTSIDE[change](moe.gate)
        live()
    rows = AuditLog(tmp_path, mode="r")
    last = rows.decisions().to_pylist()[-1]
    found = verify_decisions(rows.read())
    assert (found.agree, found.disagreements, found.skipped) == (240, 0, 0)
    assert len(last["alpha"]) == moe.gate.num_experts
    reasons = rows.read().events()["event"].to_pylist()
    assert reasons.count("checkpoint: changed from outside") == 1


def test_a_gate_that_overrules_a_learned_one_is_recorded_with_its_belief(tmp_path) -> None:
    hidden = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    gate = PriorGate(hidden_size=8, num_experts=4, num_clusters=3, top_k=2)
    moe = PosteriorMoE(torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(4)]), 8, gate=gate)
    gate.fit(hidden)
    gate.warm_start(hidden, torch.full((200, 4), 0.8))
    log = AuditLog(tmp_path / "log")
    recording = log.attach(moe, rate=1.0)
    routing = moe.route(hidden)
    moe.observe(routing, torch.where(routing.expert_indices == 1, 0.0, 0.8).double(), dense=False)
    moe.route(hidden)
    recording.detach()
    listening = len(gate.posterior._listeners)  # the gate itself
    log.close()
    table = AuditLog(tmp_path / "log", mode="r").decisions()
    alpha = np.array(table["alpha"].to_pylist())
    expected = gate.posterior.alpha[routing.cluster_ids].numpy()
    np.testing.assert_allclose(alpha[200:], expected)
    assert not np.allclose(alpha[:200], expected)
    assert listening == 1, "only the gate itself listens after detaching"
    found = verify_decisions(AuditLog(tmp_path / "log", mode="r").read())
    assert (found.agree, found.disagreements, found.skipped) == (0, 0, 400)


@pytest.mark.parametrize("scale", ["odds", "competence"])
def test_decisions_by_a_learned_prior_hold_what_was_believed_of_the_chosen(tmp_path: Path, scale: str) -> None:
    torch.manual_seed(0)
    moe = PosteriorMoE(
        experts(5), hidden_size=8, num_clusters=6, top_k=2, prior=LearnedPrior(9, scale=scale), risk_aversion=2.0
    )
    gate, believed = moe.gate, []

    def live(rows: slice) -> None:
        routing = moe.route(HIDDEN[rows])
        believed.extend(gate.counts_of(routing).tolist())
        if gate.clusterer.fitted:
            moe.observe(routing, (HIDDEN[rows, :2] > 0).double(), dense=False)

    with AuditLog(tmp_path) as log, log.attach(moe):
        live(slice(0, 50))  # from the map alone
        gate.fit(HIDDEN)
        gate.learn_prior(HIDDEN, (HIDDEN[:, :5] > -0.5).double())
        for start in (50, 100, 150):
            live(slice(start, start + 50))
    log = AuditLog(tmp_path, mode="r")
    entries = log.decisions().to_pylist()
    assert len(entries) == len(believed) == 200
    for entry, (alpha, beta) in zip(entries, believed, strict=True):
        assert [entry["alpha"][expert] for expert in entry["experts"]] == alpha
        assert [entry["beta"][expert] for expert in entry["experts"]] == beta
        assert sum(math.isnan(value) for value in entry["alpha"]) == 3, "nothing is made up of the others"
        assert entry["means"] == [a / (a + b) for a, b in zip(alpha, beta, strict=True)]
    assert {entry["mode"] for entry in entries[:50]} == {"mean"}
    assert {entry["mode"] for entry in entries[50:]} == {"lcb"}
    found = verify_decisions(log.read())
    agree = 200 if scale == "competence" else 0  # log odds are not in the log
    assert (found.agree, found.disagreements, found.skipped) == (agree, 0, 200 - agree)
    assert verify(tmp_path).sound
    with AuditLog(tmp_path) as again:
        assert again.compact() >= 1
    after = AuditLog(tmp_path, mode="r").decisions().to_pylist()
    assert [repr(entry) for entry in after] == [repr(entry) for entry in entries]


def test_a_belief_that_does_not_bear_its_score_is_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    moe = PosteriorMoE(
        experts(5), hidden_size=8, num_clusters=6, top_k=2, prior=LearnedPrior(9, strength=9.0, scale="competence")
    )
    moe.gate.fit(HIDDEN)
    with AuditLog(tmp_path) as log, log.attach(moe) as attached:
        moe.route(HIDDEN[:20])
        recorder = attached.recorders[0]
        recorder._beliefs = lambda routing, rows: {"alpha": np.ones((len(rows), 2)), "beta": np.ones((len(rows), 2))}
        moe.route(HIDDEN[:20])
    found = verify_decisions(AuditLog(tmp_path, mode="r").read())
    assert (found.agree, found.disagreements) == (20, 20)
