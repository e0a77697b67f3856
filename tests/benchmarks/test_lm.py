"""The language-model experiment in miniature: parts of the text, damages, the swap, resuming, and its arithmetic."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from moe_posterior.benchmarks.cli import benchmark
from moe_posterior.benchmarks.lm import models
from moe_posterior.benchmarks.lm.damage import Damage, damaged, every_damage, masked, router, usage_of, victims
from moe_posterior.benchmarks.lm.data import PARTS, WINDOW, Corpus
from moe_posterior.benchmarks.lm.experiment import BASE, GRADIENT, HEALTHY, Experiment, run
from moe_posterior.benchmarks.lm.models import Recipe, build, evaluate, train
from moe_posterior.benchmarks.lm.shares import CHECKPOINTS, recovered_share
from moe_posterior.benchmarks.lm.stream import Method, Plan, Service
from moe_posterior.benchmarks.lm.tables import Measured, tables_of
from moe_posterior.benchmarks.records import Record, Results, write
from moe_posterior.errors import InvalidArgumentError, MissingDataError

TINY = Recipe(hidden_size=16, intermediate_size=16, experts=4, heads=2, steps=6, warmup=2, batch_size=2)
SHORT = Plan(fit=2048, warm=2048, healthy=512, broken=512, repaired=512, batch=256, evaluated=512)
KNOBS = {"num_clusters": 4}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> list[str]:
    generator = torch.Generator().manual_seed(1)
    words = [bytes(torch.randint(97, 123, (n,), generator=generator).tolist()) for n in (3, 4, 5, 6, 7) * 4]
    folder = tmp_path_factory.mktemp("text")
    paths = []
    for number in range(2):
        drawn = torch.randint(len(words), (8_000,), generator=generator).tolist()
        path = folder / f"{number}.txt"
        path.write_bytes(b" ".join(words[index] for index in drawn))
        paths.append(str(path))
    return paths


@pytest.fixture(scope="module")
def corpus(text) -> Corpus:
    return Corpus(text)


@pytest.fixture
def model():
    return build(TINY, seed=0)


@pytest.fixture
def tokens(corpus):
    return corpus.windows("evaluate")[:4]


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_parts_cover_every_file_once_and_hold_a_share_of_each(corpus, text) -> None:
    alone = [Corpus([path]) for path in text]
    for path, own in zip(text, alone, strict=True):
        assert b"".join(own.parts[name] for name in PARTS) == Path(path).read_bytes()
        assert len(own.parts["train"]) == round(0.74 * Path(path).stat().st_size)
    for name in PARTS:
        assert corpus.parts[name] == alone[0].parts[name] + alone[1].parts[name]


def test_windows_do_not_overlap_and_a_shuffle_holds_the_same_ones(corpus) -> None:
    cut = corpus.windows("stream")
    assert bytes(cut.flatten().tolist()) == corpus.parts["stream"][: cut.numel()]
    shuffled = corpus.windows("stream", torch.Generator().manual_seed(3))
    assert sorted(map(tuple, shuffled.tolist())) == sorted(map(tuple, cut.tolist()))
    assert not torch.equal(shuffled, cut)


def test_absent_empty_and_short_texts_are_refused(tmp_path) -> None:
    with pytest.raises(MissingDataError, match="no-such"):
        Corpus([tmp_path / "no-such.txt"])
    with pytest.raises(InvalidArgumentError, match="at least one file"):
        Corpus([])
    short = tmp_path / "short.txt"
    short.write_bytes(b"x" * WINDOW)
    with pytest.raises(InvalidArgumentError, match="in every part"):
        Corpus([short])


def test_evaluation_equals_a_plain_loop(model, tokens) -> None:
    found = evaluate(model, tokens)
    total, right, count = 0.0, 0, 0
    with torch.no_grad():
        for row in tokens:
            logits = model(input_ids=row[None]).logits[0].double()
            for position in range(WINDOW - 1):
                exponents = [math.exp(value) for value in logits[position].tolist()]
                target = int(row[position + 1])
                total -= math.log(exponents[target] / sum(exponents))
                right += max(range(256), key=exponents.__getitem__) == target
                count += 1
    assert found.loss == pytest.approx(total / count, rel=1e-5)
    assert found.accuracy == pytest.approx(right / count)
    assert 0 <= found.ece <= 1


def test_an_interrupted_training_ends_with_the_bits_of_an_uninterrupted_one(corpus, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(models, "KEEP_EVERY", 2)
    straight = build(TINY, 0)
    expected = train(straight, corpus, TINY, 0, tmp_path / "straight.pt")

    def killed(model, batch, step):
        if step == 5:
            raise KeyboardInterrupt
        return models.backward(model, batch, step)

    with pytest.raises(KeyboardInterrupt):
        train(build(TINY, 0), corpus, TINY, 0, tmp_path / "killed.pt", backward=killed)
    steps = []

    def counted(model, batch, step):
        steps.append(step)
        return models.backward(model, batch, step)

    resumed = build(TINY, 0)
    progress = train(resumed, corpus, TINY, 0, tmp_path / "killed.pt", backward=counted)
    assert steps == [4, 5]  # from the last checkpoint, not from the start
    assert same(weights_of(resumed), weights_of(straight))
    assert progress == expected
    assert not list(tmp_path.glob(".*"))


def test_a_checkpoint_of_another_run_is_refused(corpus, tmp_path) -> None:
    train(build(TINY, 0), corpus, TINY, 0, tmp_path / "base.pt")
    with pytest.raises(InvalidArgumentError, match="learning_rate, seed"):
        train(build(TINY, 1), corpus, replace(TINY, learning_rate=0.5), 1, tmp_path / "base.pt")


@pytest.mark.parametrize("damage", every_damage(2), ids=lambda damage: damage.name)
def test_a_damage_touches_its_experts_alone_and_goes_bit_for_bit(model, tokens, damage) -> None:
    before, logits = weights_of(model), model(input_ids=tokens).logits
    touched = victims(damage, [torch.tensor([0.1, 0.2, 0.4, 0.3])] * 2)
    with damaged(model, damage, touched, seed=5):
        inside = weights_of(model)
        assert not torch.equal(model(input_ids=tokens).logits, logits)
    changed = {
        (int(name.split(".")[2]), expert)
        for name, value in inside.items()
        if ".experts." in name
        for expert in range(4)
        if not torch.equal(value[expert], before[name][expert])
    }
    assert changed == {(layer, expert) for layer in damage.layers for expert in touched[layer]}
    assert {len(experts) for experts in touched.values()} == {2 if damage.kind == "exchanged" else 1}
    assert all(torch.equal(inside[name], before[name]) for name in before if ".experts." not in name)
    assert same(weights_of(model), before)


def test_a_damage_is_undone_even_when_its_block_fails(model) -> None:
    before = weights_of(model)
    with pytest.raises(RuntimeError), damaged(model, Damage("noise", (0,)), {0: [1]}, seed=0):
        raise RuntimeError
    assert same(weights_of(model), before)


def test_masking_re_ranks_the_other_experts_by_the_models_own_rule(model, tokens) -> None:
    seen = []
    handle = router(model, 1).register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=tokens)
    handle.remove()
    with masked(model, {1: [2]}), torch.no_grad():
        handle = router(model, 1).register_forward_hook(lambda module, inputs, output: seen.append(output))
        model(input_ids=tokens)
        handle.remove()
    (logits, _, _), (same_logits, weights, indices) = seen
    assert torch.equal(logits, same_logits)
    for row in range(0, len(logits), 37):
        others = sorted((e for e in range(4) if e != 2), key=lambda e: -float(logits[row, e]))[:2]
        exponents = [math.exp(float(logits[row, e])) for e in others]
        assert indices[row].tolist() == others
        assert weights[row].tolist() == pytest.approx([e / sum(exponents) for e in exponents], rel=1e-5)
    with masked(model, {0: [1], 1: [2, 3]}):
        usage = usage_of(model, tokens)
    assert usage[0][1] == 0
    assert usage[1][2:].sum() == 0
    assert float(usage[1].sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("signal", ["gradient", "top1", "probability"])
def test_swapping_changes_no_bit_and_evidence_reaches_the_gates(model, corpus, signal) -> None:
    service = Service(model, Method("m", signal, KNOBS), SHORT, corpus, seed=0)
    assert service.swapped == service.before
    assert service.before.loss == evaluate(build(TINY, 0), service.measured).loss
    moment = service.moment()
    service.serve(512)
    observed = [float((gate.posterior.successes + gate.posterior.failures).sum()) for gate in service.gates.values()]
    assert len(observed) == 2
    assert all(count > 0 for count in observed)
    served = service.moment()
    service.go_back(moment)
    assert all(float(gate.posterior.failures.sum()) == 0 for gate in service.gates.values())
    service.serve(512)  # the same text again leads to the same belief
    again = service.moment()
    assert again.position == served.position
    for name, belief in served.belief.items():
        assert same(belief, again.belief[name])


def tiny_experiment(text, folder, found, **changes) -> Experiment:
    return Experiment(text, folder, [0], ("damage",), TINY, plan=SHORT, report=found.extend, **changes)


def test_an_interrupted_experiment_goes_on_and_ends_with_the_same_records(text, tmp_path, monkeypatch) -> None:
    from moe_posterior.benchmarks.lm import experiment

    methods = (Method(GRADIENT.name, knobs=KNOBS, repairs=True),)
    monkeypatch.setattr(experiment, "METHODS", methods)
    straight: list[Record] = []
    run(tiny_experiment(text, tmp_path / "runs", straight), set())
    environments = [record.environment for record in straight if record.gate == GRADIENT.name]
    assert set(environments) == {HEALTHY, *(damage.name for damage in every_damage(2))}

    original, found = experiment.after_damage, []

    def killed(service, damage):
        if damage.name == "zeroed, layer 1":
            raise KeyboardInterrupt
        return original(service, damage)

    monkeypatch.setattr(experiment, "after_damage", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_experiment(text, tmp_path / "runs", found), set())
    kept = len(found)
    played = []
    monkeypatch.setattr(experiment, "after_damage", lambda s, d: played.append(d.name) or original(s, d))
    run(tiny_experiment(text, tmp_path / "runs", found), {record.case for record in found})
    assert 0 < kept < len(found)
    assert played == [damage.name for damage in every_damage(2)][4:]
    assert sorted(map(repr, found)) == sorted(map(repr, straight))
    run(tiny_experiment(text, tmp_path / "runs", []), {record.case for record in found})
    assert len(played) == 5  # nothing was left to run


def hand_made() -> list[Record]:
    records = []

    def add(environment, gate, seed, **metrics):
        records.extend(Record("lm", environment, gate, {}, seed, name, value) for name, value in metrics.items())

    add("noise, layer 0", BASE, 0, frozen_loss=2.0, masked_loss=1.8)
    add("noise, layer 0", BASE, 1, frozen_loss=2.0, masked_loss=1.99)  # too little to recover
    add("zeroed, layer 0", BASE, 0, frozen_loss=3.0, masked_loss=2.0)
    for seed in (0, 1):
        add("noise, layer 0", GRADIENT.name, seed, curve_loss=[2.0, 1.95, 1.9, 1.9, 1.85, 1.8, 1.7])
    add("zeroed, layer 0", GRADIENT.name, 0, curve_loss=[3.0, 3.1, 3.0, 2.5, 2.0, 2.0, 2.0])
    add(HEALTHY, GRADIENT.name, 0, before_loss=2.0, swapped_loss=2.0, after_loss=2.002, before_ece=0.1, after_ece=0.2)
    return records


def test_shares_of_hand_made_losses() -> None:
    assert recovered_share(frozen=3.0, masked=2.0, now=3.5) == -0.5
    with pytest.raises(InvalidArgumentError, match="below frozen"):
        recovered_share(frozen=2.0, masked=2.0, now=1.9)
    measured = Measured(hand_made())
    assert measured.shares("noise, layer 0", GRADIENT.name, 20_480) == {0: pytest.approx(1.5)}
    assert measured.mean_shares(GRADIENT.name, 512) == {0: pytest.approx((0.25 - 0.1) / 2)}
    assert measured.mean_shares(GRADIENT.name, 5120) == {0: pytest.approx((0.75 + 1.0) / 2)}
    assert measured.pooled_shares(GRADIENT.name, 5120) == {0: pytest.approx((0.15 + 1.0) / 1.2)}
    assert measured.healthy_change(GRADIENT.name) == {0: pytest.approx(0.001)}
    assert CHECKPOINTS[4] == 5120


def test_of_two_exchanged_experts_the_best_masking_is_the_measure() -> None:
    losses = {"frozen_loss": 3.0, "masked_loss": 2.9, "masked first alone_loss": 3.2, "masked second alone_loss": 2.5}
    records = [Record("lm", "exchanged, layer 0", BASE, {}, 0, name, value) for name, value in losses.items()]
    records.append(Record("lm", "exchanged, layer 0", GRADIENT.name, {}, 0, "curve_loss", [3.0] * 6 + [2.75]))
    measured = Measured(records)
    assert measured.recoverable("exchanged, layer 0") == {0: 0.5}
    assert measured.shares("exchanged, layer 0", GRADIENT.name, 20_480) == {0: 0.5}


def test_the_command_renders_a_file_with_its_own_command_beside_it(tmp_path, capsys) -> None:
    source, markdown = tmp_path / "lm.json", tmp_path / "lm.md"
    write(Results(hand_made(), {"command": "moe-posterior benchmark lm --text a.txt"}), source)
    figures = tmp_path / "figures"
    assert benchmark(["lm", "--from", str(source), "--markdown", str(markdown), "--figures", str(figures)]) == 0
    text = markdown.read_text()
    assert "| gradient | 2.000 | 2.000 | yes | 2.002 | +0.100 | 0.100 | 0.200 |" in text
    assert (
        "| gradient | 0.075 | 0.250 | 0.500 | 0.875 | 1.000 | 1.000 | 0.958 | 1.083 |" in text
    )  # a share of 1.5 counts as 1
    assert "moe-posterior benchmark lm --text a.txt" in text
    assert "moe-posterior benchmark lm --text a.txt" in capsys.readouterr().out
    assert [path.name for path in figures.iterdir()] == ["lm-recovery.png"]
    assert [table.title for table in tables_of([])] == []


def test_the_command_says_what_is_wrong(tmp_path) -> None:
    with pytest.raises(InvalidArgumentError, match="--text must name"):
        benchmark(["lm"])
    with pytest.raises(InvalidArgumentError, match="--scratch-steps must be at least 1"):
        benchmark(["lm", "--text", "x", "--scratch-steps", "0"])
    with pytest.raises(MissingDataError, match="absent"):
        benchmark(["lm", "--text", str(tmp_path / "absent.txt"), "--quiet"])
