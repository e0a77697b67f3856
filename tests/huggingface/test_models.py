"""The promises of the swap on tiny models of every mixture-of-experts type; a representative few in every run."""

import json
from pathlib import Path

import pytest
import torch
from model_survey import checks, probe
from model_survey.survey import as_markdown, examine, main
from model_survey.tiny import moe_model_types, tiny_batch, tiny_model

from moe_posterior import record
from moe_posterior.huggingface import decision, swap_gates, swapped_gates
from moe_posterior.huggingface.adapters import Adapter
from moe_posterior.huggingface.find import find_routers
from moe_posterior.huggingface.logits_bias import LogitsInterceptor

REPRESENTATIVE = (
    "mixtral",
    "qwen3_moe",
    "olmoe",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "switch_transformers",
    "llama4_text",
)
REFUSED = {
    "nllb-moe": "not the ones that the router names",
    "doge": "product keys",
    "vitpose_backbone": "no choice",
}
RECORDED = json.loads((Path(__file__).resolve().parents[2] / "results" / "swap" / "models.json").read_text())["types"]


@pytest.mark.parametrize("name", checks.CHECKS)
@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_representative_models_keep_what_the_swap_promises(model_type: str, name: str) -> None:
    assert checks.CHECKS[name](tiny_model(model_type)) is True


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [row["model_type"] for row in RECORDED])
def test_every_model_type_is_swapped_or_refused_for_a_reason_and_none_fails(model_type: str) -> None:
    row = examine(model_type)
    if model_type in REFUSED:
        assert row["status"] == "refused"
        assert REFUSED[model_type] in row["reason"]
        return
    assert row["status"] in ("swapped", "special"), row
    assert row["checks"]["identical"]
    assert row["checks"]["evidence"]


def test_the_checks_notice_evidence_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LogitsInterceptor.__init__
    monkeypatch.setattr(
        LogitsInterceptor, "__init__", lambda self, n, width, bias, _: plain(self, n, width, None, None)
    )
    assert not checks.check_evidence(tiny_model("mixtral"))


def test_the_checks_notice_padding_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision, "real_tokens", lambda mask, num_tokens: None)
    assert not checks.check_padding(tiny_model("mixtral"))


def test_the_checks_notice_a_gate_that_changes_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    write = Adapter.write
    monkeypatch.setattr(
        Adapter,
        "write",
        lambda self, router, output, indices, weights: write(self, router, output, indices, weights * 1.01),
    )
    assert not checks.check_identical(tiny_model("mixtral"))
    assert not checks.check_gradients(tiny_model("mixtral"))


def test_the_checks_notice_experts_that_are_not_those_the_router_names(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral")
    experts = type(model.model.layers[0].mlp.experts)
    plain = experts.forward
    monkeypatch.setattr(
        experts, "forward", lambda self, hidden, indices, weights: plain(self, hidden, indices % 2, weights)
    )
    assert not checks.check_experts(model)


def test_the_survey_reports_what_breaks_instead_of_breaking(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["vitpose_backbone", "--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")]) == 0
    assert "there is no choice to change" in capsys.readouterr().out
    assert r"| vitpose\_backbone | VitPoseBackboneMoeMLP | refused |" in (tmp_path / "a.md").read_text()
    row = json.loads((tmp_path / "a.json").read_text())["types"][0]
    broken = {**row, "status": "failed", "checks": dict.fromkeys(checks.CHECKS, False)}
    assert "1 refused, 1 failed" in as_markdown([row, broken], "0")


def test_the_recorded_survey_reaches_sixty_types_and_none_failed() -> None:
    assert sum(row["status"] in ("swapped", "special") for row in RECORDED) >= 60
    assert not [row["model_type"] for row in RECORDED if row["status"] == "failed"]
    assert {row["model_type"] for row in RECORDED if row["status"] == "refused"} == set(REFUSED)


@pytest.mark.slow
def test_the_recorded_survey_names_every_type_that_holds_a_mixture() -> None:
    recorded = {row["model_type"] for row in RECORDED}
    assert recorded <= set(moe_model_types())
    for model_type in set(moe_model_types()) - recorded:
        assert not find_routers(tiny_model(model_type)), model_type


def test_a_layer_that_cannot_be_swapped_is_left_alone_beside_those_that_can() -> None:
    model = tiny_model("deepseek_v4")
    with pytest.warns(UserWarning, match="fixed function of the token's id"):
        report = swap_gates(model)
    assert [(layer.router, layer.status) for layer in report.layers] == [
        ("DeepseekV4HashRouter", "refused"),
        ("DeepseekV4TopKRouter", "swapped"),
    ]
    assert len(list(swapped_gates(model))) == 1


@pytest.mark.parametrize("model_type", ["deepseek_v3", "minimax_m2", "ernie4_5_moe", "zaya"])
def test_a_load_balancing_advantage_does_not_keep_a_condemned_expert_in_the_choice(model_type: str) -> None:
    model = tiny_model(model_type)
    batch = tiny_batch(model)
    corrections = [
        tensor
        for name, tensor in (*model.named_buffers(), *model.named_parameters())
        if name.endswith(("correction_bias", "balancing_biases"))
    ]
    assert corrections
    for tensor in corrections:
        tensor.data[..., 5] = 4.0  # far more than scores in (0, 1) can make up for
    swap_gates(model, num_clusters=2)
    for _, gate in swapped_gates(model):
        gate.fit(torch.randn(50, gate.hidden_size, generator=torch.Generator().manual_seed(0)))
    assert all(bool((indices == 5).any()) for indices in probe.choices(model, batch).values())
    for _, gate in swapped_gates(model):
        probe.condemn(gate, 5)
    assert not any(bool((indices == 5).any()) for indices in probe.choices(model, batch).values())


def test_experts_over_capacity_are_not_observed() -> None:
    model = tiny_model("switch_transformers")
    for module in model.modules():
        if hasattr(module, "expert_capacity"):
            module.expert_capacity = 1
    swap_gates(model, num_clusters=2, half_life=None)
    for _, gate in swapped_gates(model):
        gate.fit(torch.randn(50, gate.hidden_size, generator=torch.Generator().manual_seed(0)))
    with record(model) as trace:
        model(**tiny_batch(model))
    expected = {name: float((routing.routing_weights != 0).sum()) for name, routing in trace.routings}
    assert all(0 < count < 16 for count in expected.values())
    trace.observe(torch.ones(16))
    for name, gate in swapped_gates(model):
        assert probe.evidence(gate) == expected[f"{name}.posterior_gate"]


def test_a_decoders_tokens_are_not_taken_for_the_encoders_padding() -> None:
    model = tiny_model("switch_transformers")
    swap_gates(model, num_clusters=2)
    batch = tiny_batch(model, padded=3)
    del batch["decoder_attention_mask"]
    with torch.no_grad(), record(model) as trace:
        model(**batch)
    real = {name: int(torch.isfinite(routing.distance).sum()) for name, routing in trace.routings}
    assert {count for name, count in real.items() if "encoder" in name} == {16 - 3}
    assert {count for name, count in real.items() if "decoder" in name} == {16}


def test_no_type_of_the_recorded_survey_failed() -> None:
    assert RECORDED
    assert all(row["status"] != "failed" for row in RECORDED)
