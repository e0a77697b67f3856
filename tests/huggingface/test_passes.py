import pytest
import torch
from huggingface.models import D, batch, evidence, fit_on_noise, mixtral

from moe_posterior import InvalidArgumentError, NotFittedError, record, restore_gates, swap_gates, token_outcomes
from moe_posterior.clustering import Clusterer
from moe_posterior.huggingface import swapped_gates
from moe_posterior.huggingface.passes import Reservoir


def loader(batches: int = 4, padded: int = 3) -> list[dict[str, torch.Tensor]]:
    return [batch(seed=seed, padded=padded) for seed in range(batches)]


def test_a_reservoir_keeps_everything_while_it_can_and_then_a_uniform_sample() -> None:
    rows = torch.arange(600.0)[:, None]
    small = Reservoir(1000, torch.Generator().manual_seed(0))
    for chunk in rows.split(70):
        small.add(chunk)
    assert torch.equal(small.sample, rows)
    counts = torch.zeros(600)
    for seed in range(400):
        reservoir = Reservoir(60, torch.Generator().manual_seed(seed))
        for chunk in rows.split(70):
            reservoir.add(chunk)
        kept = reservoir.sample.flatten().long()
        assert len(kept.unique()) == 60
        counts[kept] += 1
    # Each row is in with probability 0.1: 40 of 400 runs, standard deviation 6.
    assert abs(float(counts[:60].mean()) - 40) < 3
    assert abs(float(counts[-60:].mean()) - 40) < 3
    assert float((counts - 40).abs().max()) < 6 * 6


def test_broken_rows_never_enter_a_reservoir() -> None:
    reservoir = Reservoir(10, torch.Generator().manual_seed(0))
    reservoir.add(torch.tensor([[1.0], [torch.nan], [torch.inf], [2.0]]))
    assert reservoir.sample.flatten().tolist() == [1.0, 2.0]


def test_fit_finds_the_clusters_of_each_layers_own_inputs_without_padding() -> None:
    model, data = mixtral(), loader()
    hidden: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    handles = [
        layer.mlp.gate.register_forward_hook(lambda _, inputs, __, place=place: hidden[place].append(inputs[0].clone()))
        for place, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for each in data:
            model(**each)
    for handle in handles:
        handle.remove()
    model.train()
    report = swap_gates(model, num_clusters=4)
    assert report.fit(data) is report
    real = torch.cat([each["attention_mask"].flatten() for each in data]).bool()
    for place, (_, gate) in enumerate(swapped_gates(model)):
        rows = torch.cat([each.reshape(-1, D) for each in hidden[place]])[real]
        direct = Clusterer(4, D).fit(rows)
        # k-means started from another draw: its clusters differ, how well they fit the rows does not.
        own = Clusterer(4, D).set_centroids(gate.clusterer.centroids)
        assert float(own(rows).distance.square().sum()) < 1.2 * float(direct(rows).distance.square().sum())
        assert torch.isfinite(gate.clusterer.radius).all()
    assert model.training
    assert not any(router.mlp.gate.moe_posterior.collector for router in model.model.layers)


def test_fit_keeps_a_bounded_sample_stops_in_time_and_is_reproducible() -> None:
    centroids = []
    for _ in range(2):
        model, data = mixtral(), loader(batches=9)
        drawn = iter(data)
        swap_gates(model, num_clusters=4).fit(drawn, max_tokens=60, sample_size=16)
        assert len(list(drawn)) == 9 - 3  # 27 real tokens a batch
        centroids.append([gate.clusterer.centroids for _, gate in swapped_gates(model)])
    assert all(torch.equal(one, other) for one, other in zip(*centroids, strict=True))


def test_fit_says_what_is_missing() -> None:
    model = mixtral()
    report = swap_gates(model, num_clusters=64)
    with pytest.raises(InvalidArgumentError, match=r"at least 64 tokens .* router 'model.layers.0.mlp.gate' saw 27"):
        report.fit(loader(batches=1))
    with pytest.raises(InvalidArgumentError, match="no router saw any"):
        report.fit([])
    with pytest.raises(InvalidArgumentError, match="must yield mappings"):
        report.fit([torch.zeros(1)])
    with pytest.raises(InvalidArgumentError, match="sample_size must be at least 1"):
        report.fit(loader(), sample_size=0)
    with pytest.raises(NotFittedError, match=r"call swapped\.fit"):
        report.warm_start(loader())
    restore_gates(model)
    with pytest.raises(InvalidArgumentError, match="holds no swapped router"):
        report.fit(loader())


def test_warm_start_counts_what_observing_would_and_changes_no_parameter() -> None:
    model, data = mixtral(), loader()
    parameters = {name: parameter.clone() for name, parameter in model.named_parameters()}
    swap_gates(model, num_clusters=4, half_life=None, amnesty=None).fit(data)
    counted = []
    for each in data:  # by hand: through observe, on labels made by hand
        labels = torch.where(each["attention_mask"] == 1, each["input_ids"], -100)
        with record(model) as trace:
            loss = model(**each, labels=labels).loss
        loss.backward()
        trace.observe_gradients()
        if each is not data[-1]:
            continue
        counted = [
            (gate.posterior.successes.clone(), gate.posterior.failures.clone()) for _, gate in swapped_gates(model)
        ]
    restore_gates(model)
    model.zero_grad()
    seen = []
    report = swap_gates(model, num_clusters=4, half_life=None, amnesty=None).fit(data)
    for _, gate in swapped_gates(model):
        gate.warm_start_from_counts = lambda successes, failures, keep=gate.warm_start_from_counts: (
            seen.append((successes.clone(), failures.clone())),
            keep(successes, failures),
        )
    report.warm_start(data)
    for (successes, failures), (expected_successes, expected_failures) in zip(seen, counted, strict=True):
        assert torch.equal(successes, expected_successes)
        assert torch.equal(failures, expected_failures)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, parameters[name])
        assert parameter.grad is None
        assert parameter.requires_grad
    for _, gate in swapped_gates(model):
        assert evidence(gate) == 0
        assert not gate.biased
        assert bool((gate.reference != 0.5).any())


def test_warm_start_of_replacing_gates_measures_the_routers_own_choice() -> None:
    model, data = mixtral(), loader()
    report = swap_gates(model, num_clusters=4, mode="replace").fit(data)
    choices: list[torch.Tensor] = []
    handle = model.model.layers[0].mlp.gate.register_forward_hook(lambda _, __, output: choices.append(output[2]))
    report.warm_start(data)
    handle.remove()
    restore_gates(model)
    plain: list[torch.Tensor] = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda _, __, output: plain.append(output[2]))
    for each in data:
        model(**each)
    assert all(torch.equal(one, other) for one, other in zip(choices, plain, strict=True))


def test_warm_start_says_what_is_missing() -> None:
    model = mixtral()
    report = swap_gates(model, num_clusters=4).fit(loader())
    with pytest.raises(InvalidArgumentError, match="must return a loss"):
        swap_gates(mixtral().model, num_clusters=4).fit(loader()).warm_start([{**batch(), "labels": None}])
    with pytest.raises(InvalidArgumentError, match=r"must yield labels where .*; got \['inputs_embeds'\]"):
        report.warm_start([{"inputs_embeds": torch.zeros(1, 2, D)}])
    with pytest.raises(InvalidArgumentError, match="max_tokens must be at least 1"):
        report.warm_start(loader(), max_tokens=0)


def test_evidence_that_contradicts_the_warm_start_moves_the_choice() -> None:
    model, data = mixtral(initializer_range=0.2), loader(batches=6, padded=0)
    swap_gates(model, num_clusters=2).fit(data).warm_start(data)
    gate = dict(swapped_gates(model))["model.layers.1.mlp.gate"]
    with record(model) as trace:
        model(**data[0])
    (_, routing) = trace.routings[1]
    worst = int(routing.expert_indices[:, 0].mode().values)
    for _ in range(40):
        gate.observe(routing, (routing.expert_indices != worst).float())
    assert gate.biased
    with record(model) as trace:
        model(**data[0])
    assert not (trace.routings[1][1].expert_indices == worst).any()


def test_token_outcomes_shift_and_leave_out_what_has_no_label() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator)
    labels = torch.randint(7, (2, 5), generator=generator)
    labels[0, :2] = -100
    for kind in ("top1", "probability"):
        for shift in (True, False):
            outcome = token_outcomes(logits, labels, kind, shift=shift)
            for b in range(2):
                for s in range(5):
                    place = s + shift
                    label = int(labels[b, place]) if place < 5 else -100
                    if label == -100:
                        assert outcome[b, s].isnan()
                        continue
                    row = logits[b, s].double()
                    expected = float(row.argmax() == label) if kind == "top1" else float(row.softmax(0)[label])
                    assert float(outcome[b, s]) == pytest.approx(expected, abs=1e-6)


def test_token_outcomes_refuses_what_does_not_fit() -> None:
    logits = torch.zeros(1, 2, 3)
    with pytest.raises(InvalidArgumentError, match=r"labels must have .* \(1, 2\)"):
        token_outcomes(logits, torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(InvalidArgumentError, match=r"lie in \[0, 3\)"):
        token_outcomes(logits, torch.tensor([[0, 3]]))
    with pytest.raises(InvalidArgumentError, match="kind must be"):
        token_outcomes(logits, torch.tensor([[0, 1]]), "rank")


def test_shared_outcomes_reach_every_layer() -> None:
    model, inputs = mixtral(), batch(padded=3)
    swap_gates(model, num_clusters=4, half_life=None)
    gates = dict(swapped_gates(model))
    fit_on_noise(gates)
    labels = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
    with torch.no_grad(), record(model) as trace:
        logits = model(**inputs).logits
    trace.observe(token_outcomes(logits, labels))
    # 30 tokens, 3 of padding, 3 last ones; two experts each. The token before the first real one has a label but is padding.
    assert {evidence(gate) for gate in gates.values()} == {(30 - 3 - 3) * 2.0}
