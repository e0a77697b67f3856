"""Training from scratch in miniature: equal starts, clusters that follow their tokens, resuming, and the traffic."""

import pytest
import torch

pytest.importorskip("transformers")

from moe_posterior.benchmarks.lm import models
from moe_posterior.benchmarks.lm.data import Corpus
from moe_posterior.benchmarks.lm.models import Recipe, evaluate
from moe_posterior.benchmarks.lm.scratch import (
    ARMS,
    balance_loss,
    build_arm,
    finish,
    make_gate,
    move_centroids,
    traffic,
    train_arm,
)
from moe_posterior.clustering import Clusterer
from moe_posterior.errors import InvalidArgumentError

TINY = Recipe(hidden_size=16, intermediate_size=16, experts=4, heads=2, steps=6, warmup=2, batch_size=4)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    drawn = torch.randint(97, 123, (30_000,), generator=torch.Generator().manual_seed(1))
    path.write_bytes(bytes(drawn.tolist()))
    return Corpus([path])


def test_all_arms_start_from_the_same_weights() -> None:
    states = [build_arm(arm, TINY, 3).state_dict() for arm in ARMS]
    shared = set.intersection(*(set(state) for state in states))
    assert sum(".experts." in name for name in shared) == 4
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in shared)
    other = build_arm(ARMS[0], TINY, 4).state_dict()
    assert not torch.equal(other["model.layers.0.mlp.experts.up"], states[0]["model.layers.0.mlp.experts.up"])


def test_an_unknown_arm_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="arm must be one of"):
        make_gate("nobody", TINY)


def test_balance_loss_equals_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 4, generator=generator)
    chosen = logits.topk(2, dim=1).indices
    expected = 0.0
    for expert in range(4):
        share = sum(expert in row for row in chosen.tolist()) / 100
        probability = sum(float(torch.softmax(row, 0)[expert]) for row in logits) / 50
        expected += 4 * share * probability
    assert float(balance_loss(logits, chosen)) == pytest.approx(expected, rel=1e-5)
    lopsided = torch.tensor([[9.0, 0, 0, 0]] * 5)
    assert float(balance_loss(lopsided, torch.zeros(5, 1, dtype=torch.long))) > 3.9


def test_centroids_move_half_way_and_keep_their_number() -> None:
    clusterer = Clusterer(3, 1).set_centroids(torch.tensor([[0.0], [10.0], [100.0]]))
    move_centroids(clusterer, torch.tensor([[2.0], [4.0], [8.0]]))
    assert clusterer.centroids.flatten().tolist() == [1.5, 9.0, 100.0]


@pytest.mark.parametrize("arm", ["replace", "prior, balanced"])
def test_an_interrupted_arm_ends_with_the_belief_of_an_uninterrupted_one(corpus, tmp_path, monkeypatch, arm) -> None:
    monkeypatch.setattr(models, "KEEP_EVERY", 2)
    expected = train_arm(arm, corpus, TINY, 0, tmp_path / "straight.pt")
    original, calls = models.nn.utils.clip_grad_norm_, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(models.nn.utils, "clip_grad_norm_", killed)
    with pytest.raises(KeyboardInterrupt):
        train_arm(arm, corpus, TINY, 0, tmp_path / "killed.pt")
    found = train_arm(arm, corpus, TINY, 0, tmp_path / "killed.pt")
    assert len(calls) == 8
    assert found == expected
    states = [torch.load(tmp_path / name, weights_only=True)["model"] for name in ("straight.pt", "killed.pt")]
    beliefs = [name for name in states[0] if "successes" in name]
    assert len(beliefs) == 2
    assert all(float(states[0][name].sum()) > 0 for name in beliefs)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_learned_prior_routes_from_its_map_while_it_trains_and_starts_without_evidence(corpus, tmp_path) -> None:
    arm = "learned, balanced"
    start = build_arm(arm, TINY, 0)
    found = train_arm(arm, corpus, TINY, 0, tmp_path / "learned.pt")
    trained = torch.load(tmp_path / "learned.pt", weights_only=True)["model"]
    name = "model.layers.0.mlp.gate.prior.map.0.weight"
    assert not torch.equal(trained[name], start.state_dict()[name])
    assert not [key for key, value in trained.items() if "successes" in key and bool(value.any())]
    start.load_state_dict(trained)
    before = evaluate(start, corpus.windows("evaluate", torch.Generator().manual_seed(0))[:256])
    assert found["loss"] == pytest.approx(before.loss, rel=1e-6)  # clusters without evidence change no decision
    finish(start, corpus, 0)
    for decoder in start.model.layers:
        gate = decoder.mlp.gate
        assert gate.clusterer.fitted
        assert not bool(gate.posterior.evidence[0].any() or gate.posterior.evidence[1].any())
        assert float(gate.posterior.prior_alpha.std()) > 0  # what the held-out text said of the experts


def test_traffic_counts_every_slot_of_every_layer(corpus) -> None:
    model = build_arm("softmax", TINY, 0)
    windows = corpus.windows("evaluate")[:3]
    shares = traffic(model, windows)
    seen = []
    for decoder in model.model.layers:
        decoder.mlp.gate.register_forward_hook(lambda gate, inputs, routing: seen.append(routing.expert_indices))
    with torch.no_grad():
        model(input_ids=windows)
    for layer, indices in zip(shares, seen, strict=True):
        flat = indices.flatten().tolist()
        assert layer == pytest.approx([flat.count(expert) / len(flat) for expert in range(4)])
