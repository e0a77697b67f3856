"""The routing functions against the gates they come from and against plain loops."""

import gc
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from moe_posterior import InvalidArgumentError, MixtureOfExperts, NotFittedError, PosteriorGate, PriorGate, SoftmaxGate
from moe_posterior.gates import Gate
from moe_posterior.serving import CustomRouting, HostRule, PosteriorRouting, PriorRouting, choose, export_routing

D, E, C, K = 6, 7, 3, 2


class EngineRouter:
    """Calls as vLLM 0.33.0's ``CustomRoutingRouter._compute_routing`` does, which stands in for it where vLLM is not installed."""

    def __init__(self, function: Callable, top_k: int, renormalize: bool) -> None:
        self.function, self.top_k, self.renormalize = function, top_k, renormalize

    def __call__(self, hidden_states: Tensor, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.function(
            hidden_states=hidden_states,
            gating_output=router_logits,
            topk=self.top_k,
            renormalize=self.renormalize,
        )
        assert weights.dtype == torch.float32
        assert ids.dtype == torch.int32
        assert weights.shape == ids.shape == (len(hidden_states), self.top_k)
        assert weights.is_contiguous()
        assert ids.is_contiguous()
        return weights, ids


def serve(
    function: Callable, hidden: Tensor, logits: Tensor, top_k: int = K, renormalize: bool = True
) -> tuple[Tensor, Tensor]:
    return EngineRouter(function, top_k, renormalize)(hidden, logits)


def data(num_tokens: int, seed: int = 0, width: int = D) -> Tensor:
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed))


def prior_gate(evidence: bool = True, **options: Any) -> PriorGate:
    gate = PriorGate(D, E, C, K, **options)
    gate.fit(data(60))
    gate.warm_start(data(200, 5), torch.full((200, E), 0.8))
    if evidence:
        believe(gate)
    return gate


def posterior_gate(**options: Any) -> PosteriorGate:
    gate = PosteriorGate(D, E, C, K, **options)
    gate.fit(data(60))
    believe(gate)
    return gate


def believe(gate: Gate, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(C, (400,), generator=generator)
    competence = torch.rand(C, E, generator=generator)
    gate.posterior.observe(ids, torch.bernoulli(competence[ids], generator=generator))


def routing_of(gate: Gate, **options: Any) -> CustomRouting:
    return export_routing(nn.ModuleDict({"gate": gate}), **options)["gate"]


@pytest.mark.parametrize("num_tokens", [0, 1, 63, 100])
@pytest.mark.parametrize("evidence", [False, True])
def test_a_prior_gate_is_served_as_it_chooses(num_tokens: int, evidence: bool) -> None:
    gate, hidden = prior_gate(evidence), data(num_tokens, 1)
    assert gate.biased is evidence
    expected = gate(hidden)
    weights, ids = serve(routing_of(gate), hidden, gate.router(hidden))
    assert torch.equal(ids.long(), expected.expert_indices)
    torch.testing.assert_close(weights, expected.routing_weights)


@pytest.mark.parametrize("num_tokens", [0, 1, 63, 100])
@pytest.mark.parametrize("options", [{}, {"novelty": "class"}, {"lazy": True, "shrinkage": 4.0}, {"score": "quantile"}])
def test_a_posterior_gate_is_served_bit_for_bit_whatever_the_logits(num_tokens: int, options: dict) -> None:
    gate, hidden = posterior_gate(**options), data(num_tokens, 1)
    if num_tokens:
        hidden[0] *= 100  # unlike anything seen
    weights, ids = serve(routing_of(gate), hidden, torch.full((num_tokens, E), torch.nan))
    expected = gate(hidden)
    assert torch.equal(ids.long(), expected.expert_indices)
    assert torch.equal(weights, expected.routing_weights)


def by_hand(logits: Tensor, top_k: int, renormalize: bool, rule: HostRule) -> tuple[list[float], list[int]]:
    """One token, as vLLM's documentation has it: scores, groups, choice, weights, all in float64."""
    values = [float(x) for x in logits]
    if rule.scoring_func == "softmax":
        highest = max(values)
        total = sum(math.exp(x - highest) for x in values)
        scores = [math.exp(x - highest) / total for x in values]
    else:
        scores = [1 / (1 + math.exp(-x)) for x in values]
    correction = rule.e_score_correction_bias
    ranked = [s + float(correction[e]) if correction is not None else s for e, s in enumerate(scores)]
    size = len(values) // rule.num_expert_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(rule.num_expert_group)]
    counted = 1 if correction is None else 2
    merit = [sum(sorted((ranked[e] for e in group), reverse=True)[:counted]) for group in groups]
    best = sorted(range(len(groups)), key=lambda g: (-merit[g], g))[: rule.topk_group]
    allowed = [e for g in best for e in groups[g]]
    ids = sorted(allowed, key=lambda e: (-ranked[e], e))[:top_k]
    weights = [scores[e] for e in ids]
    if renormalize:
        weights = [w / sum(weights) for w in weights]
    return [w * rule.routed_scaling_factor for w in weights], ids


RULES = {
    "softmax": HostRule(),
    "even": HostRule("sigmoid", e_score_correction_bias=torch.zeros(12)),
    "sigmoid": HostRule("sigmoid"),
    "scaled": HostRule(routed_scaling_factor=2.5),
    "grouped": HostRule("softmax", 4, 2),
    "deepseek": HostRule("sigmoid", 4, 2, 2.5, torch.linspace(0.3, -0.3, 12)),
    "corrected": HostRule("sigmoid", e_score_correction_bias=torch.linspace(-0.2, 0.4, 12)),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_evidence_the_choice_is_the_engines_default(name: str, renormalize: bool, dtype: torch.dtype) -> None:
    rule, experts = RULES[name], 12
    gate = PriorGate(D, experts, C, 3, learned=False)
    gate.fit(data(60))
    logits = (2 * data(200, 4, experts)).to(dtype)
    function = PriorRouting(gate, rule, spread=False)
    weights, ids = serve(function, data(200).to(dtype), logits, 3, renormalize)
    for token in range(200):
        by_weight, by_id = by_hand(logits[token], 3, renormalize, rule)
        assert ids[token].tolist() == by_id
        torch.testing.assert_close(weights[token], torch.tensor(by_weight))


@pytest.mark.parametrize("renormalize", [True, False])
def test_softmax_weights_without_evidence_are_those_of_plain_torch_bit_for_bit(renormalize: bool) -> None:
    gate, logits = prior_gate(evidence=False), data(100, 2, E)
    weights, ids = serve(routing_of(gate), data(100), logits, K, renormalize)
    expected, chosen = torch.softmax(logits, dim=-1).topk(K, dim=-1)
    if renormalize:
        expected = expected / expected.sum(dim=-1, keepdim=True)
    assert torch.equal(ids.long(), chosen)
    assert torch.equal(weights, expected)


def test_ties_go_to_the_lowest_expert_as_in_the_engine_or_round_the_circle_as_in_our_gates() -> None:
    gate, hidden, logits = prior_gate(evidence=False), data(50), torch.zeros(50, E)
    clusters = gate.assign(hidden).cluster_ids
    assert clusters.unique().tolist() == [0, 1, 2]
    _, lowest = serve(PriorRouting(gate, HostRule(), spread=False), hidden, logits)
    assert lowest.tolist() == [[0, 1]] * 50
    _, spread = serve(routing_of(gate), hidden, logits)
    assert spread.tolist() == [[c % E, (c + 1) % E] for c in clusters.tolist()]
    nn.init.zeros_(gate.router.weight)
    assert torch.equal(gate(hidden).expert_indices, spread.long())


def test_scores_that_underflow_still_rank_by_their_logits() -> None:
    logits = torch.tensor([[500.0, -300.0, -200.0, -250.0]])
    _, ids = choose(logits, torch.zeros(1, dtype=torch.int64), 3, True, HostRule())
    assert ids.tolist() == [[0, 2, 3]]


@pytest.mark.parametrize("make", [prior_gate, posterior_gate])
def test_broken_rows_get_valid_experts_and_disturb_no_other_row(make: Callable) -> None:
    gate, hidden, logits = make(), data(20), data(20, 2, E)
    function = routing_of(gate)
    weights, ids = serve(function, hidden, logits)
    hidden[3], logits[3] = torch.nan, torch.nan
    hidden[7, 2] = torch.inf
    broken_weights, broken_ids = serve(function, hidden, logits)
    kept = [row for row in range(20) if row not in (3, 7)]
    assert torch.equal(broken_ids[kept], ids[kept])
    assert torch.equal(broken_weights[kept], weights[kept])
    for row in broken_ids.tolist():
        assert len(set(row)) == K
        assert all(0 <= expert < E for expert in row)
    if make is prior_gate:
        assert broken_weights[3].isnan().all()  # as in any softmax router
    expected = gate(hidden).expert_indices if make is posterior_gate else None
    assert expected is None or torch.equal(broken_ids.long(), expected)


def test_low_precision_hidden_states_are_routed_as_by_the_gate() -> None:
    for gate in (prior_gate(), posterior_gate()):
        function = routing_of(gate)
        for dtype in (torch.bfloat16, torch.float16):
            hidden = data(100, 1).to(dtype)
            logits = data(100, 2, E).to(dtype)
            ids = gate.clusterer(hidden).cluster_ids
            _, chosen = serve(function, hidden, logits)
            if isinstance(gate, PosteriorGate):
                assert torch.equal(chosen.long(), gate(hidden).expert_indices)
            else:
                assert torch.equal(
                    chosen, choose(logits.float() + gate.evidence_bias[ids], ids, K, True, HostRule())[1]
                )


def test_casting_a_model_leaves_the_tables_as_they_are() -> None:
    function = routing_of(prior_gate())
    before = {name: table.clone() for name, table in function.state_dict().items()}
    for name, table in nn.ModuleList([function]).to(torch.bfloat16)[0].state_dict().items():
        assert table.dtype == before[name].dtype
        assert torch.equal(table, before[name])


@pytest.mark.parametrize("name", ["softmax", "even", "corrected", "deepseek"])
def test_an_expert_that_was_removed_is_never_chosen(name: str) -> None:
    gate = PriorGate(D, 12, C, 3, learned=False)
    gate.fit(data(60))
    gate.remove_expert(11)  # the one with the highest correction
    gate.remove_expert(0)
    logits = data(300, 2, 12)
    logits[:, [0, 11]] += 50.0
    weights, ids = serve(PriorRouting(gate, RULES[name], spread=False), data(300), logits, 3)
    assert not (ids == 11).any()
    assert not (ids == 0).any()
    assert weights.isfinite().all()
    hopeless = torch.full((5, 12), -400.0)  # all scores are 0, or, by softmax, equal
    _, ids = serve(PriorRouting(gate, RULES[name], spread=False), data(5), hopeless, 3)
    assert not ((ids == 11) | (ids == 0)).any()


def test_a_condemned_expert_loses_its_correction_too() -> None:
    gate = PriorGate(D, 12, C, 3, learned=False)
    gate.fit(data(60))
    gate.posterior.observe(torch.arange(C).repeat(200), torch.zeros(200 * C, 1), torch.full((200 * C, 1), 11))
    correction = torch.zeros(12)
    correction[11] = 2.0  # more than any score
    rule = HostRule("sigmoid", e_score_correction_bias=correction)
    _, ids = serve(PriorRouting(gate, rule, spread=False), data(300), data(300, 2, 12), 3)
    assert not (ids == 11).any()


def test_new_evidence_arrives_only_by_refresh_and_in_the_same_memory() -> None:
    for gate in (prior_gate(), posterior_gate()):
        function, hidden, logits = routing_of(gate), data(100, 1), data(100, 2, E)
        before = serve(function, hidden, logits)
        places = {name: table.data_ptr() for name, table in function.state_dict().items()}
        believe(gate, seed=8)
        gate.clusterer.set_centroids(data(C, 11))
        unchanged = serve(function, hidden, logits)
        assert all(torch.equal(one, other) for one, other in zip(before, unchanged, strict=True))
        function.refresh(gate)
        anew = serve(routing_of(gate), hidden, logits)
        after = serve(function, hidden, logits)
        assert all(torch.equal(one, other) for one, other in zip(anew, after, strict=True))
        assert not torch.equal(after[1], before[1])
        assert {name: table.data_ptr() for name, table in function.state_dict().items()} == places


def test_refresh_refuses_other_gates_and_changes_nothing() -> None:
    function = routing_of(prior_gate())
    before = {name: table.clone() for name, table in function.state_dict().items()}
    wider = PriorGate(D, E, C + 1, K)
    wider.fit(data(60))
    for gate, message in ((wider, "export it again"), (posterior_gate(), "must be a PriorGate")):
        with pytest.raises(InvalidArgumentError, match=message):
            function.refresh(gate)
    assert all(torch.equal(table, before[name]) for name, table in function.state_dict().items())


@pytest.mark.parametrize("make", [prior_gate, posterior_gate])
def test_a_function_pickles_and_keeps_no_part_of_the_model_alive(make: Callable) -> None:
    big = nn.Linear(1000, 1000)
    model = MixtureOfExperts(nn.ModuleList([nn.Linear(D, D) for _ in range(E)]), make())
    model.add_module("ballast", big)
    hidden, logits = data(30), data(30, 2, E)
    function = export_routing(model)["gate"]
    before = serve(function, hidden, logits)
    content = pickle.dumps(function)
    assert len(content) < 20_000
    gone = weakref.ref(model.gate)
    del model, big
    gc.collect()
    assert gone() is None
    for again in (function, pickle.loads(content)):
        assert all(torch.equal(one, other) for one, other in zip(before, serve(again, hidden, logits), strict=True))


@pytest.mark.parametrize("make", [prior_gate, posterior_gate])
def test_a_function_compiles_to_one_graph_and_sees_what_it_is_given_later(make: Callable) -> None:
    gate = make()
    function = routing_of(gate)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    hidden, logits = data(30, 1), data(30, 2, E)
    for _ in range(2):
        for one, other in zip(serve(compiled, hidden, logits), serve(function, hidden, logits), strict=True):
            torch.testing.assert_close(one, other)
        believe(gate, seed=8)
        function.refresh(gate)


@pytest.mark.parametrize("make", [prior_gate, posterior_gate])
def test_a_call_reads_nothing_back_to_the_host(make: Callable) -> None:
    function, hidden, logits = routing_of(make()), data(9).bfloat16(), data(9, 1, E)
    with FakeTensorMode() as mode:  # tensors without content: reading one raises
        for name, table in function.named_buffers():
            setattr(function, name, mode.from_tensor(table))
        weights, _ = function(
            hidden_states=mode.from_tensor(hidden), gating_output=mode.from_tensor(logits), topk=K, renormalize=True
        )
        assert weights.shape == (9, K)
        with pytest.raises(DataDependentOutputException):
            bool(weights.isfinite().all())


def test_no_gradient_is_kept() -> None:
    weights, _ = serve(routing_of(prior_gate()), data(4).requires_grad_(), data(4, 1, E).requires_grad_())
    assert not weights.requires_grad


def test_an_engine_may_scale_the_weights_in_place() -> None:
    for gate in (prior_gate(), posterior_gate()):
        function = routing_of(gate)
        weights, _ = serve(function, data(4), data(4, 1, E))
        kept = weights.clone()
        weights *= 3  # SGLang does
        assert torch.equal(serve(function, data(4), data(4, 1, E))[0], kept)


def test_a_gate_before_its_fit_serves_the_default_and_takes_its_clusters_later() -> None:
    gate, logits = PriorGate(D, E, C, K), data(40, 1, E)
    function = routing_of(gate)
    assert torch.equal(serve(function, data(40), logits)[1].long(), logits.topk(K).indices)
    gate.fit(data(60))
    believe(gate)
    function.refresh(gate)
    hidden = data(100, 1)
    assert torch.equal(serve(function, hidden, gate.router(hidden))[1].long(), gate(hidden).expert_indices)


def test_what_cannot_be_served_is_named() -> None:
    for options in ({"score": "thompson"}, {"exploration": 0.1}, {"novelty": "discount"}):
        with pytest.raises(
            InvalidArgumentError, match="gate 'gate' cannot be served: gate must choose by its tables alone"
        ):
            routing_of(posterior_gate(**options))
    with pytest.raises(InvalidArgumentError, match="must be a PriorGate or PosteriorGate; got SoftmaxGate"):
        routing_of(SoftmaxGate(D, E, K))
    with pytest.raises(NotFittedError):
        routing_of(PosteriorGate(D, E, C, K))
    with pytest.raises(InvalidArgumentError, match="holds none"):
        export_routing(nn.Linear(2, 2))
    for rule, message in (
        (HostRule("sqrtsoftplus"), "scoring_func must be one of"),
        (HostRule(num_expert_group=2), "must divide 7 experts"),
        (HostRule(num_expert_group=7, topk_group=8), "topk_group lie in"),
        (HostRule(e_score_correction_bias=torch.zeros(3)), r"must have shape \(7,\); got \(3,\)"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            routing_of(prior_gate(), rule=rule)


def test_a_call_that_does_not_fit_is_refused() -> None:
    prior, posterior = routing_of(prior_gate()), routing_of(posterior_gate())
    with pytest.raises(InvalidArgumentError, match=r"hidden_states must be \(T, 6\)"):
        serve(prior, data(4, 0, D + 1), data(4, 0, E))
    with pytest.raises(InvalidArgumentError, match=r"gating_output \(T, 7\)"):
        serve(prior, data(4), data(4, 0, E + 1))
    with pytest.raises(InvalidArgumentError, match=r"topk must lie in \[1, 7\]"):
        serve(prior, data(4), data(4, 0, E), E + 1)
    with pytest.raises(InvalidArgumentError, match="topk must be the 2"):
        serve(posterior, data(4), data(4, 0, E), 3)
    with pytest.raises(InvalidArgumentError, match="must be on cpu"):
        serve(prior, data(4).to("meta"), data(4, 0, E).to("meta"))


def test_vllms_own_router_takes_the_function() -> None:
    module = pytest.importorskip("vllm.model_executor.layers.fused_moe.router.custom_routing_router")
    gate, hidden = prior_gate(), data(50, 1)
    router = module.CustomRoutingRouter(
        top_k=K, global_num_experts=E, custom_routing_function=routing_of(gate), renormalize=True
    )
    weights, ids = router._compute_routing(hidden, gate.router(hidden), None)
    assert torch.equal(ids.long(), gate(hidden).expert_indices)
    assert weights.dtype == torch.float32


def test_the_class_of_a_function_follows_its_gate() -> None:
    both = nn.ModuleDict({"a": prior_gate(), "b": posterior_gate()})
    functions = export_routing(both, rule={"a": HostRule("sigmoid")})
    assert [type(function) for function in functions.values()] == [PriorRouting, PosteriorRouting]
    assert functions["a"].rule == HostRule("sigmoid")
    assert "num_clusters=3" in repr(functions["a"])
