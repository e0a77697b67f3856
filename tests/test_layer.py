import pytest
import torch
from oracles import assert_close, mixture
from torch import nn

from moe_posterior import ExpertsFFN, InvalidArgumentError, MixtureOfExperts, NotFittedError, PosteriorMoE, SoftmaxGate
from moe_posterior.dispatch import combine, dispatch

D, E, OUT = 6, 5, 4


def data(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def layer(top_k: int = 2, dtype: torch.dtype = torch.float64) -> PosteriorMoE:
    experts = nn.ModuleList([nn.Sequential(nn.Linear(D, 7), nn.GELU(), nn.Linear(7, OUT)) for _ in range(E)])
    moe = PosteriorMoE(experts, hidden_size=D, num_clusters=7, top_k=top_k)
    moe.gate.fit(data(100, D))
    return moe.to(dtype)


def gradients(moe: nn.Module, hidden: torch.Tensor, output: torch.Tensor) -> list[torch.Tensor]:
    probe = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    inputs = [hidden, *moe.parameters()]
    grads = torch.autograd.grad((output * probe).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 63, 100])
@pytest.mark.parametrize("top_k", [1, 2, E])
def test_outputs_and_every_gradient_match_a_loop_over_tokens(num_tokens, top_k, dtype) -> None:
    moe, hidden = layer(top_k, dtype), data(num_tokens, D, dtype=dtype).requires_grad_()
    routing = moe.route(hidden)
    actual = moe.mix(hidden, routing)
    expected = mixture(list(moe.experts), hidden, routing.expert_indices, routing.routing_weights.to(dtype))
    assert_close(actual, expected)
    if dtype != torch.bfloat16:  # there the order of summation shows
        for one, other in zip(gradients(moe, hidden, actual), gradients(moe, hidden, expected), strict=True):
            assert_close(one, other)


def test_gradients_reach_the_routing_weights_of_a_learned_gate() -> None:
    experts = nn.ModuleList([nn.Linear(D, OUT) for _ in range(E)])
    moe, hidden = MixtureOfExperts(experts, SoftmaxGate(D, E, 2)).double(), data(30, D)
    routing = moe.route(hidden)
    expected = mixture(list(moe.experts), hidden, routing.expert_indices, routing.routing_weights)
    actual = gradients(moe, hidden.requires_grad_(), moe(hidden))
    expected_hidden = data(30, D).requires_grad_()
    routing = moe.route(expected_hidden)
    expected = mixture(list(moe.experts), expected_hidden, routing.expert_indices, routing.routing_weights)
    for one, other in zip(actual, gradients(moe, expected_hidden, expected), strict=True):
        assert_close(one, other)


def test_expert_parameters_get_gradients_and_the_belief_gets_none() -> None:
    moe = layer()
    moe(data(100, D)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in moe.experts.parameters())
    assert not list(moe.gate.parameters())
    assert all(not buffer.requires_grad for buffer in moe.gate.buffers())


def test_experts_without_tokens_get_a_zero_gradient_in_training() -> None:
    moe = layer(top_k=1)
    moe(data(1, D)).sum().backward()
    assert all(p.grad is not None for p in moe.experts.parameters())


@pytest.mark.parametrize("shape", [(D,), (3, D), (2, 3, D), (0, D), (2, 0, D)])
@pytest.mark.parametrize("training", [True, False])
def test_any_leading_dimensions_also_empty_ones(shape: tuple[int, ...], training: bool) -> None:
    moe = layer().train(training)
    assert moe(data(*shape)).shape == (*shape[:-1], OUT)
    assert moe.expert_outputs(data(*shape)).shape == (*shape[:-1], E, OUT)


def test_dispatch_sorts_by_expert_and_keeps_token_order() -> None:
    order, counts = dispatch(torch.tensor([[2, 0], [0, 2], [2, 4]]), num_experts=5)
    assert order.tolist() == [1, 2, 0, 3, 4, 5]
    assert counts.tolist() == [2, 0, 3, 0, 1]


def test_combine_undoes_dispatch() -> None:
    indices = torch.tensor([[2, 0], [0, 2], [2, 4]])
    order, _ = dispatch(indices, num_experts=5)
    rows = order.double()[:, None]  # each pair's output is its own number
    assert combine(rows, order, torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 2.0]])).flatten().tolist() == [0, 3, 14]


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("implementation", ["loop", "grouped_mm"])
@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0, 8], [0, 0, 0], [1, 1, 1]])
def test_built_in_experts_match_each_network_on_its_own(activation, implementation, counts) -> None:
    experts = ExpertsFFN(3, 8, 12, activation=activation, implementation=implementation)
    rows = data(sum(counts), 8, dtype=torch.float32).requires_grad_()
    actual, expected, start = experts(rows, torch.tensor(counts)), [], 0
    for expert, count in enumerate(counts):
        part = rows[start : start + count] @ experts.up[expert]
        if activation == "swiglu":
            part = nn.functional.silu(part[:, :12]) * part[:, 12:]
        else:
            part = nn.functional.gelu(part)
        expected.append(part @ experts.down[expert])
        start += count
    torch.testing.assert_close(actual, torch.cat(expected), rtol=1e-4, atol=1e-5)
    for one, other in zip(gradients(experts, rows, actual), gradients(experts, rows, torch.cat(expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_layer_of_built_in_experts_matches_a_module_list() -> None:
    built_in = ExpertsFFN(E, D, 8)

    class One(nn.Module):
        def __init__(self, expert: int) -> None:
            super().__init__()
            self.expert = expert

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            counts = torch.zeros(E, dtype=torch.int64)
            counts[self.expert] = len(rows)
            return built_in(rows, counts)

    hidden = data(2, 20, D, dtype=torch.float32)
    stacked = PosteriorMoE(built_in, hidden_size=D, num_clusters=7)
    listed = PosteriorMoE(nn.ModuleList([One(e) for e in range(E)]), hidden_size=D, num_clusters=7)
    for moe in (stacked, listed):
        moe.gate.fit(hidden)
    torch.testing.assert_close(stacked(hidden), listed(hidden))
    torch.testing.assert_close(stacked.expert_outputs(hidden), listed.expert_outputs(hidden))


def test_expert_outputs_are_each_experts_own() -> None:
    moe, hidden = layer(), data(3, D)
    outputs = moe.expert_outputs(hidden)
    for e, expert in enumerate(moe.experts):
        assert_close(outputs[:, e], expert(hidden))


def test_observing_a_layer_changes_where_its_tokens_go() -> None:
    moe, hidden = layer(top_k=1), data(50, D)
    best = torch.zeros(50, E)
    best[:, 3] = 1.0
    moe.observe(moe.route(hidden), best)
    assert (moe.route(hidden).expert_indices == 3).all()


def test_a_layer_survives_saving_and_loading_bit_for_bit() -> None:
    moe, other, hidden = layer(), layer(), data(50, D)
    moe.observe(moe.route(hidden), torch.rand(50, E, generator=torch.Generator().manual_seed(1)))
    other.load_state_dict(moe.state_dict())
    assert torch.equal(moe(hidden), other(hidden))


def test_wrong_arguments_are_named() -> None:
    experts = nn.ModuleList([nn.Linear(D, OUT) for _ in range(E)])
    with pytest.raises(InvalidArgumentError, match="gate expects 4 experts; got 5"):
        MixtureOfExperts(experts, SoftmaxGate(D, 4, 2))
    with pytest.raises(InvalidArgumentError, match=r"experts must be of type ModuleList or ExpertsFFN; got list"):
        MixtureOfExperts(list(experts), SoftmaxGate(D, E, 2))
    with pytest.raises(InvalidArgumentError, match=r"top_k must lie in \[1, num_experts=5\]; got 6"):
        PosteriorMoE(experts, hidden_size=D, top_k=6)
    with pytest.raises(NotFittedError):
        PosteriorMoE(experts, hidden_size=D)(data(3, D))
    moe = layer()
    with pytest.raises(InvalidArgumentError, match=r"hidden must have shape \(..., 6\); got \(3, 7\)"):
        moe(data(3, 7))
    with pytest.raises(InvalidArgumentError, match="routing must cover the 3 tokens of hidden; got 4"):
        moe.mix(data(3, D), moe.route(data(4, D)))


class SoftmaxBlock(nn.Module):
    """As people write it: a loop over tokens, tuples returned, odd training behaviour."""

    def __init__(self, normalise: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.router, self.num_experts_per_tok, self.normalise = nn.Linear(D, E, bias=bias), 2, normalise
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(D, 7), nn.Dropout(0.5), nn.Linear(7, OUT)) for _ in range(E)]
        )

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.router(hidden)
        probabilities = logits.softmax(dim=-1)
        weights, indices = probabilities.topk(2, dim=-1)
        if self.normalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        rows = zip(hidden.flatten(0, -2), weights.flatten(0, -2), indices.flatten(0, -2), strict=True)
        outputs = [sum(w * self.experts[int(e)](x) for w, e in zip(ws, es, strict=True)) for x, ws, es in rows]
        return torch.stack(outputs).reshape(*hidden.shape[:-1], OUT), logits


@pytest.mark.parametrize("bias", [True, False])
def test_a_softmax_block_becomes_a_mixture_that_shares_its_parameters_and_outputs(bias: bool) -> None:
    block = SoftmaxBlock(bias=bias).eval()
    block.experts[0].train()
    moe = PosteriorMoE.from_softmax_moe(block, num_clusters=3)
    assert block.experts[0].training
    assert not moe.training
    block.eval()
    hidden = data(2, 20, D, dtype=torch.float32)
    assert_close(moe(hidden), block(hidden)[0])
    assert {id(parameter) for parameter in moe.parameters()} == {id(parameter) for parameter in block.parameters()}
    moe.gate.fit(hidden)
    assert_close(moe(hidden), block(hidden)[0])
    routing = moe.route(hidden)
    for _ in range(50):
        moe.observe(routing, (routing.expert_indices != 2).float())
    assert not (moe.route(hidden).expert_indices == 2).any()
    others = torch.where(torch.arange(E) == 2, -torch.inf, block.router(hidden.reshape(-1, D)))
    assert torch.equal(moe.route(hidden).expert_indices, others.topk(2).indices)


def test_a_block_can_also_be_left_to_the_belief_alone() -> None:
    moe = PosteriorMoE.from_softmax_moe(SoftmaxBlock(), 3, mode="replace", top_k=1, risk_aversion=2.0)
    hidden = data(30, D, dtype=torch.float32)
    moe.gate.fit(hidden)
    assert moe.route(hidden).expert_indices.shape == (30, 1)
    assert moe.gate.risk_aversion == 2.0


def test_a_block_that_does_more_than_softmax_top_k_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="its outputs on random inputs are not"):
        PosteriorMoE.from_softmax_moe(SoftmaxBlock(normalise=False))
    with pytest.raises(InvalidArgumentError, match=r"block must hold an nn.Linear"):
        PosteriorMoE.from_softmax_moe(nn.Linear(2, 2))
    with pytest.raises(InvalidArgumentError, match="meta device"):
        PosteriorMoE.from_softmax_moe(SoftmaxBlock().to("meta"))
    broken = SoftmaxBlock()
    nn.init.constant_(broken.experts[0][0].weight, torch.nan)
    with pytest.raises(InvalidArgumentError, match="it gives NaN or inf"):
        PosteriorMoE.from_softmax_moe(broken)
    block = SoftmaxBlock()
    del block.num_experts_per_tok
    with pytest.raises(InvalidArgumentError, match="top_k must be given"):
        PosteriorMoE.from_softmax_moe(block)
    with pytest.raises(InvalidArgumentError, match="mode must be"):
        PosteriorMoE.from_softmax_moe(block, top_k=2, mode="guess")
